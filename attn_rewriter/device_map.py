"""`device_map`: accelerate's hooks, which divide a model between devices, as Dynamo sees them.

accelerate keeps Dynamo out of all of its hooks, because some of them load weights. There is one on every module, so
that a graph ends at each projection, where the attention weights are still alive. Those that only move tensors can be
compiled: `tensor.to(device)` is an operation like any other.

It is accelerate's classes that are changed for this, when a model that has hooks is compiled with this package, and not
before. Hooks may be put on a model at any time, also after `torch.compile`, which tells a backend nothing of models: so
Dynamo's own frames are read, when it begins to compile one (`_begins`; here alone). Where they look otherwise in
another version of PyTorch, nothing is changed, and graphs end at each hook.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from itertools import product
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from attn_rewriter.torch_private import CallbackArgs, callback_handler, convert_frame

NAME = "attn_rewriter"
"""What backends of this package are called."""

_HOOKS = "accelerate.hooks"
_changed: set[ModuleType] = set()


def watch() -> None:
    """See to models with hooks that will be compiled. (`torch._dynamo.reset()` forgets this.)"""
    if _begins not in callback_handler.start_callbacks:
        callback_handler.start_callbacks.append(_begins)


def _begins(args: CallbackArgs) -> None:
    """Dynamo begins to compile a frame."""
    hooks = sys.modules.get(_HOOKS)
    if hooks is None or hooks in _changed:
        return
    frame = inspect.currentframe()
    while frame is not None and not _is_dynamos(frame):
        frame = frame.f_back
    if frame is not None and _is_ours(frame.f_locals.get("compiler_fn")) and any(map(_has_hooks, _models(frame))):
        _changed.add(hooks)
        trace_moves(hooks)


def _is_dynamos(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_compile" and frame.f_globals.get("__name__") == convert_frame.__name__


def _is_ours(backend: Any) -> bool:
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_name", getattr(backend, "__name__", "")) == NAME


def _models(frame: FrameType) -> Iterator[nn.Module]:
    """The modules that a frame to be compiled has as variables, or whose methods."""
    code, cells, variables, outside = (frame.f_locals.get(name) for name in ("code", "closure", "locals", "globals"))
    held = [cell.cell_contents for cell in cells or () if cell != type(cell)()]
    held += (variables or {}).values()
    outside = outside or {}
    held += [outside[name] for name in getattr(code, "co_names", ()) if name in outside]
    for x in held:
        model = x.__self__ if inspect.ismethod(x) else x
        if isinstance(model, nn.Module):
            yield model


def _has_hooks(model: nn.Module) -> bool:
    return any("_hf_hook" in vars(module) for module in model.modules())


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
