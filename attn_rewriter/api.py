"""`optimize`, `explain` and `report_of`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from itertools import count
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from attn_rewriter.backend import Backend
from attn_rewriter.choose import Request
from attn_rewriter.device import Device
from attn_rewriter.options import Compiler, Options
from attn_rewriter.report import Report

Model = TypeVar("Model", bound=Callable[..., Any])

_backends: WeakKeyDictionary[Any, Backend] = WeakKeyDictionary()
_number = count()


def optimize(
    model: Model,
    *,
    kernel: Request = "auto",
    compiler: Compiler = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    strict: bool = False,
    autotune: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Compile a module in place, its attention rewritten, and return it; a function is returned compiled.

    The module keeps its class, parameters and methods: only what a call of it runs changes, from the first call on.

    Args:
        kernel: "auto", a kernel's name, or a list of names in order of preference.
        compiler: the name of a `torch.compile` backend, or a callable taking `(gm, example_inputs)`.
        mode, dynamic, fullgraph: as in `torch.compile`.
        strict: raise where something unexpected happens at a site, instead of leaving it as it is with a warning.
        autotune: time the usable kernels on each site's shapes, once, and take the fastest (as `mode="max-autotune"`).
        options: more options for the compiler, as in `torch.compile`.

    Raises:
        TypeError: `model` is neither a module nor a callable.
        ValueError: an option, kernel, compiler or mode is not known; the message names the valid ones.
    """
    _check_model(model)
    given = {**(options or {}), "kernel": kernel, "compiler": compiler, "strict": strict, "autotune": autotune}
    backend = Backend(Options.of(given, mode))
    if isinstance(model, nn.Module):
        compile_in_place(model, backend, dynamic=dynamic, fullgraph=fullgraph)
        return model
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    _backends[compiled] = backend
    return compiled  # type: ignore[return-value]


def compile_in_place(model: nn.Module, backend: Backend, **options: Any) -> None:
    """What `nn.Module.compile` does, for modules of torch itself as well: Dynamo skips a call that begins in torch's
    own files, as that of `nn.TransformerEncoder` does, but not one that leads there from ours."""
    model._compiled_call_impl = torch.compile(calling(model), backend=backend, **options)
    _backends[model] = backend


def calling(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function of this file that calls a model as it is, compiled or not."""
    call = model._call_impl if isinstance(model, nn.Module) else model

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Dynamo counts compilations, and remembers which sizes change, by code and by name: models must not share them.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_number)}")
    return forward


def report_of(model: Any) -> Report:
    """What was rewritten in the graphs that `optimize(model)` has compiled so far; of a model with optimised modules
    in it, as within `DistributedDataParallel`, of all of them.

    Raises `ValueError` where there is nothing that came from `optimize`.
    """
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    backends = [_backends[part] for part in parts if isinstance(part, Hashable) and part in _backends]
    if not backends:
        raise ValueError("report_of takes a model that optimize() returned, or one around it")
    return Report.joined(backend.report for backend in backends)


def explain(
    model: Callable[..., Any],
    *args: Any,
    device: Device | str | None = None,
    kernel: Request = "auto",
    **kwargs: Any,
) -> Report:
    """Run a model once on the given inputs and say, site by site, what its attention computes and which kernel takes
    its place; the model stays as it is.

    All other arguments go to the model. `device` imagines another device: "sm_90", "cpu", or a `Device`; then nothing
    is replaced in the run itself. `kernel` is what `optimize` takes.

    Raises:
        TypeError: `model` is neither a module nor a callable.
        ValueError: `device` or `kernel` is not known.
    """
    _check_model(model)
    imagined = None if device is None else Device.parse(device)
    backend = Backend(Options(kernel, compiler=_run_as_is), device=imagined, dry=imagined is not None)
    # A report of its own for each call: the many compilations of one function must not meet Dynamo's limit for them.
    unlimited = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    with torch._dynamo.config.patch(unlimited):
        torch.compile(calling(model), backend=backend)(*args, **kwargs)
    return backend.report


def _run_as_is(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    return gm.forward


def _check_model(model: Any) -> None:
    if not callable(model):
        raise TypeError(f"expected a torch.nn.Module or a function, got {type(model).__name__}: {model!r}")
