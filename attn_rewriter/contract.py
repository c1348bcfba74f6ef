"""What "the same" means, in numbers: fused attention may be off by half as much again as eager code is.

Errors are root mean squares over parts of a tensor, some rows each, a row being what lies along the last dimension: the
late rows of causal attention average many values and are small beside the first ones, and what is lost there would not
be seen in the whole. (The largest difference depends too much on luck where there are few elements; a single wrong row
still stands out in a part, where the error is a rounding error everywhere else.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FACTOR = 1.5
ROWS = 128
"""How many rows a part has at least, if a tensor has them."""


class Comparison(NamedTuple):
    """A result's error, that of eager code, and what is allowed."""

    error: float
    eager: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed  # which no number is not


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The root mean square of the difference."""
    return _off(result, truth).square().mean().sqrt().item()


def rounding_unit(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The spacing of numbers of type `dtype` at the largest magnitude of each row of `truth`, as the root mean square
    over its rows."""
    return _units(truth, dtype).square().mean().sqrt().item()


def measured(result: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """What `worst` judges, `[3, parts]`: the mean squares of the errors of a result and of eager code, and of rounding
    units, over each part; `truth` is in float64. Those of several draws of the inputs are averaged."""
    if not truth.numel():
        return truth.new_zeros(3, 1)
    rows = [_rows(_off(x, truth)).square().mean(-1) for x in (result, eager)]
    rows.append(_units(truth, eager.dtype, result.device).square())
    parts = max(1, len(rows[0]) // ROWS)
    return torch.stack([torch.stack([part.mean() for part in x.to(result.device).tensor_split(parts)]) for x in rows])


def worst(squares: torch.Tensor) -> Comparison:
    """The part that is the nearest to what it is allowed, or the furthest beyond."""
    errors, eager, units = squares.sqrt()
    allowed = FACTOR * eager + units
    i = (errors / allowed.clamp(min=torch.finfo(allowed.dtype).tiny)).nan_to_num(torch.inf).argmax()
    return Comparison(errors[i].item(), eager[i].item(), allowed[i].item())


def _off(result: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return result.detach().double() - truth.detach().to(result.device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)


def _units(truth: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    # Fused kernels for CUDA multiply float32 by tensor cores, each number as two of TF32, which are 22 bits together
    # (memory-efficient attention: `OpMultiplyAddFastF32` in PyTorch's `gemm_kernel_utils.h`).
    split = device is not None and device.type == "cuda" and dtype == torch.float32
    return (2.0**-21 if split else torch.finfo(dtype).eps) * _rows(truth.detach().abs()).amax(-1)
