"""Masks that one graph makes and another one reads.

A model that falls into several graphs (FSDP2's hooks and DDP's buckets cut it, and so does any graph break) often
builds its mask in one of them and attends in others, which are handed a tensor. What is known about it is said where it
is made: of a graph's outputs, those that hold one value within a band of their last two dimensions, and another outside.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from attn_rewriter.buffers import Contents
from attn_rewriter.errors import Refused
from attn_rewriter.graph import Facts, shape, tensor
from attn_rewriter.patterns.axes import Dims, fresh
from attn_rewriter.patterns.masks import MaskReader, Unreadable, Value, Where, coordinates
from attn_rewriter.spec import Band, Index, Predicate

_LEADING = ("batch", "head")


def handed_on(gm: GraphModule) -> dict[int, Contents]:
    """What the outputs of a graph hold, by their number, where it is known."""
    facts = Facts(gm.graph, dict(gm.named_children()))
    reader = MaskReader(facts, output := _output(gm.graph))
    given = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
    found = {i: _contents(reader, node) for i, node in enumerate(given) if _may_be_mask(node)}
    return {i: contents for i, contents in found.items() if contents is not None}


def _output(graph: Graph) -> Node:
    return next(iter(graph.find_nodes(op="output")))


def _may_be_mask(node: Any) -> bool:
    value = tensor(node)
    return (
        value is not None
        and 2 <= value.ndim <= 2 + len(_LEADING)
        and not value.requires_grad
        and not value.is_complex()
        and node.op != "placeholder"
    )


def _contents(reader: MaskReader, node: Node) -> Contents | None:
    *leading, rows, columns = shape(node)
    names = (*_LEADING[: len(leading)], "query", "key")
    dims: Dims = tuple(fresh([n], name)[0] for n, name in zip((*leading, rows, columns), names))
    try:
        return _banded(reader.read(reader.facts, node, coordinates(dims), reader.until))
    except (Unreadable, Refused):
        return None


def _banded(value: Value) -> Contents | None:
    if isinstance(value, Predicate):
        value = Where(value, Index(True), Index(False))
    if not isinstance(value, Where) or not isinstance(band := value.condition, Band):
        return None
    sides, values = (band.lower, band.upper), (value.then, value.otherwise)
    if not all(side is None or isinstance(side, int) for side in sides):
        return None
    if not all(isinstance(x, Index) and not x.terms and isinstance(x.offset, (bool, int, float)) for x in values):
        return None
    return Contents(*(x.offset for x in values), *sides)  # type: ignore[union-attr, arg-type]
