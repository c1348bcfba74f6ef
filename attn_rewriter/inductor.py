"""Inductor's own attention patterns, kept out of the graphs that went through us.

Inductor looks for attention in the graph of both passes (`torch/_inductor/fx_passes/fuse_attention.py`), and does not
ask along which dimension a softmax goes: `softmax(1)` and `softmax(-2)` between two products become another function
(2.11 to 2.13). What we left as it is, we left for a reason, so that these patterns have nothing to win there.

All of them contain an exponential, and nothing else that Inductor looks for in that graph does. So exponentials go by
another name while it looks. They are renamed by passes that Inductor lets its callers add, which are settings of one
compilation in one thread, and part of the keys of its caches: what plain Inductor compiled is not taken for ours, nor
the other way round. The names of these settings are the same from PyTorch 2.11 to 2.15.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph

_BEFORE, _AFTER = "joint_custom_pre_pass", "joint_custom_post_pass"


def without_attention_patterns() -> AbstractContextManager[Any]:
    """While a graph is compiled, by whatever compiler: if it is Inductor, attention patterns find nothing."""
    try:
        from attn_rewriter.torch_private import inductor_config

        return inductor_config.patch(kept_out({name: getattr(inductor_config, name) for name in (_BEFORE, _AFTER)}))
    except (ImportError, AttributeError) as error:
        _warn(str(error))
        return nullcontext()


def kept_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of Inductor, in which its attention patterns find nothing, and the passes that were there still run."""
    kept = dict(settings)
    for name, kind in zip((_BEFORE, _AFTER), _passes()):
        if name in kept and not isinstance(kept[name], kind):
            kept[name] = kind(kept[name])
    return kept


@lru_cache
def _warn(error: str) -> None:
    """Once: a graph is compiled right, but perhaps not what is left in it of attention."""
    warnings.warn(
        "attn_rewriter can't keep PyTorch's own attention patterns out of the graphs that it hands to Inductor. They "
        "may be wrong where a softmax is not along the last dimension. This version of PyTorch has other names: "
        f"{error}",
        stacklevel=3,
    )


def exponential(x: torch.Tensor) -> torch.Tensor:
    """Another name of `torch.ops.aten.exp.default`."""
    return torch.ops.aten.exp.default(x)


def _rename(graph: Graph, old: Any, new: Any) -> None:
    for node in [*graph.find_nodes(op="call_function", target=old)]:
        node.target = new


@lru_cache
def _passes() -> tuple[type, type]:
    """The passes before and after Inductor's own, as classes of what it takes: made here, as importing it takes time
    where Inductor is not in use."""
    from attn_rewriter.torch_private import CustomGraphPass

    class Pass(CustomGraphPass):
        """Ours, and what someone else wants to run in this place: a pass, several, or none."""

        def __init__(self, other: Any) -> None:
            self.others = tuple(other) if isinstance(other, (list, tuple)) else () if other is None else (other,)

        def uuid(self) -> Any:
            """What stands for it in the keys of caches; None, which is none, where a part has none."""
            names = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.others]
            return None if None in names else (f"{type(self).__module__}.{type(self).__name__}", *names)

    class Hide(Pass):
        """Someone else's come first: they see the graph as it is."""

        def __call__(self, graph: Graph) -> None:
            for other in self.others:
                other(graph)
            _rename(graph, torch.ops.aten.exp.default, exponential)

    class Show(Pass):
        def __call__(self, graph: Graph) -> None:
            _rename(graph, exponential, torch.ops.aten.exp.default)
            for other in self.others:
                other(graph)

    return Hide, Show
