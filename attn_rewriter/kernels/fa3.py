"""flash-attention 3 for Hopper (https://arxiv.org/abs/2407.08608).

Written against the published signatures of its `flash_attn_interface`, an older and a newer one, and tested with
stand-ins of that module: there is no package of it in the registries, and it was never run here.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.flash import Flash, How, Kept
from attn_rewriter.spec import AttentionSpec, Shapes


class FA3(Flash):
    """Causal, windows, softcap and GQA, on Hopper alone."""

    name = "fa3"
    distribution = "flash-attn-3"
    module = "flash_attn_interface"
    at_least = "3.0.0b1"
    limits = replace(Flash.limits, min_capability=(9, 0))

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        if device.platform == "cuda" and (device.capability or (0, 0)) >= (10, 0):
            reasons.insert(0, f"is for sm_90, this is {device}")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        """Its backward pass takes a flag for it, which some of its builds drop, and none take for 256 features
        (https://github.com/Dao-AILab/flash-attention/pull/1766); its version does not tell them apart."""
        return "may have a backward pass that varies" if shapes.needs_backward else ""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        from flash_attn_interface import _flash_attn_forward

        # No new keys, output, lengths, pages, rotary embedding nor scales of fp8: 20 arguments that have no default.
        output, logsumexp, *_ = _flash_attn_forward(
            query,
            key,
            value,
            *[None] * 20,
            how.scale,
            how.causal,
            softcap=how.softcap,
            **_window(_flash_attn_forward, how),
        )
        return output, logsumexp, None

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        from flash_attn_interface import _flash_attn_backward

        found = tuple(x.new_empty(x.shape) for x in kept[:3])
        _flash_attn_backward(
            gradient,
            *kept[:5],
            *[None] * 6,  # lengths
            *found,
            how.scale,
            how.causal,
            softcap=how.softcap,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_window(_flash_attn_backward, how),
        )
        return found


def _window(function: Any, how: How) -> dict[str, Any]:
    """The window as a function takes it: a pair, or in its newer form, which is a custom operator, two numbers."""
    if "window_size" in inspect.signature(getattr(function, "_init_fn", function)).parameters:
        return {"window_size": how.window}
    return {"window_size_left": how.left, "window_size_right": how.right}
