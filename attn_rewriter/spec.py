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

import ast
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, reduce
from typing import Any, Literal, Union

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


AXES = ("batch", "head", "query", "key")
"""Of the scores."""


class Predicate:
    """A boolean function of (batch, head, query, key); true where a query attends to a key."""

    def __and__(self, other: Predicate) -> Predicate:
        return conjunction((self, other))

    def __or__(self, other: Predicate) -> Predicate:
        joined = _joined(self, other) if isinstance(self, Band) and isinstance(other, Band) else None
        return joined or ~(~self & ~other)

    def __xor__(self, other: Predicate) -> Predicate:
        return (self & ~other) | (~self & other)

    def __invert__(self) -> Predicate:
        return self.term if isinstance(self, Not) else Not(self)

    def tensors(self) -> Iterator[Hashable]:
        """The tensors that it reads; `rename` gives them names."""
        return (part.tensor for part in parts(self) if isinstance(part, (TensorMask, Values)))

    def sizes(self) -> Iterator[sympy.Expr]:
        """The sizes in it that only the run knows."""
        return (part for part in parts(self) if isinstance(part, sympy.Expr))

    def varies_over(self) -> frozenset[str]:
        """The axes over which it may vary."""
        return frozenset(_axes(self))

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return self

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        """The simplest predicate that agrees with this one on `q_len` queries and `kv_len` keys."""
        return self

    def reach(self, q_len: Size, kv_len: Size, at_most: Callable[[Size, Size], bool] = at_most) -> Size:
        """Up to how many of the `kv_len` keys, counted from the first, `q_len` queries may see; at least one."""
        return kv_len


def parts(value: Any) -> Iterator[Any]:
    """A value and everything inside of it."""
    yield value
    held = (getattr(value, field.name) for field in fields(value)) if is_dataclass(value) else value
    if is_dataclass(value) or isinstance(value, tuple):
        for part in held:
            yield from parts(part)


@dataclass(frozen=True)
class Values:
    """The integers of a tensor that nothing more is known about than the axes it varies over."""

    tensor: Hashable
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"tensor[{', '.join(self.axes)}]"


@dataclass(frozen=True)
class Quotient:
    """`of // divisor`, rounded down; the divisor is positive."""

    of: Index
    divisor: int

    def __str__(self) -> str:
        return (
            f"{self.of} // {self.divisor}"
            if len(self.of.terms) == 1 and not self.of.offset
            else (f"({self.of}) // {self.divisor}")
        )


@dataclass(frozen=True)
class Index:
    """`offset + Σ coefficient * term`: an integer at coordinates.

    A term is a coordinate, which a spec calls by its axis ("batch", "head", "query", "key"), or `Values`, or a
    `Quotient`. While a mask is read, coordinates are what the reader tracks, and a lone offset may be of any type.
    """

    offset: Any = 0
    terms: tuple[tuple[Any, int], ...] = ()

    def __add__(self, other: Index) -> Index:
        terms = dict(self.terms)
        for term, coefficient in other.terms:
            terms[term] = terms.get(term, 0) + coefficient
        return Index(_plain(self.offset + other.offset), tuple((t, c) for t, c in terms.items() if c != 0))

    def __mul__(self, factor: Any) -> Index:
        return Index(_plain(self.offset * factor), tuple((t, c * factor) for t, c in self.terms if factor != 0))

    def __neg__(self) -> Index:
        return self * -1

    def leaves(self) -> Iterator[Any]:
        """Coordinates and values, those inside of quotients too."""
        for term, _ in self.terms:
            yield from term.of.leaves() if isinstance(term, Quotient) else (term,)

    def values(self) -> Iterator[Values]:
        return (leaf for leaf in self.leaves() if isinstance(leaf, Values))

    def substitute(self, function: Callable[[Any], Any]) -> Index:
        """With another leaf for each of the `leaves`; sorted, so that equal ones are the same."""
        terms = [
            (Quotient(t.of.substitute(function), t.divisor) if isinstance(t, Quotient) else function(t), c)
            for t, c in self.terms
        ]
        return Index(self.offset, tuple(sorted(terms, key=str)))

    def bounds(self, size: Callable[[Any], Size | None]) -> tuple[Size, Size] | None:
        """The least and the largest value, given the size of each coordinate; None where that is not known."""
        low = high = self.offset
        for term, coefficient in self.terms:
            if isinstance(term, Quotient):
                inner = term.of.bounds(size)
                if inner is None or not all(isinstance(bound, int) for bound in inner):
                    return None
                reach = tuple(bound // term.divisor for bound in inner)
            else:
                n = None if isinstance(term, Values) else size(term)
                if n is None:
                    return None
                reach = (0, n - 1)
            least, most = (coefficient * bound for bound in (reach if coefficient > 0 else reach[::-1]))
            low, high = low + least, high + most
        return low, high

    def __str__(self) -> str:
        words = [_times(term, coefficient) for term, coefficient in self.terms]
        if self.offset != 0 or not words:
            words.append(str(self.offset))
        return " + ".join(words).replace("+ -", "- ")


def _plain(number: Any) -> Any:
    """A whole number that came out of symbols as Python has it: sizes are told apart by their type."""
    return int(number) if isinstance(number, sympy.Integer) else number


def _times(term: Any, coefficient: int) -> str:
    word = f"({term})" if isinstance(term, Quotient) and coefficient not in (1, -1) else str(term)
    return {1: word, -1: f"-{word}"}.get(coefficient, f"{coefficient} * {word}")


def _with_axis(index: Index, old: str = "", new: str = "") -> Index:
    """The same at another coordinate, tensors being told apart by their axes alone."""

    def moved(term: Any) -> Any:
        if isinstance(term, Values):
            return Values("", tuple(new if axis == old else axis for axis in term.axes))
        return new if term == old else term

    return index.substitute(moved)


def always(
    bounds: tuple[Size, Size] | None, relation: str, at_most: Callable[[Size, Size], bool] = at_most
) -> Predicate | None:
    """Whether a difference within these bounds is `relation` zero; None where that is not known or varies."""
    if bounds is None:
        return None
    low, high = bounds
    if relation == "ne":
        known = always(bounds, "eq", at_most)
        return None if known is None else ~known
    if relation == "eq":
        if at_most(1, low) or at_most(high, -1):
            return NO_KEY
        return EVERY_KEY if same(low, 0) and same(high, 0) else None
    limit = 0 if relation == "le" else -1
    return EVERY_KEY if at_most(high, limit) else NO_KEY if at_most(limit + 1, low) else None


def compared(left: Index, right: Index, relation: str) -> Predicate:
    """`left relation right` in its simplest form, `relation` being "le", "lt" or "eq".

    Sums of coordinates are small, and may be moved from side to side; sums with values of tensors wrap around where
    the model's own do, if they stay as they are.
    """
    if left == right:
        return NO_KEY if relation == "lt" else EVERY_KEY
    if any(left.values()) or any(right.values()):
        if relation == "eq" and "key" not in _axes(left):
            left, right = right, left
        return Compare(left, right, relation)
    difference = left + -right
    if relation == "lt":
        difference, relation = difference + Index(1), "le"
    coefficients, offset = dict(difference.terms), difference.offset
    if coefficients == {"key": 1, "query": -1}:
        return Band(-offset if relation == "eq" else None, -offset)
    if coefficients == {"key": -1, "query": 1}:
        return Band(offset, offset if relation == "eq" else None)
    less = Index(0, tuple((t, c) for t, c in difference.terms if c > 0))
    if relation == "eq" and "key" not in _axes(less) and ("key" in _axes(difference) or not less.terms):
        return compared(right, left, relation)
    more = Index(-difference.offset, tuple((t, -c) for t, c in difference.terms if c < 0))
    if not less.terms:
        less, more = Index(-more.offset), Index(0, more.terms)
    return Compare(less, more, relation)


def _axes(value: Predicate | Index) -> set[str]:
    """The axes that a predicate or an integer varies over."""
    found: set[str] = set()
    for part in parts(value):
        match part:
            case Band():
                found |= {"query", "key"}
            case TensorMask(axes=axes) | Values(axes=axes):
                found |= {*axes}
            case Index(terms=terms):
                found |= {term for term, _ in terms if isinstance(term, str)}
    return found


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
        sides = _outside(self)
        return NO_KEY if not sides else sides[0] if len(sides) == 1 else Not(self)

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        lower, upper = self.lower, self.upper
        if upper is not None and at_most(kv_len - 1, upper):
            upper = None
        if lower is not None and at_most(lower, 1 - q_len):
            lower = None
        return EVERY_KEY if lower is None and upper is None else Band(lower, upper)

    def reach(self, q_len: Size, kv_len: Size, at_most: Callable[[Size, Size], bool] = at_most) -> Size:
        last = kv_len if self.upper is None else _plain(q_len + self.upper)
        return last if at_most(1, last) and at_most(last, kv_len) else kv_len

    def __str__(self) -> str:
        if self.lower is None:
            return "causal" if self.upper == 0 else f"causal, offset {self.upper}"
        if self.upper is None:
            return f"keys from query{_signed(self.lower)} on"
        window = f"sliding window {self.upper - self.lower + 1}"
        return f"causal, {window}" if self.upper == 0 else f"{window}, keys to query{_signed(self.upper)}"


def _outside(band: Band) -> list[Band]:
    """What lies below a band, and what lies above it."""
    below = None if band.lower is None else Band(None, band.lower - 1)
    above = None if band.upper is None else Band(band.upper + 1, None)
    return [side for side in (below, above) if side is not None]


@dataclass(frozen=True)
class Compare(Predicate):
    """`left <= right`, `left < right`, `left == right` or `left != right`, for what no `Band` says.

    Sides that hold values of tensors are evaluated as they are, in 64 bits; others are in the form that `compared`
    gives them.
    """

    left: Index
    right: Index
    relation: str

    def __invert__(self) -> Predicate:
        if self.relation in ("eq", "ne"):
            return replace(self, relation="ne" if self.relation == "eq" else "eq")
        return compared(self.right, self.left, "lt" if self.relation == "le" else "le")

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        def renamed(term: Any) -> Any:
            return replace(term, tensor=names[term.tensor]) if isinstance(term, Values) else term

        return replace(self, left=self.left.substitute(renamed), right=self.right.substitute(renamed))

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        if any(self.left.values()) or any(self.right.values()):  # of which the sums may wrap around
            return self
        known = always((self.left + -self.right).bounds({"query": q_len, "key": kv_len}.get), self.relation)
        return self if known is None else known

    def __str__(self) -> str:
        sign = {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}[self.relation]
        return self._in_words() or f"{self.left} {sign} {self.right}"

    def _in_words(self) -> str | None:
        """What a mask of this form is called."""
        left, right = self.left, self.right
        across = "key" in _axes(left) and _with_axis(left, "key", "query") == _with_axis(right)
        behind = "query" in _axes(left) and _with_axis(left, "query", "key") == _with_axis(right) + Index(left.offset)
        match self.relation, left.terms, right.terms:
            case "le", (("key", 1),), () if not left.offset:
                return f"prefix {right.offset + 1}"
            case "le", (("query", 1),), () if not left.offset:
                return f"queries below {right.offset + 1}"
            case "le", (), ((("key" | "query") as axis, 1),) if not right.offset:
                return f"{'keys' if axis == 'key' else 'queries'} from {left.offset}"
            case "ne", ((Values(axes=("batch", "key")), 1),), () if left.offset == right.offset == 0:
                return "key padding"
            case "lt", (("key", 1),), ((Values(axes=("batch",)), 1),) if left.offset == right.offset == 0:
                return "key lengths"
            case "le", (("key", 1),), ((Values() as values, 1),) if left.offset == right.offset == 0:
                return "causal, positions tensor" if "query" in values.axes else None
            case "le", (("key", 1),), (("query", 1), (Values() as values, 1)) if left.offset == right.offset == 0:
                return None if "query" in values.axes else "causal, offset tensor"
            case "le", ((Values(), 1),), ((Values(), 1),) if across:
                return "causal, positions tensor"
            case "lt", ((Values(), 1),), ((Values(), 1),) if behind and at_most(left.offset, -1):
                return f"sliding window {-left.offset}, positions tensor"
            case "eq", ((Values(), 1),), ((Values(), 1),) if across:
                return "documents"
            case "eq", ((Quotient(of, divisor), 1),), _ if across:
                return f"chunks of {divisor}" + (", offset tensor" if any(of.values()) else "")
        return None


@dataclass(frozen=True)
class TensorMask(Predicate):
    """A boolean tensor that nothing more is known about than the axes it varies over; or an additive one, zero where
    the predicate is true."""

    tensor: Hashable
    axes: tuple[str, ...]
    additive: bool = False

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return replace(self, tensor=names[self.tensor])

    def __str__(self) -> str:
        return "key padding" if self.axes == ("batch", "key") else f"mask tensor [{', '.join(self.axes)}]"


@dataclass(frozen=True)
class Not(Predicate):
    term: Predicate

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

    def rename(self, names: dict[Hashable, str]) -> Predicate:
        return conjunction(term.rename(names) for term in self.terms)

    def within(self, q_len: Size, kv_len: Size) -> Predicate:
        return conjunction(term.within(q_len, kv_len) for term in self.terms)

    def reach(self, q_len: Size, kv_len: Size, at_most: Callable[[Size, Size], bool] = at_most) -> Size:
        return reduce(lambda seen, term: term.reach(q_len, seen, at_most), self.terms, kv_len)

    def __str__(self) -> str:
        return " and ".join(str(term) for term in self.terms)


def conjunction(predicates: Any) -> Predicate:
    """`and` of any number of predicates, flattened; bands with comparable sides become one band, and what one term says
    is not asked again in another, negated one: `a and not (a and b)` is `a and not b`."""
    terms: list[Predicate] = []
    for predicate in predicates:
        for term in predicate.terms if isinstance(predicate, And) else (predicate,):
            if term == NO_KEY:
                return NO_KEY
            if term == EVERY_KEY or term in terms:
                continue
            if ~term in terms:
                return NO_KEY
            for i, other in enumerate(terms):
                if isinstance(term, Band) and isinstance(other, Band) and (met := _met(term, other)):
                    if met == NO_KEY:
                        return NO_KEY
                    terms[i] = met
                    break
            else:
                terms.append(term)
    for i, term in enumerate(terms):
        if isinstance(term, Not) and isinstance(term.term, And):
            others = terms[:i] + terms[i + 1 :]
            left = [inner for inner in term.term.terms if not any(_implies(other, inner) for other in others)]
            if len(left) < len(term.term.terms):
                return conjunction([*others, ~conjunction(left)])
    terms.sort(key=lambda term: not isinstance(term, Band))
    return EVERY_KEY if not terms else terms[0] if len(terms) == 1 else And(tuple(terms))


def _implies(a: Predicate, b: Predicate) -> bool:
    """Whether `b` is known to hold wherever `a` does."""
    return a == b or (isinstance(a, Band) and isinstance(b, Band) and _met(a, b) == a)


def _met(a: Band, b: Band) -> Predicate | None:
    """The keys in both bands, where that is known to be a band."""
    lower, upper = _tightest(-1, a.lower, b.lower), _tightest(1, a.upper, b.upper)
    if lower is _UNKNOWN or upper is _UNKNOWN:
        return None
    empty = lower is not None and upper is not None and at_most(upper + 1, lower)
    return NO_KEY if empty else Band(lower, upper)


def _joined(a: Band, b: Band) -> Predicate | None:
    """The keys in either band, where that is known to be a band: they overlap, or one begins where the other ends."""
    for one, other in ((a, b), (b, a)):
        if one.upper is not None and other.lower is not None and not at_most(other.lower, one.upper + 1):
            return None
    lower, upper = _loosest(-1, a.lower, b.lower), _loosest(1, a.upper, b.upper)
    if lower is _UNKNOWN or upper is _UNKNOWN:
        return None
    return EVERY_KEY if lower is None and upper is None else Band(lower, upper)


_UNKNOWN: Any = object()


def _tightest(sign: int, x: Size | None, y: Size | None) -> Any:
    """The tighter of two sides (upper ones with `sign` 1, lower ones with -1), of which None is the loosest."""
    if x is None or y is None:
        return y if x is None else x
    return x if at_most(sign * x, sign * y) else y if at_most(sign * y, sign * x) else _UNKNOWN


def _loosest(sign: int, x: Size | None, y: Size | None) -> Any:
    return None if x is None or y is None else _tightest(-sign, x, y)


def _signed(offset: Size) -> str:
    return f"{offset:+d}" if isinstance(offset, int) else f" + {offset}"


def every_row_sees_a_key(
    keep: Predicate,
    sizes: Mapping[str, Size],
    at_query: Callable[[Values], Values] = lambda values: values,
    at_most: Callable[[Size, Size], bool] = at_most,
) -> bool:
    """Whether it is known that each query sees at least one key, `sizes` being those of the axes.

    It is known where one key serves as a witness for all queries: the first, the last, or the one at a fixed distance
    from the query. `at_query` gives what values of a tensor, which vary over the keys, are at the query's own position.
    """
    keep = keep.within(sizes["query"], sizes["key"])
    bands = [part for part in parts(keep) if isinstance(part, Band)]
    distances = dict.fromkeys([0, *(side for band in bands for side in (band.lower, band.upper) if side is not None)])
    query = Index(0, (("query", 1),))
    witnesses = [Index(0), Index(sizes["key"] - 1)]
    witnesses += [query + Index(n) for n in distances if at_most(0, n) and at_most(sizes["query"] + n, sizes["key"])]
    return any(_sees(keep, key, sizes, at_query, at_most) for key in witnesses)


def _sees(
    keep: Predicate,
    key: Index,
    sizes: Mapping[str, Size],
    at_query: Callable[[Values], Values],
    at_most: Callable[[Size, Size], bool],
) -> bool:
    """Whether it is known that every query sees this key, a function of the query."""

    def at_key(index: Index) -> Index:
        total = Index(index.offset)
        for term, coefficient in index.terms:
            if term == "key":
                total += key * coefficient
            elif isinstance(term, Quotient):
                total += Index(0, ((Quotient(at_key(term.of), term.divisor), coefficient),))
            elif isinstance(term, Values) and key == Index(0, (("query", 1),)):
                total += Index(0, ((at_query(term), coefficient),))
            else:
                total += Index(0, ((term, coefficient),))
        return total

    def always_holds(difference: Index, relation: str) -> bool:
        return always(difference.bounds(lambda leaf: sizes.get(leaf)), relation, at_most) == EVERY_KEY

    match keep:
        case And(terms):
            return all(_sees(term, key, sizes, at_query, at_most) for term in terms)
        case Not(And(terms)):
            return any(_sees(~term, key, sizes, at_query, at_most) for term in terms)
        case Not(Band() as band):
            return any(_sees(side, key, sizes, at_query, at_most) for side in _outside(band))
        case Band(lower, upper):
            distance = key + Index(0, (("query", -1),))
            below = lower is None or always_holds(Index(lower) + -distance, "le")
            return below and (upper is None or always_holds(distance + Index(-upper), "le"))
        case Compare(left, right, relation):
            difference = at_key(left) + -at_key(right)
            wraps = any(left.values()) or any(right.values())  # sums with values of tensors may, unless they are equal
            return (not wraps or difference == Index(0)) and always_holds(difference, relation)
        case Always(value):
            return value
    return False  # what a tensor holds is not known


_PARTS = {part.__name__: part for part in (Always, And, Band, Compare, Index, Not, Quotient, TensorMask, Values)}
"""What predicates are made of."""


def predicate_to_text(predicate: Predicate | None) -> str:
    """A predicate of known sizes and named tensors as text, for operators, which take no other values than PyTorch's.
    Its parts are tuples that begin with their name, and its tuples are lists."""
    return repr(_to_literal(predicate))


def _to_literal(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is tuple:
        return [_to_literal(item) for item in value]
    if type(value) in _PARTS.values():
        return (type(value).__name__, *(_to_literal(getattr(value, field.name)) for field in fields(value)))
    raise TypeError(f"no text says what {value!r} is, a {type(value).__name__} in a predicate")


@lru_cache
def predicate_from_text(text: str) -> Predicate | None:
    """The predicate, or None, that `predicate_to_text` wrote."""
    found = _from_literal(ast.literal_eval(text))
    if found is not None and not isinstance(found, Predicate):
        raise ValueError(f"{text!r} is no predicate")
    return found


def _from_literal(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_literal, value))
    if isinstance(value, tuple):
        name, *held = value or ("",)
        part = _PARTS.get(name) if isinstance(name, str) else None
        if part is None or len(held) != len(fields(part)):
            raise ValueError(f"{value!r} is no part of a predicate")
        return part(*map(_from_literal, held))
    if value is None or type(value) in (bool, int, str):
        return value
    raise ValueError(f"{value!r} is no part of a predicate")


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
        factor = tensors[self.factor] if isinstance(self.factor, str) else self.factor
        return x / factor if self.inverse else x * factor

    def __str__(self) -> str:
        return "scale tensor"


@dataclass(frozen=True)
class Bias:
    """`score + factor * tensor`; `axes` are those that the tensor varies over. It `may_mask` where nothing is known of
    its contents: a mask that a caller hands in."""

    tensor: Hashable
    factor: float = 1.0
    axes: tuple[str, ...] = AXES
    may_mask: bool = False

    def __str__(self) -> str:
        return "bias"


@dataclass(frozen=True)
class Mask:
    """Scores outside `keep` become so low that nobody attends (`attn_rewriter.hidden`).

    `tensor` is the mask as the model built it, `form` how to read it: "keep" and "drop" are boolean, true where a
    key is attended to or not; "additive" is a float with 0 where it is. `fills` are the numbers, one or more, that take
    the place of hidden scores, or in the additive form are added to them.
    """

    tensor: Hashable
    keep: Predicate
    form: str
    fills: tuple[float, ...] = (-math.inf,)

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

FullyMasked = Literal["impossible", "zeros", "nan", "mean", "mean, added", "by fill"]
"""What a row of the output is in which every key is masked. "impossible": there is none. "zeros", "nan": these.
"mean": the mean of all values, as eager code has it where a finite number took the place of the scores; the scores get
no gradient. "mean, added": the same where the number was added to the scores, which get the gradient of equal weights.
"by fill": the mean of the values of those keys whose fill is the highest."""


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
    the additional score of each row, a tensor's name or a number. `fully_masked_rows` says what rows are in which every
    key is masked; with sinks, which then take all of the weight, these are zero by themselves."""

    modifiers: tuple[Modifier, ...] = ()
    dropout_p: float = 0.0
    sinks: str | float | None = None
    gates: tuple[ScaleBy, ...] = ()
    fully_masked_rows: FullyMasked = "impossible"

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

    @property
    def may_mask(self) -> bool:
        """Whether a bias may hide all keys of a row."""
        return self.sinks is None and any(isinstance(m, Bias) and m.may_mask for m in self.modifiers)

    @property
    def hides_over(self) -> frozenset[str]:
        """The axes over which it varies which keys are hidden."""
        axes = {axis for m in self.modifiers if isinstance(m, Bias) and m.may_mask for axis in m.axes}
        return frozenset(axes | self.keep.varies_over())

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

    def is_plain(self, shapes: Shapes) -> bool:
        """Whether the scores are but scaled, and hidden, if at all, causally from the top left: what flash attention
        takes without a tensor."""
        form = self.affine()
        if isinstance(form, str) or form.biases or self.sinks is not None:
            return False
        return self.keep.within(shapes.q_len, shapes.kv_len) in (EVERY_KEY, Band(None, 0))

    def __str__(self) -> str:
        words = [str(modifier) for modifier in self.modifiers]
        if self.sinks is not None:
            words.append("sinks" if isinstance(self.sinks, str) else f"sink {self.sinks:g}")
        words += ["gate"] * len(self.gates)
        words = words or ["plain"]
        return ", ".join([*words, f"dropout {self.dropout_p:g}"] if self.dropout_p else words)


@dataclass(frozen=True)
class Shapes:
    """The sizes and types a site is used with; what a kernel needs besides the spec to say whether it can run.

    `dtype` is the type that holds all operands, `product_dtype` that of query, key and value where biases are wider
    than they (None: the same). `learned` are the names of the spec's tensors that want gradients.
    """

    batch: Size
    num_heads: Size
    num_kv_heads: Size
    q_len: Size
    kv_len: Size
    head_dim: Size
    head_dim_v: Size
    dtype: torch.dtype
    needs_backward: bool = False
    product_dtype: torch.dtype | None = None
    learned: tuple[str, ...] = ()

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
