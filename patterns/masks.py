"""Reading what a mask says: integer, boolean and mask-valued tensors as functions of (batch, head, query, key).

A node is read *at coordinates*: `arange(n)[None, :] <= arange(n)[:, None]`, read at (query, key), is
`key <= query`. Whatever selects, shifts or broadcasts (indexing, slices, expand, transposes) only rewrites the
coordinates, so that it does not matter how a model spells its mask. What can't be read stays a tensor: it is kept,
never guessed. Transformers v5 builds its masks this way inside the graph (`masking_utils.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple, Union

import sympy
import torch
from torch.fx import Node

from attn_rewriter.buffers import buffer_of
from attn_rewriter.errors import Refused
from attn_rewriter.graph import Call, Facts, has_memory, is_inplace, same_storage, same_view, shape, size, tensor
from attn_rewriter.hidden import is_masking
from attn_rewriter.patterns.axes import Atom, Dim, Dims, extent, leaves
from attn_rewriter.spec import (
    EVERY_KEY,
    NO_KEY,
    And,
    Index,
    Not,
    Predicate,
    Quotient,
    Size,
    TensorMask,
    Values,
    always,
    at_most,
    compared,
    same,
)


class Unreadable(Exception):
    """This expression has no reading; a boolean tensor around it may still be taken as it is."""


@dataclass(frozen=True)
class Where:
    """`then` where the condition holds, `otherwise` elsewhere."""

    condition: Predicate
    then: Value
    otherwise: Value


Value = Union[Index, Where, Predicate]


def apply(function: Callable[..., Any], *values: Value) -> Value:
    """A function of constants, applied to values that are constants under conditions."""
    for i, value in enumerate(values):
        if isinstance(value, Predicate):
            value = Where(value, Index(True), Index(False))
        if isinstance(value, Where):
            then = apply(function, *values[:i], value.then, *values[i + 1 :])
            otherwise = apply(function, *values[:i], value.otherwise, *values[i + 1 :])
            return then if _is_one(then, otherwise) else Where(value.condition, then, otherwise)
    return function(*values)


def _is_one(a: Value, b: Value) -> bool:
    """Whether two values are the same, and not zeros of different sign, of which the reciprocals differ."""
    if isinstance(a, Where) and isinstance(b, Where):
        return a.condition == b.condition and _is_one(a.then, b.then) and _is_one(a.otherwise, b.otherwise)
    if isinstance(a, Index) and isinstance(b, Index) and isinstance(a.offset, float) and isinstance(b.offset, float):
        return a == b and math.copysign(1, a.offset) == math.copysign(1, b.offset)
    return a == b


def compare(left: Index, right: Index, name: str, alone: bool = True) -> Predicate:
    """`left name right` for the canonical comparisons; `alone` where nothing but these was compared."""
    if name in ("gt", "ge"):
        left, right, name = right, left, {"gt": "lt", "ge": "le"}[name]
    if name == "ne":
        return ~compare(left, right, "eq", alone)
    if (
        not left.terms
        and not right.terms
        and isinstance(left.offset, (int, float))
        and isinstance(right.offset, (int, float))
    ):
        return EVERY_KEY if getattr(operator, name)(left.offset, right.offset) else NO_KEY
    left, right = _whole_number(left), _whole_number(right)
    if not (_integral(left.offset) and _integral(right.offset)):
        raise Unreadable("a comparison of positions with a fraction")
    reads_values = any(left.values()) or any(right.values())  # of which the sums may wrap around
    known = None if reads_values else always(_bounds(left + -right), name)
    if known is not None:
        return known
    held = [*{*left.leaves(), *right.leaves()}]
    if alone and len(held) == 1 and isinstance(held[0], Values):
        raise Unreadable("values of a tensor that nothing is known about: what they say is a tensor, too")
    return compared(left.substitute(_in_spec), right.substitute(_in_spec), name)


@dataclass(frozen=True)
class Rounded:
    """The integers of a tensor, each rounded to a floating point type: a number may be added, and the sum be compared
    with another one."""

    values: Values
    dtype: torch.dtype


def _is_rounded(index: Index) -> bool:
    return any(isinstance(leaf, Rounded) for leaf in index.leaves())


def _in_spec(leaf: Any) -> Any:
    if isinstance(leaf, Rounded):
        raise Unreadable(f"values of a tensor as {leaf.dtype}")
    if isinstance(leaf, Atom):
        if leaf.name not in ("batch", "head", "query", "key"):
            raise Unreadable(f"a part of an axis, {leaf.name}")
        return leaf.name
    return leaf


def _bounds(index: Index) -> tuple[Size, Size] | None:
    return index.bounds(lambda leaf: leaf.size if isinstance(leaf, Atom) else None)


Computation = Callable[["list[Index]", "tuple[Index, ...]", torch.dtype], "Value"]
"""Computes with numbers and positions of one type; it is also given what these were before they were converted."""


@dataclass
class MaskReader:
    """Reads nodes of one graph (and of the graphs around it) at coordinates; remembers what it read."""

    facts: Facts
    until: Node
    memo: dict[Any, Value] = field(default_factory=dict)
    levels: dict[int, Index] = field(default_factory=dict)  # of `torch.vmap`: the coordinate that each stands for

    def boolean(self, node: Node, dims: Dims) -> Predicate:
        """A boolean tensor; one that can't be read further is a `TensorMask` of the node itself."""
        try:
            keep = predicate(self.read(self.facts, node, coordinates(dims), self.until))
        except (Unreadable, Refused):
            return TensorMask((node, dims), axes(dims))
        return self._held(keep, node, dims)

    def additive(self, node: Node, dims: Dims, dtype: torch.dtype) -> Additive | None:
        """What a float tensor keeps and adds elsewhere, if it is everywhere zero or masking (`is_masking`)."""
        fills: set[float] = set()
        try:
            keep = _kept(self.read(self.facts, node, coordinates(dims), self.until), dtype, fills)
        except (Unreadable, Refused):
            return None
        if keep is None:
            return None
        return Additive(self._held(keep, node, dims), tuple(sorted(fills)) or (-math.inf,))

    def _held(self, keep: Predicate, node: Node, dims: Dims) -> Predicate:
        """What `node` keeps, without tensors of the graphs around this one, which can't be operands here.

        The mask itself takes the place of each of them and of its negation: what is built of these by `and` and `or`
        alone grows with them, so that `mask = f(a, ~b)` is also `f(mask, mask)`.
        """
        whole = TensorMask((node, dims), axes(dims), additive=_dtype(node) != torch.bool)

        def rewritten(part: Predicate, negated: bool) -> Predicate:
            if isinstance(part, Not):
                return rewritten(part.term, not negated)
            if isinstance(part, And):
                joined = operator.or_ if negated else operator.and_
                return reduce(joined, (rewritten(term, negated) for term in part.terms))
            if any(held[0].graph is not self.facts.graph for held in part.tensors()):  # type: ignore[index]
                return whole
            return ~part if negated else part

        return rewritten(keep, False)

    def constant(self, value: Any, at: Node) -> float | None:
        """A number, also where it is spelled as a tensor of one element."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, Node):
            return None
        held = value.meta.get("example_value")
        if isinstance(held, (int, float)):
            return float(held)
        if isinstance(held, (torch.SymInt, torch.SymFloat)):  # a number all the same where Dynamo guards on its value
            return float(held.node.expr) if held.node.expr.is_number else None
        if tensor(value) is None or any(n != 1 for n in shape(value)):
            return None
        try:
            read = self.read(self.facts, value, (Index(),) * len(shape(value)), at)
        except (Unreadable, Refused):
            return None
        constant = isinstance(read, Index) and not read.terms and isinstance(read.offset, (int, float))
        return float(read.offset) if constant else None  # type: ignore[union-attr]

    def read(self, facts: Facts, node: Any, at: tuple[Index, ...], before: Node) -> Value:
        """The value of `node`, as seen by `before`, at coordinates."""
        if not isinstance(node, Node):
            return literal(node)
        if tensor(node) is None:
            return literal(size(node))
        end = facts.position[before]
        return self._after(facts, node, at, [w for w in facts.writes(node) if facts.position[w] < end])

    def _after(self, facts: Facts, node: Node, at: tuple[Index, ...], writes: Sequence[Node]) -> Value:
        """The value of a tensor after what was written into its memory."""
        writes = [w for w in writes if facts.position[node] < facts.position[w]]
        if writes and same_view(writes[-1], node):  # which reads what was there before by itself
            node, writes = writes[-1], []
        key = (node, at, writes[-1] if writes else None, *self.levels.items())
        if key not in self.memo:
            self.memo[key] = self._written(facts, node, at, writes) if writes else self._read(facts, node, at)
        return self.memo[key]

    def _written(self, facts: Facts, node: Node, at: tuple[Index, ...], writes: Sequence[Node]) -> Value:
        """The same, where the last write went into a part of the tensor."""
        last, dtype = writes[-1], _dtype(node)
        _check_no_element_twice(node)
        if last.target is operator.setitem:
            base, index, value = last.args
            inside, there = self._place(facts, base, node, at)
            here, there = _selected(index, there, shape(base))  # type: ignore[arg-type]
            if tensor(value) is not None and (same_storage(value, node) or len(shape(value)) > len(there)):  # type: ignore[arg-type]
                raise Unreadable("a part of a tensor that is written into another part")
            inside &= here
            new = self.converted(facts, last, value, there, dtype)
        elif is_inplace(last) and last.args and "out" not in last.kwargs:
            inside, there = self._place(facts, last.args[0], node, at)
            new = self._after(facts, last, there, ())
        else:
            raise Unreadable(f"a write by {last.target}")
        return as_dtype(_where(inside, new, self._after(facts, node, at, writes[:-1])), dtype)

    def _place(self, facts: Facts, view: Any, node: Node, at: tuple[Index, ...]) -> tuple[Predicate, tuple[Index, ...]]:
        """Whether coordinates of a tensor lie in a view of it, and where they are there."""
        if isinstance(view, Node) and same_view(view, node):
            return EVERY_KEY, at
        call = facts.call(view)
        if call is None or call.name != "getitem":
            raise Unreadable("a write into what is no slice")
        _check_no_element_twice(view)
        inside, there = self._place(facts, call["input"], node, at)
        here, there = _selected(call["index"], there, shape(call["input"]))
        return inside & here, there

    def _read(self, facts: Facts, node: Node, at: tuple[Index, ...]) -> Value:
        dims = _whole(at, shape(node))
        if not has_memory(node) or (facts is self.facts and not facts.unchanged(node, self.until)):
            dims = None  # it can't be an operand
        try:
            value = as_dtype(self._followed(facts, node, at), _dtype(node))
        except (Unreadable, Refused):
            return self._opaque(node, dims)
        foreign = node.op == "placeholder" and facts is self.facts
        if isinstance(value, Predicate):
            return self._held(value, node, dims) if foreign and dims is not None else value
        # Integers that depend on a tensor's are best taken from this node, unless they are a mere sum.
        is_own = dims is not None and _dtype(node) in _INTEGERS
        if is_own and _reads_values(value) and (foreign or isinstance(value, Where)):
            return self._opaque(node, dims)
        return value

    def _followed(self, facts: Facts, node: Node, at: tuple[Index, ...]) -> Value:
        """What the node's operation makes of its arguments."""
        if node.op == "placeholder":
            given = facts.argument(node)
            if given is None or facts.outer is None or facts.caller is None:
                return self._buffer(facts, node, at)
            return self.read(facts.outer, given, at, facts.caller)
        call = facts.call(node)
        rule = _RULES.get(call.name) if call is not None else None
        if call is None or rule is None:
            raise Unreadable(f"{node.target}")
        return rule(self, facts, node, call, at)

    def _buffer(self, facts: Facts, node: Node, at: tuple[Index, ...]) -> Value:
        """The contents of a registered buffer, which the models of GPT-2's time have for their masks, or of a mask that
        was made elsewhere."""
        buffer = buffer_of(node)
        held = buffer.read() if buffer is not None and facts.unchanged(node) else None
        if held is None:
            raise Unreadable("an input of the graph")
        inside: Predicate = EVERY_KEY
        if held.scattered:
            dims = _whole(at, shape(node))
            if dims is None:
                raise Unreadable("a part of what is masked here and there")
            inside = TensorMask((node, dims), axes(dims), additive=True)
        row, column = (Index(), Index(), *at)[-2:]
        if held.lower is not None:
            inside &= compare(column + -row, Index(held.lower), "ge")
        if held.upper is not None:
            inside &= compare(column + -row, Index(held.upper), "le")
        return _where(inside, Index(held.inside), Index(held.outside))

    def _opaque(self, node: Node, dims: Dims | None) -> Value:
        """What nothing more is known about: a tensor's booleans or integers, if it is read whole and straight."""
        if dims is None or _dtype(node) not in (torch.bool, *_INTEGERS):
            raise Unreadable(f"what {node} holds")
        if _dtype(node) == torch.bool:
            return TensorMask((node, dims), axes(dims))
        return Index(0, ((Values((node, dims), axes(dims)), 1),))

    def argument(self, facts: Facts, node: Node, value: Any, at: tuple[Index, ...]) -> Value:
        """An argument of an elementwise operation, broadcast to the coordinates of its result."""
        if not isinstance(value, Node) or tensor(value) is None:
            return self.read(facts, value, (), node)
        return self.read(facts, value, _own(value, at), node)

    def converted(
        self, facts: Facts, node: Node, value: Any, at: tuple[Index, ...], dtype: torch.dtype | None = None
    ) -> Value:
        """The same in the type of the result, or in another one."""
        read = self.argument(facts, node, value, at)
        return apply(lambda index: converted(index, dtype or _dtype(node), tensor(value) is None), read)

    def computed(
        self, facts: Facts, node: Node, operands: Sequence[Any], at: tuple[Index, ...], function: Computation
    ) -> Value:
        """What an operation makes of its operands, each converted to the type that they have in common."""
        dtype = _common_type(operands)
        if not dtype.is_floating_point and _dtype(node).is_floating_point:  # a division takes integers as they are
            dtype = _dtype(node)
        literal = [tensor(operand) is None for operand in operands]

        def compute(*given: Index) -> Value:
            return function([converted(index, dtype, known) for index, known in zip(given, literal)], given, dtype)

        return apply(compute, *(self.argument(facts, node, operand, at) for operand in operands))

    def integers(self, facts: Facts, node: Node, value: Any, at: tuple[Index, ...]) -> Value:
        """The same, for a choice between integers the integers that it gives, if they can be read as they are."""
        read = self.argument(facts, node, value, at)
        if not isinstance(read, Where) or _dtype(value) not in _INTEGERS:
            return read
        current, own = facts.current(value, node), _own(value, at)
        dims = _whole(own, shape(current))
        if dims is None or (facts is self.facts and not facts.unchanged(current, self.until)):
            return read
        return self._opaque(current, dims)


def _own(node: Node, at: tuple[Index, ...]) -> tuple[Index, ...]:
    """The coordinates of a tensor that is broadcast to those of a result."""
    sizes = shape(node)
    return tuple(Index() if n == 1 else c for n, c in zip(sizes, at[len(at) - len(sizes) :] if sizes else ()))


_HALF = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _reads_values(value: Value) -> bool:
    if isinstance(value, Where):
        return _reads_values(value.then) or _reads_values(value.otherwise)
    return isinstance(value, Index) and any(value.values())


def literal(value: Any) -> Index:
    """A Python number or a size."""
    if isinstance(value, (bool, int, float, sympy.Expr)):
        return Index(value)
    raise Unreadable(f"{type(value).__name__}")


def predicate(value: Value) -> Predicate:
    """A value as a condition."""
    if isinstance(value, Where):
        then, otherwise = predicate(value.then), predicate(value.otherwise)
        return (value.condition & then) | (~value.condition & otherwise)
    if isinstance(value, Index):
        if value.terms or not isinstance(value.offset, (bool, int, float)):
            raise Unreadable("a number as a condition")
        return EVERY_KEY if value.offset else NO_KEY
    return value


def coordinates(dims: Dims) -> tuple[Index, ...]:
    """Where the element with the dimensions' atoms lies: a folded dimension counts its atoms like digits."""
    result = []
    for dim in dims:
        index = Index()
        for atom in leaves(dim):
            if not isinstance(atom.size, int) and index.terms:
                raise Unreadable("a folded dimension of symbolic size")
            index = (index * atom.size if index.terms else index) + Index(0, ((atom, 1),))
        result.append(index)
    return tuple(result)


def axes(dims: Dims) -> tuple[str, ...]:
    """The names of the axes that a tensor with these dimensions varies over."""
    return tuple(dict.fromkeys(atom.axis for dim in dims for atom in leaves(dim)))


def _whole(at: tuple[Index, ...], sizes: tuple[Size, ...]) -> Dims | None:
    """The dimensions of a tensor that is read whole and straight, or None."""
    dims: list[Dim] = []
    for index, n in zip(at, sizes):
        if index.offset != 0 or any(not isinstance(t, Atom) or c != 1 for t, c in index.terms) or index.terms[1:]:
            return None
        dims.append(tuple(axis for axis, _ in index.terms))
        if not same(extent(dims[-1]), n):
            return None
    atoms = [atom for dim in dims for atom in dim]
    return tuple(dims) if len(atoms) == len(set(atoms)) else None


class Additive(NamedTuple):
    """Which keys a mask that is added keeps, and the numbers, one or more, that it adds to the scores of others."""

    keep: Predicate
    fills: tuple[float, ...]


def _kept(value: Value, dtype: torch.dtype, fills: set[float]) -> Predicate | None:
    """Where a value is zero, if it is masking elsewhere; the numbers that it is there go into `fills`."""
    if isinstance(value, Where):
        then, otherwise = _kept(value.then, dtype, fills), _kept(value.otherwise, dtype, fills)
        if then is None or otherwise is None:
            return None
        return (value.condition & then) | (~value.condition & otherwise)
    if isinstance(value, Index) and not value.terms and isinstance(value.offset, (int, float)):
        if value.offset == 0:
            return EVERY_KEY
        if is_masking(value.offset, dtype):
            fills.add(float(value.offset))
            return NO_KEY
    return None


# ---------------------------------------------------------------------------------------------------------------
# One rule for each operation: (reader, facts, node, call, coordinates) -> value

_RULES: dict[str, Callable[[MaskReader, Facts, Node, Call, tuple[Index, ...]], Value]] = {}


def _reads(*names: str) -> Callable[[Any], Any]:
    def register(rule: Any) -> Any:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _integral(value: Any) -> bool:
    return isinstance(value, (int, sympy.Expr))


@_reads("arange")
def arange(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    start, step = (_whole_number(Index(size(call[name]))).offset for name in ("start", "step"))
    if not (_integral(start) and isinstance(step, int)):
        raise Unreadable("arange over what is not an integer")
    return as_dtype(at[0] * step + Index(start), _dtype(node))


@_reads("full", "full_like", "new_full", "ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "tensor")
def filled(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    fill: Any = 1 if "ones" in call.name else 0
    if "full" in call.name:
        fill = call["fill_value"]
    if call.name == "tensor":
        fill = call["data"]
        while isinstance(fill, (list, tuple)) and len(fill) == 1:
            fill = fill[0]
    return reader.converted(facts, node, fill, at)


@_reads("cast", "move")
def cast(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    return reader.converted(facts, node, call["input"], at)


_POSITIONS = {
    torch.uint8: (0, 2**8 - 1),
    torch.int8: (-(2**7), 2**7 - 1),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
    torch.int64: (-(2**63), 2**63 - 1),
    torch.float16: (-(2**11), 2**11),
    torch.bfloat16: (-(2**8), 2**8),
    torch.float32: (-(2**24), 2**24),
    torch.float64: (-(2**53), 2**53),
}
"""The types that hold positions, and between which: beyond, integers wrap around, and others are rounded."""

LONGEST = 2**20
"""Lengths that only the run knows are taken to be no longer than this, where a type has to hold positions."""

_NUMBERS = (torch.bool, *_POSITIONS)


def as_dtype(value: Value, dtype: torch.dtype) -> Value:
    """A value that has another type already, converted as torch does."""
    if dtype == torch.bool and isinstance(value, Predicate):
        return value
    found = apply(lambda index: converted(index, dtype), value)
    return predicate(found) if dtype == torch.bool else found


def converted(index: Index, dtype: torch.dtype, literal: bool = False) -> Index:
    """A number or positions in another type. Where positions would wrap around or be rounded they are unreadable, and
    so is a literal (a number that is no tensor) that the type does not hold."""
    if not index.terms and not isinstance(index.offset, sympy.Expr):
        return Index(_number(index.offset, dtype, literal))
    if _is_rounded(index):
        (leaf, sign), *others = index.terms
        if others or sign not in (1, -1) or not isinstance(leaf, Rounded) or leaf.dtype != dtype:
            raise Unreadable(f"rounded values of a tensor as {dtype}")
        return index
    index = _whole_number(index)
    if any(index.values()):
        return _values_as(index, dtype)
    if not _integral(index.offset) or dtype not in _POSITIONS or not _lies_within(index, *_POSITIONS[dtype]):
        raise Unreadable(f"positions as {dtype}")
    return index


def _number(value: Any, dtype: torch.dtype, literal: bool) -> Any:
    """A number in another type: zero or not, with the range of a float (overflow becomes infinite), or of an integer,
    where others wrap around."""
    if dtype not in _NUMBERS or not isinstance(value, (bool, int, float)):
        raise Unreadable(f"a number as {dtype}")
    if dtype in _INTEGERS:
        low, high = _POSITIONS[dtype]
        if isinstance(value, float):
            if not (math.isfinite(value) and low <= int(value) <= high):
                raise Unreadable(f"{value} as {dtype}")
            return int(value)
        if low <= value <= high:
            return int(value)
        if literal:
            raise Unreadable(f"{value} as {dtype}")
    try:
        exact = torch.float64 if isinstance(value, float) else torch.int64
        return torch.tensor(value, dtype=exact, device="cpu").to(dtype).item()
    except (RuntimeError, OverflowError, ValueError) as error:
        raise Unreadable(str(error)) from error


def _lies_within(index: Index, low: int, high: int) -> bool:
    """Whether positions are representable, at the shortest lengths and at the longest."""
    for length in (1, LONGEST):
        bounds = _at_length(index, length).bounds(lambda atom, length=length: _number_at(atom.size, length))  # type: ignore[misc]
        if bounds is None or not (low <= bounds[0] and bounds[1] <= high):
            return False
    return True


def _at_length(index: Index, length: int) -> Index:
    """With numbers for sizes that only the run knows."""
    terms = (
        (Quotient(_at_length(t.of, length), t.divisor) if isinstance(t, Quotient) else t, c) for t, c in index.terms
    )
    return Index(_number_at(index.offset, length), tuple(terms))


def _number_at(value: Size, length: int) -> int:
    if isinstance(value, int):
        return value
    number = value.xreplace(dict.fromkeys(value.free_symbols, sympy.Integer(length)))
    if not number.is_Integer:
        raise Unreadable(f"a size of {value}")
    return int(number)


def _whole_number(index: Index) -> Index:
    """With an integer for a float that is one."""
    offset = index.offset
    return Index(int(offset), index.terms) if isinstance(offset, float) and offset.is_integer() else index


def _common_type(operands: Sequence[Any]) -> torch.dtype:
    """The type in which torch computes with tensors and with numbers that are none."""

    def held(operand: Any) -> Any:
        value = operand.meta.get("example_value") if isinstance(operand, Node) else operand
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return 0 if isinstance(value, torch.SymInt) else 0.0
        if not isinstance(value, (torch.Tensor, bool, int, float)):
            raise Unreadable(f"{type(value).__name__}")
        return value

    values = [held(operand) for operand in operands]
    if not any(isinstance(value, torch.Tensor) for value in values):
        raise Unreadable("numbers of no tensor")
    return values[0].dtype if len(values) == 1 else torch.result_type(*values)


def _values_as(index: Index, dtype: torch.dtype) -> Index:
    """Values of a tensor, in a type that holds all of them; sums of such only in 64 bits, where specs compute them.
    In a floating point type they are `Rounded`."""
    (first, _), *_ = index.terms
    alone = isinstance(first, Values) and index == Index(0, ((first, 1),))
    if alone and dtype.is_floating_point:
        return Index(0, ((Rounded(first, dtype), 1),))
    own = _dtype(first.tensor[0]) if alone else torch.int64
    numbers = [index.offset, *(coefficient for _, coefficient in index.terms)]
    if (
        dtype not in _INTEGERS
        or torch.promote_types(own, dtype) != dtype
        or any(isinstance(n, int) and abs(n) >= 2**31 for n in numbers)
    ):
        raise Unreadable(f"values of a tensor as {dtype}")
    return index


def _dtype(node: Node) -> torch.dtype:
    return tensor(node).dtype  # type: ignore[union-attr]


@_reads("copy")
def copied(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    return reader.argument(facts, node, call["input"], at)


@_reads("expand")
def expanded(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    return reader.argument(facts, node, call["input"], at)


@_reads("repeat", "tile")
def repeated(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Whisper's `position_ids.repeat(batch, 1)`: only dimensions of size 1 grow."""
    into, out = shape(call["input"]), shape(node)
    if not all(same(n, 1) or same(n, wide) for n, wide in zip(into, out[len(out) - len(into) :])):
        raise Unreadable("a repetition")
    return reader.argument(facts, node, call["input"], at)


@_reads("permute")
def permuted(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    into = [Index()] * len(at)
    for out, axis in enumerate(call["dims"]):
        into[axis] = at[out]
    return reader.read(facts, call["input"], tuple(into), node)


@_reads("reshape")
def reshaped(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Only dimensions of size 1 come and go; foldings are undone before masks are read (`axes`)."""
    out, into = shape(node), shape(call["input"])
    kept = [index for n, index in zip(out, at) if n != 1]
    wide = [n for n in into if n != 1]
    if len(kept) != len(wide) or not all(same(a, b) for a, b in zip(wide, (n for n in out if n != 1))):
        raise Unreadable("a reshape")
    left = iter(kept)
    return reader.read(facts, call["input"], tuple(Index() if n == 1 else next(left) for n in into), node)


@_reads("getitem")
def indexed(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Slices shift a coordinate; index tensors (transformers' `mask[batch_idx, kv_idx]`) replace it."""
    base = call["input"]
    sizes = shape(base)
    index = _items(call["index"], len(sizes))
    tensors = [item for item in index if isinstance(item, Node) and tensor(item) is not None]
    if tensors:
        if len(tensors) != len(index):
            raise Unreadable("index tensors beside slices")
        return reader.read(facts, base, tuple(_position(reader, facts, node, item, at) for item in tensors), node)
    into: list[Index] = []
    left = iter(zip(at, shape(node)))
    for item in index:
        n = sizes[len(into)] if item is not None else 0
        if item is None:
            next(left)
        elif isinstance(item, slice):
            position, kept = next(left)
            into.append(_sliced(item, n, position, kept))
        elif _integral(size(item)) and not isinstance(item, bool):
            into.append(Index(_from_front(size(item), n)))
        else:
            raise Unreadable("an index")
    return reader.read(facts, base, tuple(into), node)


def _check_no_element_twice(node: Node) -> None:
    """Raises `Unreadable` for what was expanded: a write into a part of it changes other parts, too."""
    value = tensor(node)
    if value is None or any(n != 1 and stride == 0 for n, stride in zip(shape(node), value.stride())):
        raise Unreadable("a write into what was expanded")


def _items(index: Sequence[Any], ndim: int) -> list[Any]:
    """An index with an item for each of so many dimensions."""
    items = [*index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in items:
        i = items.index(Ellipsis)
        items[i : i + 1] = [slice(None)] * (ndim - used)
    return items + [slice(None)] * (ndim - sum(item is not None for item in items))


def _selected(index: Any, at: tuple[Index, ...], sizes: tuple[Size, ...]) -> tuple[Predicate, tuple[Index, ...]]:
    """Whether coordinates lie in what an index selects, and where they are there."""
    inside: Predicate = EVERY_KEY
    there: list[Index] = []
    left = iter(zip(at, sizes))
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, bool) for item in items):
        raise Unreadable("a write at an index")
    for item in _items(items, len(sizes)):
        if item is None:
            there.append(Index())
            continue
        position, n = next(left)
        if isinstance(item, slice) and size(item.step) in (None, 1):
            first, end = (
                default if bound is None else _from_front(size(bound), n)
                for bound, default in ((item.start, 0), (item.stop, n))
            )
            inside &= compare(position, Index(first), "ge") & compare(position, Index(end), "lt")
            there.append(position + -Index(first))
        elif not isinstance(item, slice) and _integral(size(item)):
            inside &= compare(position, Index(_from_front(size(item), n)), "eq")
        else:
            raise Unreadable("a write at an index")
    return inside, tuple(there)


def _sliced(item: slice, n: Size, position: Index, kept: Size) -> Index:
    """Where an element of a slice was, of which `kept` elements of `n` are left."""
    start, stop, step = size(item.start), size(item.stop), size(item.step)
    start, step = 0 if start is None else start, 1 if step is None else step
    if not (_integral(start) and isinstance(step, int)) or step < 1:
        raise Unreadable("a slice")
    # A slice that starts before the front or is cut off at the end has another length than it says.
    whole = step == 1 and _integral(stop) and at_most(0, stop) and same(stop - start, kept)
    return position * step + Index(start if whole else _from_front(start, n))


def _from_front(position: Size, n: Size) -> Size:
    """A position that may count from the end, as one that counts from the front."""
    if at_most(position, -1):
        position = n + position
    if not (at_most(0, position) and at_most(position, n)):
        raise Unreadable("a position that may count from either end, or be clamped")
    return position


def _position(reader: MaskReader, facts: Facts, node: Node, item: Node, at: tuple[Index, ...]) -> Index:
    if _dtype(item) not in (torch.int32, torch.int64):
        raise Unreadable("an index that is a mask")
    value = reader.argument(facts, node, item, at)
    bounds = _bounds(value) if isinstance(value, Index) else None
    if bounds is None or not at_most(0, bounds[0]):
        raise Unreadable("an index tensor")
    return value  # type: ignore[return-value]


@_reads("index")
def taken(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Index tensors for all dimensions, as an operator takes them."""
    base, index = call["input"], call["indices"]
    if len(index) != len(shape(base)) or any(tensor(item) is None for item in index):
        raise Unreadable("index tensors beside slices")
    return reader.read(facts, base, tuple(_position(reader, facts, node, item, at) for item in index), node)


@_reads("add_batch_dim")
def batched(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Within `torch.vmap` a tensor has a dimension less, the coordinate of which belongs to the level."""
    if call["level"] not in reader.levels:
        raise Unreadable("a level of vmap that was left")
    axis = call["in_dim"] % (len(at) + 1)
    into = (*at[:axis], reader.levels[call["level"]], *at[axis:])
    return reader.read(facts, call["input"], into, node)


@_reads("remove_batch_dim")
def unbatched(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    # What does not depend on the level is expanded, at the front, wherever its dimension was wanted.
    axis = call["out_dim"] % len(at) if _depends_on(facts, call["input"], call["level"]) else 0
    around = reader.levels
    reader.levels = {**around, call["level"]: at[axis]}
    try:
        return reader.read(facts, call["input"], (*at[:axis], *at[axis + 1 :]), node)
    finally:
        reader.levels = around


def _depends_on(facts: Facts, node: Node, level: int) -> bool:
    """Whether a tensor has a dimension that belongs to a level of `torch.vmap`."""
    seen, stack = set[Node](), [node]
    while stack:
        x = stack.pop()
        call = facts.call(x)
        if call is not None and call.name == "add_batch_dim" and call["level"] == level:
            return True
        left = call is not None and call.name == "remove_batch_dim" and call["level"] == level
        if x in seen or tensor(x) is None or left:
            continue
        seen.add(x)
        stack += x.all_input_nodes
    return False


@_reads("tril", "triu")
def triangular(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    row, column, diagonal = at[-2], at[-1], literal(size(call["diagonal"]))
    inside = compare(column + -row, diagonal, "le" if call.name == "tril" else "ge")
    value = reader.read(facts, call["input"], at, node)
    if isinstance(value, Predicate):
        return inside & value
    return _where(inside, value, converted(Index(0), _dtype(node)))


@_reads("where")
def where(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    condition = predicate(reader.argument(facts, node, call["condition"], at))
    then, otherwise = (reader.converted(facts, node, call[name], at) for name in ("input", "other"))
    return _where(condition, then, otherwise)


@_reads("masked_fill")
def masked_fill(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    mask = predicate(reader.argument(facts, node, call["mask"], at))
    fill, value = (reader.converted(facts, node, call[name], at) for name in ("value", "input"))
    return _where(mask, fill, value)


def _where(condition: Predicate, then: Value, otherwise: Value) -> Value:
    if condition == EVERY_KEY:
        return then
    return otherwise if condition == NO_KEY else Where(condition, then, otherwise)


@_reads("lt", "le", "gt", "ge", "eq", "ne")
def comparison(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Both sides are compared in the type that torch gives them: in bfloat16, -9984 is -10000."""
    operands = [call["input"], call["other"]]
    dtype = _common_type(operands)
    values = [reader.argument(facts, node, x, at) for x in operands]
    if all(isinstance(value, Where) for value in values):  # four cases, where there may be one comparison
        values = [reader.integers(facts, node, x, at) for x in operands]
    alone = not any(isinstance(value, Where) for value in values)

    def relation(*sides: Index) -> Value:
        left, right = (converted(x, dtype, tensor(operand) is None) for x, operand in zip(sides, operands))
        if _is_rounded(left) or _is_rounded(right):
            left, right = _exactly(left, right, dtype)
        return _truth(compare(left, right, call.name, alone))

    return predicate(apply(relation, *values))


def _exactly(left: Index, right: Index, dtype: torch.dtype) -> tuple[Index, Index]:
    """Two sides of a comparison, a number and the rounded sum of another one and an integer of at most 64 bits, as
    sides without rounding that compare alike. Rounding keeps order, and so it does where the numbers are so small that
    the integers near them are exact, or so large that the integer beside them does not matter."""
    numbers: list[Any] = [left.offset, right.offset]
    if not (_is_rounded(left) and _is_rounded(right)) and all(isinstance(n, (int, float)) for n in numbers):
        difference = numbers[0] - numbers[1]
        if abs(difference) >= 2**65 and dtype != torch.float16:  # in which an integer may be as large
            return Index(difference), Index(0)
        if all(abs(n) < _POSITIONS[dtype][1] // 4 for n in numbers):
            return left.substitute(_unrounded), right.substitute(_unrounded)
    raise Unreadable(f"values of a tensor as {dtype}")


def _unrounded(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Rounded) else leaf


def _truth(value: Predicate) -> Value:
    return value if value not in (EVERY_KEY, NO_KEY) else Index(value == EVERY_KEY)


@_reads("and", "or", "xor", "not")
def logical(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    terms = [call["input"]] if call.name == "not" else [call["input"], call["other"]]
    if any(dtype != torch.bool for dtype in (_dtype(node), _common_type(terms))):
        raise Unreadable("bits of integers")
    values = [predicate(reader.argument(facts, node, term, at)) for term in terms]
    if call.name == "not":
        return ~values[0]
    return {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[call.name](*values)


@_reads("add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "floor_divide", "remainder")
def arithmetic(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Chunks of keys and queries, as Llama-4 has them; masks that are multiplied by the lowest number."""
    if call.args.get("alpha", 1) != 1:
        raise Unreadable("alpha")
    operands = [call[name] for name in ("input", "other", "exponent") if name in call.args]
    name = {"floor": "floor_divide", None: call.name}.get(call.args.get("rounding_mode"))
    if name is None:
        raise Unreadable("a division that rounds to zero")
    if _dtype(node) == _common_type(operands) == torch.bool and name in ("add", "mul"):
        values = [predicate(reader.argument(facts, node, operand, at)) for operand in operands]
        return reduce(operator.and_ if name == "mul" else operator.or_, values)
    return reader.computed(facts, node, operands, at, _computation(name, node))


def _computation(name: str, node: Node) -> Computation:
    """An operation on numbers, which torch computes itself, or on positions, whose type must hold the result."""

    def compute(values: list[Index], given: tuple[Index, ...], dtype: torch.dtype) -> Value:
        if all(_is_number(value) for value in values):
            found = _evaluated(name, values, given, dtype)
            if found.dtype != _dtype(node) and not is_inplace(node):
                raise Unreadable(f"{found.dtype} where {_dtype(node)} is computed")
            return Index(found.item())
        if name not in _OF_POSITIONS or (dtype != _dtype(node) and not is_inplace(node)):
            raise Unreadable(f"{name} of positions")
        rounded = [value for value in values if _is_rounded(value)]
        if rounded and (name not in ("add", "sub") or len(rounded) > 1 or rounded[0].offset != 0):
            raise Unreadable(f"{name} of rounded values of a tensor")
        if dtype in _HALF and any(x != before for x, before in zip(values, given) if x not in rounded):
            raise Unreadable(f"a number that {dtype} rounds")
        return converted(_OF_POSITIONS[name](*map(_whole_number, values)), dtype)

    return compute


def _is_number(index: Index) -> bool:
    return not index.terms and isinstance(index.offset, (bool, int, float))


def _evaluated(name: str, values: list[Index], given: tuple[Index, ...], dtype: torch.dtype) -> torch.Tensor:
    """A function of numbers of one type, as torch computes it. Its ways to the same result may differ in rounding: with
    vectors or one by one, a power by multiplications, and, of a number that a half precision type rounds, with what it
    was before. It must not matter which of them is taken."""
    numbers = [value.offset for value in values]
    if name in ("floor_divide", "remainder") and numbers[1] == -1:
        raise Unreadable("a division that ends the process where it overflows")
    ways = [[torch.full((_MANY,), number, dtype=dtype, device="cpu") for number in numbers]]
    ways.append([way[0] for way in ways[0]])
    if name == "pow":
        ways.append([ways[0][0], numbers[1]])
    if dtype in _HALF:
        ways.append([torch.tensor(value.offset, dtype=torch.float32, device="cpu") for value in given])
    try:
        with torch.no_grad():
            first, *others = (getattr(torch, name)(*way) for way in ways)
    except (RuntimeError, OverflowError) as error:
        raise Unreadable(str(error)) from error
    results = {str(number) for way in (first, *others) for number in way.to(first.dtype).reshape(-1).tolist()}
    if len(results) > 1:  # as words, for which two of what is no number are the same, and zeros of two signs are not
        raise Unreadable(f"what {name} makes of numbers that {dtype} rounds")
    return first[0]


_MANY = 129
"""More elements than a vector of any type has."""


def _quotient(a: Index, b: Index) -> Index:
    divisor = b.offset
    if b.terms or not isinstance(divisor, int) or divisor <= 0 or not _integral(a.offset):
        raise Unreadable("a division by what is not a positive number")
    if not any(a.values()):  # else the sum may wrap around
        bounds = _bounds(a)
        if bounds is not None and all(isinstance(n, int) for n in bounds):
            low, high = (n // divisor for n in bounds)
            if low == high:
                return Index(low)
        if isinstance(a.offset, int) and all(n % divisor == 0 for n in (a.offset, *(c for _, c in a.terms))):
            return Index(a.offset // divisor, tuple((term, c // divisor) for term, c in a.terms))
    if isinstance(a.offset, sympy.Expr):
        raise Unreadable("a division of symbolic positions")
    return Index(0, ((Quotient(a, divisor), 1),)) if a.terms else Index(a.offset // divisor)


def _remainder(a: Index, b: Index) -> Index:
    return a + -_product(_quotient(a, b), b)


@_reads("abs")
def absolute(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Symmetric windows."""

    def magnitude(values: list[Index], given: tuple[Index, ...], dtype: torch.dtype) -> Value:
        (a,) = values
        if _is_number(a):
            return Index(_evaluated("abs", values, given, dtype).item())
        return as_dtype(_where(compare(a, Index(0), "ge"), a, -a), dtype)

    return reader.computed(facts, node, [call["input"]], at, magnitude)


@_reads("maximum", "minimum")
def extremum(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    first = "ge" if call.name == "maximum" else "le"

    def greatest(values: list[Index], given: tuple[Index, ...], dtype: torch.dtype) -> Value:
        if all(_is_number(value) for value in values):
            return Index(_evaluated(call.name, values, given, dtype).item())
        a, b = values
        return _where(compare(a, b, first), a, b)

    return reader.computed(facts, node, [call["input"], call["other"]], at, greatest)


def _product(a: Index, b: Index) -> Index:
    for x, y in ((a, b), (b, a)):
        if not y.terms and (not x.terms or isinstance(y.offset, int)):
            return x * y.offset
    raise Unreadable("a product of positions")


_OF_POSITIONS: dict[str, Callable[..., Index]] = {
    "add": operator.add,
    "sub": lambda a, b: a + -b,
    "neg": operator.neg,
    "mul": _product,
    "floor_divide": _quotient,
    "remainder": _remainder,
}


@_reads("diff")
def difference(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    """Transformers looks for packed sequences by where the positions do not grow by one; for `arange` they do."""
    axis = call["dim"] % len(at)
    if call["n"] != 1 or call["append"] is not None:
        raise Unreadable("a difference of higher order")

    def element(of: Node, where: Index) -> Value:
        return as_dtype(reader.read(facts, of, (*at[:axis], where, *at[axis + 1 :]), node), _dtype(node))

    def step(after: Value, before: Value) -> Value:
        if isinstance(after, Predicate) and isinstance(before, Predicate):
            return after ^ before
        subtract = _computation("sub", node)
        return apply(lambda *values: subtract([*values], values, _dtype(node)), after, before)

    here = element(call["input"], at[axis])
    if call["prepend"] is None:
        return step(element(call["input"], at[axis] + Index(1)), here)
    if shape(call["prepend"])[axis] != 1:
        raise Unreadable("more than one element before the first")
    first = step(element(call["input"], Index()), element(call["prepend"], Index()))
    later = step(here, element(call["input"], at[axis] + Index(-1)))
    if not _is_one(first, later):
        raise Unreadable("uneven steps")
    return later


@_reads("cumsum")
def cumulated(reader: MaskReader, facts: Facts, node: Node, call: Call, at: tuple[Index, ...]) -> Value:
    value = reader.read(facts, call["input"], at, node)
    if value == NO_KEY or (isinstance(value, Index) and _is_number(value) and value.offset == 0):
        return converted(Index(0), _dtype(node))
    raise Unreadable("a running sum")
