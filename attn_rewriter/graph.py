"""Reading FX graphs: one canonical name for every spelling of an operation, and facts about values and aliases.

`x @ y`, `torch.matmul(x, y)`, `x.matmul(y)` and `torch.bmm(x, y)` all read as `matmul(input, other)`. An in-place
spelling reads as the functional one; `Facts.current` says which node holds a tensor's contents at a given time.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from attn_rewriter.errors import refuse
from attn_rewriter.spec import Size, same
from attn_rewriter.torch_private import (
    GuardOnDataDependentSymNode,
    HigherOrderOperator,
    Max,
    Min,
    OpOverload,
    OpOverloadPacket,
    StrictMinMaxConstraint,
    predispatch,
    tree_leaves,
)

# Each row: canonical name(parameters): its spellings. A row names every parameter that matters, and a call that gives
# anything else is not read. `*x` takes what is left of the positions, what follows a lone `*` comes by keyword alone,
# `x:y` is a parameter whose keyword is spelled y, and with `...` at the end the rest is read off the result, by its
# shape and type. (Rows whose reader takes the type from the result name `dtype` and look no further.) `.name` is a
# method; a method's and an operator's in-place form come with it.
_OPERATIONS = """
matmul(input, other): torch.matmul operator.matmul .matmul .__matmul__
matmul(input, other:mat2): torch.bmm torch.mm .bmm .mm
baddbmm(input, batch1, batch2, *, beta=1, alpha=1): torch.baddbmm .baddbmm
einsum(equation, *operands:tensors): torch.einsum torch.functional.einsum
softmax(input, dim, dtype=None): torch.softmax torch.special.softmax .softmax
softmax(input, dim=None, _stacklevel=3, dtype=None): F.softmax
softmax(input, dim, half_to_float=False): ._softmax
dropout(input, p=0.5, training=True, inplace=False): F.dropout
dropout(input, p, training:train): torch.dropout .dropout
scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, \
enable_gqa=False): torch._C._nn.scaled_dot_product_attention .scaled_dot_product_attention
multi_head_attention_forward(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, \
bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, \
need_weights=True, attn_mask=None, use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, \
v_proj_weight=None, static_k=None, static_v=None, average_attn_weights=True, is_causal=False): \
F.multi_head_attention_forward
add(input, other, *, alpha=1): torch.add operator.add .add .__add__ .__radd__
sub(input, other, *, alpha=1): torch.sub torch.subtract operator.sub .sub .subtract .__sub__
mul(input, other): torch.mul torch.multiply operator.mul .mul .multiply .__mul__ .__rmul__
div(input, other, *, rounding_mode=None): torch.div torch.divide operator.truediv .div .divide .__truediv__
div(input, other): torch.true_divide .true_divide
neg(input): torch.neg torch.negative operator.neg .neg .negative .__neg__
pow(input, exponent): torch.pow operator.pow .pow .__pow__
sqrt(input): torch.sqrt .sqrt math.sqrt torch.sym_sqrt
rsqrt(input): torch.rsqrt .rsqrt
reciprocal(input): torch.reciprocal .reciprocal
tanh(input): torch.tanh F.tanh .tanh
conv2d(input, ...): torch.conv2d F.conv2d
exp(input): torch.exp .exp
clamp(input, min=None, max=None): torch.clamp torch.clip .clamp .clip
clamp(input, min, *, max=None): torch.clamp_min .clamp_min
clamp(input, max, *, min=None): torch.clamp_max .clamp_max
max(input, dim=None, keepdim=False, *, other=None): torch.max .max
min(input, dim=None, keepdim=False, *, other=None): torch.min .min
amax(input, dim=(), keepdim=False): torch.amax .amax
sum(input, dim=None, keepdim=False, *, dtype=None): torch.sum .sum
logsumexp(input, dim, keepdim=False): torch.logsumexp .logsumexp
nan_to_num(input, nan=None, posinf=None, neginf=None): torch.nan_to_num .nan_to_num
cat(tensors, dim=0): torch.cat torch.concat torch.concatenate
pad(input, pad, mode="constant", value=None): F.pad torch._C._nn.pad
chunk(input, chunks, dim=0): torch.chunk .chunk
cast(input, ...): .to .type .type_as .float .half .bfloat16 .double .bool .int .long ._to_copy .cpu .cuda
detach(input): torch.detach .detach
copy(input): torch.clone .clone .contiguous
permute(input, *dims): torch.permute .permute
transpose(input, dim0, dim1): torch.transpose torch.swapdims .transpose .swapdims
transpose(input, dim0:axis0, dim1:axis1): torch.swapaxes .swapaxes
getattr(input, name): getattr
mT(input): torch.adjoint .adjoint .mT .mH
T(input): .numpy_T .matrix_H
t(input): torch.t .t
reshape(input, ...): torch.reshape torch.flatten torch.unflatten torch.squeeze torch.unsqueeze .reshape .view .flatten \
.unflatten .squeeze .unsqueeze .view_as .reshape_as ._unsafe_view
expand(input, ...): torch.broadcast_to .expand .expand_as .broadcast_to
repeat(input, *sizes:repeats): .repeat
tile(input, *dims): torch.tile .tile
repeat_interleave(input, repeats, dim=None, *, output_size=None): torch.repeat_interleave .repeat_interleave
getitem(input, index): operator.getitem .__getitem__
index(input, indices): .index
add_batch_dim(input, in_dim, level): vmap._add_batch_dim
remove_batch_dim(input, level, batch_size, out_dim): vmap._remove_batch_dim
where(condition, input, other): torch.where
where_method(input, condition, other): .where
masked_fill(input, mask, value): torch.masked_fill .masked_fill
tril(input, diagonal=0): torch.tril .tril
triu(input, diagonal=0): torch.triu .triu
lt(input, other): torch.lt torch.less operator.lt .lt .less .__lt__
le(input, other): torch.le torch.less_equal operator.le .le .less_equal .__le__
gt(input, other): torch.gt torch.greater operator.gt .gt .greater .__gt__
ge(input, other): torch.ge torch.greater_equal operator.ge .ge .greater_equal .__ge__
eq(input, other): torch.eq operator.eq .eq .__eq__
ne(input, other): torch.ne torch.not_equal operator.ne .ne .not_equal .__ne__
and(input, other): torch.logical_and torch.bitwise_and operator.and_ .logical_and .bitwise_and .__and__ .__rand__
or(input, other): torch.logical_or torch.bitwise_or operator.or_ .logical_or .bitwise_or .__or__ .__ror__
not(input): torch.logical_not torch.bitwise_not operator.invert .logical_not .bitwise_not .__invert__
xor(input, other): torch.logical_xor torch.bitwise_xor operator.xor .logical_xor .bitwise_xor .__xor__ .__rxor__
floor_divide(input, other): torch.floor_divide operator.floordiv .floor_divide .__floordiv__
remainder(input, other): torch.remainder operator.mod .remainder .__mod__
abs(input): torch.abs torch.absolute operator.abs .abs .absolute .__abs__
maximum(input, other): torch.maximum .maximum
minimum(input, other): torch.minimum .minimum
arange(start=0, end=None, step=1, *, dtype=None): torch.arange
full(size, fill_value, *, dtype=None): torch.full
zeros(*size, dtype=None): torch.zeros
ones(*size, dtype=None): torch.ones
tensor(data, *, dtype=None): torch.tensor torch.as_tensor torch._refs.tensor
tensor(data:s, *, dtype=None): torch.scalar_tensor
full_like(input, fill_value, *, dtype=None): torch.full_like
zeros_like(input, *, dtype=None): torch.zeros_like
ones_like(input, *, dtype=None): torch.ones_like
new_full(input, size, fill_value, *, dtype=None): .new_full
new_zeros(input, *size, dtype=None): .new_zeros
new_ones(input, *size, dtype=None): .new_ones
cumsum(input, dim, *, dtype=None): torch.cumsum .cumsum
diff(input, n=1, dim=-1, prepend=None, append=None): torch.diff .diff
"""

_INERT = frozenset({"device", "pin_memory", "requires_grad", "memory_format"})
"""Arguments of any function that change no value; what they change is read off the result."""

_ALIASES = {"input": ("self", "x", "a", "x1"), "other": ("x2",), "dim": ("axis",), "keepdim": ("keepdims",)}
"""Other keywords of the same parameters: those of operators, and NumPy's, which PyTorch's builtins take as well."""

_NAMESPACES = {"torch": torch, "F": F, "operator": operator, "math": math, "vmap": predispatch}

_ANYWHERE, _KEYWORD, _REST = (
    getattr(inspect.Parameter, kind) for kind in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", "VAR_POSITIONAL")
)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a row; `default` is `...` where it has none, `kind` says by what it is given."""

    name: str
    keyword: str
    default: Any
    kind: Any

    def given(self, kwargs: dict[str, Any]) -> list[str]:
        """The keywords by which a call gives it: none, or one if the call is right."""
        return [keyword for keyword in (self.keyword, *_ALIASES.get(self.keyword, ())) if keyword in kwargs]


@dataclass(frozen=True)
class _Signature:
    """The name and the parameters of a row; `open` where the rest of the arguments is read off the result."""

    name: str
    parameters: tuple[_Parameter, ...]
    open: bool

    @classmethod
    def parse(cls, name: str, text: str) -> _Signature:
        """Read a row's parameters, as they stand between the parentheses."""
        items = [item.strip() for item in text.split(",")]
        parameters: list[_Parameter] = []
        kind = _ANYWHERE
        for item in items:
            spelled, _, default = item.partition("=")
            canonical, _, keyword = spelled.lstrip("*").partition(":")
            value = ast.literal_eval(default) if default else ...
            if item.startswith("*") and canonical:
                parameters.append(_Parameter(canonical, keyword or canonical, value, _REST))
            if item.startswith("*"):
                kind = _KEYWORD
            elif item != "...":
                parameters.append(_Parameter(canonical, keyword or canonical, value, kind))
        return cls(name, tuple(parameters), "..." in items)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by parameter; None where the row does not say what one of them is."""
        bound: dict[str, Any] = {}
        left, given = list(args), dict(kwargs)
        for parameter in self.parameters:
            positional = parameter.kind is not _KEYWORD and bool(left)
            keywords = parameter.given(given)
            if len(keywords) + positional > 1:
                return None
            if parameter.kind is _REST:
                values = left if positional else given.pop(keywords[0]) if keywords else ()
                bound[parameter.name], left = _flat(values), []
            elif positional:
                bound[parameter.name] = left.pop(0)
            elif keywords:
                bound[parameter.name] = given.pop(keywords[0])
            elif parameter.default is not ...:
                bound[parameter.name] = parameter.default
            else:
                return None
        if given.get("layout") in (None, torch.strided):
            given.pop("layout", None)
        return bound if self.open or not (left or given.keys() - _INERT) else None


def _flat(values: Any) -> tuple[Any, ...]:
    """Sizes, dimensions or tensors, each an argument of its own or all of them one."""
    if not isinstance(values, (tuple, list)):
        return (values,)
    return tuple(values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values)


def _parse_operations(text: str) -> tuple[dict[Any, _Signature], dict[str, _Signature]]:
    functions: dict[Any, _Signature] = {}
    methods: dict[str, _Signature] = {}
    for row in text.strip().splitlines():
        head, _, spellings = row.partition("): ")
        name, _, parameters = head.partition("(")
        signature = _Signature.parse(name, parameters)
        for spelling in spellings.split():
            if spelling.startswith("."):
                methods[spelling[1:]] = signature
                if not spelling.endswith("__"):
                    methods[spelling[1:] + "_"] = signature
                continue
            if spelling == "getattr":
                functions[getattr] = signature
                continue
            namespace, _, path = spelling.partition(".")
            functions[operator.attrgetter(path)(_NAMESPACES[namespace])] = signature
            augmented = getattr(operator, "i" + path.rstrip("_"), None) if namespace == "operator" else None
            if augmented is not None:
                functions[augmented] = signature
    return functions, methods


_FUNCTIONS, _METHODS = _parse_operations(_OPERATIONS)
_PURE_EXCEPT = {"dropout", "getattr"}


@dataclass(frozen=True)
class HigherOrder:
    """What a higher-order operator does with the bodies that it calls.

    `inputs` is the first of its arguments that are a body's inputs, one for each placeholder, where it calls a body
    once (of two bodies, one); None where it calls a body several times, or with inputs of its own making. `changes`
    says what a body runs under that its caller does not: "autocast" where the first four arguments are those of
    `torch.autocast`, "grad" where the first argument says whether gradients are on, "nothing", or "unknown" where
    nobody can say whether gradients are on. `repeats`: whether the backward pass runs a body again, with the same
    random numbers. `carries`: whether what a body gives is its next input, and must lie in memory as the first did; so
    must its gradient, of which a kernel makes no promise. No operator here writes into, or passes on, any tensor but as
    its bodies do.
    """

    inputs: int | None
    changes: str = "nothing"
    repeats: bool = False
    carries: bool = False


# Bodies of other operators are not looked into: nobody knows what they run under.
HIGHER_ORDER = {
    "wrap": HigherOrder(1),
    "tag_activation_checkpoint": HigherOrder(1, repeats=True),
    "wrap_activation_checkpoint": HigherOrder(1, repeats=True),
    "wrap_with_autocast": HigherOrder(5, "autocast"),
    "wrap_with_set_grad_enabled": HigherOrder(2, "grad"),
    "invoke_subgraph": HigherOrder(2),
    "cond": HigherOrder(3),
    "map_impl": HigherOrder(None),
    "while_loop": HigherOrder(None, carries=True),
    "scan": HigherOrder(None, carries=True),
    "autograd_function_apply": HigherOrder(None, "unknown"),  # off in its forward pass, as asked in its backward pass
}

# Operators that are not looked into, but write into nothing that their bodies do not write into.
_WRITES_AS_ITS_BODIES = HIGHER_ORDER.keys() | {"flex_attention", "flex_attention_backward", "associative_scan"}


def _obstacle(caller: Node) -> str:
    """Why the bodies that a node calls stay as they are; empty where they are rewritten as well."""
    name = _name(caller)
    if (operator := HIGHER_ORDER.get(name)) is None:
        return f"it is in a body of `{name}`, and nobody knows what that runs under"
    given = tree_leaves(caller.meta.get("example_value"))
    if operator.carries and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given):
        return f"`{name}` takes no gradient that lies in memory in another way"
    return ""


def inputs_of(caller: Node, body: Graph) -> list[Any] | None:
    """What the placeholders of a body stand for, in their order: nodes of the outer graph, or constants. None where
    the caller does not call it just once, with these."""
    operator = HIGHER_ORDER.get(_name(caller))
    if operator is None or operator.inputs is None:
        return None
    given: list[Any] = tree_leaves(list(caller.args[operator.inputs :]))
    return given if len(given) == len(body.find_nodes(op="placeholder")) else None


@dataclass(frozen=True)
class Call:
    """An operation under its canonical name, with its arguments by parameter."""

    name: str
    args: dict[str, Any]

    def __getitem__(self, parameter: str) -> Any:
        return self.args[parameter]


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor that Dynamo recorded for a node."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a type has all numbers of another one."""
    try:
        return torch.promote_types(wide, narrow) == wide
    except RuntimeError:  # float8 has no wider types, says PyTorch
        return wide == narrow


def size(value: Any) -> Size:
    """An int, SymInt or node that holds one, as a `Size`."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        expression = _settled(value.node.expr, value.node.shape_env)
        return int(expression) if expression.is_Integer else expression
    return value


def _settled(expression: Any, env: Any) -> Any:
    """An expression without the `Max` and `Min` that the ranges of its symbols decide: no size is below 2."""
    choices = expression.atoms(Max, Min)
    ranges = {choice: env.bound_sympy(choice) for choice in choices}
    return expression.xreplace({choice: known.lower for choice, known in ranges.items() if known.is_singleton()})


def guarded(a: Size, b: Size, node: Node) -> bool:
    """Whether `a <= b` in this run, where Dynamo guards on it from now on; `node` is any of the graph. No, if the sizes
    are among the data, or where a guard is an error: Dynamo was told which values they take, or would settle on one."""
    mode = getattr(tensor(node), "fake_mode", None)
    env = mode.shape_env if mode is not None else None
    if env is None:
        return False
    room = sympy.sympify(b - a)
    known = env.bound_sympy(room)
    if known.lower < 0 and (known.upper == 0 or room.free_symbols & _with_a_range(env)):
        return False
    try:
        return bool(env.evaluate_expr(sympy.Le(a, b)))
    except GuardOnDataDependentSymNode:
        return False


def _with_a_range(env: Any) -> set[sympy.Symbol]:
    """The sizes of which `mark_dynamic` has said between what they are."""
    found: set[sympy.Symbol] = set()
    for tracked in env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", ())
        for n, constraint in zip(getattr(tracked.fake, "shape", ()), constraints):
            if isinstance(constraint, StrictMinMaxConstraint) and isinstance(n, torch.SymInt):
                found |= n.node.expr.free_symbols
    return found


def shape(node: Node) -> tuple[Size, ...]:
    """A node's shape; refuses where Dynamo recorded none."""
    value = tensor(node)
    if value is None and isinstance(node.meta.get("example_value"), (torch.SymFloat, torch.SymInt)):
        return ()
    if value is None:
        refuse("describe", f"no shape is known for {node}", node)
    return tuple(size(n) for n in value.shape)


def call(node: Any) -> Call | None:
    """The canonical reading of a node, or None for an operation that is not in the table."""
    if not isinstance(node, Node):
        return None
    if node.op == "call_method":
        signature = _METHODS.get(str(node.target))
    elif node.op == "call_function" and isinstance(node.target, (OpOverload, OpOverloadPacket)):
        # An operator is called like the function of its name, but for `tensor`, whose overloads each convert to a type.
        # Someone else's operators may be called anything. (Dynamo traces `x.mT` as a packet since 2.14.)
        packet: Any = getattr(node.target, "overloadpacket", node.target)
        name = packet.__name__ if packet._qualified_op_name.startswith("aten::") else ""
        signature = _FUNCTIONS.get(getattr(torch, name, None)) or _METHODS.get(name)
        if name in ("tensor", "as_tensor"):
            return None
    elif node.op == "call_function":
        signature = _FUNCTIONS.get(node.target)
    else:
        return None
    args = signature.bind(node.args, node.kwargs) if signature and "out" not in node.kwargs else None
    if signature is None or args is None:
        return None
    return _normalise(Call(signature.name, args), node)


def _normalise(found: Call, node: Node) -> Call | None:
    """Several spellings share a name but not a form; bring them to one."""
    name, args = found.name, found.args
    ndim = value.ndim if (value := tensor(args.get("input"))) is not None else None
    if name in ("getattr", "mT", "T"):
        attribute = args.get("name", name)
        if attribute not in ("T", "mT", "H", "mH") or ndim is None or value is None or value.is_complex():
            return None
        order = range(ndim)[::-1] if attribute in ("T", "H") else [*range(ndim - 2), ndim - 1, ndim - 2]
        return Call("permute", {"input": args["input"], "dims": tuple(order)})
    if name in ("transpose", "t") and ndim:
        dim0, dim1 = (args["dim0"] % ndim, args["dim1"] % ndim) if name == "transpose" else (0, ndim - 1)
        swapped = {dim0: dim1, dim1: dim0}
        return Call("permute", {"input": args["input"], "dims": tuple(swapped.get(i, i) for i in range(ndim))})
    if name == "permute" and ndim is not None:
        return Call(name, {"input": args["input"], "dims": tuple(d % ndim for d in args["dims"])})
    if name == "getitem":
        if ndim is None:
            return Call("unpack", args)
        index = args["index"] if isinstance(args["index"], tuple) else (args["index"],)
        if _takes_all(index, args["input"], node):
            return Call("reshape", {"input": args["input"]})
        return Call(name, {"input": args["input"], "index": index})
    if name == "reshape" and (tensor(node) is None or value is None or tensor(node).dtype != value.dtype):  # type: ignore[union-attr]
        return None
    if name == "cast":
        cast = tensor(node)
        if cast is None or value is None:
            return None
        return found if cast.device == value.device else Call("move", found.args)
    if name == "where_method":
        return Call("where", args)
    if name == "cat" and len(args["tensors"]) == 2:
        return Call("append", {"input": args["tensors"][0], "other": args["tensors"][1], "dim": args["dim"]})
    if name in ("max", "min"):
        other = args["dim"] if args["other"] is None else args["other"]
        if tensor(other) is not None:
            return Call(f"{name}imum", {"input": args["input"], "other": other})
        return found if args["other"] is None else None
    if name == "arange" and args["end"] is None:
        return Call(name, {**args, "start": 0, "end": args["start"]})
    if name == "sum" and args["dtype"] is not None and not _is_wider(args["dtype"], value):
        return None
    return found


def _is_wider(dtype: torch.dtype, value: torch.Tensor | None) -> bool:
    """Whether a type holds every number of a floating point tensor."""
    return value is not None and value.is_floating_point() and torch.promote_types(dtype, value.dtype) == dtype


def _takes_all(index: tuple[Any, ...], indexed: Node, result: Node) -> bool:
    """Whether an index leaves no element out, and each in its place."""
    if not all(item is None or item is Ellipsis or isinstance(item, slice) for item in index):
        return False
    slices = [item for item in index if isinstance(item, slice) and item != slice(None)]
    if not slices:
        return True
    forward = all(item.step is None or item.step == 1 for item in slices)
    return forward and tensor(result) is not None and same(math.prod(shape(result)), math.prod(shape(indexed)))


_AUGMENTED = frozenset(
    "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem".split()  # noqa: SIM905
)


def _name(node: Node) -> str:
    """The name of a node's operation, without an overload's."""
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "")


def is_inplace(node: Node) -> bool:
    """Whether a node writes into its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    if name.strip("_") in _AUGMENTED:  # `operator.iadd`, `x.__iadd__`
        return True
    if name.endswith("_") and not name.endswith("__"):
        return getattr(node.target, "__module__", "") != "_operator"  # `operator.and_`
    return node.kwargs.get("inplace") is True or (any(a is True for a in node.args) and _says_inplace(node))


def _says_inplace(node: Node) -> bool:
    """Whether one of a node's positional arguments is `inplace=True`, as in `F.relu(x, True)`."""
    try:
        return inspect.signature(node.target).bind_partial(*node.args).arguments.get("inplace") is True  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin has no signature
        return False


def is_pure(node: Node) -> bool:
    """Whether a node without users can be erased: a known operation that writes nothing and draws no numbers."""
    found = call(node)
    return found is not None and found.name not in _PURE_EXCEPT and not is_inplace(node)


_DEAR = {"matmul", "baddbmm", "einsum", "softmax", "conv2d", "dropout"}
_DEAR |= {"scaled_dot_product_attention", "multi_head_attention_forward"}
_CHEAP = {
    *("setitem", "index_put", "fill", "zero", "copy", "gather", "index_select", "take_along_dim", "roll", "flip"),
    *("stack", "unbind", "split", "select", "narrow", "diagonal", "one_hot", "bucketize", "searchsorted", "argsort"),
    *("sort", "cumprod", "isin", "any", "all", "sum", "eye", "scatter", "index_fill", "get_data_attr"),
}


def is_cheap(node: Node) -> bool:
    """Whether a node may be run once more, on made-up inputs: what masks are made of, and draws no random numbers."""
    found = call(node)
    return found.name not in _DEAR if found is not None else _name(node).strip("_") in _CHEAP


def erase_unused(graph: Graph) -> bool:
    """Erase the pure nodes that nobody uses, such as scores that a model keeps for whoever asks; whether there was
    one. Dynamo leaves them in the graph."""
    before = len(graph.nodes)
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)
    return len(graph.nodes) < before


_SHAPE_ONLY = {"full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"}
_SELECTING = {"reshape", "permute", "expand", "getitem"}


_LIKE_ANOTHER = {"reshape_as", "view_as", "expand_as", "type_as"}


def looks_at_shape_only(node: Node, value: Node) -> bool:
    """Whether a node takes nothing from a value but shape and type, as `torch.ones_like(scores[0, 0])` does."""
    found = call(node)
    if _name(node) in _LIKE_ANOTHER and node.args[0] is not value:
        return True
    if found is None or is_inplace(node):
        return node.op == "call_method" and node.target == "size"
    return found.name in _SHAPE_ONLY or (
        found.name in _SELECTING and all(looks_at_shape_only(user, node) for user in node.users)
    )


# Functions that write into arguments though their name does not say so: if one of their arguments, or its default, is
# true, into which.
_STATEFUL: dict[Any, tuple[str, bool, tuple[str, ...]]] = {
    F.batch_norm: ("training", False, ("running_mean", "running_var")),
    F.instance_norm: ("use_input_stats", True, ("running_mean", "running_var")),
    F.embedding: ("max_norm", False, ("weight",)),
    F.embedding_bag: ("max_norm", False, ("weight",)),
}


def _written(node: Node, modules: dict[str, Any]) -> list[Node]:
    """The arguments whose contents a node may change."""
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target
    if "out" in node.kwargs:
        return _nodes(node.kwargs["out"])
    if is_inplace(node):
        return _nodes(node.args[0] if node.args else node.kwargs.get("input"))
    if target in _STATEFUL:
        given = inspect.signature(target).bind_partial(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
        condition, default, names = _STATEFUL[target]
        return _nodes([given.get(name) for name in names]) if given.get(condition, default) else []
    if isinstance(target, OpOverload):
        return _written_by(target, node)
    if isinstance(target, OpOverloadPacket):
        return [x for name in target.overloads() for x in _written_by(getattr(target, name), node)]
    if isinstance(target, HigherOrderOperator):
        bodies = [modules.get(str(a.target)) for a in node.all_input_nodes if a.op == "get_attr"]
        found = [body for body in bodies if isinstance(body, GraphModule)]
        is_known = target.__name__ in _WRITES_AS_ITS_BODIES and found
        return node.all_input_nodes if not is_known or any(map(_writes, found)) else []
    builtin = inspect.isbuiltin(target) or inspect.ismethoddescriptor(target)
    if node.op == "call_method" or target in _FUNCTIONS or builtin:
        return []
    # Someone else's code may do anything, and so may an object that is called, such as Dynamo's for NumPy's methods.
    trusted = (getattr(target, "__module__", None) or "").split(".")[0] in ("torch", "einops")
    return [] if trusted and inspect.isroutine(target) else node.all_input_nodes


def _written_by(overload: OpOverload, node: Node) -> list[Node]:
    """The arguments that an operator's schema says it writes into."""
    arguments = overload._schema.arguments
    given = dict(zip((a.name for a in arguments if not a.kwarg_only), node.args)) | node.kwargs
    return _nodes([given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write])


def _nodes(argument: Any) -> list[Node]:
    """The nodes in an argument, which may be a list of them."""
    found: list[Node] = []
    torch.fx.map_arg(argument, found.append)
    return found


def _writes(body: GraphModule) -> bool:
    """Whether a body writes into what it did not make itself."""
    modules = dict(body.named_children())
    given = {_storage(node) for node in body.graph.nodes if node.op in ("placeholder", "get_attr")} | {None}
    return any(_storage(written) in given for node in body.graph.nodes for written in _written(node, modules))


class Region(NamedTuple):
    """What a node runs under: gradients on or off (None where that is not known), and the contexts that the graph has
    entered and not left, the innermost last: autocast, inference mode, the transforms of `torch.func`. A higher-order
    operator that changes what its body runs under is one of the contexts there."""

    grad: bool | None
    contexts: tuple[Node, ...] = ()

    def after(self, node: Node) -> Region:
        """The region of the next node."""
        name = _name(node)
        if name == "_set_grad_enabled":
            return Region(bool(node.args[0]), self.contexts)
        if name.startswith("_enter_") or name.endswith("_increment_nesting"):
            return Region(self.grad, (*self.contexts, node))
        if name.startswith("_exit_") or name.endswith("_decrement_nesting"):
            return Region(self.grad, self.contexts[:-1])
        return self

    def within(self, caller: Node) -> Region:
        """The region of a body that a node calls, which is itself in this one."""
        match HIGHER_ORDER[_name(caller)].changes:
            case "autocast":
                return Region(self.grad, (*self.contexts, caller))
            case "grad":
                return Region(bool(caller.args[0]), self.contexts)
            case "unknown":
                return Region(None, self.contexts)
        return self

    @property
    def autocasts(self) -> tuple[tuple[Any, ...], ...]:
        """The arguments of `torch.autocast` for each of the contexts that is one, the innermost last."""
        named = (context for context in self.contexts if _name(context) in ("_enter_autocast", "wrap_with_autocast"))
        return tuple(context.args[:4] for context in named)

    def is_like(self, other: Region) -> bool:
        """Whether two regions are the same but for who entered them."""
        return [(_name(c), c.args) for c in self.contexts] == [(_name(c), c.args) for c in other.contexts]


@dataclass
class Facts:
    """What the stages ask of one graph, found out once. `outer` and `caller` lead from a body to its call; where it
    has several (not `single`) its inputs are not known from one of them. `obstacle` says why nothing in this graph is
    rewritten, if so."""

    graph: Graph
    modules: dict[str, Any] = field(default_factory=dict)
    outer: Facts | None = None
    caller: Node | None = None
    single: bool = True
    obstacle: str = ""

    def __post_init__(self) -> None:
        self.position = {node: i for i, node in enumerate(self.graph.nodes)}
        self._calls: dict[Node, Call | None] = {}
        self._writes: dict[int | None, list[Node]] = {}
        self._regions: dict[Node, Region] = {}
        self.inserted: list[Node] = []
        region = self._start()
        for node in self.graph.nodes:
            self._regions[node] = region
            region = region.after(node)
            for written in _written(node, self.modules):
                if tensor(written) is not None:
                    self._writes.setdefault(_storage(written), []).append(node)

    def call(self, node: Any) -> Call | None:
        if node not in self._calls:
            self._calls[node] = call(node)
        return self._calls[node]

    def _start(self) -> Region:
        if self.outer is None or self.caller is None or self.obstacle:
            return Region(torch.is_grad_enabled())
        around = self.outer.region(self.caller).within(self.caller)
        return around if self.single else Region(None, around.contexts)

    def region(self, node: Node) -> Region:
        """What a node runs under. What is computed under another region may have other gradients, or another type."""
        return self._regions[node]

    def autocast(self, node: Node, device: str) -> torch.dtype | None:
        """The type that autocast gives the operands of a product at a node; None where it is off."""
        for kind, dtype, enabled, _ in reversed(self.region(node).autocasts):
            if kind == device:
                return (dtype or torch.get_autocast_dtype(device)) if enabled else None
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else None

    def is_transformed(self, node: Node) -> bool:
        """Whether a node runs under a transform of `torch.func`, which may want what fused kernels don't have: another
        derivative of the backward pass, forward derivatives, a batch rule."""
        names = map(_name, self.region(node).contexts)
        return any(name.endswith("_nesting") or name == "_enter_dual_level" for name in names)

    def levels(self, node: Node) -> list[Node]:
        """The nodes that enter the levels of `torch.vmap` in which a node runs, the outermost first."""
        return [context for context in self.region(node).contexts if _name(context) == "_vmap_increment_nesting"]

    def is_in_inference_mode(self, node: Node) -> bool:
        """Whether a node runs in inference mode that the graph itself enters. AOTAutograd raises there for a view of
        what was made outside, and leaves PyTorch's dispatcher in a state in which later backward passes fail (2.13)."""
        return any(_name(context) == "_enter_inference_mode" for context in self.region(node).contexts)

    def current(self, node: Node, at: Node) -> Node:
        """The node that holds, just before `at` runs, the contents of the tensor that `node` returned.

        It is `node` itself, or the last in-place operation on that very tensor. Contents changed through a
        view, an overlapping tensor or an unknown operation are refused.
        """
        between = [w for w in self.writes(node) if self.position[node] < self.position[w] < self.position[at]]
        if not between:
            return node
        for write in between:
            if not same_view(write, node):
                refuse("describe", f"{node} is modified in place by {describe_node(write)} before it is used", write)
        return between[-1]

    def writes(self, node: Node) -> list[Node]:
        """The nodes that may change the contents of a tensor, or of what shares its memory. (Tensors whose memory
        nobody knows, as within `torch.vmap`, may share that of any other one.)"""
        if tensor(node) is None:
            return []
        storage = _storage(node)
        if storage is not None and None not in self._writes:
            return self._writes.get(storage, [])
        shared = [*self._writes] if storage is None else [storage, None]
        found = {write for held in shared for write in self._writes.get(held, ())}
        return sorted(found, key=self.position.__getitem__)

    def written(self, node: Node) -> list[Node]:
        """The arguments whose contents a node may change."""
        return _written(node, self.modules)

    def unchanged(self, node: Node, until: Node | None = None) -> bool:
        """Whether `until`, or the end of the graph, still sees the contents that `node` had when it was made."""
        end = self.position[until] if until is not None else math.inf
        return not any(self.position[node] < self.position[w] < end for w in self.writes(node))

    def lasts(self, node: Node, at: Node) -> bool:
        """Whether a call in the place of `at`, and its backward pass, if it has one, see the contents that `node` had
        when it was made: autograd keeps tensors by reference."""
        result = tensor(at)
        return self.unchanged(node, None if result is not None and result.requires_grad else at)

    def is_seen_outside(self, node: Node) -> bool:
        """Whether who calls the graph may write into a tensor later: it shares its memory with an input or output."""
        return _storage(node) in self._outside

    @cached_property
    def _outside(self) -> set[int | None]:
        held = {node for node in self.graph.nodes if node.op in ("placeholder", "get_attr")}
        held.update(*(node.all_input_nodes for node in self.graph.find_nodes(op="output")))
        return {_storage(node) for node in held} - {None}

    def replace(self, old: Node, new: list[Node], result: Node) -> None:
        """`result`, one of the `new` nodes that were inserted before `old`, takes its place."""
        self.inserted += new
        self.position.update(dict.fromkeys(new, self.position[old]))
        self._regions.update(dict.fromkeys(new, self._regions[old]))
        if (storage := _storage(result)) is not None:
            self._writes[storage] = self.writes(old)
        for user in old.users:
            self._calls.pop(user, None)
        old.replace_all_uses_with(result)

    @cached_property
    def _arguments(self) -> dict[Node, Node]:
        if self.caller is None or not self.single:
            return {}
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = zip(placeholders, inputs_of(self.caller, self.graph) or ())
        return {placeholder: x for placeholder, x in given if isinstance(x, Node)}

    def argument(self, placeholder: Node) -> Node | None:
        """For an input of a body: the node of the outer graph that is handed in for it."""
        return self._arguments.get(placeholder)

    def bodies(self) -> Iterator[Facts]:
        """The graphs of higher-order operators that this graph calls: checkpointed and autocast regions, branches."""
        calls: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and isinstance(self.modules.get(str(node.target)), GraphModule):
                calls.setdefault(str(node.target), []).extend(node.users)
        for name, users in calls.items():
            body = self.modules[name]
            if not users:
                continue
            single = len(users) == 1 and inputs_of(users[0], body.graph) is not None
            obstacle = self.obstacle or next(filter(None, map(_obstacle, users)), "")
            regions = [] if obstacle else [self.region(user).within(user) for user in users]
            if not all(region.is_like(regions[0]) for region in regions):
                obstacle = "the body that it is in is called under several autocast regions"
            yield Facts(body.graph, dict(body.named_children()), self, users[0], single, obstacle)


def _storage(node: Any) -> int | None:
    value = tensor(node)
    try:
        return None if value is None else value.untyped_storage()._cdata
    except NotImplementedError:  # sparse and other storage-less tensors
        return None


def has_memory(node: Node) -> bool:
    """Whether a tensor is one that lies in memory, and not a stand-in for many as within `torch.vmap`."""
    return _storage(node) is not None


def same_storage(a: Node, b: Node) -> bool:
    """Whether two nodes may share memory."""
    return _storage(a) is None or _storage(a) == _storage(b)


def same_view(a: Node, b: Node) -> bool:
    """Whether two nodes stand for the same elements of the same tensor, and gradients flow alike through both."""
    x, y = tensor(a), tensor(b)
    if x is None or y is None or _storage(a) is None:
        return a is b
    if _storage(a) != _storage(b) or x.requires_grad != y.requires_grad:
        return False
    sizes = [(size(m), size(n)) for m, n in zip((*x.shape, *x.stride()), (*y.shape, *y.stride()))]
    return (
        x.ndim == y.ndim
        and x.dtype == y.dtype
        and size(x.storage_offset()) == size(y.storage_offset())
        and all(m == n for m, n in sizes)
    )


# ---------------------------------------------------------------------------------------------------------------
# Where a node comes from, in the words of the user's model

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
_ROOT = re.compile(r"^L\['\w+'\](?:\.(?:__self__|fn|_orig_mod|_old_forward|args\[0\])(?!\w))*\.?")
_HOOKED = re.compile(r"\b(?:_old_forward\.__self__|forward\.args\.0)\.")  # how accelerate's hooks reach a module
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def source(node: Node) -> str:
    """`file:line` of the innermost line of the model's code that made a node; empty where Dynamo kept none."""
    frames = [f for f in _FRAME.finditer(node.meta.get("stack_trace") or "") if not f["file"].startswith(_HERE)]
    return f"{frames[-1]['file']}:{frames[-1]['line']}" if frames else ""


def module_path(node: Node) -> str:
    """The dotted path of the module whose forward made a node, as in `model.named_modules()`."""
    paths = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    path = _ROOT.sub("", paths[-1]) if paths else ""
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path).replace("_modules.", "").replace("__dict__.", "")
    return _HOOKED.sub("", path).lstrip(".")


def graph_break(graph: Graph) -> str:
    """Where a graph ends because Dynamo gave up, in words; empty where it goes on to its end."""
    reason = getattr(graph.owning_module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    places = [f" at {f.filename}:{f.lineno}" for f in reason.user_stack if not f.filename.startswith(_HERE)]
    return " into a graph break" + "".join(places[-1:])


def describe_node(node: Node) -> str:
    """A node in words: its operation and, where known, its line."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    where = source(node)
    return f"`{name}`" + (f" ({where})" if where else "")
