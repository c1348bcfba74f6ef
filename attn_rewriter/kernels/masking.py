"""Masks, biases and what else is done to scores, as operations on tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import reduce
from operator import add, and_
from typing import Any

import torch
import torch.nn.functional as F

from attn_rewriter.hidden import hidden_from
from attn_rewriter.kernels.base import Tensors, number
from attn_rewriter.spec import (
    EVERY_KEY,
    AffineForm,
    Always,
    And,
    Band,
    Bias,
    Clamp,
    Compare,
    Index,
    Mask,
    Modifier,
    Not,
    Predicate,
    Quotient,
    Scale,
    ScaleBy,
    Shapes,
    Softcap,
    TensorMask,
    Values,
)


def keep_mask(masks: Iterable[Mask], shapes: Shapes, tensors: Tensors) -> torch.Tensor | None:
    """What the masks keep, as one boolean tensor; None where no key is hidden at these shapes."""
    masks = [mask for mask in masks if mask.keep.within(shapes.q_len, shapes.kv_len) != EVERY_KEY]
    return reduce(and_, (keep(mask, tensors) for mask in masks)) if masks else None


def any_in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Whether anything is true in each block of the last dimension."""
    return F.pad(x, (0, -x.size(-1) % block)).unflatten(-1, (-1, block)).any(-1)


def keep(mask: Mask, tensors: Tensors) -> torch.Tensor:
    """What one mask keeps, as a boolean tensor that broadcasts to the scores."""
    if mask.tensor is None:
        query, key = tensors["query"], tensors["key"]
        return holds(mask.keep, tensors, *coordinates(1, 1, query.size(-2), key.size(-2), query.device))
    held = tensors[str(mask.tensor)]
    if mask.form == "additive":
        return held == 0
    return held if mask.form == "keep" else ~held


def without_hidden(bias: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """`keep`, or every key, without those that a bias hides: an additive mask that nobody can look into, as `generate`
    hands in its own.

    Their weight is zero anyway, unless a row has no key that is far above them.
    """
    lowest = hidden_from(bias.dtype)
    far_above = bias > lowest / 2
    usual = (far_above if keep is None else far_above & keep).any(-1, keepdim=True)
    shown = ~(torch.where(usual, bias, 0.0) <= lowest)  # no `|`, of which Inductor makes wrong C++ below a `pad` (2.13)
    return shown if keep is None else shown & keep


def holds(
    predicate: Predicate,
    tensors: Tensors,
    b: torch.Tensor,
    h: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    wide: Callable[[Any], Any] = operator.methodcaller("long"),
) -> torch.Tensor:
    """A predicate at (batch, head, query, key), each an integer tensor: the 0-d ones of a FlexAttention `mask_mod`,
    or `coordinates` that broadcast to the scores. Of the tensors, only those that the predicate names are read.
    Sizes in it that are symbols are keys of `tensors` as well. (Other integers than tensors will do, with what makes
    them `wide`, of 64 bits.)"""
    at = {"batch": b, "head": h, "query": q, "key": k}

    def integer(index: Index) -> Any:
        total = number(index.offset, tensors)
        for term, coefficient in index.terms:
            match term:
                case Values():
                    found = wide(_gathered(term, tensors, at))
                case Quotient(of, divisor):
                    found = integer(of) // divisor
                case _:
                    found = wide(at[term])
            found = found if coefficient == 1 else found * coefficient
            total = found if isinstance(total, int) and total == 0 else total + found
        return total

    def evaluated(part: Predicate) -> torch.Tensor:
        match part:
            case And(terms):
                return reduce(and_, map(evaluated, terms))
            case Not(term):
                return ~evaluated(term)
            case TensorMask(additive=additive):
                held = _gathered(part, tensors, at)
                return held == 0 if additive else held
            case Band(lower, upper):
                distance = k - q
                sides = [] if lower is None else [distance >= number(lower, tensors)]
                sides += [] if upper is None else [distance <= number(upper, tensors)]
                return reduce(and_, sides) if sides else distance == distance
            case Compare(left, right, relation):
                return getattr(operator, relation)(integer(left), integer(right))
            case Always(value):
                return (k == k) if value else (k != k)
        raise NotImplementedError(f"{type(part).__name__} at coordinates")

    return evaluated(predicate)


def _gathered(leaf: TensorMask | Values, tensors: Tensors, at: dict[str, torch.Tensor]) -> torch.Tensor:
    """The elements of a predicate's tensor at coordinates."""
    return element(tensors[str(leaf.tensor)], at.values(), (axis in leaf.axes for axis in at))


def element(tensor: torch.Tensor, at: Iterable[torch.Tensor], varies: Iterable[bool]) -> torch.Tensor:
    """The elements at coordinates of a tensor that broadcasts to the scores; where it does not vary, it has but one."""
    return tensor[tuple(i if varying else i * 0 for i, varying in zip(at, varies))]


def coordinates(
    batch: int, num_heads: int, q_len: int, kv_len: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All (batch, head, query, key), each along its own dimension."""
    sizes = (batch, num_heads, q_len, kv_len)
    b, h, q, k = (
        torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(sizes)
    )
    return b, h, q, k


def modified(score: torch.Tensor, modifier: Modifier, tensors: Tensors, *, fast: bool = False) -> torch.Tensor:
    """What a modifier other than a mask makes of scores.

    The fast way to cap them is exact to a rounding unit of the cap in float32, far below what half precision rounds
    scores to. CUDA's own tanh takes as long as the products around it.
    """
    match modifier:
        case Scale(factor):
            return score * factor
        case ScaleBy():
            return modifier.apply(score, tensors)
        case Bias(name, factor):
            return score + (tensors[str(name)] if factor == 1 else factor * tensors[str(name)])
        case Softcap(cap) if fast:
            return cap * (2 * torch.sigmoid(score * (2 / cap)) - 1)
        case Softcap(cap):
            return cap * torch.tanh(score / cap)
        case Clamp(lower, upper):
            # Not `clamp`, which FlexAttention's C++ would store in half precision into scores of float32 (2.13).
            return score.clamp_min(lower).clamp_max(upper)
    raise NotImplementedError(f"{modifier} on scores")


def summed_bias(form: AffineForm, tensors: Tensors) -> torch.Tensor | None:
    """The sum of all biases, or None."""
    terms = bias_terms(form.biases, tensors)
    return reduce(add, terms) if terms else None


def bias_terms(biases: Iterable[tuple[str, float]], tensors: Tensors) -> list[torch.Tensor]:
    """Biases times their factors."""
    return [tensors[name] if factor == 1 else tensors[name] * factor for name, factor in biases]


def scaled_query(scales: Iterable[ScaleBy], tensors: Tensors) -> torch.Tensor:
    """The query times the tensors that scale it."""
    return reduce(lambda query, scale: scale.apply(query, tensors), scales, tensors["query"])


def sink_scores(sinks: str | float, tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The score of the sinks, which broadcasts to `[batch, num_heads, q_len, 1]`; of this type where it is a number."""
    if isinstance(sinks, str):
        return tensors[sinks]
    return tensors["query"].new_full((1, 1, 1, 1), sinks, dtype=dtype)
