"""Differential attention, `(softmax(a) - λ * softmax(b)) @ v` (https://arxiv.org/abs/2410.05258), as two attentions.

A product over a sum is the sum of products, of which each has a softmax of its own. It is tried on a copy of the graph:
where one of the two can't be read, the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from attn_rewriter.describe import describe
from attn_rewriter.errors import Refusal, Refused
from attn_rewriter.find import find, is_after_softmax
from attn_rewriter.graph import Facts, shape, tensor
from attn_rewriter.splice import Splice


def distribute(facts: Facts) -> bool:
    """Rewrite every product over a sum of two attentions' weights; whether there was one."""
    products = [node for node in facts.graph.nodes if any(_sums(node, facts))]
    products = [node for node in products if _is_two_attentions(node, facts)]
    for node in products:
        _open(node, facts)
    return bool(products)


def _sums(node: Node, facts: Facts) -> Iterator[tuple[str, list[Node]]]:
    """The argument of a product that is a sum for it alone, and the nodes from the sum to the product."""
    call = facts.call(node)
    if call is None or call.name != "matmul":
        return
    for side in ("input", "other"):
        path: list[Node] = []
        value = call[side]
        while (found := facts.call(value)) is not None and len(value.users) == 1 and facts.unchanged(value, node):
            path.insert(0, value)
            if (
                found.name in ("add", "sub")
                and found["alpha"] == 1
                and _are_alike(value, found["input"], found["other"])
                and is_after_softmax(facts, found["input"])  # unlike rotary positions
                and is_after_softmax(facts, found["other"])
            ):
                yield side, path
            if found.name not in ("cast", "copy"):
                break
            value = found["input"]


def _are_alike(*nodes: Node) -> bool:
    return all(tensor(x) is not None for x in nodes) and len({(tensor(x).dtype, shape(x)) for x in nodes}) == 1  # type: ignore[union-attr]


def _is_two_attentions(node: Node, facts: Facts) -> bool:
    copied: dict[Node, Node] = {}
    graph = Graph()
    graph.output(graph.graph_copy(facts.graph, copied))
    trial = replace(facts, graph=graph)
    try:
        made = _open(copied[node], trial)
    except Refused:
        return False
    trial = replace(trial)  # with what is known of the new nodes
    read = [describe(site, trial) for site in find(trial) if site.output in (made or ())]
    return len(read) == 2 and not any(isinstance(found, Refusal) for found in read)


def _open(node: Node, facts: Facts) -> tuple[Node, ...] | None:
    """Put two products in the place of one, and return them."""
    call = facts.call(node)
    assert call is not None
    for side, path in _sums(node, facts):
        total, *casts = path
        found = facts.call(total)
        assert found is not None
        with Splice(facts, node, node) as splice:
            other = splice.stand_in(call["other" if side == "input" else "input"])
            parts = []
            for term in (found["input"], found["other"]):
                weights = splice.stand_in(term)
                if casts:
                    weights = splice.as_type(weights, tensor(casts[-1]).dtype)  # type: ignore[union-attr]
                parts.append(torch.matmul(weights, other) if side == "input" else torch.matmul(other, weights))
            result = parts[0] + parts[1] if found.name == "add" else parts[0] - parts[1]
            splice.replace(node, result, path)
        return tuple(part.node for part in parts)  # type: ignore[attr-defined]
    return None
