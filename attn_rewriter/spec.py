"""What an attention site computes, as one frozen value that knows nothing of graphs.

    weights = dropout(softmax(modifiers(query @ keyᵀ)))        output = gates(weights @ value)

The modifiers are an ordered tuple, because their order is part of the meaning (Gemma-2 caps its scores, then
masks them). With sinks, the softmax has one more score in each row, which takes its share of the weight and has no
value. Tensors appear by name; whoever holds the spec holds a mapping from these names to operands.

Layouts: query `[batch, num_heads, q_len, head_dim]`, key `[batch, num_kv_heads, kv_len, head_dim]`, value
`[batch, num_kv_heads, kv_len, head_dim_v]`; biases and masks broadcast to `[batch, num_heads, q_len, kv_len]`.
Head `h` of the query reads head `h // (num_heads // num_kv_heads)` of key and value.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Union

import sympy
import torch

Size = Union[int, sympy.Expr]
"""A dimension: a number, or under dynamic shapes an expression in the graph's size symbols."""


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value that their symbols can take."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


def at_most(a: Size, b: Size) -> bool:
    """Whether `a <= b` holds for every value that their symbols can take."""
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    return bool(sympy.expand(b - a).is_nonnegative)


# ---------------------------------------------------------------------------------------------------------------
# Masks: which keys a query may attend to


class Predicate:
    """A boolean function of (batch, head, query, key); true where a query attends to a key."""

    def __and__(self, other: Predicate) -> Predicate:
        return conjunction((self, other))

    def __or__(self, other: Predicate) -> Predicate:
        return ~(~self & ~other)

    def __invert__(self) -> Predicate:
        return self.term if isinstance(self, Not) else Not(self)

    def leaves(self) -> Iterator[Predicate]:
        yield self

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return self

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        """The simplest predicate that agrees with this one on `q_len` queries and `kv_len` keys."""
        return self


@dataclass(frozen=True)
class Always(Predicate):
    value: bool = True

    def __invert__(self) -> Predicate:
        return Always(not self.value)

    def __str__(self) -> str:
        return "every key" if self.value else "no key"


EVERY_KEY, NO_KEY = Always(True), Always(False)


@dataclass(frozen=True)
class Band(Predicate):
    """`lower <= key - query <= upper`; None leaves a side open.

    Causal attention aligned at the top left (PyTorch's `is_causal`) is `Band(None, 0)`, aligned at the bottom
    right (flash-attn's `causal`) `Band(None, kv_len - q_len)`. A sliding window of W keys, self included, has
    `lower = upper - (W - 1)`.
    """

    lower: Size | None = None
    upper: Size | None = None

    def __invert__(self) -> Predicate:
        below = None if self.lower is None else Band(None, self.lower - 1)
        above = None if self.upper is None else Band(self.upper + 1, None)
        sides = [side for side in (below, above) if side is not None]
        return NO_KEY if not sides else sides[0] if len(sides) == 1 else Not(self)

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        lower, upper = self.lower, self.upper
        if upper is not None and at_most(kv_len - 1, upper):
            upper = None
        if lower is not None and at_most(lower, 1 - q_len):
            lower = None
        return EVERY_KEY if lower is None and upper is None else Band(lower, upper)

    def __str__(self) -> str:
        if self.lower is None:
            return "causal" if self.upper == 0 else f"causal, offset {self.upper}"
        if self.upper is None:
            return f"keys from query{_signed(self.lower)} on"
        window = f"sliding window {self.upper - self.lower + 1}"
        return f"causal, {window}" if self.upper == 0 else f"{window}, keys to query{_signed(self.upper)}"


@dataclass(frozen=True)
class TensorMask(Predicate):
    """A boolean tensor that nothing more is known about than the axes it varies over."""

    tensor: Hashable
    axes: tuple[str, ...]

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return replace(self, tensor=names[self.tensor])

    def __str__(self) -> str:
        return "key padding" if self.axes == ("batch", "key") else f"mask tensor [{', '.join(self.axes)}]"


@dataclass(frozen=True)
class Not(Predicate):
    term: Predicate

    def leaves(self) -> Iterator[Predicate]:
        yield from self.term.leaves()

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return ~self.term.rename(names)

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        return ~self.term.within(q_len, kv_len)

    def __str__(self) -> str:
        if isinstance(self.term, And):
            return " or ".join(str(~term) for term in self.term.terms)
        return f"inverted {self.term}" if isinstance(self.term, TensorMask) else f"not ({self.term})"


@dataclass(frozen=True)
class And(Predicate):
    terms: tuple[Predicate, ...]

    def leaves(self) -> Iterator[Predicate]:
        for term in self.terms:
            yield from term.leaves()

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return conjunction(term.rename(names) for term in self.terms)

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        return conjunction(term.within(q_len, kv_len) for term in self.terms)

    def __str__(self) -> str:
        return " and ".join(str(term) for term in self.terms)


def conjunction(predicates: Any) -> Predicate:
    """`and` of any number of predicates, flattened; bands with comparable sides become one band."""
    terms: list[Predicate] = []
    for predicate in predicates:
        for term in predicate.terms if isinstance(predicate, And) else (predicate,):
            if term == NO_KEY:
                return NO_KEY
            if term == EVERY_KEY or term in terms:
                continue
            for i, other in enumerate(terms):
                if isinstance(term, Band) and isinstance(other, Band) and (met := _meet(term, other)):
                    terms[i] = met
                    break
            else:
                terms.append(term)
    terms.sort(key=lambda term: not isinstance(term, Band))
    return EVERY_KEY if not terms else terms[0] if len(terms) == 1 else And(tuple(terms))


def _meet(a: Band, b: Band) -> Band | None:
    def tighter(x: Size | None, y: Size | None, sign: int) -> Size | None:
        if x is None or y is None:
            return y if x is None else x
        if at_most(sign * x, sign * y):
            return x
        if at_most(sign * y, sign * x):
            return y
        raise ValueError("not comparable")

    try:
        return Band(tighter(a.lower, b.lower, -1), tighter(a.upper, b.upper, 1))
    except ValueError:
        return None


def _signed(offset: Size) -> str:
    return f"{offset:+d}" if isinstance(offset, int) else f" + {offset}"


# ---------------------------------------------------------------------------------------------------------------
# Score modifiers


@dataclass(frozen=True)
class Scale:
    """`score * factor`."""

    factor: float

    def __str__(self) -> str:
        return f"scale {self.factor:.4g}"


@dataclass(frozen=True)
class ScaleBy:
    """`score * factor`, or `score / factor` if `inverse`, by a tensor or a number that only the run knows. Where it
    does not vary over the keys (not `per_key`) it may be multiplied into the query, or, as a gate, into the output."""

    factor: Hashable
    inverse: bool = False
    per_key: bool = False

    def apply(self, x: Any, tensors: Any) -> Any:
        factor = tensors[self.factor]
        return x / factor if self.inverse else x * factor

    def __str__(self) -> str:
        return "scale tensor"


@dataclass(frozen=True)
class Bias:
    """`score + factor * tensor`."""

    tensor: Hashable
    factor: float = 1.0

    def __str__(self) -> str:
        return "bias"


@dataclass(frozen=True)
class Mask:
    """Scores outside `keep` become minus infinity (or a number so low that its exponential is zero).

    `tensor` is the mask as the model built it, `form` how to read it: "keep" and "drop" are boolean, true where a
    key is attended to or not; "additive" is a float with 0 where it is and at most `MASKED` where it is not.
    """

    tensor: Hashable
    keep: Predicate
    form: str

    def __str__(self) -> str:
        return str(self.keep)


@dataclass(frozen=True)
class Softcap:
    """`cap * tanh(score / cap)`, which keeps scores within ±cap (Gemma-2, https://arxiv.org/abs/2408.00118)."""

    cap: float

    def __str__(self) -> str:
        return f"softcap {self.cap:g}"


@dataclass(frozen=True)
class Clamp:
    """`min(max(score, lower), upper)`."""

    lower: float = -math.inf
    upper: float = math.inf

    def __str__(self) -> str:
        return f"clamp [{self.lower:g}, {self.upper:g}]"


Modifier = Union[Scale, ScaleBy, Bias, Mask, Softcap, Clamp]

MASKED = -1e9
"""An additive constant at or below this (in float16: at or below its lowest finite number) is read as a mask."""


@dataclass(frozen=True)
class AffineForm:
    """Modifiers in the one order that SDPA and its relatives compute:
    `query_scales(query) @ keyᵀ * scale + Σ factor * bias`, under one mask."""

    scale: float
    query_scales: tuple[ScaleBy, ...]
    biases: tuple[tuple[str, float], ...]
    masks: tuple[Mask, ...]
    keep: Predicate


@dataclass(frozen=True)
class AttentionSpec:
    """What a site computes. `modifiers` apply to `query @ keyᵀ` from left to right, `gates` to the output; `sinks` is
    the additional score of each row, a tensor's name or a number. With `zero_rows`, a row in which every key is masked
    gives zeros; otherwise such rows are unspecified."""

    modifiers: tuple[Modifier, ...] = ()
    dropout_p: float = 0.0
    sinks: str | float | None = None
    gates: tuple[ScaleBy, ...] = ()
    zero_rows: bool = False

    @property
    def numeric(self) -> frozenset[str]:
        """The names of the tensors whose values enter the arithmetic; those of masks only choose."""
        named = [m.tensor for m in self.modifiers if isinstance(m, Bias)]
        named += [m.factor for m in (*self.modifiers, *self.gates) if isinstance(m, ScaleBy)]
        return frozenset(name for name in (*named, self.sinks) if isinstance(name, str))

    @property
    def keep(self) -> Predicate:
        """What all masks together keep."""
        return conjunction(m.keep for m in self.modifiers if isinstance(m, Mask))

    def affine(self) -> AffineForm | str:
        """The modifiers as an `AffineForm`, or the reason why they are none."""
        scale = 1.0
        query_scales: list[ScaleBy] = []
        biases: list[tuple[str, float]] = []
        masks: list[Mask] = []
        for modifier in self.modifiers:
            match modifier:
                case Scale(factor):
                    scale *= factor
                    biases = [(name, f * factor) for name, f in biases]
                case ScaleBy():
                    if biases or modifier.per_key:
                        what = "that varies over the keys" if modifier.per_key else "after a bias"
                        return f"scores are scaled by a tensor {what}"
                    query_scales.append(modifier)
                case Bias(tensor, factor):
                    biases.append((str(tensor), factor))
                case Mask():
                    masks.append(modifier)
                case Softcap() | Clamp():
                    return f"scores go through {modifier}"
        return AffineForm(scale, tuple(query_scales), tuple(biases), tuple(masks), self.keep)

    def __str__(self) -> str:
        words = [str(modifier) for modifier in self.modifiers]
        if self.sinks is not None:
            words.append("sinks" if isinstance(self.sinks, str) else f"sink {self.sinks:g}")
        words += ["gate"] * len(self.gates)
        words = words or ["plain"]
        return ", ".join([*words, f"dropout {self.dropout_p:g}"] if self.dropout_p else words)


@dataclass(frozen=True)
class Shapes:
    """The sizes and types a site is used with; what a kernel needs besides the spec to say whether it can run."""

    batch: Size
    num_heads: Size
    num_kv_heads: Size
    q_len: Size
    kv_len: Size
    head_dim: Size
    head_dim_v: Size
    dtype: torch.dtype
    needs_backward: bool = False

    @property
    def num_groups(self) -> Size:
        """Query heads for each key/value head: 1 is multi-head attention, `num_heads` multi-query."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_gqa(self) -> bool:
        return not same(self.num_heads, self.num_kv_heads)

    @property
    def is_dynamic(self) -> bool:
        return not all(isinstance(size, int) for size in (self.batch, self.q_len, self.kv_len))

    def __str__(self) -> str:
        heads = f"{self.num_heads}" + (f"/{self.num_kv_heads}" if self.is_gqa else "")
        dims = f"{self.head_dim}" + (f"/{self.head_dim_v}" if not same(self.head_dim, self.head_dim_v) else "")
        return f"{self.batch}×{heads}×{self.q_len}×{self.kv_len}×{dims} {str(self.dtype).removeprefix('torch.')}"


def is_masking(value: float, dtype: torch.dtype) -> bool:
    """Whether adding `value` to a score of `dtype` means "do not attend" (see `MASKED`)."""
    return value <= max(MASKED, torch.finfo(dtype).min) and not math.isnan(value)
