"""When is a score hidden, in its type, after all that is done to it; and what becomes of a row in which all are.

A mask hides a key by a score so low that the key's weight is zero. Whether it is zero depends on the fill, on the type
that the fill is rounded to, and on what is done to the scores afterwards: the lowest number of float16 times 1e-5 is
-0.66, which hides nothing. This module is the only place that knows.

The proof. `hidden_from` is the largest fill that counts as a mask. The scores of keys that are seen are taken to be
above half of it (above -5e8, in float16 above -32752): the one thing that is assumed. Let later steps multiply scores
by `c` altogether, `c > 0`. Then a hidden score lies at least `c * |fill| / 2` below any that is seen. The exponential
of a number below -745 is zero in float64, and of one below -104 in float32. So the weight is zero where `c * fill` is
at most `FADED = -2 * 745`.

A row may see no key at all. Then nothing is far above the hidden scores, and what eager code gives follows from the
fills alone, if these are so large that they swallow the scores they are added to.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import torch

from attn_rewriter.spec import Bias, Clamp, FullyMasked, Mask, Modifier, Scale, ScaleBy, Softcap

MASKED = -1e9
"""A fill at or below this (in float16: at or below its lowest finite number) is read as a mask."""

FADED = -1490.0
"""A score at or below this, after all that was done to it, is still hidden (see the proof above)."""

SWALLOWED = 16.0
"""Scores up to this magnitude must be lost in the rounding of a fill that they are added to: those of float16's lowest
number are, and with -1e9 in float32 twice as large ones."""

_MOST_MASKS = 6
"""So many masks at most are looked at in all combinations."""


def hidden_from(dtype: torch.dtype) -> float:
    """The number at or below which what is added to a score of `dtype` means "do not attend"."""
    return max(MASKED, torch.finfo(dtype).min)


def is_masking(value: float, dtype: torch.dtype) -> bool:
    """Whether adding `value` to a score of `dtype` means "do not attend"."""
    return value <= hidden_from(dtype) and not math.isnan(value)


@dataclass(frozen=True)
class Done:
    """One step of what is done to scores: a modifier, or None where a row is shifted; and the type of the result."""

    modifier: Modifier | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Level:
    """Where a hidden score ends: its value, and whether scores that are not hidden would show in it, because its fill
    was added and did not swallow them."""

    value: float
    shows: bool = False


class NotHidden(Exception):
    """Says in words why a key that a mask hides is seen after all, or why it is not known how a row without keys is."""


def levels(steps: Sequence[Done]) -> tuple[Level, ...]:
    """Where the scores of keys end that are hidden by each set of the masks, and each choice of their fills.

    Raises `NotHidden` where one of them comes back."""
    masks = {i: step.modifier.fills for i, step in enumerate(steps) if isinstance(step.modifier, Mask)}
    if len(masks) > _MOST_MASKS:
        raise NotHidden(f"{len(masks)} masks are more than are looked at together")
    sets = (some for n in range(1, len(masks) + 1) for some in combinations(masks, n))
    return tuple(_level(steps, dict(zip(some, fills))) for some in sets for fills in product(*(masks[i] for i in some)))


def _level(steps: Sequence[Done], hiding: dict[int, float]) -> Level:
    """Where scores end that are hidden by the masks of these numbers, with these fills."""
    score: float | None = None  # None while nothing hides it
    shows = False
    for i, step in enumerate(steps):
        modifier = step.modifier
        if isinstance(modifier, Mask) and i in hiding:
            # The fill is a number of the model's code, or of a tensor that was read, whose type may be wider.
            fill = _rounded(hiding[i], step.dtype)
            if modifier.form == "additive":
                shows = shows or (score is None and not swallows(fill, step.dtype))
                score = _rounded((score or 0.0) + hiding[i], step.dtype)
            else:
                score, shows = fill, False
        elif score is not None:
            score = _rounded(score, step.dtype)
            match modifier:
                case Scale(factor):
                    score = _rounded(score * factor, step.dtype)
                case Clamp(lower, upper):
                    if lower > score and not is_masking(lower, step.dtype):
                        raise NotHidden(f"scores go through {modifier} after a mask")
                    score = min(max(score, lower), upper)
                case ScaleBy():
                    raise NotHidden("scores are scaled by a tensor after a mask")
                case Softcap():
                    raise NotHidden(f"scores go through {modifier} after a mask")
                case Bias():
                    shows = shows or not swallows(score, step.dtype)
            if not score <= FADED:
                factor = modifier.factor if isinstance(modifier, Scale) else 1.0
                raise NotHidden(f"scores are scaled by {factor:g} after a mask: what is hidden becomes {score:g}")
    assert score is not None
    return Level(score, shows)


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).item())


def swallows(fill: float, dtype: torch.dtype) -> bool:
    """Whether scores of ordinary size are lost in what they are added to."""
    return math.isinf(fill) or abs(fill) * torch.finfo(dtype).eps / 2 >= SWALLOWED


def swallowing_from(dtype: torch.dtype) -> float:
    """The number at or below which a row whose highest score it is counts as one that sees no key. It is half of what
    hides a score, as fills of several masks may be added without rounding in between, but swallows scores in any case.
    (In float64 -1e9 does not: such a row attends by its scores.)"""
    return min(hidden_from(dtype) / 2, -2 * SWALLOWED / torch.finfo(dtype).eps)


Zeroing = Literal["nothing", "nan", "hidden", "some"]
"""Which weights are set to zero after the softmax: none, those that are not a number, all that were hidden before it,
or some of these."""


def fully_masked_rows(
    steps: Sequence[Done], zeroing: Zeroing, learned: Container[Any] | None = None, stable: bool | None = True
) -> FullyMasked:
    """What a row is in which every key is masked, by what the model does to its scores and weights. `learned` are the
    tensors that want gradients, None in inference. A softmax that is not `stable` divides the exponentials by their
    sum, without the row's maximum subtracted: those of hidden scores are zero, as of minus infinity. (None: something
    else is subtracted.)

    Raises `NotHidden` where that is not known."""
    found = (Level(-math.inf),) if stable is False else levels(steps)
    values = {level.value for level in found}
    if stable is None and zeroing != "hidden" and values != {-math.inf}:
        raise NotHidden("something else than its maximum is subtracted from a row that sees no key")
    if zeroing == "hidden" or (zeroing == "nan" and values == {-math.inf}):
        return "zeros"
    if zeroing == "some" or (zeroing == "nan" and -math.inf in values):
        raise NotHidden("of a row that sees no key, only some weights are set to zero")
    if any(level.shows for level in found):
        raise NotHidden(
            "a row that sees no key attends by its scores: what is added to hide them does not swallow them"
        )
    if values == {-math.inf}:
        return "nan"
    if _shifted_between(steps):
        raise NotHidden("a row that sees no key is shifted between a mask and another one, or a bias")
    if len(values) > 1:
        return "by fill"
    forms = {step.modifier.form == "additive" for step in steps if isinstance(step.modifier, Mask)}
    if learned is not None and len(forms) > 1:
        raise NotHidden("in training, some keys of a row that sees none are filled, and to others a mask is added")
    added = True in forms
    after = steps[next(i for i, step in enumerate(steps) if isinstance(step.modifier, Mask)) + 1 :]
    if learned is not None and added and any(isinstance(step.modifier, Clamp) for step in after):
        # At its bound, `clamp` passes the gradient on, and `maximum` a half of it.
        raise NotHidden("a row that sees no key is clamped after a mask was added")
    if learned is not None and not added:
        for step in after:
            if isinstance(step.modifier, Bias) and step.modifier.tensor in learned:
                raise NotHidden("a bias that wants a gradient is added to what a mask has filled")
    return "mean, added" if added else "mean"


def _shifted_between(steps: Sequence[Done]) -> bool:
    """Whether rows are shifted after a mask and before another one, or a bias, which is not swallowed then."""
    masks = [i for i, step in enumerate(steps) if isinstance(step.modifier, Mask)]
    first, *rest = [i for i, step in enumerate(steps) if isinstance(step.modifier, (Mask, Bias)) and i >= masks[0]]
    return bool(rest) and any(step.modifier is None for step in steps[first : rest[-1]])
