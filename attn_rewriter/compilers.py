"""What compiles the rewritten graphs, and what is shown while it does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from attn_rewriter import torch_private
from attn_rewriter.device_map import NAME, watch
from attn_rewriter.errors import AttnRewriterError, in_a_line
from attn_rewriter.inductor import kept_out, without_attention_patterns
from attn_rewriter.options import Options
from attn_rewriter.progress import name_of, working
from attn_rewriter.torch_private import (
    BackendCompilerFailed,
    CallbackArgs,
    CallbackTrigger,
    CompileContext,
    TorchRuntimeError,
    callback_handler,
)

WITHOUT_AOT = frozenset({"eager", "eager_noexcept", "eager_debug", "pre_dispatch_eager"})
"""Compilers that run the graph under PyTorch's autograd. (One that is given as a callable may do so.)"""


@dataclass(frozen=True)
class CompilerOfOurs:
    """A compiler, called so that Inductor, if it is that or calls it, does not look for attention once more."""

    compile: Callable[..., Any]

    def __post_init__(self) -> None:
        watch()

    def __call__(self, gm: GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        watch()  # once more, should it be forgotten
        with without_attention_patterns():
            return self.compile(gm, example_inputs, **kwargs)

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`."""
        if hasattr(self.compile, "reset"):
            self.compile.reset()


def compiler_of(options: Options) -> CompilerOfOurs:
    """The compiler that the options name, with its own mode and options: it takes a graph and example inputs."""
    return CompilerOfOurs(_named(options))


def _named(options: Options) -> Callable[..., Any]:
    if callable(options.compiler):
        return options.compiler
    if options.compiler == "inductor":
        # What torch.compile itself makes of its mode and options.
        compiler = torch_private.TorchCompileInductorWrapper(options.mode, dict(options.compiler_options), None)
        if any(name.startswith("joint_custom_") for name in compiler.config):  # which replace those of the process
            compiler.config = kept_out(compiler.config)
        return compiler
    given: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        given["mode"] = options.mode
    if options.compiler_options:
        given["options"] = dict(options.compiler_options)
    return functools.partial(torch_private.lookup_backend(options.compiler), **given)


_number = count()


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function made in another one code that it shares with none. Dynamo counts compilations, and remembers
    which sizes change, by code and by name."""
    function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{next(_number)}")
    return function


def compiled_again(graph: GraphModule, backend: Callable[..., Any]) -> Callable[..., Any]:
    """A graph, traced once more; where PyTorch can't compile it then, it runs as it is, with one warning. (All modules
    of torch's own that `torch.compile` is handed share one code.)"""

    def forward(*args: Any) -> Any:
        return graph(*args)

    compiled = torch.compile(with_own_code(forward), backend=Again(backend))
    failed = False

    def call(*args: Any) -> Any:
        nonlocal failed
        if failed:
            return graph(*args)
        try:
            return compiled(*args)
        except (TorchRuntimeError, BackendCompilerFailed) as error:
            # PyTorch knows less of a graph that is traced once more: what was the size of a tensor is a number, and
            # inputs are views of each other without a history. Some it does not take then (2.13: `torch.cond`).
            if isinstance(getattr(error, "inner_exception", None), AttnRewriterError):
                raise
            failed = True
            warnings.warn(
                "attn_rewriter runs a graph uncompiled that was compiled before, after an error of its compiler: "
                f"{in_a_line(error)}",
                stacklevel=2,
            )
            return graph(*args)

    return call


@dataclass(frozen=True)
class Again:
    """A backend for graphs of ours."""

    backend: Callable[..., Any]
    __name__: ClassVar[str] = NAME
    """By its name Dynamo knows a registered backend (2.13): after a compilation it then lets go of its weak references
    to the inputs, which would keep PyTorch from exchanging them (`torch.utils.swap_tensors`)."""

    def __call__(self, gm: GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        return self.backend(gm, example_inputs, **kwargs)


@contextmanager
def compiling(compiler: object, what: str) -> Iterator[None]:
    """While a graph is compiled; its backward pass, which PyTorch compiles when it first runs, is shown then."""
    with working(f"compiling with {name_of(compiler)}" + (f", {what}" if what else "")):
        yield
    _show_backward()


_awaited: set[str] = set()
"""The compilations of graphs whose backward pass PyTorch compiles when it first runs."""

_backward = ExitStack()


def _show_backward() -> None:
    """Show the compilation of a backward pass as that of its graph, which is being compiled."""
    _awaited.add(str(CompileContext.current_compile_id()))
    for callbacks, callback in (
        (callback_handler.start_callbacks, _backward_begins),
        (callback_handler.end_callbacks, _backward_ends),
    ):
        if callback not in callbacks:  # any more: `torch._dynamo.reset()` forgets them
            callbacks.append(callback)


def _backward_begins(args: CallbackArgs) -> None:
    if args.callback_trigger is CallbackTrigger.LAZY_BACKWARD and args.compile_id in _awaited:
        _backward.enter_context(working("compiling the backward pass"))


def _backward_ends(args: CallbackArgs) -> None:
    _backward.close()
