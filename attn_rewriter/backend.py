"""The `torch.compile` backend: rewrite Dynamo's graph, then hand it to a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from attn_rewriter.buffers import Buffers, forget
from attn_rewriter.device import Device
from attn_rewriter.options import Options
from attn_rewriter.pipeline import Checks, Settings, rewrite
from attn_rewriter.report import Report
from attn_rewriter.sites import Check
from attn_rewriter.verify import duplicate, verify


class Backend:
    """A backend with its options, and a memory of what it rewrote.

    The rewritten graph holds operations of PyTorch, so that the caches of AOTAutograd and Inductor work as ever: they
    are keyed by the graph, and another option or version that rewrites differently makes another graph. (Functions of
    this package in it, as for FlexAttention, keep AOTAutograd from caching it; they are gone when Inductor sees it.
    flash-attention's packages are called by an operator, `kernels/flash.py`.)

    Where it only `looks`, for `explain`, graphs are rewritten as for their compiler, but run as they were. A `device`
    imagines another one; then, `dry`, kernels are chosen, and no graph is rewritten.
    """

    def __init__(
        self,
        options: Options | None = None,
        *,
        device: Device | None = None,
        dry: bool = False,
        looks: bool = False,
    ) -> None:
        self.options = options or Options()
        inductor = self.options.compiler == "inductor"
        autotune = self.options.autotune or (self.options.mode or "").startswith("max-autotune")
        keep_weights = self.options.keep_weights
        self.settings = Settings(
            self.options.kernel,
            device,
            self.options.strict,
            dry,
            inductor,
            autotune,
            None if keep_weights is None else tuple(keep_weights),
        )
        self._looks = looks
        self._compile = _compiler(self.options)
        self._reports: list[Report] = []

    @property
    def report(self) -> Report:
        """All sites of the graphs compiled so far."""
        return Report.joined(self._reports)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return self._guarded(gm, example_inputs, self._settings_for(gm), **kwargs)

    def _settings_for(self, gm: GraphModule) -> Settings:
        """After a graph break, what a graph returns is what the model goes on with: all weights are wanted."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        is_whole = reason is None or not reason.graph_break
        return self.settings if is_whole else replace(self.settings, keep_weights=None)

    def _guarded(
        self, gm: GraphModule, example_inputs: Sequence[Any], settings: Settings, **kwargs: Any
    ) -> Callable[..., Any]:
        always = self.options.verify == "always"
        with Buffers(gm, example_inputs) as buffers:
            original = duplicate(gm) if self._looks or always else gm
            compiled = self._rewritten(gm, example_inputs, settings, **kwargs)
        if self._looks:
            return original.forward
        compiled = self._watched(compiled, original, settings) if always else compiled
        # Traced once more, so that Dynamo's own guards watch over whatever its compilation takes for granted.
        again = functools.partial(self._guarded, settings=settings)
        return buffers.guarded(compiled, lambda original: torch.compile(original, backend=again))

    def _rewritten(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        settings: Settings,
        checks: Checks | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        if checks is None and self.options.verify:
            checks = verify(gm, example_inputs, settings)
        self._reports.append(rewrite(gm, settings, checks))
        return gm.forward if self._looks else self._compile(gm, example_inputs, **kwargs)

    def _watched(self, compiled: Callable[..., Any], original: GraphModule, settings: Settings) -> Callable[..., Any]:
        """A compiled graph whose sites are checked at each call after the first."""
        first = True
        bad: dict[int, Check] = {}

        def call(*args: Any) -> Any:
            nonlocal compiled, first
            checks = {} if first else verify(original, args, settings, without=bad)
            first = False
            if failed := {number: check for number, check in checks.items() if check.verdict}:
                bad.update(failed)
                forget(original)  # no buffer is read by value where it is traced again
                again = functools.partial(self._rewritten, settings=settings, checks=dict(bad))
                compiled = torch.compile(duplicate(original), backend=again)
            return compiled(*args)

        return call

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`."""
        if hasattr(self._compile, "reset"):
            self._compile.reset()


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
