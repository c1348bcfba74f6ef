"""Attention weights that a model returns though nobody wants them: `keep_weights` names the layers whose are wanted.

The weights of all others are replaced by empty tensors where the graph returns them, and nowhere else, so that their
attention can be fused. They are on the device "meta": whoever computes with them after all gets no number from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

import torch
from torch.fx import Node
from torch.nn.modules import module

from attn_rewriter.find import after, find
from attn_rewriter.graph import Facts, module_path, tensor
from attn_rewriter.splice import run
from attn_rewriter.torch_private import CatchErrorsWrapper, eval_frame, global_forward_hooks

_COPIES = {"cast", "copy", "detach", "permute", "reshape"}

_CALLBACKS = {CatchErrorsWrapper.__call__.__code__}
"""What Python calls in place of a function that is to be compiled."""


def withhold(facts: Facts, keep: Sequence[str]) -> bool:
    """Return empty tensors for the weights of all sites in modules that no pattern of `keep` matches; whether there
    were any. Weights that are used otherwise stay."""
    (output,) = facts.graph.find_nodes(op="output")
    unwanted = [node for node in _weights(facts, keep) if output in node.users]
    for node in unwanted:
        held = tensor(node)
        assert held is not None
        with facts.graph.inserting_before(output):
            empty = facts.graph.call_function(torch.empty, (0,), {"dtype": held.dtype, "device": "meta"})
        empty.meta["example_value"] = run(empty, getattr(held, "fake_mode", None))
        output.replace_input_with(node, empty)
    return bool(unwanted)


def returns_to_the_caller() -> bool:
    """Whether what the function being compiled returns is handed on to who called the model: nothing else runs between
    them. (transformers runs a model's outer layers as they are while it collects weights.)"""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code not in _CALLBACKS:
        frame = frame.f_back
    frame = frame and frame.f_back
    while frame is not None and _hands_on(frame):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == eval_frame.__file__


def _hands_on(frame: FrameType) -> bool:
    """Whether code is known to return what it is given: that of optimized models, of modules without hooks, and that of
    transformers."""
    name = frame.f_globals.get("__name__", "")
    if name == module.__name__:
        return not (frame.f_locals["self"]._forward_hooks or global_forward_hooks)
    return name == "attn_rewriter.api" or name.startswith("transformers.")


def _weights(facts: Facts, keep: Sequence[str]) -> Iterator[Node]:
    for site in [*find(facts)]:
        if site.kind == "softmax" and not is_kept(module_path(site.anchor), keep):
            yield from _until_product(facts, site.anchor)


def _until_product(facts: Facts, anchor: Node) -> Iterator[Node]:
    """What lies between a softmax and the products, and copies of it; not what else is computed from it."""
    following = sorted(after(facts, anchor), key=lambda found: facts.position[found[0]])
    leading = {node for node, is_product in following if is_product}
    for node, _ in reversed(following):
        if any(user in leading for user in node.users):
            leading.add(node)
    weights = {anchor}
    for node, is_product in following:
        call = facts.call(node)
        is_copy = call is not None and call.name in _COPIES and node.all_input_nodes[0] in weights
        if not is_product and (node in leading or is_copy):
            weights.add(node)
    yield from weights


def is_kept(module: str, keep: Sequence[str]) -> bool:
    """Whether a pattern, as of file names, matches the path of a module or of one that it is part of. After a graph
    break paths begin further inside, so that the end of a pattern will do, if it names something."""
    names = module.split(".")
    within = [".".join(names[:i]) for i in range(1, len(names) + 1)]
    return any(fnmatchcase(path, end) for pattern in keep for end in _ends(pattern.split(".")) for path in within)


def _ends(names: Sequence[str]) -> Iterator[str]:
    ends = (names[i:] for i in range(len(names)))
    return (".".join(end) for end in ends if len(end) == len(names) or set("".join(end)) - set("*?"))
