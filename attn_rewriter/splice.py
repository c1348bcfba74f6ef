"""Putting operations into a graph: plain PyTorch code runs on stand-ins for nodes, and what it does is inserted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any

import sympy
import torch
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from attn_rewriter.buffers import ORIGIN
from attn_rewriter.errors import refuse
from attn_rewriter.graph import Facts, is_pure, size, tensor
from attn_rewriter.spec import Size, same
from attn_rewriter.torch_private import PythonReferenceAnalysis, enable_python_dispatcher, sympy_interp


class Splice:
    """A place in a graph, in front of `before`, while operations are being put there.

    New nodes get what Dynamo gave the old ones: a fake value, and from `origin` where in the model they come from.
    An exception takes all of them out again.
    """

    def __init__(self, facts: Facts, before: Node, origin: Node) -> None:
        self.facts, self.before, self.origin = facts, before, origin
        self.last = before.prev
        self.mode = getattr(tensor(before), "fake_mode", None)
        self._tracer = GraphAppendingTracer(facts.graph)
        self._point = facts.graph.inserting_before(before)

    def __enter__(self) -> Splice:
        self._point.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._point.__exit__(kind, error, traceback)
        if error is not None:
            for node in reversed(self.nodes):
                self.facts.graph.erase_node(node)

    @property
    def nodes(self) -> list[Node]:
        """What was put in so far."""
        nodes, node = [], self.last.next
        while node is not self.before:
            nodes.append(node)
            node = node.next
        return nodes

    def stand_in(self, value: Any) -> Any:
        """What plain PyTorch code takes for a node; anything else stands for itself."""
        return Proxy(value, self._tracer) if isinstance(value, Node) else value

    def value(self, proxy: Any) -> torch.Tensor:
        """The fake value of a stand-in."""
        for node in self.nodes:
            if "example_value" not in node.meta:
                node.meta.update({key: self.origin.meta[key] for key in ORIGIN if key in self.origin.meta})
                with self._region():
                    node.meta["example_value"] = run(node, self.mode)
        held = proxy.node.meta["example_value"]
        assert isinstance(held, torch.Tensor)
        return held

    def _region(self) -> ExitStack:
        """What runs in this place runs under: autocast as the graph says, with gradients or without."""
        stack, region = ExitStack(), self.facts.region(self.before)
        for autocast in region.autocasts:
            stack.enter_context(torch.autocast(*autocast))
        if region.grad is not None:
            stack.enter_context(torch.set_grad_enabled(region.grad))
        return stack

    def as_type(self, proxy: Any, dtype: torch.dtype) -> Any:
        """Convert, unless the tensor has the type already."""
        return proxy if self.value(proxy).dtype == dtype else proxy.to(dtype)

    def size(self, n: Size) -> Any:
        """A size as an argument: a number, or a stand-in for the node that holds it or for what is computed from the
        nodes that hold its symbols."""
        if not isinstance(n, sympy.Expr):
            return n
        for node in self.facts.graph.nodes:
            if node is self.before:
                break
            held = node.meta.get("example_value")
            if isinstance(held, torch.SymInt) and same(size(held), n):
                return self.stand_in(node)
        if n.is_Symbol:
            refuse("emit", f"the size {n} is nowhere in the graph before")
        return sympy_interp(PythonReferenceAnalysis, {symbol: self.size(symbol) for symbol in n.free_symbols}, n)

    def replace(self, old: Node, new: Any, interior: Iterable[Node] = ()) -> None:
        """Let the stand-in `new` take the place of `old`; erase `old`, the `interior` nodes that only led to it, and
        what was computed upstream for them alone."""
        self.value(new)
        facts = self.facts
        facts.replace(old, self.nodes, new.node)
        upstream: list[Node] = []
        for node in sorted({old, *interior}, key=facts.position.__getitem__, reverse=True):
            if not node.users:
                upstream += node.all_input_nodes
                facts.graph.erase_node(node)
        while upstream:
            node = upstream.pop()
            if not node._erased and not node.users and is_pure(node):
                upstream += node.all_input_nodes
                facts.graph.erase_node(node)


def run(node: Node, mode: Any, value_of: Callable[[Node], Any] = lambda node: node.meta["example_value"]) -> Any:
    """A node's result on the fake values of its arguments, under their fake mode. A function may have a `fake` of its
    own. (Some operations take symbolic sizes only in Python.)"""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    target: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
    target = getattr(target, "fake", target)
    with mode or nullcontext(), enable_python_dispatcher():
        return target(*args, **kwargs)


_VIEWS = {"permute", "reshape", "expand", "getitem", "cast", "move"}


def share(facts: Facts) -> None:
    """Let each of the equal views and moves, and of the equal calls of functions with `is_shared`, that were put into a
    graph be computed once: layers have the same mask."""
    first: dict[Any, Node] = {}
    inserted = {*facts.inserted}
    # In the order of the graph, whichever site was rewritten first: the first of equal nodes is before all their users.
    for node in [node for node in facts.graph.nodes if node in inserted]:
        found = facts.call(node)
        if not (found is not None and found.name in _VIEWS) and not getattr(node.target, "is_shared", False):
            continue
        if not all(map(facts.unchanged, (node, *node.all_input_nodes))):
            continue
        key = (node.target, repr(torch.fx.map_arg((node.args, node.kwargs), _told_apart)), facts.region(node))
        held = first.setdefault(key, node)
        if held is not node:
            node.replace_all_uses_with(held)
            facts.graph.erase_node(node)


def _told_apart(node: Node) -> Any:
    """A node; but a device or a size that was asked of one tensor is the same as that of another."""
    value = node.meta.get("example_value")
    return value if isinstance(value, (torch.device, torch.SymInt)) else node
