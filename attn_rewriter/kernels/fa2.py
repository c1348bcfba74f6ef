"""flash-attention 2 (https://arxiv.org/abs/2307.08691, https://github.com/Dao-AILab/flash-attention).

Keys that are hidden from all queries of a sequence, as padding is, are left out: its functions for sequences of varying
length get the other ones, next to each other. Queries all stay, as eager code defines the rows of padding, too. Under a
causal mask this would not be sound: which keys a query sees would follow from how many of them were left out before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Tensors, number
from attn_rewriter.kernels.blocks import AsNode, mask_names
from attn_rewriter.kernels.flash import Flash, FlashForm, How, Kept
from attn_rewriter.kernels.masking import coordinates, holds
from attn_rewriter.spec import AttentionSpec, Predicate, Shapes, Softcap


@dataclass(frozen=True)
class _ShownKeys(AsNode):
    """All keys, as indices into `[batch * kv_len]`, those that a predicate keeps first; and where each sequence begins
    among these, and the last one ends."""

    keep: Predicate
    names: tuple[Any, ...]  # of tensors
    __name__ = "shown_keys"
    is_shared = True

    def run(self, batch: int, kv_len: int, device: Any, masks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(self.names, masks))
        keep = holds(self.keep, tensors, *coordinates(batch, 1, 1, kv_len, device)).expand(batch, 1, 1, kv_len)
        order = (~keep).flatten().byte().argsort(stable=True)
        return order, F.pad(keep.sum(-1).flatten().cumsum(0), (1, 0)).int()


class FA2(Flash):
    """Causal, windows, softcap, dropout and GQA, from Ampere on; and padding of the keys."""

    name = "fa2"
    distribution = "flash-attn"
    extra = "flash"
    module = "flash_attn.flash_attn_interface"
    at_least = "2.7"  # its functions have had these arguments since; 2.0 aligned causal with the first query and key
    has_dropout = True
    limits = replace(Flash.limits, platforms=frozenset({"cuda", "rocm"}))

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        if spec.dropout_p and any(isinstance(modifier, Softcap) for modifier in spec.modifiers):
            reasons.append("has no dropout with a softcap")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        """Its backward pass is told to be deterministic. That for AMD's devices has other kernels, never tried."""
        unknown = shapes.needs_backward and device.platform != "cuda"
        return f"may have a backward pass that varies on {device}" if unknown else ""

    @staticmethod
    def no_mask(form: FlashForm, shapes: Shapes, device: Device) -> list[str]:
        assert form.mask is not None
        return [] if form.mask.varies_over() <= {"batch", "key"} else [form.no_window]

    @staticmethod
    def mask_parts(form: FlashForm, shapes: Shapes, tensors: Tensors) -> list[Tensor]:
        """Those of `_ShownKeys`."""
        assert form.mask is not None
        names = mask_names(form.mask)
        masks = tuple(tensors[name] for name in names)
        sizes = (number(n, tensors) for n in (shapes.batch, shapes.kv_len))
        found: Any = _ShownKeys(form.mask, names)(*sizes, tensors["query"].device, masks)
        return [found[0], found[1]]

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_forward

        numbers = how.dropout_p, how.scale, how.causal, *how.window, how.softcap
        if how.mask is None:
            output, logsumexp, _, random = _flash_attn_forward(query, key, value, *numbers, None, False)
            return output, _of_no_key(logsumexp), random
        batch, q_len = query.shape[:2]
        shown = _Shown.of(how, query, key)
        output, logsumexp, _, random = _flash_attn_varlen_forward(
            query.flatten(0, 1), shown.packed(key), shown.packed(value), *shown.where, *numbers, None, False
        )
        logsumexp = logsumexp.unflatten(1, (batch, q_len)).transpose(0, 1)
        return output.unflatten(0, (batch, q_len)), _of_no_key(logsumexp), random

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward

        numbers = how.dropout_p, how.scale, how.causal, *how.window, how.softcap
        options = None, torch.are_deterministic_algorithms_enabled(), kept.random
        query, key, value, output, logsumexp, _ = kept
        if how.mask is None:
            found = tuple(x.new_empty(x.shape) for x in kept[:3])
            _flash_attn_backward(gradient, *kept[:5], *found, *numbers, *options)
            return found
        shown = _Shown.of(how, query, key)
        given = query.flatten(0, 1), shown.packed(key), shown.packed(value)
        found = tuple(x.new_empty(x.shape) for x in given)
        output, gradient = output.flatten(0, 1), gradient.flatten(0, 1)
        logsumexp = logsumexp.transpose(0, 1).flatten(1).contiguous()  # which the package does not see to
        _flash_attn_varlen_backward(gradient, *given, output, logsumexp, *found, *shown.where, *numbers, *options)
        return found[0].view(query.shape), *(shown.unpacked(x, like) for x, like in zip(found[1:], (key, value)))


def _of_no_key(logsumexp: Tensor) -> Tensor:
    """Minus infinity where a row has no key, which this package says by plus infinity."""
    return logsumexp.masked_fill(logsumexp == float("inf"), float("-inf"))


class _Shown(NamedTuple):
    """The keys that are shown, and the arguments that say where sequences begin and how long they are at most."""

    order: Tensor
    where: tuple[Tensor, Tensor, int, int]

    @staticmethod
    def of(how: How, query: Tensor, key: Tensor) -> _Shown:
        order, starts = how.parts
        (batch, q_len), kv_len = query.shape[:2], key.size(1)
        of_queries = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * q_len
        return _Shown(order, (of_queries, starts, q_len, kv_len))

    def packed(self, x: Tensor) -> Tensor:
        """Keys or values, those that are shown first."""
        return x.flatten(0, 1)[self.order]

    def unpacked(self, x: Tensor, like: Tensor) -> Tensor:
        """Gradients in the places of keys or values; those of hidden ones, which nobody wrote, are zero."""
        hidden = torch.arange(x.size(0), device=x.device) >= self.where[1][-1]
        found = torch.empty_like(x)
        found[self.order] = x.masked_fill(hidden[:, None, None], 0.0)
        return found.view(like.shape)
