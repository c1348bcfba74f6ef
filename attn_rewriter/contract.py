"""What "the same" means, in numbers: fused attention may be off by half as much again as eager code is."""

from __future__ import annotations

import torch

FACTOR = 1.5


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The root mean square of the difference. (The largest one depends too much on luck where there are few
    elements; a single wrong element still stands out against an error that is a rounding error everywhere.)"""
    return (result.detach().double() - truth.detach().to(result.device)).square().mean().sqrt().item()


def rounding_unit(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The spacing of numbers of type `dtype` at the largest magnitude of `truth`."""
    return torch.finfo(dtype).eps * truth.detach().abs().max().item()


def budget(eager: torch.Tensor, truth: torch.Tensor) -> float:
    """How far from the truth, in float64, a result may be that eager code computes as `eager`."""
    return FACTOR * error(eager, truth) + rounding_unit(truth, eager.dtype)
