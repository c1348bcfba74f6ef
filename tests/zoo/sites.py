"""Attention in a graph, counted without the rewriter's eyes: what there is to recognise.

Attention is a softmax (also one spelled out as `exp(x) / exp(x).sum()`) whose scores come from a product of two
activations and whose weights go into another one, with anything between but further products, layers with weights
and norms. PyTorch's own attention functions are attention as they stand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attn_rewriter.graph import module_path, source

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm", "__matmul__", "_grouped_mm"}
_WALLS = {"linear", "embedding", "layer_norm", "batch_norm", "group_norm", "rms_norm", "topk", "argmax", "addmm"}
_FUNCTIONS = {"scaled_dot_product_attention": "sdpa", "multi_head_attention_forward": "mha"}


@dataclass(frozen=True)
class Counted:
    """A site: which module and line, and whether it is in the denominator (`why_not` is empty)."""

    module: str
    source: str
    kind: str
    why_not: str = ""


def count(gm: GraphModule, split: bool = False) -> Iterator[Counted]:
    """The attention of a graph and of the bodies it calls. `split`: there are other graphs, so a site may have its
    other half there."""
    for body in gm.modules():
        if isinstance(body, GraphModule):
            yield from _count(body.graph, split)


def _count(graph: torch.fx.Graph, split: bool) -> Iterator[Counted]:
    live = _live(graph)
    for node in graph.nodes:
        kind = _FUNCTIONS.get(name(node), "softmax" if _is_softmax(node) else "")
        if not kind or node not in live:
            continue
        why_not = _judged(node, live, split) if kind == "softmax" else ""
        if why_not is not None:
            yield Counted(module_path(node), source(node), kind, why_not)


def _judged(node: Node, live: set[Node], split: bool) -> str | None:
    """Why a softmax is not in the denominator; None where it is no attention."""
    before, after = [*_products(node, _inputs)], [*_products(node, _users)]
    region = _reached(node, _users)
    if before and after:
        leading = _leading(region, after)
        others = [u for n in {node, *leading} for u in n.users if u in live and not ({u} & (leading | {*after}))]
        same = [u for u in others if not _shrinks(u, node)]
        return "the weights are also used elsewhere" if same else ""
    if split and before and any(n.op == "output" for n in region):
        return "split by a graph break"
    if split and after and not before and _scores_come_in(node):
        return "split by a graph break"
    return None


def _leading(region: set[Node], to: list[Node]) -> set[Node]:
    """The nodes of a region on a way to some nodes after it."""
    leading: set[Node] = set()
    stack = [*to]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in region and node not in leading:
                leading.add(node)
                stack.append(node)
    return leading


def _shrinks(user: Node, weights: Node) -> bool:
    """Whether a use looks at less than the weights: at their shape or type."""
    return name(user) in ("size", "getattr", "dim", "sym_size", "numel")


def _scores_come_in(node: Node) -> bool:
    shape = getattr(node.meta.get("example_value"), "shape", ())
    incoming = [n for n in _reached(node, _inputs) if n.op == "placeholder"]
    return len(shape) >= 3 and any(getattr(n.meta.get("example_value"), "shape", None) == shape for n in incoming)


def name(node: Node) -> str:
    """An operation's bare name, without the underscore of its in-place form."""
    if node.op not in ("call_function", "call_method"):
        return ""
    bare = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bare if bare.startswith("__") else bare.rstrip("_").partition(".")[0]


def _is_softmax(node: Node) -> bool:
    if name(node) == "softmax":
        return True
    if name(node) in ("div", "truediv") and len(node.args) == 2 and all(isinstance(a, Node) for a in node.args):
        top, bottom = node.args
        return name(top) == "exp" and name(bottom) == "sum" and bottom.args[0] is top  # type: ignore[arg-type]
    return False


def _is_product(node: Node) -> bool:
    """A product of two activations: not one with a parameter, as in a router that is written with `@`."""
    return name(node) in _PRODUCTS and not any(_is_weight(n) for n in node.all_input_nodes)


def _is_weight(node: Node) -> bool:
    while node.op in ("call_method", "call_function") and name(node) in ("t", "transpose", "permute", "getattr", "to"):
        node = node.all_input_nodes[0]
    return node.op == "get_attr" or isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def _is_wall(node: Node) -> bool:
    return name(node) in _WALLS or name(node).startswith("conv") or name(node) == "softmax" or node.op == "output"


def _inputs(node: Node) -> list[Node]:
    """What a node reads; of what it reads, also what wrote into it in place."""
    written = [u for n in node.all_input_nodes for u in n.users if _writes(u) and u < node]
    return [*node.all_input_nodes, *written]


def _writes(node: Node) -> bool:
    method = isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__")
    return method or node.target is operator.setitem


def _users(node: Node) -> list[Node]:
    return [*node.users]


def _reached(start: Node, step: Callable[[Node], list[Node]], through: bool = False) -> set[Node]:
    """The nodes that a walk meets before products and walls; with `through`, these as well."""
    seen: set[Node] = set()
    stack = step(start)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        stop = _is_product(node) or name(node) in _PRODUCTS or _is_wall(node)
        if not stop or through or node.op == "output":
            seen.add(node)
        if not stop:
            stack += step(node)
    return seen


def _products(start: Node, step: Callable[[Node], list[Node]]) -> Iterator[Node]:
    for node in _reached(start, step, through=True):
        if _is_product(node):
            yield node


def _live(graph: torch.fx.Graph) -> set[Node]:
    """The nodes that the outputs, or something written in place, depend on."""
    stack = [n for n in graph.nodes if n.op == "output" or _writes(n)]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return live
