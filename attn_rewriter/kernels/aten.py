"""PyTorch's own fused attention, one backend by name: what `sdpa` leaves to PyTorch to choose, and passes that can be
mixed with those of the flash-attention packages.

The operators are those that `scaled_dot_product_attention` calls itself (`native_functions.yaml`), where its own checks
(`sdp_utils.cpp`) pass; these checks are declared here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.flash import Flash, How, Kept, flash_form
from attn_rewriter.kernels.sdpa import varies_in_training
from attn_rewriter.spec import AttentionSpec, Shapes, same

aten = torch.ops.aten


class Aten(Flash):
    """Scores that are but scaled: all of them, or causal with as many queries as keys. GQA."""

    distribution = module = "torch"
    at_least = "2.11"

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        form = flash_form(spec, shapes)
        if not isinstance(form, str):
            if form.softcap:
                reasons.append("computes no softcap")
            if (form.left, form.right) not in ((None, None), (None, 0)):
                reasons.append(f"takes no window: {spec.keep}")
            elif form.right == 0 and not same(shapes.q_len, shapes.kv_len):  # it aligns the first ones
                reasons.append("is causal only where there are as many queries as keys")
        if 0 in (shapes.batch, shapes.q_len, shapes.kv_len):
            reasons.append("takes no empty tensors")
        if not reasons and (absent := self.unavailable()):
            reasons.append(absent)
        return reasons

    @staticmethod
    def unavailable() -> str | None:
        """Why this PyTorch can't run it, or was told not to; None if it can."""
        raise NotImplementedError


class CuDNN(Aten):
    """cuDNN's attention."""

    name = "cudnn"

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        if isinstance(shapes.head_dim, int) and shapes.head_dim > 128 and device.capability != (9, 0):
            reasons.append(f"head_dim is at most 128 on {device}, here {shapes.head_dim}")
        if same(shapes.q_len, 1) or same(shapes.kv_len, 1):  # on sm_100 wrong for one query, says PyTorch
            reasons.append("takes more than one query and key")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return "is not deterministic"  # so says PyTorch, and does not take it then, in no pass

    @staticmethod
    def unavailable() -> str | None:
        if not torch.backends.cudnn.is_available():
            return "this PyTorch has no cuDNN"
        if (torch.backends.cudnn.version() or 0) < 91000:
            return f"needs cuDNN 9.10 or newer, this is {torch.backends.cudnn.version()}"
        if not torch.backends.cuda.cudnn_sdp_enabled():
            return "was switched off by torch.backends.cuda.enable_cudnn_sdp"
        if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
            return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE gives its logsumexp another layout"
        return None

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        output, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
            *_heads_first(query, key, value), None, True, 0.0, how.causal, False, scale=how.scale
        )
        return output.transpose(1, 2), logsumexp.squeeze(-1), None

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        """PyTorch keeps one plan for each shape and strides of query, key and value, whatever those of the output and
        its gradient are (`MHAParams` in `MHA.cpp`; seen in 2.11 with cuDNN 9.19): another layout of these gives wrong
        gradients without a word. So they always have the ones that they have at sites of `sdpa`: the output lies as the
        query, its gradient with positions before heads."""
        query, key, value = _heads_first(*kept[:3])
        found = aten._scaled_dot_product_cudnn_attention_backward(
            gradient.contiguous().transpose(1, 2),
            query,
            key,
            value,
            _laid_out_for(query, kept.output.transpose(1, 2)),
            kept.logsumexp.unsqueeze(-1),
            kept.random,  # the seed and offset of a dropout: not read, but converted on sm_100
            kept.random,
            *[None] * 3,  # bias, lengths
            query.size(-2),
            key.size(-2),
            0.0,
            how.causal,
            scale=how.scale,
        )
        return _positions_first(found)


class TorchFlash(Aten):
    """The flash-attention 2 that PyTorch brings along."""

    name = "flash"

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        small = device.capability is not None and device.capability in ((8, 6), (8, 9), (12, 0), (12, 1))
        if small and shapes.needs_backward and isinstance(shapes.head_dim, int) and shapes.head_dim > 192:
            reasons.append(f"has a backward pass up to head_dim 192 on {device}, here {shapes.head_dim}")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return varies_in_training(device) if shapes.needs_backward else ""

    @staticmethod
    def unavailable() -> str | None:
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch has no flash attention"
        if not torch.backends.cuda.flash_sdp_enabled():
            return "was switched off by torch.backends.cuda.enable_flash_sdp"
        return None

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        output, logsumexp, *_ = aten._scaled_dot_product_flash_attention(
            *_heads_first(query, key, value), 0.0, how.causal, False, scale=how.scale
        )
        return output.transpose(1, 2), logsumexp, None

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        query, key, value = _heads_first(*kept[:3])
        state = query.new_empty(2, dtype=torch.uint64)  # not read without dropout, but its type is checked
        found = aten._scaled_dot_product_flash_attention_backward(
            gradient.transpose(1, 2),
            query,
            key,
            value,
            kept.output.transpose(1, 2),
            kept.logsumexp,
            *[None] * 2,  # lengths
            query.size(-2),
            key.size(-2),
            0.0,
            how.causal,
            state,
            state,
            scale=how.scale,
        )
        return _positions_first(found)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As ATen takes them; their last dimension has no gaps."""
    return tuple((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors)


def _positions_first(found: Any) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in found)


def _laid_out_for(query: Tensor, output: Tensor) -> Tensor:
    """The output in memory as PyTorch would have made it for this query."""
    wanted = torch.empty_like(query, device="meta").stride()
    if all(n == 1 or a == b for n, a, b in zip(query.shape, output.stride(), wanted)):
        return output
    return torch.empty_like(query).copy_(output)
