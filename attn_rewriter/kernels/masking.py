"""Masks and biases as tensors, for the kernels that take them so."""

from __future__ import annotations

from functools import reduce
from operator import add, and_

import torch

from attn_rewriter.kernels.base import Tensors
from attn_rewriter.spec import EVERY_KEY, AffineForm, Band, Mask, Shapes


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


def summed_bias(form: AffineForm, tensors: Tensors) -> torch.Tensor | None:
    """The sum of all biases, or None."""
    terms = [tensors[name] if factor == 1 else tensors[name] * factor for name, factor in form.biases]
    return reduce(add, terms) if terms else None
