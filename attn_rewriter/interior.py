"""The operations of a model that the rewriting of a site replaces, to be run again beside what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from attn_rewriter.describe import Description
from attn_rewriter.errors import Refused
from attn_rewriter.graph import Facts, holds, is_cheap
from attn_rewriter.torch_private import TorchDispatchMode, predispatch, tree_leaves, tree_map


@dataclass(frozen=True)
class Interior:
    """What lies in a graph between the operands of a site and its `output`."""

    found: Description
    output: Node
    facts: Facts

    @cached_property
    def numeric(self) -> tuple[Node, ...]:
        """The operands that enter the arithmetic."""
        found = self.found
        nodes = (found.operands[name].node for name in ("query", "key", "value", *sorted(found.spec.numeric)))
        return tuple(dict.fromkeys(node for node in nodes if isinstance(node, Node)))

    @cached_property
    def roots(self) -> tuple[Node, ...]:
        """Those of them that are not made of others, as `k * 2` is beside `k`: where gradients end."""

        products = {self.found.operands[name].node for name in ("query", "key")}
        interior = self.found.interior
        scores = {*interior, *(x for node in interior for x in node.all_input_nodes)} - products

        def is_made_of_others(node: Node) -> bool:
            others = {x for x in self.numeric if x is not node}
            if not others.isdisjoint(before(self.facts, [node], self.output, (), is_leaf)):
                return True
            # Scores may be their own bias.
            found = before(self.facts, [node], self.output, (), lambda x: is_leaf(x) and x not in scores)
            return node not in products and products <= {*found}

        return tuple(node for node in self.numeric if not is_made_of_others(node))

    @cached_property
    def masks(self) -> tuple[Node, ...]:
        """The operands that only choose."""
        nodes = (state.node for state in self.found.operands.values())
        return tuple(dict.fromkeys(node for node in nodes if isinstance(node, Node) and node not in self.numeric))

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The operations from the roots on, in order."""
        after: set[Node] = set()  # what depends on the roots
        for node in before(self.facts, [self.output], self.output, self.roots):
            if any(x in self.roots or x in after for x in self._inputs(node)):
                after.add(node)
        wanted, stack = set(), [self.output]
        while stack:
            node = stack.pop()
            if node in after and node not in wanted:
                wanted.add(node)
                stack += [*self._inputs(node), *self.facts.writes(node)]
        return tuple(sorted(wanted, key=self.facts.position.__getitem__))

    @cached_property
    def needs(self) -> tuple[Node, ...]:
        """What must be known to run them, and to call a kernel."""
        operands = [state.node for state in self.found.operands.values() if isinstance(state.node, Node)]
        inputs = [x for node in self.nodes for x in self._inputs(node)]
        return tuple(dict.fromkeys(x for x in [*operands, *inputs] if x not in self.nodes))

    def run(self, values: Mapping[Node, Any], until: Node | None = None) -> Any:
        """What the operations give for values of what they need, at the output or at a node before it."""
        wanted, env = self.output if until is None else until, dict(values)
        for node in self.nodes if wanted not in env else ():
            env[node] = called(node, lambda x, at=node: env[self.read(x, at)])  # type: ignore[misc]
            if node is wanted:
                break
        return env[wanted]

    def _inputs(self, node: Node) -> list[Node]:
        return [self.read(x, node) for x in node.all_input_nodes]

    def read(self, node: Node, at: Node) -> Node:
        """The node with the contents that `at` reads of another one, which something may have written into."""
        try:
            return self.facts.current(node, at)
        except Refused:  # in part: then both stand for the same memory
            return node


def before(
    facts: Facts,
    nodes: Iterable[Node],
    until: Node,
    known: Container[Node] = (),
    stops: Callable[[Node], bool] = lambda node: node.op == "placeholder",
) -> list[Node]:
    """What nodes are computed from, themselves included, with all that is written into these before `until` has run, in
    order: nothing that is `known`, and nothing before a node that `stops`, unless that writes."""
    found, stack = set[Node](), [*nodes]
    while stack:
        node = stack.pop()
        if node in found or node in known or facts.position[node] > facts.position[until]:
            continue
        found.add(node)
        stack += facts.writes(node)
        stack += [] if stops(node) and not facts.written(node) else node.all_input_nodes
    return sorted(found, key=facts.position.__getitem__)


def is_leaf(node: Node) -> bool:
    """Whether the value of a node is not computed from others: an input, a size, or what is not to be run again."""
    if node.op not in ("call_function", "call_method"):
        return True
    values = [x for x in tree_leaves(node.meta.get("example_value")) if x is not None]  # a statement has none
    return not is_cheap(node) or (bool(values) and not any(isinstance(x, Tensor) for x in values))


# ---------------------------------------------------------------------------------------------------------------
# How they are run again


def called(node: Node, value_of: Callable[[Node], Any]) -> Any:
    """A node's result on values. (Not as `splice.run` does for fake ones: autograd would call the Python dispatcher
    once more in the backward pass, where there is none.)"""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    target: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    return target(*args, **kwargs)


@contextmanager
def levels(facts: Facts, value_of: Callable[[Node], Any]) -> Iterator[Callable[[Node], None]]:
    """Gives a function that enters and leaves levels of `torch.vmap` until they are those that a node was traced in."""
    entered: list[Node] = []

    def go_to(node: Node) -> None:
        wanted = facts.levels(node)
        while entered != wanted[: len(entered)]:
            entered.pop()
            predispatch._vmap_decrement_nesting()
        for level in wanted[len(entered) :]:
            depth = called(level, value_of)
            entered.append(level)
            if depth != len(entered):
                raise RuntimeError("the graph is compiled within another level of vmap")

    try:
        yield go_to
    finally:
        for _ in entered:
            predispatch._vmap_decrement_nesting()


@contextmanager
def widened(device: str, product: torch.dtype) -> Iterator[None]:
    """Computes in float64, whatever types are asked for; but rounds to types that are narrower than the products'.

    PyTorch's own attention is computed as it is written down: its kernel for CPUs (2.13) takes the weights of a row
    without a key for 1 in its backward pass, where a finite number is added to all of its scores."""
    with torch.autocast(device, enabled=False), sdpa_kernel([SDPBackend.MATH]), _Widened(product):
        yield


class _Widened(TorchDispatchMode):
    def __init__(self, product: torch.dtype) -> None:
        super().__init__()
        self._product = product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._wide, (args, kwargs or {}))
        if func is torch.ops.aten._softmax.default:  # its last argument says that half becomes float
            args = (*args[:2], False)
        return func(*args, **kwargs)

    def _wide(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.double() if x.is_floating_point() else x
        is_wide = isinstance(x, torch.dtype) and x.is_floating_point and holds(x, self._product)
        return torch.float64 if is_wide else x


class WithoutDropout(TorchFunctionMode):
    """Drops nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        if name in ("dropout", "dropout_", "alpha_dropout", "feature_dropout"):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {} if len(args) > 4 else {"dropout_p": 0.0}
        return function(*args, **kwargs)
