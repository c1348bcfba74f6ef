"""flash-attention 2 (https://arxiv.org/abs/2307.08691, https://github.com/Dao-AILab/flash-attention)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.flash import Flash, How, Kept
from attn_rewriter.spec import AttentionSpec, Shapes, Softcap


class FA2(Flash):
    """Causal, windows, softcap, dropout and GQA, from Ampere on."""

    name = "fa2"
    distribution = "flash-attn"
    module = "flash_attn.flash_attn_interface"
    at_least = "2.7"  # its functions have had these arguments since; 2.0 aligned causal with the first query and key
    has_dropout = True
    limits = replace(Flash.limits, platforms=frozenset({"cuda", "rocm"}))

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        if spec.dropout_p and any(isinstance(modifier, Softcap) for modifier in spec.modifiers):
            reasons.append("has no dropout with a softcap")
        return reasons

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        output, logsumexp, _, random = _flash_attn_forward(
            query, key, value, how.dropout_p, how.scale, how.causal, *how.window, how.softcap, None, False
        )
        return output, logsumexp, random

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        found = tuple(x.new_empty(x.shape) for x in kept[:3])
        numbers = how.dropout_p, how.scale, how.causal, *how.window, how.softcap
        deterministic = torch.are_deterministic_algorithms_enabled()
        _flash_attn_backward(gradient, *kept[:5], *found, *numbers, None, deterministic, kept.random)
        return found
