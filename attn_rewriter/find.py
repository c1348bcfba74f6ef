"""Anchors of attention in a graph: a softmax between two products, and PyTorch's own attention functions.

Finding is coarse on purpose. It says where attention may be and which nodes begin and end it; what the nodes between
compute, and whether that is attention at all, is for `describe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from attn_rewriter.errors import Refusal, Refused
from attn_rewriter.graph import Call, Facts, is_inplace
from attn_rewriter.patterns.masks import MaskReader
from attn_rewriter.patterns.match import Matcher
from attn_rewriter.patterns.softmax import Softmax, read_softmax

PRODUCTS = frozenset({"matmul", "baddbmm", "einsum"})
# Operations that a walk from the softmax to a product may meet: elementwise ones, views, casts and selections.
_PASSED = {
    *("add", "sub", "mul", "div", "neg", "tanh", "clamp", "maximum", "minimum", "max", "amax", "unpack", "detach"),
    *("cast", "copy", "permute", "reshape", "expand", "repeat", "repeat_interleave", "getitem", "append", "pad"),
    *("where", "masked_fill", "nan_to_num", "dropout"),
    "conv2d",  # over the heads: talking heads, which are refused
}


@dataclass(frozen=True)
class Site:
    """One place where a model attends: the anchor, and the node whose value a fused kernel will replace; a `refusal`
    where not even that much can be read."""

    kind: str  # "softmax", "sdpa", or "mha" for a multi-head attention call that could not be opened
    anchor: Node
    output: Node
    call: Call
    softmax: Softmax | None = None
    refusal: Refusal | None = None


def find(facts: Facts) -> Iterator[Site]:
    """The sites of one graph, in the order of the model. A softmax without a product on both sides, such as a
    router's or a loss function's, is no site."""
    matcher = Matcher(facts, MaskReader(facts, [*facts.graph.nodes][-1]).constant)
    for node in facts.graph.nodes:
        call = facts.call(node)
        if call is None:
            continue
        if call.name == "scaled_dot_product_attention":
            yield Site("sdpa", node, node, call)
        elif call.name == "multi_head_attention_forward":
            yield Site("mha", node, node, call)
        elif (softmax := _softmax(node, call, matcher)) is not None and _product_before(facts, softmax):
            output = next((found for found, is_product in after(facts, node) if is_product), None)
            if output is not None:
                known, refusal = (None, softmax) if isinstance(softmax, Refusal) else (softmax, None)
                yield Site("softmax", node, output, call, known, refusal)


def _softmax(node: Node, call: Call, matcher: Matcher) -> Softmax | Refusal | None:
    try:
        return read_softmax(node, call, matcher)
    except Refused as refused:  # what it is computed from is not known, because something wrote into a part of it
        return replace(refused.refusal, node=node) if call.name == "softmax" else None


def _product_before(facts: Facts, softmax: Softmax | Refusal) -> bool:
    if isinstance(softmax, Refusal):
        met = _before(facts, softmax.node.all_input_nodes, {softmax.node})
    else:
        met = _before(facts, [softmax.input], set(softmax.nodes))
    return any(call.name in PRODUCTS for call in met)


def is_after_softmax(facts: Facts, node: Node) -> bool:
    """Whether a walk back from a node, up to the nearest products, meets a softmax, or an `exp` as in one by hand."""
    return any(call.name in ("softmax", "exp") for call in _before(facts, [node], set()))


def _before(facts: Facts, nodes: Iterable[Node], seen: set[Node]) -> Iterator[Call]:
    """What a walk back from nodes meets, up to and with the nearest products and whatever else no walk passes; what
    writes into them included."""
    stack = [*nodes]
    while stack:
        node = stack.pop()
        call = facts.call(node)
        if node in seen or call is None:
            continue
        seen.add(node)
        yield call
        if call.name in _PASSED:
            stack.extend(node.all_input_nodes)
            stack.extend(user for user in node.users if is_inplace(user))


def after(facts: Facts, anchor: Node) -> Iterator[tuple[Node, bool]]:
    """What a softmax's result flows through to the nearest products, nearest first, and whether it is a product."""
    seen, queue = {anchor}, list(anchor.users)
    while queue:
        node = queue.pop(0)
        call = facts.call(node)
        if node in seen or call is None:
            continue
        seen.add(node)
        if call.name in PRODUCTS:
            yield node, True
        elif call.name in _PASSED - {"add", "sub"}:
            yield node, False
            queue.extend(node.users)
