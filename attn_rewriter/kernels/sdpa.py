"""`torch.nn.functional.scaled_dot_product_attention`, on every device that PyTorch has.

PyTorch then takes cuDNN, flash, memory-efficient or plain attention by its own rules
(https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from attn_rewriter.context_parallel import ring
from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Limits, Tensors
from attn_rewriter.kernels.blocks import AsNode
from attn_rewriter.kernels.fully_masked import (
    faint,
    gradient_of_equal_weights,
    gradient_of_lifted,
    lifted_rows,
    lost,
    loud,
)
from attn_rewriter.kernels.masking import keep_mask, scaled_query, sink_scores, summed_bias
from attn_rewriter.spec import AttentionSpec, Band, Bias, Shapes, same
from attn_rewriter.torch_private import scaled_dot_product_attention

_HALF = (torch.float16, torch.bfloat16)

_RING_MULTIPLE = 64
"""Memory-efficient attention pads its logsumexp to a multiple of 32, and PyTorch's ring (2.11) adds it up as it is, of
all of a process's part or of a half."""


def varies_in_training(device: Device) -> str:
    """Why gradients of PyTorch's own attention differ from run to run while deterministic algorithms are asked for.
    Where PyTorch may only warn, its flash and memory-efficient attention do so, and add up the gradient of the query in
    any order as ever (`attention_backward.cu`); cuDNN's it does not take then (`sdp_utils.cpp`)."""
    if device.platform == "cuda" and torch.is_deterministic_algorithms_warn_only_enabled():
        return "has PyTorch's deterministic backward pass only without warn_only"
    return "" if device.platform in ("cpu", "cuda") else f"may have a backward pass that varies on {device}"


class SDPA(Kernel):
    """Any affine form: scale, biases, masks as tensors, causal without one, GQA, dropout; sinks as one more key."""

    name = "sdpa"
    limits = Limits(max_blocks=2**16 - 1)  # pytorch#142228
    goes_round = True
    adds_fills = True

    def goes_through_scores(self, shapes: Shapes) -> bool:
        return shapes.dtype != torch.float16  # whose numbers do not become small enough (`fully_masked.faint`)

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        form = spec.affine()
        reasons = super().refusals(spec, shapes, device)
        reasons += [form] if isinstance(form, str) else self._too_large(spec, shapes, device)
        return reasons + (self._local(spec, shapes, device) if ring() is not None else [])

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return varies_in_training(device) if shapes.needs_backward else ""

    @staticmethod
    def _local(spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        """What a part of a sequence says nothing about the whole of."""
        reasons = []
        if not spec.is_plain(shapes) or not same(shapes.q_len, shapes.kv_len):
            reasons.append(
                "context_parallel() takes the scores of as many queries as keys, scaled, with a causal mask or none, "
                f"not {spec} at {shapes}"
            )
        if spec.dropout_p:  # its backward pass would draw the last part's random numbers for all parts
            reasons.append("context_parallel() takes no dropout")
        multiple = isinstance(shapes.q_len, int) and shapes.q_len % _RING_MULTIPLE == 0
        if device.type == "cuda" and shapes.dtype not in _HALF and not multiple:
            reasons.append(
                f"context_parallel() takes {str(shapes.dtype).removeprefix('torch.')} on CUDA where each process has a "
                f"multiple of {_RING_MULTIPLE} tokens, not {shapes.q_len}"
            )
        return reasons

    @staticmethod
    def _too_large(spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        """Sizes at which memory-efficient attention, taken where flash is not, is wrong without a word (offsets of 32
        bits, pytorch#187227)."""
        flash = shapes.dtype in _HALF and spec.is_plain(shapes)
        scores = shapes.q_len * shapes.kv_len
        if device.type == "cuda" and isinstance(scores, int) and scores > 2**32 and not flash:
            return ["its CUDA kernels for masks, biases and float32 take at most 2**32 scores a head"]
        return []

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        form = spec.affine()
        assert not isinstance(form, str)
        query, key, value = scaled_query(form.query_scales, tensors), tensors["key"], tensors["value"]
        bias = summed_bias(form, tensors)
        plain = bias is None and spec.sinks is None
        is_causal = plain and form.keep.within(shapes.q_len, shapes.kv_len) == Band(None, 0)
        attn_mask: Any = bias
        keep = None if is_causal else keep_mask(form.masks, shapes, tensors)
        rows, lifted = None, None
        if spec.fully_masked_rows == "by fill" or spec.may_mask:
            lifted, rows = lifted_rows(spec, shapes, tensors)
            attn_mask = lifted
        elif keep is not None:
            if spec.fully_masked_rows in ("mean", "mean, added"):
                rows = ~keep.any(-1, keepdim=True)
            attn_mask = self._mask(keep, rows, bias, spec, shapes, device)
        gradient: Any = None
        faint_rows: Any = None
        through = shapes.needs_backward and (spec.may_mask or spec.fully_masked_rows == "mean, added")
        if rows is not None and through and self.no_closed_gradient(spec, shapes):
            faint_rows = rows
            query, value, attn_mask = faint(query, value, attn_mask, rows, shapes)
        elif rows is not None:  # with a query of zeros, and all keys shown, all weights are equal
            if through and spec.may_mask:
                gradient = gradient_of_lifted(query, form.scale, spec, shapes, tensors)
            elif through:
                gradient = gradient_of_equal_weights(query, form.scale, shapes, tensors)
                gradient = torch.where(rows, gradient, gradient.new_zeros(()))
            query = torch.where(rows, query.new_zeros(()), query)
        varies = {axis for m in spec.modifiers if isinstance(m, Bias) for axis in m.axes} | spec.keep.varies_over()
        if attn_mask is not None and "key" not in varies and (device.type == "cuda" or spec.sinks is not None):
            # On CUDA, memory-efficient attention raises where a mask has a stride of 0 along the keys (2.11).
            attn_mask = attn_mask.expand(-1, -1, -1, _kv_len(shapes, key)).contiguous()
        if spec.sinks is not None:
            attn_mask, key, value = _with_sinks(spec.sinks, attn_mask, key, value, shapes, tensors)
        repeated = shapes.is_gqa and not self._takes_gqa(shapes, device, attn_mask is not None)
        if repeated:
            key, value = (x.repeat_interleave(shapes.num_groups, dim=1) for x in (key, value))
        scale = form.scale
        if not scale > 0:  # kernels take the largest score, and hide keys with -inf, before they multiply
            query, scale = query * scale, 1.0
        elif shapes.needs_backward and device.type == "cpu" and shapes.dtype not in _HALF:
            query, scale = _scaled_in_part(query, scale)
        # Arguments that have their default are left out, so that the graph reads as a person would write it.
        options: dict[str, Any] = {"scale": scale}
        if attn_mask is not None:
            options["attn_mask"] = attn_mask
        if spec.dropout_p:
            options["dropout_p"] = spec.dropout_p
        if is_causal:
            options["is_causal"] = True
        if shapes.is_gqa and not repeated:
            options["enable_gqa"] = True
        if ring() is not None:
            output = AroundTheRing(**options)(query, key, value)
        else:
            output = scaled_dot_product_attention(query, key, value, **options)
        if faint_rows is not None:
            output = loud(output, faint_rows, shapes)
        if gradient is not None:
            output = output + gradient
        if lifted is not None:
            output = lost(output, lifted, spec, shapes)
        elif spec.fully_masked_rows == "nan" and keep is not None:
            output = torch.where(keep.any(-1, keepdim=True), output, float("nan"))
        if shapes.needs_backward and self._may_be_cudnn(shapes, device):
            output = _with_one_layout_of_gradients(output, shapes)
        return output

    @staticmethod
    def _mask(keep: Any, rows: Any, bias: Any, spec: AttentionSpec, shapes: Shapes, device: Device) -> Any:
        """The mask for PyTorch's function, in which `rows` see all keys, the scores of all being the same."""
        # Of a boolean mask cuDNN makes no zeros in rows without a key, but of minus infinities it does (9.19).
        zeros = spec.fully_masked_rows == "zeros" and SDPA._may_be_cudnn(shapes, device)
        if bias is None and spec.sinks is None and not zeros:
            return keep if rows is None else keep | rows
        # PyTorch's softmax makes zeros of rows of minus infinities. Where there must be something else, half of the
        # lowest number keeps them finite, as kernels multiply by log2(e).
        lowest = float("-inf") if spec.fully_masked_rows == "zeros" else torch.finfo(shapes.dtype).min / 2
        low = torch.full((), lowest, dtype=shapes.dtype, device=keep.device)
        zero = torch.zeros((), dtype=shapes.dtype, device=keep.device)
        if rows is not None:
            # What was added to scores that a fill swallows still gets a gradient.
            through = bias is not None and spec.fully_masked_rows == "mean, added" and shapes.learned
            low = torch.where(rows, bias - bias.detach() if through else zero, low)
        return torch.where(keep, zero if bias is None else bias, low)

    @staticmethod
    def _takes_gqa(shapes: Shapes, device: Device, masked: bool) -> bool:
        """On CUDA, flash and cuDNN attention read grouped heads, memory-efficient attention does not; flash takes no
        mask, and cuDNN (first choice from sm_90 on) only half precision."""
        if device.type != "cuda":
            return True
        return shapes.dtype in _HALF and (not masked or SDPA._may_be_cudnn(shapes, device))

    @staticmethod
    def _may_be_cudnn(shapes: Shapes, device: Device) -> bool:
        return device.type == "cuda" and (device.capability or (0, 0)) >= (9, 0) and shapes.dtype in _HALF


@dataclass(frozen=True)
class AroundTheRing(AsNode):
    """Attention to the keys of all processes: what `context_parallel` has put in the place of PyTorch's function, also
    where it was put there anew since."""

    scale: float
    is_causal: bool = False
    enable_gqa: bool = False
    __name__ = "around_the_ring"

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, **vars(self))

    def fake(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same for one process: of the same shape."""
        return scaled_dot_product_attention(query, key, value, **vars(self))


def _with_sinks(
    sinks: Any, bias: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, shapes: Shapes, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bias, key and value with one more key: its score is the sinks', its value zero."""
    score = sink_scores(sinks, tensors, shapes.dtype)
    column = F.pad(score, (_kv_len(shapes, key), 0))
    bias = column if bias is None else F.pad(bias, (0, 1)) + column
    return bias, F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))


def _kv_len(shapes: Shapes, key: torch.Tensor) -> int:
    return shapes.kv_len if isinstance(shapes.kv_len, int) else key.size(-2)


def _scaled_in_part(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The query times a number from 0.7 to 1.4, and a power of two to scale by.

    PyTorch's CPU kernel computes its weights again in the backward pass, and scales scores there by other operations
    (2.13): rounded in another way, large ones give other weights, and gradients that are several times as far off as
    eager's. A power of two rounds nothing.
    """
    power = 2.0 ** round(math.log2(scale))
    return query if scale == power else query * (scale / power), power


def _with_one_layout_of_gradients(output: torch.Tensor, shapes: Shapes) -> torch.Tensor:
    """Let the gradient of the output always arrive as [batch, q_len, num_heads, head_dim_v] in memory.

    PyTorch keeps one backward plan of cuDNN for each shape, whatever the strides of the output's gradient (seen in
    2.11 with cuDNN 9.19): a second layout in the same process gives wrong gradients without a word. Reshaping the
    output makes autograd reshape its gradient. Where the model goes on in this layout, as models do, it costs nothing.
    """
    merged = output.transpose(1, 2).flatten(1, 2)
    heads = shapes.num_heads if isinstance(shapes.num_heads, int) else output.size(1)
    return merged.unflatten(1, (-1, heads)).transpose(1, 2)
