"""The private names of PyTorch that this package needs: the only door to them.

A name is private here if a part of it begins with an underscore, or if it is in `torch.fx.experimental`. PyTorch may
rename it in any release. When that happens, this is the file to change.

A name is looked up each time that it is asked for. `from attn_rewriter.torch_private import name` asks once, where that
line runs; `torch_private.name` asks where it is used, so that a name that is gone breaks only what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:  # the types of the names below
    from torch import _TorchCompileInductorWrapper as TorchCompileInductorWrapper
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C._functorch import is_functorch_wrapped_tensor
    from torch._C._nn import scaled_dot_product_attention
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import convert_frame, eval_frame, list_backends, lookup_backend
    from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
    from torch._dynamo.convert_frame import CatchErrorsWrapper
    from torch._dynamo.exc import BackendCompilerFailed, ShortenTraceback, TorchDynamoException, TorchRuntimeError
    from torch._functorch import config as functorch_config
    from torch._functorch import predispatch
    from torch._guards import CompileContext, TracingContext, tracing
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.inductor_prims import force_stride_order
    from torch._inductor.utils import fresh_cache
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.autograd.forward_ad import _current_level as forward_level
    from torch.cuda import _sleep as cuda_sleep
    from torch.fx.experimental.symbolic_shapes import (
        GuardOnDataDependentSymNode,
        ShapeEnv,
        StrictMinMaxConstraint,
        statically_known_true,
    )
    from torch.nn.modules.module import _global_forward_hooks as global_forward_hooks
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
    from torch.utils._pytree import tree_leaves, tree_map
    from torch.utils._sympy.functions import Max, Min
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis


class Private(NamedTuple):
    """A private name: what completes "attn_rewriter needs it to …", and the oldest and newest PyTorch known to have it
    (looked up in the installed 2.13 and 2.15, and in the sources of 2.11, 2.12 and 2.14)."""

    path: str
    use: str
    releases: tuple[str, str] = ("2.11", "2.15")


_SHAPES = "torch.fx.experimental.symbolic_shapes"

NAMES = {
    # Dynamo
    "BackendCompilerFailed": Private("torch._dynamo.exc.BackendCompilerFailed", "tell whether a compiler failed"),
    "CallbackArgs": Private("torch._dynamo.callback.CallbackArgs", "read which compilation begins"),
    "CallbackTrigger": Private("torch._dynamo.callback.CallbackTrigger", "tell a backward pass from a forward pass"),
    "CatchErrorsWrapper": Private("torch._dynamo.convert_frame.CatchErrorsWrapper", "find who called the model"),
    "CompileContext": Private("torch._guards.CompileContext", "know which compilation a graph belongs to"),
    "ShortenTraceback": Private("torch._dynamo.exc.ShortenTraceback", "tell whether a compiler failed"),
    "TorchCompileInductorWrapper": Private("torch._TorchCompileInductorWrapper", "compile as torch.compile does"),
    "TorchDynamoException": Private("torch._dynamo.exc.TorchDynamoException", "tell whether a compiler failed"),
    "TorchRuntimeError": Private("torch._dynamo.exc.TorchRuntimeError", "tell whether a graph can't be traced again"),
    "callback_handler": Private("torch._dynamo.callback.callback_handler", "be told when a compilation begins"),
    "convert_frame": Private("torch._dynamo.convert_frame", "find the model that is being compiled"),
    "dynamo_config": Private("torch._dynamo.config", "say when Dynamo may give up"),
    "eval_frame": Private("torch._dynamo.eval_frame", "find who called the model"),
    "list_backends": Private("torch._dynamo.list_backends", "say which compilers there are"),
    "lookup_backend": Private("torch._dynamo.lookup_backend", "call a compiler by its name"),
    # AOTAutograd and Inductor
    "CustomGraphPass": Private("torch._inductor.custom_graph_pass.CustomGraphPass", "keep out Inductor's patterns"),
    "TracingContext": Private("torch._guards.TracingContext", "compile a kernel by itself"),
    "compile_fx": Private("torch._inductor.compile_fx.compile_fx", "compile a kernel by itself"),
    "force_stride_order": Private("torch._inductor.inductor_prims.force_stride_order", "lay out a captured tensor"),
    "fresh_cache": Private("torch._inductor.utils.fresh_cache", "time compilations from scratch"),
    "functorch_config": Private("torch._functorch.config", "say how backward passes are compiled"),
    "inductor_config": Private("torch._inductor.config", "keep out Inductor's patterns"),
    "list_mode_options": Private("torch._inductor.list_mode_options", "check a mode of Inductor"),
    "list_options": Private("torch._inductor.list_options", "check an option of Inductor"),
    "tracing": Private("torch._guards.tracing", "compile a kernel by itself"),
    # Fake tensors and symbolic sizes
    "FakeTensor": Private("torch._subclasses.FakeTensor", "tell fake tensors from real ones"),
    "FakeTensorMode": Private("torch._subclasses.FakeTensorMode", "compile a kernel by itself"),
    "GuardOnDataDependentSymNode": Private(f"{_SHAPES}.GuardOnDataDependentSymNode", "notice sizes that are data"),
    "Max": Private("torch.utils._sympy.functions.Max", "simplify sizes"),
    "Min": Private("torch.utils._sympy.functions.Min", "simplify sizes"),
    "PythonReferenceAnalysis": Private("torch.utils._sympy.reference.PythonReferenceAnalysis", "turn sizes into nodes"),
    "ShapeEnv": Private(f"{_SHAPES}.ShapeEnv", "compile a kernel by itself"),
    "StrictMinMaxConstraint": Private(f"{_SHAPES}.StrictMinMaxConstraint", "know which sizes have a range"),
    "enable_python_dispatcher": Private("torch._dispatch.python.enable_python_dispatcher", "run symbolic sizes"),
    "statically_known_true": Private(f"{_SHAPES}.statically_known_true", "compare sizes without a guard"),
    "sympy_interp": Private("torch.utils._sympy.interp.sympy_interp", "turn sizes into nodes"),
    # Operators and tensors
    "HigherOrderOperator": Private("torch._ops.HigherOrderOperator", "know what an operation may write into"),
    "OpOverload": Private("torch._ops.OpOverload", "read the operators of a graph"),
    "OpOverloadPacket": Private("torch._ops.OpOverloadPacket", "read the operators of a graph"),
    "TorchDispatchMode": Private("torch.utils._python_dispatch.TorchDispatchMode", "compute in float64"),
    "cuda_sleep": Private("torch.cuda._sleep", "hold the GPU while the steps to be timed are launched"),
    "flex_attention": Private("torch._higher_order_ops.flex_attention.flex_attention", "call FlexAttention in a graph"),
    "forward_level": Private("torch.autograd.forward_ad._current_level", "know when forward-mode AD is in use"),
    "global_forward_hooks": Private("torch.nn.modules.module._global_forward_hooks", "know modules without hooks"),
    "is_functorch_wrapped_tensor": Private("torch._C._functorch.is_functorch_wrapped_tensor", "notice torch.func"),
    "is_traceable_wrapper_subclass": Private(
        "torch.utils._python_dispatch.is_traceable_wrapper_subclass", "notice tensors that wrap others"
    ),
    "predispatch": Private("torch._functorch.predispatch", "read masks that torch.vmap makes"),
    "scaled_dot_product_attention": Private(
        "torch._C._nn.scaled_dot_product_attention", "call PyTorch's own, whatever replaces it in torch.nn.functional"
    ),
    "set_grad_enabled": Private("torch._C._set_grad_enabled", "run a graph without gradients"),
    "tree_leaves": Private("torch.utils._pytree.tree_leaves", "look into nested arguments"),
    "tree_map": Private("torch.utils._pytree.tree_map", "change nested arguments"),
}


class PrivateNameGone(ImportError):
    """The installed PyTorch does not have a private name that is needed."""


def _look_up(name: str) -> Any:
    """Raises `PrivateNameGone` for a name of the table that PyTorch does not have."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, use, (oldest, newest) = NAMES[name]
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(__import__(module, fromlist=[attribute]), attribute)  # as `from module import attribute` does
    except (ImportError, AttributeError) as error:
        raise PrivateNameGone(
            f"attn_rewriter needs {path} to {use}, and PyTorch {torch.__version__} does not give it ({error}): install "
            f"PyTorch {oldest} to {newest}, which have it, or a newer attn_rewriter"
        ) from error


if not TYPE_CHECKING:  # a type checker must not take every name for one that is here
    __getattr__ = _look_up
