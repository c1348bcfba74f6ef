"""Numbers, positions and booleans are read in the type that PyTorch computes them in, and wrap around where it does.

An expression is run once, and what PyTorch was asked for is written down as a graph; its value is then read at the
coordinates (query, key) and compared, at all of them, with what PyTorch computed. What can't be followed stays a
tensor.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from attn_rewriter.graph import Facts
from attn_rewriter.kernels.masking import coordinates as all_coordinates
from attn_rewriter.kernels.masking import holds
from attn_rewriter.patterns.axes import Atom, Dims, leaves
from attn_rewriter.patterns.masks import MaskReader, Rounded, Unreadable, Value, Where, coordinates
from attn_rewriter.spec import Index, Predicate, Quotient, Values
from tests.running import rewritten

EXAMPLES = 20 * int(os.environ.get("ATTN_REWRITER_EXAMPLES", 50))
Q_LEN, KV_LEN = 5, 7
BOOL, U8, I8, I16, I32, I64 = torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TYPES = (BOOL, U8, I8, I16, I32, I64, F16, BF16, F32, F64)


class Recorder(TorchFunctionMode):
    """Writes down as a graph what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.alive: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__setitem__:
            node = self.graph.call_function(operator.setitem, self._known(args))
            node.meta["example_value"] = function(*args)
            return None
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            method = getattr(torch.Tensor, function.__name__, None) is function
            target: Any = function.__name__ if method else function
            if target == "__getitem__":
                method, target = False, operator.getitem
            make = self.graph.call_method if method else self.graph.call_function
            node = make(target, self._known(args), self._known(kwargs or {}))
            node.meta["example_value"] = result
            self.nodes.setdefault(id(result), node)  # what is written in place goes by its first name, as Dynamo has it
            self.alive.append(result)
        return result

    def _known(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.nodes:
                self.nodes[id(value)] = self.graph.placeholder(f"x{len(self.nodes)}")
                self.nodes[id(value)].meta["example_value"] = value
            return self.nodes[id(value)]
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._known, value))
        return {k: self._known(v) for k, v in value.items()} if isinstance(value, dict) else value


def read(expression: Callable[[], Tensor]) -> tuple[Tensor, Value | None]:
    """What an expression is, once it is expanded to `[Q_LEN, KV_LEN]`, and what is read of it, if that is possible."""
    with Recorder() as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = expression().expand(Q_LEN, KV_LEN)
    node = recorder.nodes[id(result)]
    last = recorder.graph.output(node)
    dims = (Atom(Q_LEN, "query"),), (Atom(KV_LEN, "key"),)
    reader = MaskReader(Facts(recorder.graph), last)
    if result.dtype == torch.bool:
        return result, reader.boolean(node, dims)
    try:
        return result, reader.read(reader.facts, node, coordinates(dims), last)
    except Unreadable:
        return result, None


def evaluated(value: Value) -> Tensor:
    """A value at all coordinates, in float64 where it is no integer."""
    if isinstance(value, Predicate):
        held = {key: f"t{i}" for i, key in enumerate(value.tensors())}
        tensors: Any = {name: _laid_out(*key) for key, name in held.items()}  # type: ignore[misc]
        at = all_coordinates(1, 1, Q_LEN, KV_LEN)
        return holds(value.rename(held), tensors, *at).expand(1, 1, Q_LEN, KV_LEN)[0, 0]  # type: ignore[arg-type]
    if isinstance(value, Where):
        then, otherwise = evaluated(value.then), evaluated(value.otherwise)
        return torch.where(evaluated(value.condition), then, otherwise)
    match value.terms:
        case ((Rounded(values=Values(tensor=(node, dims)), dtype=dtype), sign),):
            return _laid_out(node, dims)[0, 0].to(dtype) * sign + float(value.offset)  # type: ignore[misc]
    total = torch.full((Q_LEN, KV_LEN), value.offset, dtype=F64 if isinstance(value.offset, float) else I64)
    for term, coefficient in value.terms:
        match term:
            case Values(tensor=(node, dims)):
                found = _laid_out(node, dims)[0, 0].long()
            case Quotient(of, divisor):
                found = evaluated(of) // divisor
            case Atom(name="query"):
                found = torch.arange(Q_LEN)[:, None]
            case Atom(name="key"):
                found = torch.arange(KV_LEN)
            case _:
                raise AssertionError(term)
        total = total + found * coefficient
    return total


def _laid_out(node: Node, dims: Dims) -> Tensor:
    """A tensor that broadcasts to `[1, 1, Q_LEN, KV_LEN]`."""
    held = node.meta["example_value"]
    names = [leaf.axis for dim in dims for leaf in leaves(dim)]
    held = held.reshape([leaf.size for dim in dims for leaf in leaves(dim)])
    held = held.permute(sorted(range(len(names)), key=lambda i: names[i] == "key"))
    return held.reshape(1, 1, Q_LEN if "query" in names else 1, KV_LEN if "key" in names else 1)


def assert_followed(expression: Callable[[], Tensor]) -> Value | None:
    """What is read of an expression, if anything, is what PyTorch computed."""
    result, value = read(expression)
    if value is None:
        return None
    found = evaluated(value).expand(Q_LEN, KV_LEN)
    wide = F64 if result.is_floating_point() else I64
    assert torch.equal(found != found, result != result)
    assert torch.equal(*(torch.where(x != x, 0, x.to(wide)) for x in (found, result)))
    return value


def is_followed(value: Value | None) -> bool:
    """Whether a value is read down to numbers and coordinates."""
    if value is None or isinstance(value, Where):
        return value is not None and all(map(is_followed, (value.condition, value.then, value.otherwise)))
    held = (Values, Rounded)
    return (
        not any(isinstance(x, held) for x in value.leaves()) if isinstance(value, Index) else not any(value.tensors())
    )


# ---------------------------------------------------------------------------------------------------------------
# Expressions by name


def q(dtype: torch.dtype = I64) -> Tensor:
    return torch.arange(Q_LEN, dtype=dtype)[:, None]


def k(dtype: torch.dtype = I64) -> Tensor:
    return torch.arange(KV_LEN, dtype=dtype)[None]


def ones(dtype: torch.dtype) -> Tensor:
    return torch.ones(Q_LEN, KV_LEN, dtype=dtype)


FOLLOWED: dict[str, Callable[[torch.dtype], Tensor]] = {
    "causal": lambda t: k(t) <= q(t),
    "counted from the end": lambda t: torch.arange(KV_LEN, 0, -1, dtype=t)[None] > q(t),
    "start and end by name": lambda t: torch.arange(start=1, end=1 + KV_LEN, dtype=t)[None] > q(t) + 1,
    "chunks": lambda t: k(t) // 3 == torch.div(q(t), 3, rounding_mode="floor"),
    "remainders": lambda t: k(t).to(t if t != U8 else I8) % 3 == q(t if t != U8 else I8).remainder(3),
    "doubled": lambda t: k(t) * 2 < q(t) + q(t),
    "numbers": lambda t: (ones(t).tril() * 3 - 2 * ones(t).tril()) == 1,
    "filled": lambda t: ones(t).masked_fill(k() > q(), 0) != 0,
    "chosen": lambda t: torch.where(k() > q(), ones(t), 2) == 2,
    "an extreme": lambda t: torch.maximum(k(t), q(t)) <= q(t) + 1,
    "against a fraction": lambda t: ones(t).triu() > 0.5,
    "against a float": lambda t: q(t).float() + 1.0 > k(t),
    "in place": lambda t: ones(t).triu(1).mul_(3).add_(1).lt_(2) == 1,
}


def written(into: Tensor, index: Any, value: Any) -> Tensor:
    into[index] = value
    return into


ALL = slice(None)
FOLLOWED_WRITES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "a slice": lambda t: written(ones(t), (ALL, slice(2, 5)), 0),
    "a corner": lambda t: written(ones(t), (slice(1, -1), slice(3)), 0),
    "from the end": lambda t: written(ones(t), (..., slice(-2, None)), 0),
    "a row": lambda t: written(ones(t), 2, 0),
    "a column": lambda t: written(ones(t), (..., -1), 0),
    "a triangle": lambda t: written(ones(t), (ALL, slice(5)), torch.ones(Q_LEN, 5, dtype=t).tril()),
    "a row of a triangle, everywhere": lambda t: written(ones(t), (slice(2), ALL), ones(t).tril()[3]),
    "twice": lambda t: written(written(ones(t), (ALL, slice(4)), 0), (slice(2), ALL), 1),
    "with one more dimension": lambda t: written(ones(t), (None, slice(1, 3)), 0),
    "what was there, filled": lambda t: written(
        x := ones(t).tril(1), (ALL, slice(4)), x[:, :4].masked_fill(k()[:, :4] < q(), 0)
    ),
    "a view": lambda t: (x := ones(t), x[1:3].mul_(0))[0],
    "a view of a view": lambda t: (x := ones(t), x[1:][:, 2:4].masked_fill_(k()[:, 2:4] > 2, 0))[0],
    "and the whole": lambda t: written(ones(t).triu_(1), (ALL, slice(2)), 1).mul_(1),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", FOLLOWED_WRITES)
def test_writes_are_followed(name: str, dtype: torch.dtype) -> None:
    if dtype == BOOL and name in ("a view", "and the whole"):
        pytest.skip("booleans are not multiplied in place")
    assert is_followed(assert_followed(lambda: FOLLOWED_WRITES[name](dtype)))


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name: str, dtype: torch.dtype) -> None:
    assert is_followed(assert_followed(lambda: FOLLOWED[name](dtype)))


# Where PyTorch wraps around or rounds, or kernels differ: followed or not, but never followed wrongly.
OTHERWISE: dict[str, Callable[[], Tensor]] = {
    "one more than the largest": lambda: INPUTS[KV_LEN, I64] < INPUTS[KV_LEN, I64] + 1,
    "bytes below zero": lambda: k(U8) - 1 > q(U8),
    "a difference of bytes": lambda: ones(U8).tril().diff(dim=-1, prepend=ones(U8)[:, :1]) > 0,
    "a difference of booleans": lambda: ones(BOOL).tril().diff(dim=-1, prepend=ones(BOOL)[:, :1]),
    "a difference of rows": lambda: (q() * k()).diff(axis=0, prepend=k() * 0),
    "a sum beyond 8 bits": lambda: k(I8) + 125 > 0,
    "a product beyond 8 bits": lambda: k(I8) * 100 > q(I8),
    "a product beyond 16 bits": lambda: k(I16) * 20000 > 0,
    "a sum beyond 32 bits": lambda: k(I32) + (2**31 - 3) > 0,
    "a sum beyond 64 bits": lambda: k() + (2**63 - 3) > 0,
    "numbers beyond 8 bits": lambda: ones(I8).tril() * 100 + ones(I8).tril() * 100 > 0,
    "the least of its type": lambda: (ones(I8).tril() * -128).abs() > 0,
    "minus one, in bytes": lambda: -ones(U8).tril() > 100,
    "a literal beyond its type": lambda: ones(U8).tril() * 3 < 300,
    "a literal below its type": lambda: k(U8) < -1,
    "a tensor beyond its type": lambda: ones(U8).tril() + torch.tensor(300) > 50,
    "cast to fewer bits": lambda: (k() * 100).to(I8) > 0,
    "a number cast to fewer bits": lambda: (ones(I64).tril() * 300).to(U8) > 44,
    "positions that half precision rounds": lambda: (k() + 2045).half() > (q() + 2048).half(),
    "positions that bfloat16 rounds": lambda: (k() + 254).to(BF16) == (q() + 254).to(BF16),
    "positions that float32 rounds": lambda: (k() + 2**24).float() == 2**24,
    "a sum that half precision rounds": lambda: k(F16) + 2046 == 2048,
    "a sum that bfloat16 rounds": lambda: ones(BF16).tril() + 256 == 256,
    "a sum that overflows": lambda: torch.where(k() > q(), ones(F16) * 60000, 1) + 60000 > 65504,
    "a constant that half precision rounds": lambda: (ones(F16).tril() * 3) * 0.1 == 0.3,
    "in Python it would be exact": lambda: ones(F32).tril() * 1e-8 + 1 == 1,
    "a third, in float32": lambda: ones(F32).tril() / 3 == 1 / 3,
    "a power that wraps around": lambda: (ones(I8).tril() * 2) ** 7 > 0,
    "a power that is no integer": lambda: (ones(I32).tril() + 3) ** 0.5 == 2,
    "booleans added": lambda: (ones(BOOL).tril() + ones(BOOL)) == True,  # noqa: E712
    "bits of booleans": lambda: (ones(BOOL).tril() & 2) > 0,
    "a boolean and a number": lambda: ones(BOOL).tril() + 1 > 1,
    "a boolean tripled": lambda: ones(BOOL).tril() * 3 > 2,
    "zeros of both signs": lambda: torch.where(k() > q(), ones(F32) * -0.0, 0.0).reciprocal() > 0,
    "not a number": lambda: torch.where(k() > q(), ones(F32) * float("nan"), 0.0) != 0,
    "the maximum of a number and none": lambda: torch.maximum(ones(F32).tril(), torch.tensor(float("nan"))) > 0,
    "infinity less infinity": lambda: (ones(F32).tril() * float("inf")) == float("inf"),
    "an index of bytes": lambda: ones(F32).tril()[:, torch.ones(KV_LEN, dtype=U8)] > 0,
    "a comparison written into numbers": lambda: (k() + q()).lt_(4) * 2 > 1,
    "a comparison in the narrower type": lambda: ones(F16).tril() * 2049 == torch.tensor(2049.0),
    "floor of a fraction": lambda: torch.div(ones(F32).tril() * 7, 2, rounding_mode="floor") == 3,
    "truncated": lambda: torch.div(k() - 3, 2, rounding_mode="trunc") == q() - 2,
    "a remainder below zero": lambda: (k() - 3) % -2 == 0,
    "counted up in 8 bits": lambda: ones(I8).tril().cumsum(0, dtype=I8) > 3,
    "nothing counted up": lambda: torch.zeros(Q_LEN, KV_LEN, dtype=BOOL).cumsum(-1) > 0,
    "a sum twice": lambda: torch.add(k(), q(), alpha=2) > 6,
    "another part of itself": lambda: written(x := (k() > q()).clone(), (ALL, slice(3)), x[:, 1:4]),
    "a row of what was expanded": lambda: written(torch.zeros(1, KV_LEN, dtype=BOOL).expand(Q_LEN, -1), 0, True),
    "a row of an expanded slice": lambda: (x := torch.ones(1, 9, dtype=BOOL), x.expand(5, 9)[2:4, :3].zero_())[0][
        :, :7
    ],
    "of one row more": lambda: written(ones(BOOL), 0, (k() > 2)),
    "a part of itself, given elsewhere": lambda: (
        x := (k() > q()).clone(),
        torch.logical_not(x[3:5], out=x[:2]),
    )[0],
    "every other column": lambda: written(ones(BOOL), (ALL, slice(None, None, 2)), False),
    "an index tensor": lambda: written(ones(BOOL), (ALL, torch.tensor([0, 2])), False),
    "a mask as an index": lambda: written(ones(BOOL), k() > q(), False),
    "a slice beyond the end": lambda: written(ones(BOOL), (ALL, slice(2, 100)), False),
    "a diagonal": lambda: (x := ones(BOOL), x.diagonal().logical_not_())[0],
    "a transposed view": lambda: (x := ones(BOOL), x.mT[2:4].logical_not_())[0],
    "a view taken before the whole changes": lambda: (x := ones(I64), y := x[1:3], x.mul_(3), y.add_(1))[0] == 4,
    "a view that is read after the whole changes": lambda: (x := ones(I64), x[:], x[1:].mul_(3))[1] == 3,
    "a fraction into integers": lambda: written(ones(I64), (ALL, slice(2)), 2.7) == 2,
    "a number into bytes": lambda: written(ones(U8), (ALL, slice(2)), torch.tensor(300)) == 44,
    "values, rounded": lambda: INPUTS[KV_LEN, I64].float() == 3,
    "values, rounded to half": lambda: INPUTS[KV_LEN, I64].half() > q().half(),
    "one more than values, rounded": lambda: INPUTS[KV_LEN, I64].to(BF16) + 1 == 4,
    "values and the lowest number": lambda: (
        torch.where(k() > q(), torch.finfo(F32).min, 0.0) + INPUTS[KV_LEN, I64] == 0
    ),
    "values and a large number, twice": lambda: (INPUTS[KV_LEN, I64].float() + 1e30) - 1e30 == 0,
    "values and infinity, in half": lambda: torch.where(k() > q(), -float("inf"), 0.0).half() + INPUTS[KV_LEN, I64] < 0,
    "values between the numbers of their type": lambda: INPUTS[KV_LEN, I64].float() + 0.25 == 3.25,
    "half of values": lambda: INPUTS[KV_LEN, I64].float() * 0.5 == 1.5,
    "values, there and back": lambda: INPUTS[KV_LEN, I64].float().long() == INPUTS[KV_LEN, I64],
    "an integer filled with a fraction": lambda: ones(I64).masked_fill(k() > q(), 2.7) == 2,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_otherwise(name: str) -> None:
    assert_followed(OTHERWISE[name])


# ---------------------------------------------------------------------------------------------------------------
# Expressions by chance

WHOLE = (True, 0, 1, 2, 3, -1, 5, 7, 100, 127, 200, 255, 256, 300, -128, 2049, 40000, 2**24 + 1, 2**31 - 1, 2**40)
FLOATS = (0.0, -0.0, 0.5, 1.0, 0.1, -1.5, 2.0, 3.0, 1e-8, -1e9, 65504.0, 1e30)
NUMBERS = (*WHOLE, *FLOATS, float("inf"), -float("inf"), float("nan"))

numbers, types = st.sampled_from(NUMBERS), st.sampled_from(TYPES)
starts, steps = st.integers(-3, 300), st.sampled_from((1, 1, 2, -1, 40))
leaf = st.one_of(
    st.tuples(st.just("positions"), st.sampled_from("qk"), starts, steps, types),
    st.tuples(st.just("full"), numbers, types),
    st.tuples(st.just("scalar"), numbers, types),
    st.tuples(st.just("triangle"), st.sampled_from(("tril", "triu")), st.integers(-2, 2), types),
    st.tuples(st.just("causal")),
    st.tuples(st.just("input"), st.sampled_from("qk"), types),
)
literals = st.tuples(st.just("literal"), numbers)
_EXTREMES = torch.tensor([0, 2**63 - 1, -(2**63), 3, -1, 255, 127])
INPUTS = {(n, dtype): _EXTREMES[:n].to(dtype) for n in (Q_LEN, KV_LEN) for dtype in TYPES}
"""Of these nothing is known but their types."""

UNARY: dict[str, Callable[..., Tensor]] = {
    "neg": lambda a: -a,
    "abs": lambda a: abs(a),
    "tril": lambda a: _wide(a).tril(),
    "triu": lambda a: _wide(a).triu(1),
    "diff, along keys": lambda a: _wide(a).diff(axis=1, prepend=_wide(a)[:, :1]),
    "diff, along queries": lambda a: torch.diff(_wide(a), 1, 0, prepend=_wide(a)[:1].long()),
    "diff, of a longer one": lambda a: torch.diff(torch.cat([_wide(a), _wide(a)], 0)[: Q_LEN + 1], dim=0),
    "cumsum": lambda a: _wide(a).cumsum(1),
    "sqrt": lambda a: torch.sqrt(a),
    "reciprocal": lambda a: a.reciprocal(),
    "rsqrt": lambda a: a.rsqrt(),
    "not": lambda a: ~a,
    "logical not": lambda a: torch.logical_not(a),
    "same": lambda a: a.clone(),
    **{f"to {t}": (lambda a, t=t: a.to(t)) for t in TYPES},
}
BINARY: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor")},
    "div, down": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "div, to zero": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "maximum": lambda a, b: torch.maximum(a, b),
    "minimum": lambda a, b: torch.min(a, other=b),
    "masked_fill": lambda a, b: _wide(a).masked_fill(torch.arange(KV_LEN)[None] > torch.arange(Q_LEN)[:, None], b),
    "where": lambda a, b: torch.where(torch.arange(KV_LEN)[None] >= torch.arange(Q_LEN)[:, None], a, b),
    "logical and": lambda a, b: torch.logical_and(a, b),
    **{
        f"{name}, in place": (lambda a, b, name=name: getattr(_wide(a).clone(), f"{name}_")(b))
        for name in ("add", "sub", "mul", "div", "lt", "eq", "floor_divide", "remainder", "pow")
    },
}


def _whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Whole division, but by -1: where that overflows, PyTorch ends the process."""

    def divide(a: Any, b: Any) -> Tensor:
        if (torch.as_tensor(b) == -1).any():
            raise OverflowError
        return function(a, b)

    return divide


for _name in ("floordiv", "mod", "div, down", "div, to zero", "floor_divide, in place", "remainder, in place"):
    BINARY[_name] = _whole(BINARY[_name])


def _wide(a: Tensor) -> Tensor:
    return a.expand(Q_LEN, KV_LEN)


tensors = st.recursive(
    leaf,
    lambda of: st.one_of(
        st.tuples(st.sampled_from([*UNARY]), of),
        st.tuples(st.sampled_from([*BINARY]), of, of | literals),
        st.tuples(st.sampled_from([*BINARY]), literals, of),
    ),
    max_leaves=5,
)


def built(program: Any) -> Any:
    """What an expression computes."""
    match program:
        case ("literal", value):
            return value
        case ("positions", axis, start, step, dtype):
            n = Q_LEN if axis == "q" else KV_LEN
            made = torch.arange(start, start + n * step, step=step, dtype=dtype)
            return made[:, None] if axis == "q" else made[None]
        case ("full", value, dtype):
            return torch.full((Q_LEN, KV_LEN), value, dtype=dtype)
        case ("scalar", value, dtype):
            return torch.tensor(value, dtype=dtype)
        case ("triangle", name, diagonal, dtype):
            return getattr(torch.ones(Q_LEN, KV_LEN, dtype=dtype), name)(diagonal)
        case ("input", "q", dtype):
            return INPUTS[Q_LEN, dtype][:, None]
        case ("input", "k", dtype):
            return INPUTS[KV_LEN, dtype][None]
        case ("causal",):
            return torch.arange(KV_LEN)[None] <= torch.arange(Q_LEN)[:, None]
        case (name, a):
            return UNARY[name](built(a))
        case (name, a, b):
            return BINARY[name](built(a), built(b))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(tensors)
def test_any_expression(program: Any) -> None:
    def expression() -> Tensor:
        return _wide(built(program))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expression()
    except (RuntimeError, TypeError, NotImplementedError, ZeroDivisionError, OverflowError, AttributeError):
        assume(False)
    assert_followed(expression)


places = st.sampled_from(
    (
        (ALL, slice(3)),
        (slice(1, 4),),
        (slice(-2, None), slice(2, -1)),
        (..., -2),
        (..., slice(4, None)),
        (0,),
        (slice(2, 3), 5),
        (None, ALL, slice(1, 6)),
        (slice(1, None), None, slice(2)),
        (ALL, slice(None, None, 3)),
    )
)
writes = st.tuples(st.sampled_from(("set", "set, of what is there", "fill", "add", "times")), places, tensors, numbers)


@settings(max_examples=EXAMPLES // 2, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(tensors, st.lists(writes, min_size=1, max_size=4))
def test_any_writes(program: Any, changes: Any) -> None:
    def expression() -> Tensor:
        x = _wide(built(program)).clone()
        for how, place, other, number in changes:
            match how:
                case "set":
                    x[place] = _wide(built(other))[place]
                case "set, of what is there":
                    x[place] = x[place].masked_fill(_wide(built(other))[place] > 0, number)
                case "fill":
                    x[place] = number
                case "add":
                    x[place].add_(_wide(built(other))[place])
                case "times":
                    x[place].mul_(number)
        return x

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expression()
    except (RuntimeError, TypeError, NotImplementedError, ZeroDivisionError, OverflowError, AttributeError):
        assume(False)
    assert_followed(expression)


# ---------------------------------------------------------------------------------------------------------------
# And in attention


@pytest.mark.parametrize("name", [name for name in OTHERWISE if name != "an index of bytes"])  # Dynamo takes none
def test_in_attention(name: str) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keep = (OTHERWISE[name]() != 0) | (torch.arange(KV_LEN) == 0)
        return (query @ key.mT).masked_fill(~keep, -float("inf")).softmax(-1) @ value

    shapes = (2, 3, Q_LEN, 4), (2, 3, KV_LEN, 4), (2, 3, KV_LEN, 4)
    given = [torch.randn(shape, dtype=F64) for shape in shapes]
    compiled, report = rewritten(attention)
    torch.testing.assert_close(compiled(*given), attention(*given), rtol=1e-12, atol=1e-12)
    assert report().n_fused == 1
