"""`optimize`, `explain` and `report_of`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from attn_rewriter import torch_private
from attn_rewriter.backend import Backend
from attn_rewriter.choose import Request
from attn_rewriter.compilers import with_own_code
from attn_rewriter.device import Device
from attn_rewriter.options import Compiler, Options
from attn_rewriter.progress import name_of, working
from attn_rewriter.report import Report
from attn_rewriter.withhold import is_kept

Model = TypeVar("Model", bound=Callable[..., Any])

_backends: WeakKeyDictionary[Any, Backend] = WeakKeyDictionary()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


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
    verify: bool | str = "auto",
    keep_weights: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Compile a module in place, its attention rewritten, and return it; a function is returned compiled.

    The module keeps its class, parameters and methods: only what a call of it runs changes, from the first call on.
    A copy of it, or what is loaded from its pickle, runs its own code until it is optimised as well.

    Args:
        kernel: "auto", a kernel's name, or a list of names in order of preference.
        compiler: the name of a `torch.compile` backend, or a callable taking `(gm, example_inputs)`.
        mode, dynamic, fullgraph: as in `torch.compile`.
        strict: raise where something unexpected happens at a site, instead of leaving it as it is with a warning.
        autotune: time the usable kernels on each site's shapes, once, and take the fastest (as `mode="max-autotune"`).
        verify: "auto" compares what was read with the model's own operations on made-up inputs, once, when a graph is
            compiled; True compares every site on the inputs of each graph's first call as well, "always" on those of
            each call. A site that breaks the contract stays as it is, with a warning. False compares nothing.
        keep_weights: where the model returns its attention weights, as with `output_attentions=True`, keep those of the
            modules that these patterns match ("model.layers.3.*"); all others come back as empty tensors, and their
            attention is fused. None keeps all.
        options: more options for the compiler, as in `torch.compile`.

    Raises:
        TypeError: `model` is neither a module nor a callable.
        ValueError: an option, kernel, compiler or mode is not known; the message names the valid ones.
    """
    _check_model(model)
    given = {**(options or {}), "kernel": kernel, "compiler": compiler, "strict": strict}
    given |= {"autotune": autotune, "verify": verify, "keep_weights": keep_weights}
    backend = Backend(Options.of(given, mode))
    if isinstance(model, nn.Module):
        _check_modules(model, keep_weights or ())
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
    held = vars(model) if isinstance(model, nn.Module) else dict.fromkeys(_HOOKS, ())

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name in _HOOKS:
            len(held[name])  # so that Dynamo guards on them: of a module's hooks it does not notice the first one
        return call(*args, **kwargs)

    return with_own_code(forward)


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
    backend = Backend(Options(kernel), device=imagined, dry=imagined is not None, looks=True)
    # A report of its own for each call: the many compilations of one function must not meet Dynamo's limit for them.
    unlimited = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    with torch_private.dynamo_config.patch(unlimited), working(f"explaining {name_of(model)}"):
        torch.compile(calling(model), backend=backend)(*args, **kwargs)
    return backend.report


def _check_modules(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(is_kept(name, [pattern]) for name in names):
            raise ValueError(f"no module's path matches {pattern!r} (keep_weights): they are like {names[-1]!r}")


def _check_model(model: Any) -> None:
    if not callable(model):
        raise TypeError(f"expected a torch.nn.Module or a function, got {type(model).__name__}: {model!r}")
