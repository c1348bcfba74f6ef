"""The table of operations binds as PyTorch does: each spelling, called in every way that PyTorch takes.

A sample says what the parameters of a row are; every split of them into positions and keywords, under every name that
a parameter is known by, is tried on PyTorch itself. What PyTorch takes must be read, and what was read, computed by a
plain function of the row's parameters, must be what PyTorch computed. Exceptions are named.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from attn_rewriter.graph import _ALIASES, _FUNCTIONS, _INERT, _METHODS, Call, _Signature, call

# ---------------------------------------------------------------------------------------------------------------
# Samples: for each row, parameters with their values, in the order of their positions


class Several(tuple):  # type: ignore[type-arg]
    """Values that may be arguments of their own, or all of them one."""


Sample = dict[str, Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
NAMES = {
    "input": ("input", "self", "a", "x", "x1"),
    "other": ("other", "x2", "mat2", "b"),
    "dim": ("dim", "axis"),
    "keepdim": ("keepdim", "keepdims"),
    "dim0": ("dim0", "axis0"),
    "dim1": ("dim1", "axis1"),
    "training": ("training", "train"),
    "operands": ("operands", "tensors"),
    "sizes": ("sizes", "repeats"),
    "data": ("data", "s"),
}
"""The names that a parameter has somewhere in PyTorch."""

OPTIONAL = {
    *("alpha", "beta", "dtype", "rounding_mode", "keepdim", "n", "prepend", "append", "diagonal", "mode", "value"),
    *("attn_mask", "dropout_p", "is_causal", "nan", "posinf", "neginf", "output_size", "step", "half_to_float"),
    *("memory_format", "inplace", "_stacklevel"),
}
"""Parameters that a call may leave out, besides those that a sample marks: by `?`, or by `*` if they have no place."""

NAN, INF = float("nan"), float("inf")
TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed))
    return (drawn % 2 == 0) if dtype == torch.bool else drawn.to(dtype)


def _pairs(dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """The two sides of an operation: tensors of one type and of two, one that is broadcast, and Python numbers."""
    x = numbers(3, 4, dtype=dtype)
    yield x, numbers(3, 4, dtype=dtype, seed=1)
    yield x, numbers(4, dtype=torch.int32, seed=2)
    yield x, torch.tensor(3, dtype=torch.float64)
    yield x, 3
    yield x, 2.5
    yield 3, x


def _elementwise(name: str = "other", **options: Any) -> Callable[[torch.dtype], Iterator[Sample]]:
    return lambda dtype: ({"input": a, name: b, **options} for a, b in _pairs(dtype))


def _unary(dtype: torch.dtype) -> Iterator[Sample]:
    yield {"input": numbers(3, 4, dtype=dtype)}
    if dtype == torch.float32:
        yield {"input": 2.25}


def _one(**options: Any) -> Callable[[torch.dtype], Iterator[Sample]]:
    def samples(dtype: torch.dtype) -> Iterator[Sample]:
        yield {"input": numbers(3, 4, dtype=dtype), **options}

    return samples


def _several(*given: Sample) -> Callable[[torch.dtype], Iterator[Sample]]:
    def samples(dtype: torch.dtype) -> Iterator[Sample]:
        for sample in given:
            yield {"input": numbers(3, 4, dtype=dtype), **sample}

    return samples


def _products(dtype: torch.dtype) -> Iterator[Sample]:
    for left, right in (((2, 3, 4), (2, 4, 5)), ((3, 4), (4, 5)), ((2, 3, 4), (4, 5))):
        yield {"input": numbers(*left, dtype=dtype), "other": numbers(*right, dtype=dtype, seed=1)}


def _choices(first: str, second: str, third: str) -> Callable[[torch.dtype], Iterator[Sample]]:
    def samples(dtype: torch.dtype) -> Iterator[Sample]:
        held = {"condition": numbers(3, 4, dtype=torch.bool), "input": numbers(3, 4, dtype=dtype)}
        for other in (numbers(3, 4, dtype=torch.float64, seed=1), torch.tensor(2), 3, 0.5):
            of: dict[str, Any] = {**held, "other": other}
            yield {name: of[name] for name in (first, second, third)}
        for one, other in ((2, held["input"]), (2, 0.5)):
            of = {**held, "input": one, "other": other}
            yield {name: of[name] for name in (first, second, third)}

    return samples


def _attention(dtype: torch.dtype) -> Iterator[Sample]:
    if not dtype.is_floating_point:
        return
    query, key, value = (numbers(1, 2, 3, 4, dtype=dtype, seed=seed) for seed in range(3))
    held = {"query": query, "key": key, "value": value}
    yield {**held, "attn_mask": numbers(3, 3, dtype=torch.bool) | torch.eye(3).bool(), "dropout_p": 0.0, "*scale": 0.3}
    yield {**held, "attn_mask": None, "dropout_p": 0.0, "is_causal": True, "*scale": None, "*enable_gqa": True}


def _multi_head(dtype: torch.dtype) -> Iterator[Sample]:
    if dtype != torch.float32:
        return
    rows = {name: numbers(3, 2, 4, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    yield {
        **rows,
        "embed_dim_to_check": 4,
        "num_heads": 2,
        "in_proj_weight": numbers(12, 4),
        "in_proj_bias": numbers(12),
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": numbers(4, 4),
        "out_proj_bias": numbers(4),
        "?training": False,
        "?key_padding_mask": torch.tensor([[False, False, True], [False, True, False]]),
        "?need_weights": False,
        "?attn_mask": torch.zeros(3, 3).triu(1),
    }


def _constants(*given: Any) -> Callable[[torch.dtype], Iterator[Sample]]:
    """What makes a tensor of nothing else."""

    def samples(dtype: torch.dtype) -> Iterator[Sample]:
        for sample in given:
            yield {**sample, "*dtype": dtype, "*device": "cpu", "*requires_grad": False}
            yield {**sample, "*layout": torch.strided, "*pin_memory": False}

    return samples


def _alike(*given: Any) -> Callable[[torch.dtype], Iterator[Sample]]:
    """What makes a tensor like another."""

    def samples(dtype: torch.dtype) -> Iterator[Sample]:
        for sample in given:
            held = {"input": numbers(3, 4, dtype=dtype), **sample}
            yield {**held, "*dtype": torch.float64, "*requires_grad": False}
            yield {**held, "*device": "cpu", "*memory_format": torch.contiguous_format}

    return samples


SAMPLES: dict[str, Callable[[torch.dtype], Iterator[Sample]]] = {
    "matmul": _products,
    "baddbmm": lambda dtype: iter(
        [
            {
                "input": numbers(2, 3, 5, dtype=dtype),
                "batch1": numbers(2, 3, 4, dtype=dtype),
                "batch2": numbers(2, 4, 5, dtype=dtype, seed=1),
                "beta": 2,
                "alpha": 3,
            }
        ]
    ),
    "einsum": lambda dtype: iter(
        [
            {"equation": "ij,jk->ik", "operands": Several([numbers(3, 4, dtype=dtype), numbers(4, 2, dtype=dtype)])},
            {"equation": "ij->ji", "operands": Several([numbers(3, 4, dtype=dtype)])},
        ]
    ),
    "softmax": _several(
        {"dim": 1, "dtype": torch.float64},
        {"dim": 0, "_stacklevel": 3},
        {"dim": -1, "half_to_float": False},
    ),
    "dropout": _several({"?p": 0.5, "?training": False, "inplace": False}, {"?p": 1.0, "?training": True}),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "add": _elementwise(alpha=2),
    "sub": _elementwise(alpha=2),
    "mul": _elementwise(),
    "div": lambda dtype: (
        {"input": a, "other": b, "rounding_mode": mode} for a, b in _pairs(dtype) for mode in ("floor", "trunc", None)
    ),
    "neg": _unary,
    "pow": _elementwise("exponent"),
    "sqrt": _unary,
    "rsqrt": _unary,
    "reciprocal": _unary,
    "tanh": _unary,
    "exp": _unary,
    "abs": _unary,
    "not": _unary,
    "clamp": _several(
        {"?min": -1, "?max": 2},
        {"?min": torch.tensor(-1), "?max": torch.tensor(2)},
        {"?min": 0.5, "?max": None},
    ),
    "max": _several({}, {"dim": 1, "keepdim": True}, {"other": numbers(3, 4, dtype=torch.float64, seed=1)}),
    "amax": _several({"dim": 1, "keepdim": True}, {"?dim": (0, 1)}),
    "sum": _several({"dtype": torch.float64}, {"dim": 1, "keepdim": True, "dtype": torch.float32}, {"dim": (0, 1)}),
    "logsumexp": _several({"dim": 1, "keepdim": True}, {"dim": (0, 1)}),
    "nan_to_num": lambda dtype: iter(
        [{"input": torch.tensor([1.0, NAN, INF, -INF]).to(dtype), "nan": 2.0, "posinf": 3.0, "neginf": 4.0}]
    ),
    "cat": lambda dtype: iter(
        [
            {"tensors": [numbers(3, 4, dtype=dtype), numbers(3, 2, dtype=torch.int32, seed=1)], "dim": 1},
            {"tensors": [numbers(2, 4, dtype=dtype, seed=i) for i in range(3)], "?dim": 0},
        ]
    ),
    "pad": _several({"pad": [0, 1], "mode": "constant", "value": 2.0}, {"pad": [1, 0, 0, 2], "mode": "constant"}),
    "chunk": _several({"chunks": 2, "?dim": 1}),
    "detach": _unary,
    "copy": _one(memory_format=torch.contiguous_format),
    "permute": lambda dtype: iter([{"input": numbers(2, 3, 4, dtype=dtype), "dims": Several((2, 0, 1))}]),
    "transpose": lambda dtype: iter([{"input": numbers(2, 3, 4, dtype=dtype), "dim0": 0, "dim1": -1}]),
    "getattr": lambda dtype: (
        {"input": numbers(*shape, dtype=dtype), "name": name}
        for name in ("T", "mT", "H", "mH")
        for shape in ((3, 4), (3,))
    ),
    "mT": lambda dtype: iter([{"input": numbers(*shape, dtype=dtype)} for shape in ((3, 4), (2, 3, 4))]),
    "T": _unary,
    "t": _unary,
    "repeat": _several({"sizes": Several((2, 1))}, {"sizes": Several((2, 1, 3))}),
    "tile": _several({"dims": Several((2, 1))}, {"dims": Several((2,))}),
    "repeat_interleave": _several(
        {"repeats": 2, "?dim": 1, "output_size": 8},
        {"repeats": torch.tensor([1, 2, 0]), "dim": 0},
    ),
    "getitem": _several(
        {"index": 0},
        {"index": (slice(None), 1)},
        {"index": (Ellipsis, None, slice(1, 3))},
        {"index": torch.tensor([2, 0])},
    ),
    "index": _several({"indices": [torch.tensor([2, 0]), torch.tensor([[1], [0]])]}),
    "add_batch_dim": lambda dtype: iter(()),
    "remove_batch_dim": lambda dtype: iter(()),
    "where": _choices("condition", "input", "other"),
    "where_method": _choices("input", "condition", "other"),
    "masked_fill": _several(
        *({"mask": numbers(3, 4, dtype=torch.bool, seed=2), "value": v} for v in (1, torch.tensor(1), 0.5))
    ),
    "tril": _several({"diagonal": 1}),
    "triu": _several({"diagonal": -1}),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor"), _elementwise()),
    **dict.fromkeys(("floor_divide", "remainder", "maximum", "minimum"), _elementwise()),
    "arange": _constants(
        {"end": 5},
        {"start": 2, "end": 7},
        {"start": 1, "end": 8, "step": 3},
        {"start": 7, "end": 1, "step": -2},
        {"end": 4.5},
    ),
    "full": _constants({"size": (2, 3), "fill_value": 1}, {"size": [2], "fill_value": True}),
    "zeros": _constants({"size": Several((2, 3))}, {"size": Several((4,))}),
    "tensor": _constants({"data": 3}, {"data": [[1, 2], [3, 4]]}, {"data": True}),
    "full_like": _alike({"fill_value": 1}),
    "zeros_like": _alike({}),
    "new_full": _alike({"size": (2, 3), "fill_value": 1}),
    "new_zeros": _alike({"size": Several((2, 3))}, {"size": Several((4,))}),
    "cumsum": _several({"dim": 1, "dtype": torch.int8}, {"dim": 0}),
    "diff": lambda dtype: (
        {"input": numbers(3, 4, dtype=dtype), **options}
        for options in (
            {"?n": 1, "?dim": -1},
            {"n": 2, "dim": 1},
            {"n": 1, "?dim": 0, "prepend": numbers(2, 4, dtype=dtype, seed=1), "append": numbers(1, 4, dtype=dtype)},
            {"n": 1, "dim": 1, "prepend": numbers(3, 1, dtype=torch.int32, seed=1)},
        )
    ),
}
for _name, _same_as in {"min": "max", "ones": "zeros", "ones_like": "zeros_like", "new_ones": "new_zeros"}.items():
    SAMPLES[_name] = SAMPLES[_same_as]

# Rows whose arguments are read off the result: calls, each `(args, kwargs)` after the input.
OPEN: dict[str, tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]] = {
    "to": (
        ((torch.float16,), {}),
        (("cpu",), {}),
        (("cpu", torch.float64, True, True), {}),
        ((numbers(2, dtype=torch.int8),), {}),
        ((), {"dtype": torch.int8, "copy": True, "memory_format": torch.preserve_format}),
        ((), {"other": numbers(2, dtype=torch.int8)}),
        ((torch.bool,), {"non_blocking": True}),
    ),
    "type": (((torch.int16,), {}), (("torch.FloatTensor",), {}), ((), {"dtype": torch.bool})),
    "type_as": (((numbers(2, dtype=torch.int8),), {}), ((), {"other": numbers(2, dtype=torch.int8)})),
    "float": (((), {}), ((), {"memory_format": torch.preserve_format})),
    "_to_copy": (((), {"dtype": torch.int8}), ((), {"dtype": torch.float64, "device": "cpu"})),
    "reshape": (((2, 6), {}), (((4, -1),), {}), ((), {"shape": (12,)})),
    "view": (((2, 6), {}), (((4, -1),), {}), ((), {"size": (12,)})),
    "flatten": (((), {}), ((0, 1), {}), ((), {"start_dim": 0, "end_dim": -1})),
    "unflatten": (((1, (2, 2)), {}), ((), {"dim": 0, "sizes": (1, 3)})),
    "squeeze": (((), {}), ((0,), {}), (((0, 1),), {}), ((), {"dim": 0}), ((), {"axis": 0})),
    "unsqueeze": (((1,), {}), ((), {"dim": -1}), ((), {"axis": 0})),
    "view_as": (((numbers(2, 6),), {}), ((), {"other": numbers(2, 6)})),
    "expand": (((2, 3, 4), {}), (((-1, 4),), {}), ((), {"size": (3, 4)})),
    "expand_as": (((numbers(2, 3, 4),), {}), ((), {"other": numbers(2, 3, 4)})),
    "broadcast_to": ((((2, 3, 4),), {}), ((), {"size": (3, 4)})),
    "conv2d": (((numbers(2, 2, 1, 1),), {}), ((numbers(2, 2, 3, 3), None, 2), {"padding": 1})),
}
for _name in ("half", "bfloat16", "double", "bool", "int", "long", "cpu"):
    OPEN[_name] = OPEN["float"]
OPEN["reshape_as"], OPEN["_unsafe_view"] = OPEN["view_as"], OPEN["view"]

# ---------------------------------------------------------------------------------------------------------------
# What each canonical name means, as a plain function of its parameters (and of the result, for what is read off it)


def _reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(input: Tensor, dim: Any, keepdim: bool, **unused: Any) -> Any:
        return function(input) if dim is None else function(input, dim, keepdim)

    return compute


def _of(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _is_bool(*values: Any) -> bool:
    return all(_of(value).dtype == torch.bool for value in values)


def _bits(on_integers: Callable[..., Any], logical: Callable[..., Any]) -> Callable[..., Any]:
    """`and` and its like are read of booleans alone; of others they may be either."""

    def compute(result: Any, **operands: Any) -> Any:
        values = operands.values()
        return logical(*map(_of, values)) if _is_bool(*values) else result

    return compute


MEANING: dict[str, Callable[..., Any]] = {
    "matmul": lambda input, other: input @ other,
    "baddbmm": lambda input, batch1, batch2, beta, alpha: beta * input + alpha * (batch1 @ batch2),
    "einsum": lambda equation, operands: torch.einsum(equation, *operands),
    "softmax": lambda input, dim, dtype=None, half_to_float=False, _stacklevel=3: input.to(
        dtype or input.dtype
    ).softmax(dim),
    "dropout": lambda result, input, p, training, inplace=False: (
        torch.where(result == 0, 0, input / (1 - p)) if training else input
    ),
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "multi_head_attention_forward": F.multi_head_attention_forward,
    "add": lambda input, other, alpha: torch.add(_of(input), other, alpha=alpha) if alpha != 1 else input + other,
    "sub": lambda input, other, alpha: torch.sub(_of(input), other, alpha=alpha) if alpha != 1 else input - other,
    "mul": operator.mul,
    "div": lambda input, other, rounding_mode=None: (
        torch.div(_of(input), other, rounding_mode=rounding_mode) if rounding_mode else input / other
    ),
    "neg": operator.neg,
    "pow": lambda input, exponent: input**exponent,
    "sqrt": lambda input: _of(input).sqrt(),
    "rsqrt": lambda input: _of(input).rsqrt(),
    "reciprocal": lambda input: 1 / _of(input),
    "tanh": lambda input: _of(input).tanh(),
    "exp": lambda input: _of(input).exp(),
    "clamp": lambda input, min, max: input.clamp(min, max),
    "max": _reduced(torch.max),
    "min": _reduced(torch.min),
    "amax": lambda input, dim, keepdim: input.amax(dim, keepdim),
    "sum": lambda input, dim, keepdim, dtype: input.sum(dim, keepdim, dtype=dtype),
    "logsumexp": lambda input, dim, keepdim: input.logsumexp(dim, keepdim),
    "nan_to_num": lambda input, nan, posinf, neginf: input.nan_to_num(nan, posinf, neginf),
    "cat": lambda tensors, dim: torch.cat(tensors, dim),
    "append": lambda input, other, dim: torch.cat([input, other], dim),
    "pad": lambda input, pad, mode, value: F.pad(input, pad, mode, value),
    "chunk": lambda input, chunks, dim: input.chunk(chunks, dim),
    "cast": lambda result, input: input.to(result.dtype),
    "detach": lambda input: input,
    "copy": lambda input: input,
    "permute": lambda input, dims: input.permute(dims),
    "reshape": lambda result, input: input.reshape(result.shape),
    "expand": lambda result, input: input.expand(result.shape),
    "conv2d": lambda result, input: result,
    "repeat": lambda input, sizes: input.repeat(sizes),
    "tile": lambda input, dims: input.tile(dims),
    "repeat_interleave": lambda input, repeats, dim, output_size: input.repeat_interleave(repeats, dim),
    "getitem": lambda input, index: input[index],
    "index": lambda input, indices: input[tuple(indices)],
    "where": lambda condition, input, other: torch.where(condition, input, other),
    "masked_fill": lambda input, mask, value: input.masked_fill(mask, value),
    "tril": lambda input, diagonal: input.tril(diagonal),
    "triu": lambda input, diagonal: input.triu(diagonal),
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "and": _bits(operator.and_, torch.logical_and),
    "or": _bits(operator.or_, torch.logical_or),
    "xor": _bits(operator.xor, torch.logical_xor),
    "not": _bits(operator.invert, torch.logical_not),
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "abs": lambda input: abs(input),
    "maximum": lambda input, other: torch.maximum(input, other),
    "minimum": lambda input, other: torch.minimum(input, other),
    "arange": lambda start, end, step, dtype: torch.arange(start, end, step, dtype=dtype),
    "full": lambda size, fill_value, dtype: torch.full(size, fill_value),
    "zeros": lambda size, dtype: torch.zeros(size),
    "ones": lambda size, dtype: torch.ones(size),
    "tensor": lambda data, dtype: torch.tensor(data),
    "full_like": lambda input, fill_value, dtype: torch.full_like(input, fill_value, dtype=dtype),
    "zeros_like": lambda input, dtype: input.to(dtype or input.dtype) * 0,
    "ones_like": lambda input, dtype: torch.full(input.shape, 1),
    "new_full": lambda input, size, fill_value, dtype: torch.full(size, fill_value),
    "new_zeros": lambda input, size, dtype: torch.zeros(size),
    "new_ones": lambda input, size, dtype: torch.ones(size),
    "cumsum": lambda input, dim, dtype: input.cumsum(dim, dtype=dtype),
    "diff": lambda input, n, dim, prepend, append: torch.diff(input, n, dim, prepend, append),
}

# ---------------------------------------------------------------------------------------------------------------
# Every way to call


def ways(sample: Sample, names: dict[str, tuple[str, ...]] = NAMES) -> Iterator[Arguments]:
    """Every split of a sample into positions and keywords, with every name, and without what may be left out."""
    held = {name.lstrip("?*"): value for name, value in sample.items()}
    positional = sum("*" not in name for name in sample)
    optional = [name.lstrip("?*") for name in sample if name[0] in "?*" or name in OPTIONAL]
    counts = range(len(optional) + 1) if len(optional) < 5 else (0, 1, len(optional))
    for dropped in (names for count in counts for names in itertools.combinations(optional, count)):
        kept = [(name, value) for name, value in held.items() if name not in dropped]
        last = sum(name not in dropped for name in [*held][:positional])
        for split in range(last + 1):
            yield from _named(kept[:split], kept[split:], names)


def _named(
    positions: list[tuple[str, Any]], rest: list[tuple[str, Any]], known: dict[str, tuple[str, ...]]
) -> Iterator[Arguments]:
    spread = [tuple(value for _, value in positions)]
    if positions and isinstance(positions[-1][1], Several):
        spread.append((*spread[0][:-1], *positions[-1][1]))
    for names in itertools.product(*(known.get(name, (name,)) for name, _ in rest)):
        if len({*names}) == len(names):
            kwargs = {name: value for name, (_, value) in zip(names, rest)}
            for args in spread:
                yield args, kwargs


def _plain(value: Any) -> Any:
    """A value for PyTorch: lists of its own kinds, tensors of their own memory."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if not isinstance(value, Several) else tuple(map(_plain, value))
    return value


def run(target: Any, method: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What PyTorch makes of a call; None where it takes it not."""
    args, kwargs = _plain(args), {name: _plain(value) for name, value in kwargs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not method:
                return target(*args, **kwargs)
            return getattr(args[0], target)(*args[1:], **kwargs) if args and isinstance(args[0], Tensor) else None
        except (
            TypeError,
            RuntimeError,
            ValueError,
            AttributeError,
            IndexError,
            NotImplementedError,
            ZeroDivisionError,
        ):
            return None


def node(target: Any, method: bool, args: Any, kwargs: Any, result: Any) -> tuple[Node, dict[Node, Any]]:
    """A graph's node that makes this call, and what its inputs hold."""
    graph = Graph()
    values: dict[Node, Any] = {}

    def as_node(value: Any) -> Any:
        if isinstance(value, Tensor):
            made = graph.placeholder(f"x{len(values)}")
            made.meta["example_value"] = values[made] = value
            return made
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(map(as_node, value))
        return value

    args, kwargs = as_node(tuple(args)), {name: as_node(value) for name, value in kwargs.items()}
    made = graph.create_node("call_method" if method else "call_function", target, args, kwargs)
    made.meta["example_value"] = result
    return made, values


def computed(found: Call, values: dict[Node, Any], result: Any) -> Any:
    """What the call that was read means."""
    meaning = MEANING[found.name]
    args = torch.fx.map_arg(found.args, values.__getitem__)
    if found.name in ("cast", "reshape", "expand", "conv2d", "and", "or", "xor", "not", "dropout"):
        return meaning(result, **args)
    in_order = meaning.__module__ == "_operator"
    return meaning(*args.values()) if in_order else meaning(**args)


def assert_means(found: Call, values: dict[Node, Any], result: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = computed(found, values, result)
    if not isinstance(result, Tensor) and isinstance(result, (tuple, list)):
        assert len(expected) == len(result)
        pairs = [*zip(expected, result)]
    else:
        pairs = [(expected, result)]
    for one, other in pairs:
        if other is None:
            assert one is None
            continue
        one, other = map(_of, (one, other))
        assert one.shape == other.shape
        assert torch.allclose(one.to(other.dtype), other, rtol=1e-2, atol=1e-2, equal_nan=True)


SPELLINGS: list[tuple[str, Any, bool, _Signature]] = [
    *((f"{getattr(f, '__module__', '') or ''}.{f.__name__}", f, False, row) for f, row in _FUNCTIONS.items()),
    *((f".{name}", name, True, row) for name, row in _METHODS.items()),
]
"""The words, the target, whether it is a method, and its row."""


def _overloads() -> Iterator[tuple[str, Any, bool, _Signature]]:
    """The operators that are read by the name of a function or a method, all their overloads together and each."""
    named = {f.__name__: row for f, row in _FUNCTIONS.items() if getattr(torch, f.__name__, None) is f}
    for name, row in {**_METHODS, **named}.items():
        packet = getattr(torch.ops.aten, name, None)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        if "tensor" not in name.split("_", 1):
            yield str(packet), packet, False, row
        for overload in packet.overloads():
            operator_ = getattr(packet, overload)
            if "tensor" not in name.split("_", 1) and not any(
                argument.alias_info and argument.kwarg_only for argument in operator_._schema.arguments
            ):
                yield str(operator_), operator_, False, row


OVERLOADS = [*_overloads()]

NOT_HERE = {
    *(".cuda", ".dropout", "._softmax", "._to_copy", "._unsafe_view", ".scaled_dot_product_attention"),
    *(".mT", ".mH", ".numpy_T", ".matrix_H", "aten.cuda", ".index"),
    *(f"torch._functorch.predispatch.{name}" for name in ("_add_batch_dim", "_remove_batch_dim")),
    *("aten.cuda.default", "aten.mm.dtype", "aten.bmm.dtype", "aten.baddbmm.dtype", "aten.view.dtype"),
    *(
        "aten.to.prim_other",
        "aten.where.default",
        "aten.repeat_interleave.Tensor",
        "aten.einsum.sublist",
        "aten.index.list_Tensor",
        "aten.__getitem__.Dict_Tensor",
    ),
}
"""What no call of these samples comes to: what is no method of a tensor but an operator, or needs a GPU, and overloads
of another form, which are not read."""

# What PyTorch takes and the table does not read, with why. (Each occurs.)
UNREAD: dict[str, Callable[..., bool]] = {
    "a sum in a type that does not hold its terms": lambda row, args, kwargs: row == "sum" and "dtype" in kwargs,
    "a factor by its position, as some overloads have it": lambda row, args, kwargs: (
        row in ("add", "sub") and len(args) > 2
    ),
}


def _calls(row: _Signature, target: Any, method: bool) -> Iterator[Arguments]:
    if not row.open:
        for dtype in TYPES:
            for sample in SAMPLES[row.name](dtype):
                yield from ways(sample, NAMES if dtype == TYPES[0] else {})
        return
    name = target if method else target.__name__.split(".")[0]
    for dtype in TYPES:
        for shape in ((3, 4), (1, 1), (2, 2, 3, 3)):
            input = numbers(*shape, dtype=dtype)
            for args, kwargs in OPEN.get(name if name in OPEN else name.rstrip("_"), ()):
                yield (input, *args), kwargs
                if not method:
                    yield args, {"input": input, **kwargs}
                    yield args, {"self": input, **kwargs}


def _taken(row: _Signature, target: Any, method: bool) -> Iterator[tuple[Arguments, Any]]:
    """The calls that PyTorch takes, with what it makes of them."""
    for args, kwargs in _calls(row, target, method):
        result = run(target, method, args, kwargs)
        if result is not None and result is not NotImplemented:
            yield (args, kwargs), result


def _exists(words: str, target: Any, method: bool) -> bool:
    """Whether a spelling is PyTorch's, of tensors: the table has in-place forms that PyTorch has not."""
    if words in NOT_HERE:
        return False
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_exists(str(each), each, False) for each in (getattr(target, name) for name in target.overloads()))
    if isinstance(target, torch._ops.OpOverload):
        return any(
            "Tensor" in str(argument.type) and "List[" not in str(argument.type)
            for argument in target._schema.arguments
        )
    return not method or hasattr(torch.Tensor, target)


ALL = pytest.mark.parametrize(
    ("words", "target", "method", "row"), SPELLINGS + OVERLOADS, ids=lambda x: x if isinstance(x, str) else ""
)


@ALL
def test_every_way_to_call(words: str, target: Any, method: bool, row: _Signature) -> None:
    taken = 0
    for (args, kwargs), result in _taken(row, target, method):
        taken += 1
        made, values = node(target, method, args, kwargs, result)
        found = call(made)
        if found is None:
            assert any(known(row.name, args, kwargs) for known in UNREAD.values()), f"not read: {words} {args} {kwargs}"
            continue
        try:
            assert_means(found, values, result)
        except Exception as error:
            raise AssertionError(f"{words} {args} {kwargs} is read as {found.name} {found.args}") from error
    assert taken or not _exists(words, target, method)


@ALL
def test_what_a_row_does_not_name_is_not_read(words: str, target: Any, method: bool, row: _Signature) -> None:
    """Every parameter in PyTorch's schemas is named by the row, or changes no value, or makes the call unreadable."""
    (args, kwargs), result = next(_taken(row, target, method), (((), {}), None))
    if result is None:
        return
    known = {name for p in row.parameters for name in (p.keyword, *_ALIASES.get(p.keyword, ()))}
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{_operator_name(target)}")
    declared = {argument.name for schema in schemas for argument in schema.arguments}
    inert = {*_INERT, "layout"}

    def read(*more: Any, **others: Any) -> Call | None:
        return call(node(target, method, (*args, *more), {**kwargs, **others}, result)[0])

    assert read() is not None
    assert read(out=result) is None
    if row.open:
        assert row.name in ("cast", "reshape", "expand", "conv2d")
        return
    for name in (declared - known - inert) | {"unheard_of"}:
        assert read(**{name: 1}) is None, name
    for name in {p.keyword for p in row.parameters[: len(args)]}:
        assert read(**{name: 1}) is None, f"{name} twice"
    positions = sum(p.kind is not p.kind.KEYWORD_ONLY for p in row.parameters)
    if not any(p.kind is p.kind.VAR_POSITIONAL for p in row.parameters):
        assert read(*[None] * (positions + 1 - len(args))) is None
    assert read(layout=torch.sparse_coo) is None


def _operator_name(target: Any) -> str:
    name = target if isinstance(target, str) else target.__name__.split(".")[0]
    of_python = {
        "truediv": "div",
        "floordiv": "floor_divide",
        "mod": "remainder",
        "invert": "bitwise_not",
        "getattr": "",
    }
    return of_python.get(name, name)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (torch.add, (numbers(3, 4), 2, numbers(3, 4)), {}),
        (torch.sub, (numbers(3, 4), 2, numbers(3, 4)), {}),
        (torch.baddbmm, (2, numbers(2, 3, 5), numbers(2, 3, 4), numbers(2, 4, 5)), {}),
        (torch.baddbmm, (2, numbers(2, 3, 5), 3, numbers(2, 3, 4), numbers(2, 4, 5)), {}),
        (torch.where, (numbers(3, 4, dtype=torch.bool),), {}),
        (torch.repeat_interleave, (torch.tensor([1, 2]),), {}),
        (torch.einsum, ("ij->ji", numbers(3, 4)), {"path": None}),
        (torch.zeros, (2,), {"layout": torch.sparse_coo}),
        (getattr, (numbers(3, 4), "T", None), {}),
        (torch.ops.aten.tensor.bool, (3,), {}),
        (torch.max, (numbers(3, 4),), {"dim": 0, "other": None, "keepdim": True, "axis": 1}),
    ],
    ids=lambda x: getattr(x, "__name__", "") if callable(x) else "",
)
def test_forms_that_no_row_has(target: Any, args: Any, kwargs: Any) -> None:
    """Such as the factor between two summands, which PyTorch still takes."""
    result = run(target, False, args, kwargs)
    assert call(node(target, False, args, kwargs, result)[0]) is None


def test_exceptions_occur() -> None:
    """None of `UNREAD` is there for nothing."""
    occurring = set()
    for _, target, method, row in SPELLINGS + OVERLOADS:
        if row.name in ("sum", "add", "sub"):
            for (args, kwargs), result in _taken(row, target, method):
                if call(node(target, method, args, kwargs, result)[0]) is None:
                    occurring |= {why for why, known in UNREAD.items() if known(row.name, args, kwargs)}
    assert occurring == UNREAD.keys()
