"""The `torch.compile` backend: rewrite Dynamo's graph, then hand it to a compiler."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule

from attn_rewriter.buffers import Buffers, copied, forget, kept, note
from attn_rewriter.choose import requested
from attn_rewriter.compilers import WITHOUT_AOT, compiled_again, compiler_of, compiling
from attn_rewriter.context_parallel import never_give_up, ring
from attn_rewriter.device import Device
from attn_rewriter.device_map import NAME, watch
from attn_rewriter.errors import AttnRewriterError, RewriteError, in_a_line, is_out_of_memory
from attn_rewriter.graph import graph_break
from attn_rewriter.handed_on import handed_on
from attn_rewriter.options import Options
from attn_rewriter.packages import warn_if_untested
from attn_rewriter.pipeline import Checks, Settings, rewrite
from attn_rewriter.report import Report
from attn_rewriter.second_opinion import Opinions
from attn_rewriter.sites import Check, summary
from attn_rewriter.torch_private import ShortenTraceback, TorchDynamoException
from attn_rewriter.verify import verify
from attn_rewriter.withhold import returns_to_the_caller

log = logging.getLogger("attn_rewriter")


class Backend:
    """A backend with its options, and a memory of what it rewrote.

    The rewritten graph holds operations of PyTorch, so that the caches of AOTAutograd and Inductor work as ever: they
    are keyed by the graph, and another option or version that rewrites differently makes another graph. (Functions of
    this package in it, as for FlexAttention, keep AOTAutograd from caching it; they are gone when Inductor sees it.
    flash-attention's packages are called by an operator, `kernels/flash.py`.)

    Where it only `looks`, for `explain`, graphs are rewritten as for their compiler, but run as they were. A `device`
    imagines another one; then, `dry`, kernels are chosen, and no graph is rewritten.
    """

    __name__ = NAME  # see `compilers.Again`

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
        warn_if_untested()
        autotune = self.options.autotune or (self.options.mode or "").startswith("max-autotune")
        keep_weights = self.options.keep_weights
        self.settings = Settings(
            kernel=self.options.kernel,
            device=device,
            strict=self.options.strict,
            dry=dry,
            inductor=inductor,
            twice=callable(self.options.compiler) or self.options.compiler in WITHOUT_AOT,
            autotune=autotune,
            keep_weights=None if keep_weights is None else tuple(keep_weights),
        )
        self._looks = looks
        self._compile = compiler_of(self.options)
        self._reports: list[Report] = []

    @property
    def report(self) -> Report:
        """All sites of the graphs compiled so far."""
        return Report.joined(self._reports)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        return self._guarded(gm, example_inputs, self._settings_for(gm), **kwargs)

    def _settings_for(self, gm: GraphModule) -> Settings:
        """All weights are wanted but where they leave through the model's output: what a part of its graph returns,
        or a function that Dynamo compiles by itself, is what the model goes on with."""
        is_whole = not graph_break(gm.graph) and returns_to_the_caller()
        return self.settings if is_whole else replace(self.settings, keep_weights=None)

    def _guarded(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        settings: Settings,
        weakly: bool = False,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        """A graph whose inputs are read by value where that is possible, and checked at each call. Where they hold
        something else, they are read `weakly`, and then not any more."""
        never_give_up()
        with Buffers(gm, example_inputs, weakly) as buffers:
            masks = self._handed_on(gm)
            compiled = self._unguarded(gm, example_inputs, settings, buffers.original, **kwargs)
        if self._looks:
            return buffers.original.forward
        compiled = noting(masks, compiled) if masks else compiled
        if masks or self._reports[-1].n_sites:
            # Traced once more, so that Dynamo's own guards watch over whatever its compilation takes for granted.
            def again(way: Callable[..., Any], **options: Any) -> Callable[..., Any]:
                return functools.partial(compiled_again, backend=functools.partial(way, settings=settings, **options))

            otherwise = again(self._unguarded) if weakly else again(self._guarded, weakly=True)
            compiled = buffers.guarded(compiled, again(self._guarded), otherwise)
        return compiled

    def _unguarded(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        settings: Settings,
        original: GraphModule | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        original = original or kept(gm)
        if self.options.verify != "always":
            return self._rewritten(gm, example_inputs, settings, original, **kwargs)
        watched = copied(gm)  # while its buffers are known
        return self._watched(self._rewritten(gm, example_inputs, settings, original, **kwargs), watched, settings)

    def _handed_on(self, gm: GraphModule) -> dict[int, Any]:
        try:
            return handed_on(gm)
        except Exception as error:
            if self.settings.strict:
                raise RewriteError(f"could not read the masks that a graph hands on: {error}") from error
            log.debug("internal error while masks were read", exc_info=error)
            return {}

    def _rewritten(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        settings: Settings,
        original: GraphModule | None = None,
        checks: Checks | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        """`original` is a copy of the graph, for where its compiler fails."""
        original = original or kept(gm)
        if checks is None and self.options.verify in (True, "always") and ring() is None:  # whose keys are not here
            checks = verify(gm, example_inputs, settings)
        opinions = Opinions(example_inputs) if self.options.verify and ring() is None and not settings.dry else None
        falls_back = not (settings.strict or self._looks or requested(settings.kernel) or ring())
        # What is tried on fake tensors is nothing that a checkpoint around the compiled function should count.
        try:
            with saved_tensors_hooks(lambda x: x, lambda x: x):
                report = rewrite(gm, settings, checks, opinions)
        except AttnRewriterError:
            raise
        except Exception as error:
            said = in_a_line(error)
            if settings.strict or ring():
                raise RewriteError(f"could not rewrite a graph: {said}") from error
            log.debug("internal error", exc_info=error)
            warnings.warn(f"attn_rewriter leaves a graph as it is, after an error: {said}", stacklevel=2)
            self._reports.append(Report(()))
            return original.forward if self._looks else compiled_again(copied(original), self._compile)
        self._reports.append(report)
        if self._looks:
            return gm.forward
        try:
            with compiling(self.options.compiler, summary(report.sites) if report.sites else ""):
                return self._compile(gm, example_inputs, **kwargs)
        except Exception as error:
            if not falls_back or not report.n_fused or not _is_a_failure(error):
                raise
            said = in_a_line(error)
            log.debug("%s raised for a rewritten graph", self.options.compiler, exc_info=error)
        self._reports[-1] = report.eager(f"{self.options.compiler} raised: {said}")
        warnings.warn(
            f"attn_rewriter leaves a graph with {report.n_fused} rewritten sites as it was, the first of them at "
            f"{next(site.place for site in report.sites if site.kernel)}, after an error of its compiler: {said}",
            stacklevel=2,
        )
        return compiled_again(copied(original), self._compile)  # traced once more: what failed may have left traces

    def _watched(self, compiled: Callable[..., Any], original: GraphModule, settings: Settings) -> Callable[..., Any]:
        """A compiled graph whose sites are checked at each call after the first."""
        first = True
        bad: dict[int, Check] = {}

        def call(*args: Any) -> Any:
            nonlocal compiled, first
            checks = {} if first or ring() else verify(original, args, settings, without=bad)
            first = False
            if failed := {number: check for number, check in checks.items() if check.verdict}:
                bad.update(failed)
                forget(original)  # no buffer is read by value where it is traced again
                again = functools.partial(self._rewritten, settings=settings, checks=dict(bad))
                compiled = compiled_again(copied(original), again)
            return compiled(*args)

        return call

    def reset(self) -> None:
        """Called by `torch._dynamo.reset()`."""
        self._compile.reset()


def _is_a_failure(error: Exception) -> bool:
    """Whether another graph may do better: not for want of memory, nor where Dynamo is told to go another way."""
    told = isinstance(error, TorchDynamoException) and not isinstance(error, ShortenTraceback)
    return not told and not is_out_of_memory(error)


def noting(masks: Mapping[int, Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A call that says of the masks among its outputs what they hold."""

    def call(*args: Any) -> Any:
        outputs = compiled(*args)
        for i, held in masks.items():
            note(outputs[i], held)
        return outputs

    return call


def _by_name(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="attn_rewriter", mode=…, options=…)` calls, found through its entry point."""
    return Backend(Options.of(options, mode))(gm, example_inputs)


_by_name.__name__ = NAME


def __getattr__(name: str) -> Any:
    """Dynamo loads a backend from its entry point when someone first compiles with it, by `backend="attn_rewriter"`."""
    if name == NAME:
        watch()
        return _by_name
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
