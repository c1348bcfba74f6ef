"""`device_map`: accelerate's hooks, which divide a model between devices, as Dynamo sees them.

accelerate keeps Dynamo out of all of its hooks, because some of them load weights. There is one on every module, so
that a graph ends at each projection, where the attention weights are still alive. Those that only move tensors can be
compiled: `tensor.to(device)` is an operation like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import torch


def trace_moves(hooks: ModuleType) -> None:
    """Let Dynamo see those hooks of `accelerate.hooks` that only move tensors; the others stay as they are, and so does
    what is run and not compiled.

    It is the classes that are changed, for good: hooks come and go, are copied, and are guarded on.
    """
    align, sequential = (getattr(hooks, name, None) for name in ("AlignDevicesHook", "SequentialHook"))

    def only_moves(hook: Any) -> bool:
        if type(hook) is sequential:
            return all(map(only_moves, hook.hooks))
        return type(hook) is align and not getattr(hook, "offload", True)  # a subclass does who knows what

    for kind, name in product((align, sequential), ("pre_forward", "post_forward")):
        plain = getattr(getattr(kind, name, None), "__wrapped__", None)
        if plain is not None:  # else Dynamo sees it, as before accelerate 1.13
            setattr(kind, name, _seen(plain, only_moves))


def _seen(plain: Callable[..., Any], where: Callable[[Any], bool]) -> Callable[..., Any]:
    hidden = torch.compiler.disable(plain, reason="this hook does more than move tensors")

    @functools.wraps(plain)
    def method(hook: Any, *args: Any, **kwargs: Any) -> Any:
        return (plain if where(hook) else hidden)(hook, *args, **kwargs)

    return method
