"""Masks and biases as tensors, for the kernels that take them so."""

from __future__ import annotations

from functools import reduce
from operator import add, and_

import torch

from attn_rewriter.kernels.base import Tensors
from attn_rewriter.spec import EVERY_KEY, AffineForm, Always, And, Band, Mask, Not, Predicate, Shapes, TensorMask


def keep_mask(form: AffineForm, shapes: Shapes, tensors: Tensors) -> torch.Tensor | None:
    """What the masks keep, as one boolean tensor; None where no key is hidden at these shapes."""
    masks = [mask for mask in form.masks if mask.keep.within(shapes.q_len, shapes.kv_len) != EVERY_KEY]
    return reduce(and_, (keep(mask, tensors) for mask in masks)) if masks else None


def keep(mask: Mask, tensors: Tensors) -> torch.Tensor:
    """What one mask keeps, as a boolean tensor that broadcasts to the scores."""
    if mask.tensor is None:
        assert isinstance(mask.keep, Band)
        return band_mask(mask.keep, tensors)
    held = tensors[str(mask.tensor)]
    if mask.form == "additive":
        return held == 0
    return held if mask.form == "keep" else ~held


def band_mask(band: Band, tensors: Tensors) -> torch.Tensor:
    """`lower <= key - query <= upper` as a boolean tensor [q_len, kv_len]."""
    query, key = tensors["query"], tensors["key"]
    rows = torch.arange(query.size(-2), device=query.device)
    distance = torch.arange(key.size(-2), device=query.device) - rows.unsqueeze(-1)
    kept = distance == distance
    if band.lower is not None:
        kept = kept & (distance >= band.lower)
    return kept if band.upper is None else kept & (distance <= band.upper)


def holds(
    predicate: Predicate, tensors: Tensors, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """A predicate at (batch, head, query, key), each an integer tensor: the 0-d ones of a FlexAttention `mask_mod`,
    or `coordinates` that broadcast to the scores. Of the tensors, only those that the predicate names are read."""
    match predicate:
        case And(terms):
            return reduce(and_, (holds(term, tensors, b, h, q, k) for term in terms))
        case Not(term):
            return ~holds(term, tensors, b, h, q, k)
        case TensorMask(name):
            return element(tensors[str(name)], b, h, q, k)
        case Band(lower, upper):
            distance = k - q
            sides = [] if lower is None else [distance >= lower]
            sides += [] if upper is None else [distance <= upper]
            return reduce(and_, sides) if sides else distance == distance
        case Always(value):
            return (k == k) if value else (k != k)
    raise NotImplementedError(f"{type(predicate).__name__} at coordinates")


def element(tensor: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The elements at coordinates of a tensor that broadcasts to the scores."""
    return tensor[tuple(i if n != 1 else i * 0 for n, i in zip(tensor.shape, (b, h, q, k)))]


def coordinates(
    batch: int, num_heads: int, q_len: int, kv_len: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All (batch, head, query, key), each along its own dimension."""
    sizes = (batch, num_heads, q_len, kv_len)
    b, h, q, k = (
        torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(sizes)
    )
    return b, h, q, k


def summed_bias(form: AffineForm, tensors: Tensors) -> torch.Tensor | None:
    """The sum of all biases, or None."""
    terms = [tensors[name] if factor == 1 else tensors[name] * factor for name, factor in form.biases]
    return reduce(add, terms) if terms else None
