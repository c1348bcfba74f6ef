"""Running a function eager, in float64, and through the rewriter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attn_rewriter import Backend, Device, Options, Report

DRAWS = 8  # errors are compared over several draws of the inputs: a few elements' error is mostly luck


class Exact(TorchFunctionMode):
    """Turns the casts to float32 that models write around their softmax into casts to float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "float":
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


def double(inputs: Sequence[Any]) -> list[Any]:
    """The same inputs in float64, as new leaves."""

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return [convert(x) for x in inputs]


def with_gradients(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, list[torch.Tensor | None]]:
    """A function's result, and the gradients of a fixed weighting of it for every input that wants one."""
    result = function(*inputs)
    outputs = [result] if isinstance(result, torch.Tensor) else [*result]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    used = [y for y in outputs if y.requires_grad]
    if not used or not wanted:
        return result, []
    generator = torch.Generator("cpu").manual_seed(1)
    ways = [torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y) for y in used]
    return result, [*torch.autograd.grad(used, wanted, ways, allow_unused=True)]


def truth(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, list[torch.Tensor | None]]:
    """Result and gradients in float64."""
    with Exact():
        return with_gradients(function, double(inputs))


def run_as_is(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A compiler that compiles nothing."""
    return gm.forward


def rewritten(
    function: Callable[..., Any], dynamic: bool | None = None, device: str | None = None, **options: Any
) -> tuple[Any, Callable[[], Report]]:
    """A function compiled with the rewriter and without Inductor, as if for `device`, and the report of it."""
    torch._dynamo.reset()
    imagined = Device.parse(device) if device is not None else None
    backend = Backend(Options(**{"compiler": run_as_is, "strict": True, **options}), device=imagined)
    return torch.compile(function, backend=backend, dynamic=dynamic), lambda: backend.report


def gradients(model: torch.nn.Module, outputs: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of a fixed weighting of a model's outputs, one tensor for each module. The model holds none before
    and after.

    A module's own parameters are taken together because weight and bias of a linear layer are one matrix `[W | b]`,
    and share a rounding unit. (The bias of a key projection alone has a gradient that is zero but for rounding: it
    shifts all scores of a row alike.) Single numbers are left out: CLIP's `logit_scale`, a sum over the logits.
    """
    torch.stack([(x.double() * _cotangent(x)).sum() for x in outputs]).sum().backward()
    found = {
        name: [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None and p.ndim]
        for name, module in model.named_modules()
    }
    model.zero_grad()
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _cotangent(x: torch.Tensor) -> torch.Tensor:
    """A random gradient for an output, exact in every type."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    return noise.bfloat16().double()


def joined(draws: Iterable[Any]) -> Any:
    """Several results of the same nesting as one, their tensors stacked."""
    first, *rest = draws
    if isinstance(first, Mapping):
        return {key: joined([first[key], *(each[key] for each in rest)]) for key in first}
    if isinstance(first, (tuple, list)):
        return [joined(parts) for parts in zip(first, *rest)]
    return None if first is None else torch.stack([first, *rest])


def together(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """All gradients as one tensor. One rounding unit is that of the largest: where the weights have a single 1, the
    gradients of query and key are differences of large numbers that cancel."""
    held = [g.flatten() for g in gradients if g is not None]
    return torch.cat([g.to(held[0].dtype) for g in held]) if held else None
