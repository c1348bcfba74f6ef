"""A kernel by itself, on tensors: to time it, and to check it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule

from attn_rewriter import torch_private
from attn_rewriter.device import Device
from attn_rewriter.inductor import without_attention_patterns
from attn_rewriter.kernels import Kernel
from attn_rewriter.spec import AttentionSpec, Shapes, Size
from attn_rewriter.torch_private import FakeTensorMode, ShapeEnv, TracingContext, tracing


def by_itself(
    kernel: Kernel,
    spec: AttentionSpec,
    shapes: Shapes,
    device: Device,
    operands: dict[str, Any],
    size: Callable[[Size], int] = lambda n: n,
) -> Callable[..., torch.Tensor]:
    """A function of a kernel's operands, in their order; `size` says what the sizes are that are symbols."""
    names = [*operands]

    def attend(*held: Any) -> torch.Tensor:
        return kernel(spec, shapes, device, _Operands(zip(names, held), size))

    return _compiled(attend, [*operands.values()]) if kernel.needs_inductor else attend


class _Operands(dict[Any, Any]):
    """A kernel's tensors, and its sizes."""

    def __init__(self, held: Any, size: Callable[[Size], int]) -> None:
        super().__init__(held)
        self._size = size

    def __missing__(self, name: Any) -> int:
        if not isinstance(name, sympy.Expr):
            raise KeyError(name)
        return self._size(name)


def _compiled(function: Callable[..., torch.Tensor], args: Sequence[Any]) -> Callable[..., torch.Tensor]:
    """A function as Inductor compiles it, not traced by Dynamo: as one node of a graph, like those that are emitted."""
    from attn_rewriter.torch_private import compile_fx  # takes seconds where Inductor is not in use

    graph = Graph()
    graph.output((graph.call_function(function, tuple(graph.placeholder(f"arg{i}") for i in range(len(args)))),))
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    # The backward pass is compiled now: by the time it is asked for, it would be within Dynamo's own compilation.
    now = torch_private.functorch_config.patch(force_non_lazy_backward_lowering=True)
    with now, without_attention_patterns(), tracing(TracingContext(mode)):
        inputs = [mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in args]
        compiled: Any = compile_fx(GraphModule({}, graph), inputs)
    return lambda *args: compiled(*args)[0]
