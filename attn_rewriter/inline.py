"""Checkpoints that nothing is computed again for, opened: without gradients, a checkpoint is a call like any other.

AOTAutograd takes no operation in it that may draw random numbers there (2.13: `RuntimeError: Activation checkpoint
rematerialization … does not support RNG ops`), and fused attention is one, also where it has no dropout.
"""

from __future__ import annotations

import operator
from itertools import count
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attn_rewriter.graph import Facts, inputs_of
from attn_rewriter.torch_private import tree_leaves


def open_checkpoints(facts: Facts) -> bool:
    """Put the body of each checkpoint without gradients in the place of its call; whether there was one."""
    calls = facts.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    opened = [_open(call, facts) for call in calls]
    return any(opened)


def _open(call: Node, facts: Facts) -> bool:
    body = facts.modules.get(str(getattr(call.args[0], "target", "")))
    given = tree_leaves(call.meta.get("example_value"))
    if not isinstance(body, GraphModule) or any(isinstance(x, torch.Tensor) and x.requires_grad for x in given):
        return False
    inputs, results = inputs_of(call, body.graph), next(iter(body.graph.find_nodes(op="output"))).args[0]
    if "_checkpoint_context_fn" in body.meta or inputs is None or not isinstance(results, (tuple, list)):
        return False
    made: dict[Any, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs))
    for user in call.users:
        taken = results[user.args[1]] if user.target is operator.getitem else None  # type: ignore[index]
        if not isinstance(made.get(taken, taken), Node):
            return False
    with facts.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                made[node] = facts.graph.get_attr(_adopted(str(node.target), body, facts))
            elif node.op not in ("placeholder", "output"):
                made[node] = facts.graph.node_copy(node, made.__getitem__)
    for user in [*call.users]:
        user.replace_all_uses_with(made[results[user.args[1]]])  # type: ignore[index]
        facts.graph.erase_node(user)
    facts.graph.erase_node(call)
    return True


def _adopted(name: str, body: GraphModule, facts: Facts) -> str:
    """The name under which the outer graph has what a body holds."""
    owner = facts.graph.owning_module
    assert owner is not None
    new = next(new for n in count() if not hasattr(owner, new := f"{name}_{n}"))
    setattr(owner, new, getattr(body, name))
    facts.modules[new] = getattr(body, name)
    return new
