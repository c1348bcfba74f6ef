"""PyTorch's context parallelism: each process holds a part of the sequence, and attends to the keys of all.

`torch.distributed.tensor.experimental.context_parallel` replaces `F.scaled_dot_product_attention`, as long as its block
lasts, by a function that sends keys and values around the processes. A causal mask over a part, or none, it takes to be
that of the whole sequence. Any other attention would see the keys of its own process alone, and nobody would say so:
here it is an error.

Where Dynamo gives up, after too many compilations or an error, it runs a model as it is, which would be wrong there
without a word. So its settings that it raises instead hold within each block, and go back with it.
"""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from attn_rewriter import torch_private
from attn_rewriter.torch_private import scaled_dot_product_attention

_EXPERIMENTAL = "torch.distributed.tensor.experimental."


@dataclass(frozen=True)
class Ring:
    """The processes among which a sequence is divided, and how: what is compiled for one ring computes for no other."""

    mesh: Any
    options: str


def ring() -> Ring | None:
    """The ring of the block that we are in."""
    function: Any = F.scaled_dot_product_attention
    if function is scaled_dot_product_attention:  # PyTorch's own: nothing has replaced it
        return None
    module = getattr(function, "__module__", None) or ""
    if not module.startswith(_EXPERIMENTAL):
        return None
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    return Ring(held["device_mesh"], repr(sys.modules[module]._cp_options))


_BEGIN, _END = "_enable_context_parallel_dispatcher_impl", "_disable_context_parallel_dispatcher_impl"
"""What PyTorch calls first and last in a block (2.11 to 2.13)."""

_SETTINGS = {"fail_on_recompile_limit_hit": True, "suppress_errors": False}

_watched: set[str] = set()


def never_give_up() -> None:
    """Let Dynamo raise where it would give up: within the block that we are in, and within each that will be entered.
    Called for each graph that is compiled; nothing happens unless blocks are used."""
    implementations = [
        module
        for name, module in [*sys.modules.items()]
        if name.startswith(_EXPERIMENTAL) and getattr(vars(module).get(_BEGIN), "__module__", None) == name
    ]
    for module in implementations:
        if module.__name__ not in _watched:
            _watched.add(module.__name__)
            _watch(module)
    if ring() is not None and not implementations and any(map(_differs, _SETTINGS)):
        warnings.warn(
            "attn_rewriter sets torch._dynamo.config.fail_on_recompile_limit_hit for good: this version of PyTorch "
            "does not say where a block of context_parallel() ends",
            stacklevel=2,
        )
        _set(_SETTINGS)


def _watch(module: Any) -> None:
    """Let settings change with each block."""
    begin, end = getattr(module, _BEGIN), getattr(module, _END)
    before: list[dict[str, Any]] = []

    def hold() -> None:
        before.append({name: getattr(torch_private.dynamo_config, name) for name in _SETTINGS})
        _set(_SETTINGS)

    @functools.wraps(begin)
    def beginning(*args: Any, **kwargs: Any) -> Any:
        found = begin(*args, **kwargs)
        hold()
        return found

    @functools.wraps(end)
    def ending(*args: Any, **kwargs: Any) -> Any:
        try:
            return end(*args, **kwargs)
        finally:
            if before:
                _set(before.pop())

    setattr(module, _BEGIN, beginning)
    setattr(module, _END, ending)
    if ring() is not None:  # it has begun
        hold()


def _differs(name: str) -> bool:
    return bool(getattr(torch_private.dynamo_config, name) != _SETTINGS[name])


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(torch_private.dynamo_config, name, value)
