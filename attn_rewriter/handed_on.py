"""Masks that one graph makes and another one reads.

A model that falls into several graphs (FSDP2's hooks and DDP's buckets cut it, and so does any graph break) often
builds its mask in one of them and attends in others, which are handed a tensor. What is known about it is said where it
is made: of a graph's outputs, those that hold one value within a band of their last two dimensions, and another
outside, and those that are masks but vary with what only the run knows.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, TypeGuard

from torch.fx import Graph, GraphModule, Node

from attn_rewriter.buffers import UNPROVED, Contents
from attn_rewriter.errors import Refused
from attn_rewriter.graph import Facts, shape, tensor
from attn_rewriter.patterns.axes import Dims, fresh
from attn_rewriter.patterns.masks import MaskReader, Unreadable, Value, Where, coordinates
from attn_rewriter.spec import EVERY_KEY, NO_KEY, Band, Index, Predicate

_LEADING = ("batch", "head")


def handed_on(gm: GraphModule) -> dict[int, Any]:
    """What the masks among the outputs of a graph hold, by their number."""
    facts = Facts(gm.graph, dict(gm.named_children()))
    reader = MaskReader(facts, output := _output(gm.graph))
    given = output.args[0] if isinstance(output.args[0], (tuple, list)) else ()
    found = {i: _contents(reader, node) for i, node in enumerate(given) if _may_be_mask(node)}
    return {i: held for i, held in found.items() if held is not None}


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


def _contents(reader: MaskReader, node: Node) -> Any:
    *leading, rows, columns = shape(node)
    names = (*_LEADING[: len(leading)], "query", "key")
    dims: Dims = tuple(fresh([n], name)[0] for n, name in zip((*leading, rows, columns), names))
    try:
        return _banded(reader.read(reader.facts, node, coordinates(dims), reader.until))
    except (Unreadable, Refused):
        return None


def _banded(value: Value) -> Any:
    if isinstance(value, Predicate):
        value = Where(value, Index(True), Index(False))
    if not isinstance(value, Where) or value.condition in (EVERY_KEY, NO_KEY):
        return None
    inside, outside = value.then, value.otherwise
    if not (_is_number(inside) and _is_number(outside)):
        return None
    band = value.condition
    if not isinstance(band, Band) or not all(isinstance(side, (int, NoneType)) for side in (band.lower, band.upper)):
        return UNPROVED
    return Contents(inside.offset, outside.offset, band.lower, band.upper)


def _is_number(value: Value) -> TypeGuard[Index]:
    return isinstance(value, Index) and not value.terms and isinstance(value.offset, (bool, int, float))
