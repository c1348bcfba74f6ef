"""The `torch.compile` backend: rewrite Dynamo's graph, then hand it to a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from attn_rewriter.buffers import Buffers, note
from attn_rewriter.caches import keep_in_place
from attn_rewriter.context_parallel import ring
from attn_rewriter.device import Device
from attn_rewriter.errors import RewriteError
from attn_rewriter.handed_on import handed_on
from attn_rewriter.options import Options
from attn_rewriter.pipeline import Settings, log, rewrite
from attn_rewriter.report import Report


class Backend:
    """A backend with its options, and a memory of what it rewrote.

    The rewritten graph holds operations of PyTorch, so that the caches of AOTAutograd and Inductor work as ever: they
    are keyed by the graph, and another option or version that rewrites differently makes another graph. (Functions of
    this package in it, as for FlexAttention, keep AOTAutograd from caching it; they are gone when Inductor sees it.
    flash-attention's packages are called by an operator, `kernels/flash.py`.)
    """

    def __init__(self, options: Options | None = None, *, device: Device | None = None, dry: bool = False) -> None:
        self.options = options or Options()
        inductor = self.options.compiler == "inductor"
        autotune = self.options.autotune or (self.options.mode or "").startswith("max-autotune")
        self.settings = Settings(self.options.kernel, device, self.options.strict, dry, inductor, autotune)
        self._compile = _compiler(self.options)
        self._reports: list[Report] = []

    @property
    def report(self) -> Report:
        """All sites of the graphs compiled so far."""
        return Report.joined(self._reports)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        if ring() is not None:
            # Where Dynamo gives up, after too many compilations or an error, it runs the model as it is: here wrongly.
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            torch._dynamo.config.suppress_errors = False
        with Buffers(gm, example_inputs) as buffers:
            masks = self._handed_on(gm)
            compiled = self._rewritten(gm, example_inputs, **kwargs)
        compiled = noting(masks, compiled) if masks else compiled
        if masks or self._reports[-1].n_sites:
            # Traced once more, so that Dynamo's own guards watch over whatever its compilation takes for granted.
            compiled = buffers.guarded(
                compiled,
                lambda original: torch.compile(original, backend=self),
                lambda original: torch.compile(original, backend=self._rewritten),
            )
        return compiled

    def _handed_on(self, gm: GraphModule) -> dict[int, Any]:
        try:
            return handed_on(gm)
        except Exception as error:
            if self.settings.strict:
                raise RewriteError(f"could not read the masks that a graph hands on: {error}") from error
            log.debug("internal error while masks were read", exc_info=error)
            return {}

    def _rewritten(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        if self._records:
            keep_in_place(gm)
        self._reports.append(rewrite(gm, self.settings))
        return self._compile(gm, example_inputs, **kwargs)

    @property
    def _records(self) -> bool:
        """Whether the compiler makes CUDA graphs."""
        config = getattr(self._compile, "config", {})
        return self.settings.inductor and config.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`."""
        if hasattr(self._compile, "reset"):
            self._compile.reset()


def noting(masks: Mapping[int, Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A call that says of the masks among its outputs what they hold."""

    def call(*args: Any) -> Any:
        outputs = compiled(*args)
        for i, held in masks.items():
            note(outputs[i], held)
        return outputs

    return call


def _compiler(options: Options) -> Callable[..., Any]:
    if callable(options.compiler):
        return options.compiler
    if options.compiler == "inductor":
        # What torch.compile itself makes of its mode and options.
        return torch._TorchCompileInductorWrapper(options.mode, dict(options.compiler_options), None)
    given: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        given["mode"] = options.mode
    if options.compiler_options:
        given["options"] = dict(options.compiler_options)
    return functools.partial(torch._dynamo.lookup_backend(options.compiler), **given)


def attn_rewriter(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="attn_rewriter", mode=…, options=…)` calls, found through its entry point."""
    return Backend(Options.of(options, mode))(gm, example_inputs)
