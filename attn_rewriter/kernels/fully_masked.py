"""Rows in which every key is masked: what the model's own code gives for them, in the output and in gradients.

Kernels that leave hidden keys out give zeros there. Eager code gives the mean of all values where its fill is finite,
and no number where it is minus infinity (`FullyMasked` in `attn_rewriter.spec`). Which rows these are is one small
boolean tensor; all layers with the same mask share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_rewriter.hidden import FADED, hidden_from, swallowing_from
from attn_rewriter.kernels.base import Tensors, number
from attn_rewriter.kernels.blocks import AsNode, mask_names
from attn_rewriter.kernels.masking import coordinates, holds, keep
from attn_rewriter.spec import (
    AXES,
    And,
    AttentionSpec,
    Band,
    Bias,
    Mask,
    Predicate,
    Scale,
    Shapes,
)


@dataclass(frozen=True)
class _RowsWithoutKeys(AsNode):
    """Whether a row sees no key, `[batch, num_heads, q_len, 1]`; dimensions over which this does not vary have one
    element."""

    keep: Predicate
    names: tuple[Any, ...]  # of tensors, and sizes that are symbols
    __name__ = "rows_without_keys"
    is_shared = True

    def run(
        self, batch: int, num_heads: int, q_len: int, kv_len: int, device: Any, masks: tuple[Tensor, ...]
    ) -> Tensor:
        tensors: Any = dict(zip(self.names, masks))
        terms = self.keep.terms if isinstance(self.keep, And) else (self.keep,)
        bands = [term for term in terms if isinstance(term, Band)]
        others = [term for term in terms if not isinstance(term, Band)]
        varies = self.keep.varies_over()
        b, h, q = (n if axis in varies else 1 for axis, n in zip(AXES, (batch, num_heads, q_len)))

        def seen(terms: Iterable[Predicate], q_len: int) -> Tensor:
            at = coordinates(b, h, q_len, kv_len, device)
            return reduce(and_, (holds(term, tensors, *at) for term in terms)).expand(-1, -1, -1, kv_len)

        if len(bands) == 1 and others and not any("query" in term.varies_over() for term in others):
            return ~self._any_within(bands[0], seen(others, 1), q_len, kv_len, tensors)
        return ~seen(terms, q).any(-1, keepdim=True)

    @staticmethod
    def _any_within(band: Band, seen: Tensor, q_len: int, kv_len: int, tensors: Any) -> Tensor:
        """Whether a query sees any of the keys within a band around it, in time and memory that grow with the length
        alone: by how many keys are seen up to the end of the band, and before its start."""
        count = F.pad(seen.squeeze(2).long().cumsum(-1), (1, 0))
        query = torch.arange(q_len, device=seen.device)

        def up_to(end: Any) -> Tensor:
            return count[..., torch.clamp(end, 0, kv_len)]

        last = query * 0 + kv_len if band.upper is None else query + number(band.upper, tensors) + 1
        first = query * 0 if band.lower is None else query + number(band.lower, tensors)
        return (up_to(last) > up_to(first)).unsqueeze(-1)


def rows_without_keys(keep: Predicate, shapes: Shapes, tensors: Tensors) -> Tensor:
    """Which rows see no key, `[batch, num_heads, q_len, 1]` or of one element where that is the same for all."""
    names = mask_names(keep)
    sizes = (number(n, tensors) for n in (shapes.batch, shapes.num_heads, shapes.q_len, shapes.kv_len))
    found: Any = _RowsWithoutKeys(keep, names)(*sizes, tensors["query"].device, tuple(tensors[n] for n in names))
    return found


def completed(
    output: Tensor, query: Tensor, scale: float, spec: AttentionSpec, shapes: Shapes, tensors: Tensors
) -> Any:
    """A kernel's output, zero in rows without a key, with what the model has there.

    `query` and `scale` are those of the scores, `[batch, num_heads, q_len, head_dim]`."""
    if spec.fully_masked_rows in ("impossible", "zeros"):
        return output
    rows = rows_without_keys(spec.keep.within(shapes.q_len, shapes.kv_len), shapes, tensors)
    if spec.fully_masked_rows == "nan":
        return torch.where(rows, float("nan"), output)
    value = mean_of_values(spec, shapes, tensors)
    if spec.fully_masked_rows == "mean, added" and shapes.needs_backward:
        value = value + gradient_of_equal_weights(query, scale, shapes, tensors)
    return torch.where(rows, value, output)


def mean_of_values(spec: AttentionSpec, shapes: Shapes, tensors: Tensors) -> Tensor:
    """The output of equal weights, `[batch, num_heads, 1, head_dim_v]`. (What is dropped is drawn once for all rows of
    a head: each row is distributed as in eager code.)"""
    value = tensors["value"]
    if shapes.is_gqa:
        value = value.repeat_interleave(shapes.num_groups, dim=1)
    if spec.dropout_p:
        value = value * F.dropout(torch.ones_like(value[..., :1]), spec.dropout_p)
    return value.mean(-2, keepdim=True)


def gradient_of_equal_weights(query: Tensor, scale: float, shapes: Shapes, tensors: Tensors) -> Tensor:
    """As `gradient_of_weights` where all keys of a row weigh the same."""
    equal = tensors["query"].new_full((1, 1, 1, 1), 1.0) / tensors["key"].size(-2)
    return gradient_of_weights(equal, query, scale, shapes, tensors)


def gradient_of_weights(weights: Tensor, query: Tensor, scale: float, shapes: Shapes, tensors: Tensors) -> Tensor:
    """Zeros, with the gradients that weights which the scores have no part in give to query and key,
    `[batch, num_heads, q_len, head_dim_v]`; the weights are `[batch, 1, 1, kv_len]`, or broadcast to that.

    The gradient of a score is that of `score * weight * (value - weighted mean of values)`. Summed over the keys this
    is linear in the query: a product with one matrix for each head, the covariance of keys and values.
    """
    key, value = tensors["key"], tensors["value"].detach()
    weights = weights.expand(-1, -1, -1, value.size(-2)).mT
    centered = (value - (value * weights).sum(-2, keepdim=True)) * weights
    covariance = key.mT @ centered
    if shapes.is_gqa:
        covariance = covariance.repeat_interleave(shapes.num_groups, dim=1)
    linear = (query * scale) @ covariance
    return linear - linear.detach()


def faint(
    query: Tensor, value: Tensor, mask: Tensor | None, rows: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A query, values, and what is added to the scores, for a kernel whose output `loud` then makes right. The scores
    of `rows` are next to nothing in it, and still get their gradients.

    The query of such a row is multiplied by a small power of two: its scores no longer change the weights. The gradient
    of its output is divided by that number, or query and key would get too little. The values must not get this larger
    gradient. So the kernel is given them twice, as they are and detached, and the larger gradient goes through the
    detached half alone. A bias gets the gradient of the scores as it is, which is multiplied back.
    """
    factor = _faintness(shapes)
    if mask is not None and shapes.learned:
        mask = torch.where(rows & mask.isfinite(), mask.detach() + (mask - mask.detach()) * factor, mask)
    # The gradient of what is multiplied by one is no view of a larger one, which `torch.cond` would not take.
    return torch.where(rows, query * factor, query), torch.cat([value * 1.0, value.detach()], -1), mask


def loud(output: Tensor, rows: Tensor, shapes: Shapes) -> Tensor:
    """The output of a kernel that was given what `faint` makes."""
    output, again = output.chunk(2, dim=-1)
    again = (again - again.detach()) / _faintness(shapes)
    return output + torch.where(rows, again, again.new_zeros(()))


def _faintness(shapes: Shapes) -> float:
    return 2.0**-80 if shapes.dtype == torch.float64 else 2.0**-40


def lifted_rows(spec: AttentionSpec, shapes: Shapes, tensors: Tensors, biases: bool = True) -> tuple[Tensor, Tensor]:
    """What masks and biases add to the scores, broadcast to these, and which rows that hides as a whole.

    Such a row is lifted until its highest number is zero: a softmax does not change by that, and kernels compute with
    numbers that are not as low. Its scores are swallowed by what is added, so that they count as zero there; and so
    are smaller biases beside a fill. Without `biases`, those that can't be masks are left out.

    A row of minus infinities becomes no number, unless the model makes zeros of that, or in training (see `lost`).
    """
    wide = torch.promote_types(shapes.dtype, torch.float32)
    added: Any = tensors["query"].new_zeros((), dtype=wide)
    shows: Any = None  # which keys no mask has filled; None where no mask fills
    for modifier in spec.modifiers:
        match modifier:
            case Scale(factor):
                added = added * factor
            case Bias(name, factor, may_mask=may_mask) if biases or may_mask:
                added = added + tensors[str(name)].to(wide) * factor
            case Mask(tensor=name, form="additive"):
                added = added + tensors[str(name)].to(wide)
            case Mask(fills=(fill,)):
                kept = keep(modifier, tensors)
                added = torch.where(kept, added, fill)
                shows = kept if shows is None else shows & kept
    highest = added.amax(-1, keepdim=True).detach()
    limit: Any = swallowing_from(shapes.dtype)
    if shows is not None:  # what a mask fills is no score any more, however the fill compares with it
        shown = (shows & (added >= highest + FADED)).any(-1, keepdim=True)
        limit = torch.where(shown, limit, hidden_from(shapes.dtype) / 2)
    rows = highest <= limit
    if spec.fully_masked_rows == "zeros" or shapes.needs_backward:  # minus infinity stays, and gives zeros
        highest = highest.masked_fill(highest == float("-inf"), 0.0)
    lifted = added - highest
    swallowed = lifted >= highest * torch.finfo(shapes.dtype).eps
    lifted = torch.where(swallowed, lifted - lifted.detach(), lifted)  # whose gradient is left
    return torch.where(rows, lifted, added).to(shapes.dtype), rows


def lost(output: Tensor, lifted: Tensor, spec: AttentionSpec, shapes: Shapes) -> Tensor:
    """A kernel's output with no number in rows of minus infinities, in training: what is no number before a kernel
    would spoil all gradients of key and value."""
    if not shapes.needs_backward or spec.fully_masked_rows == "zeros":
        return output
    return torch.where((lifted == float("-inf")).all(-1, keepdim=True), float("nan"), output)


def gradient_of_lifted(query: Tensor, scale: float, spec: AttentionSpec, shapes: Shapes, tensors: Tensors) -> Tensor:
    """Zeros, with the gradients of rows that `lifted_rows` lifts, where these are all rows of a head."""
    levels, rows = lifted_rows(spec, shapes, tensors, biases=False)
    levels = levels[:, : None if "head" in spec.hides_over else 1, :1]  # the same for all queries
    weights = levels.softmax(-1).masked_fill(levels.amax(-1, keepdim=True) == float("-inf"), 0.0)
    gradient = gradient_of_weights(weights, query, scale, shapes, tensors)
    return torch.where(rows, gradient, gradient.new_zeros(()))
