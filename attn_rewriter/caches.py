"""Key/value caches that a graph writes into, under CUDA graphs.

Inductor makes no CUDA graph of a graph that writes into its inputs, unless these are known to stay where they are.
transformers marks its static caches so, where it makes them outside of what is compiled; a cache that was made within a
compiled prompt is not marked. Here what a graph shows is enough: an input that is written in part, at an index or in a
slice, is a cache, and outlives the call. Should it move after all, as with the cache of the next prompt, PyTorch finds
that out at the call and records the CUDA graph again (`torch._dynamo.mark_static_address` with guard=False).
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from attn_rewriter.graph import Facts


def keep_in_place(gm: GraphModule) -> list[Node]:
    """Mark all inputs that a graph writes into as staying where they are, if one of them is a cache; which they are."""
    facts = Facts(gm.graph, dict(gm.named_children()))
    writes = {node: facts.writes(node) for node in gm.graph.find_nodes(op="placeholder")}
    written = [node for node, nodes in writes.items() if nodes]
    if not any(_in_part(write, node) for node in written for write in writes[node]):
        return []
    for node in written:
        node.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"
    return written


_AT_AN_INDEX = {"index_copy_", "index_put_", "setitem", "scatter_"}


def _in_part(write: Node, node: Node) -> bool:
    """Whether an input keeps some of its contents: it is written at an index, or through a view."""
    name = getattr(write.target, "__name__", write.target)
    return name in _AT_AN_INDEX or write.args[0] is not node
