"""Products and their operands: which axes a product contracts, and where query, key and value come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attn_rewriter.errors import Refused
from attn_rewriter.graph import Call, Facts, shape, tensor
from attn_rewriter.patterns.axes import Atom, Dim, Dims, backward, fresh, leaves, plan
from attn_rewriter.patterns.match import Constant
from attn_rewriter.spec import Bias, Modifier, Scale, same

Label = Any


@dataclass(frozen=True)
class Factor:
    """One side of a product: a tensor, and a label for each of its dimensions (None where it is broadcast)."""

    value: Node
    labels: tuple[Label | None, ...]


@dataclass(frozen=True)
class Product:
    """A sum of products in the manner of einsum; `steps` is what the operation does to its result besides."""

    node: Node
    left: Factor
    right: Factor
    out: tuple[Label, ...]
    steps: tuple[Modifier, ...] = ()

    def other(self, factor: Factor) -> Factor:
        return self.right if factor is self.left else self.left

    @property
    def contracted(self) -> tuple[Label, ...]:
        """The labels that are summed over."""
        return tuple(x for x in self.left.labels if x is not None and x in self.right.labels and x not in self.out)

    def labelled(self, dims: Dims) -> dict[Label, Dim]:
        """The dimension of each label, given those of the result; those summed over are new."""
        sizes = dict(zip(self.left.labels, shape(self.left.value)))
        summed = fresh([sizes[label] for label in self.contracted])
        return dict(zip(self.out, dims)) | dict(zip(self.contracted, summed))


def product(node: Node, call: Call | None, constant: Constant) -> Product | None:
    """Read `matmul`, `bmm`, `baddbmm` or a two-operand `einsum`; None for anything else."""
    if call is None:
        return None
    if call.name == "matmul":
        return _matmul(node, call["input"], call["other"])
    if call.name == "baddbmm":
        alpha, beta = constant(call["alpha"], node), constant(call["beta"], node)
        if alpha is None or beta is None:
            return None
        steps: list[Modifier] = [] if alpha == 1 else [Scale(alpha)]
        if beta != 0:
            steps.append(Bias(call["input"], beta))
        elif (added := tensor(call["input"])) is None or added.requires_grad:
            return None  # its gradient is zero, not missing
        return _matmul(node, call["batch1"], call["batch2"], tuple(steps))
    if call.name == "einsum":
        return _einsum(node, call["equation"], call["operands"])
    return None


def _matmul(node: Node, left: Any, right: Any, steps: tuple[Modifier, ...] = ()) -> Product | None:
    if tensor(left) is None or tensor(right) is None or min(len(shape(left)), len(shape(right))) < 2:
        return None
    batch = len(shape(node)) - 2
    m, n, k = f"{batch}", f"{batch + 1}", "contracted"

    def labels(value: Node, *last: str) -> tuple[Label | None, ...]:
        ndim = len(shape(value))
        return (*(str(batch + 2 - ndim + i) for i in range(ndim - 2)), *last)

    return _broadcast(
        node, left, labels(left, m, k), right, labels(right, k, n), tuple(map(str, range(batch + 2))), steps
    )


def _einsum(node: Node, equation: Any, operands: Sequence[Any]) -> Product | None:
    if not isinstance(equation, str) or len(operands) != 2 or any(tensor(value) is None for value in operands):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    ndims = [len(shape(value)) for value in operands]
    dots = [n - len(term.replace("...", "")) for n, term in zip(ndims, terms)]

    def labels(term: str, count: int) -> tuple[str, ...]:
        head, found, tail = term.partition("...")
        width = max(dots[i] for i in range(2) if "..." in terms[i]) if found else 0
        ellipsis = tuple(f".{i}" for i in range(width - count, width)) if found else ()
        return (*head, *ellipsis, *tail)

    left, right = labels(terms[0], dots[0]), labels(terms[1], dots[1])
    width = max([dots[i] for i in range(2) if "..." in terms[i]], default=0)
    result = labels(out, width)
    if any(len(set(term)) != len(term) for term in (left, right, result)):
        return None  # a repeated letter takes a diagonal
    if (set(left) ^ set(right)) - set(result):
        return None  # a letter of one operand alone is summed away
    return _broadcast(node, operands[0], left, operands[1], right, result)


def _broadcast(
    node: Node, a: Node, left: Sequence[Label], b: Node, right: Sequence[Label], out: tuple[Label, ...], steps: Any = ()
) -> Product | None:
    """Drop the label of a dimension of size 1 that the other operand or the result has in full."""
    sizes = dict(zip(out, shape(node)))
    for labels, value in ((left, a), (right, b)):
        for label, n in zip(labels, shape(value)):
            if label not in sizes or same(sizes[label], 1):
                sizes[label] = n
    factors = [
        Factor(value, tuple(None if same(n, 1) and not same(sizes[x], 1) else x for x, n in zip(labels, shape(value))))
        for value, labels in ((a, left), (b, right))
    ]
    summed = {x for x in left if x not in out}
    if any(summed - set(factor.labels) for factor in factors):
        return None  # a sum in which one operand is repeated
    return Product(node, factors[0], factors[1], out, steps)


# ---------------------------------------------------------------------------------------------------------------
# Where an operand comes from


@dataclass(frozen=True)
class State:
    """A tensor that holds an operand's elements: its dimensions' atoms, and the factor and cast still to apply."""

    node: Node
    dims: Dims
    scale: float = 1.0

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a number that is no tensor."""
        value = tensor(self.node)
        return None if value is None else value.dtype

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(atom for dim in self.dims for atom in leaves(dim))


@dataclass(frozen=True)
class Operand:
    """The ways to take an operand from the graph, nearest to its use first; the last is the furthest back."""

    states: tuple[State, ...]

    @property
    def origin(self) -> State:
        return self.states[-1]

    def best(self, groups: Sequence[Sequence[Atom]], *, broadcast: bool = False) -> State:
        """Of the states that need no less than the origin (repeats undone, scale and cast peeled off), the one that
        is brought into a layout in the fewest steps."""
        origin = self.origin
        usable = [
            state
            for state in self.states
            if (state.scale, state.dtype, state.atoms) == (origin.scale, origin.dtype, origin.atoms)
        ]
        return min(usable, key=lambda state: len(plan(state.dims, groups, broadcast=broadcast)))


def trace(facts: Facts, constant: Constant, node: Node, dims: Dims, until: Node, *, scaled: bool) -> Operand:
    """Follow an operand back through views, repeats, exact casts and (if `scaled`) constant factors, as far as
    `until` still sees every tensor on the way unchanged."""
    states = [State(node, dims)]
    while (state := _before(facts, constant, states[-1], until, scaled)) is not None:
        states.append(state)
    return Operand(tuple(states))


def _before(facts: Facts, constant: Constant, state: State, until: Node, scaled: bool) -> State | None:
    node, scale = state.node, state.scale
    call = facts.call(node)
    if call is None:
        return None
    dims, source = backward(call, node, state.dims), call.args.get("input")
    if dims is None and call.name == "cast" and _is_exact(source, node):
        dims = state.dims
    if dims is None and scaled and call.name in ("mul", "div") and call.args.get("rounding_mode") is None:
        source, factor = call["input"], constant(call["other"], node)
        if factor is None and call.name == "mul":
            source, factor = call["other"], constant(call["input"], node)
        if factor and tensor(source) is not None and _is_exact(source, node) and shape(source) == shape(node):
            scale, dims = scale * (1 / factor if call.name == "div" else factor), state.dims
    if dims is None:
        return None
    found = available(facts, source, node, until)
    return State(found, dims, scale) if found is not None else None


def available(facts: Facts, source: Any, node: Node, until: Node) -> Node | None:
    """The node with what `node` was made from, if `until` may take that instead of what `node` made of it."""
    if tensor(source) is None or facts.region(node) != facts.region(until):
        return None  # what was made without gradients stays without them
    try:
        source = facts.current(source, node)
    except Refused:
        return None
    return source if facts.lasts(source, until) else None


def _is_exact(source: Any, node: Node) -> bool:
    """Whether a conversion to the type of `node` loses nothing and kernels make it themselves, as they hold scores in
    float32: float16 or bfloat16 to float32, or no conversion."""
    value, result = tensor(source), tensor(node)
    if value is None or result is None:
        return False
    dtype = result.dtype
    if value.dtype == dtype:
        return dtype.is_floating_point
    return dtype == torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
