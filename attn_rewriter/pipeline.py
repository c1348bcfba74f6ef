"""find → describe → choose → emit, over a graph and the bodies that it calls."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attn_rewriter.autotune import times
from attn_rewriter.choose import Request, choose, requested
from attn_rewriter.context_parallel import ring
from attn_rewriter.describe import describe
from attn_rewriter.device import Device
from attn_rewriter.distribute import distribute
from attn_rewriter.emit import emit
from attn_rewriter.errors import KernelUnavailable, Refusal, RewriteError
from attn_rewriter.find import Site, find
from attn_rewriter.graph import Facts, erase_unused, module_path, source, tensor
from attn_rewriter.lower import lower, obstacle
from attn_rewriter.report import Report, SiteReport
from attn_rewriter.spec import AttentionSpec
from attn_rewriter.splice import share

log = logging.getLogger("attn_rewriter")


@dataclass(frozen=True)
class Settings:
    """What the pipeline is told: the kernels to choose from, the device to choose for (None: the tensors' own),
    whether something unexpected raises, whether to choose only and replace nothing, whether Inductor will compile the
    graph, and whether to choose by timing the kernels here."""

    kernel: Request = "auto"
    device: Device | None = None
    strict: bool = False
    dry: bool = False
    inductor: bool = True
    autotune: bool = False


def rewrite(gm: GraphModule, settings: Settings) -> Report:
    """Rewrite every site of a graph in place, and report on each."""
    started = time.perf_counter()
    sites: list[SiteReport] = []
    random = count()
    for facts in _graphs(gm):
        sites += _rewrite(facts, settings, random)
        share(facts)
        owner = facts.graph.owning_module
        assert owner is not None
        owner.recompile()
    for site in sites:
        log.info("%s", site)
    return Report(tuple(sites), rewrite_seconds=time.perf_counter() - started)


def _graphs(gm: GraphModule) -> Iterator[Facts]:
    """The graph, then the bodies that it calls, each with its multi-head attention calls opened and without what
    nobody uses."""
    queue = [Facts(gm.graph, dict(gm.named_children()))]
    while queue:
        facts = queue.pop()
        opened = lower(facts)
        if erase_unused(facts.graph) or opened:
            facts = replace(facts)
        if distribute(facts):
            facts = replace(facts)
        queue += facts.bodies()
        yield facts


def _rewrite(facts: Facts, settings: Settings, random: Iterator[int]) -> Iterator[SiteReport]:
    for site in [*find(facts)]:
        unread = SiteReport(module_path(site.anchor), source(site.anchor))
        try:
            report = _rewrite_site(site, facts, settings, random, unread)
        except KernelUnavailable as error:
            raise KernelUnavailable(f"{unread.place}: {error}") from None
        except Exception as error:
            message = f"{unread.place}: {type(error).__name__}: {error}"
            if settings.strict:
                raise RewriteError(f"could not rewrite the attention at {message}") from error
            warnings.warn(f"attn_rewriter leaves this attention as it is, after an error at {message}", stacklevel=2)
            log.debug("internal error at %s", message, exc_info=error)
            report = replace(unread, refusals=(Refusal("internal", f"{type(error).__name__}: {error}", site.anchor),))
        if report.kernel is None and not settings.dry and ring() is not None and not _is_wrapped(site):
            raise RewriteError(
                "within context_parallel(), this attention would see the keys of its own process alone, and it can't "
                f"be rewritten: {report}"
            )
        yield report


def _is_wrapped(site: Site) -> bool:
    """Whether a site's tensors are of a class that says itself what operations do, as `DTensor` and `NestedTensor`."""
    return is_traceable_wrapper_subclass(tensor(site.output))


def _rewrite_site(
    site: Site, facts: Facts, settings: Settings, random: Iterator[int], unread: SiteReport
) -> SiteReport:
    if site.kind == "mha":
        reason = obstacle(site.anchor, site.call) or "it could not be opened"
        return replace(unread, refusals=(Refusal("lower", reason, site.anchor),))
    if _is_wrapped(site):
        reason = f"its tensors are {type(tensor(site.output)).__name__}s, which fused kernels don't take"
        return replace(unread, refusals=(Refusal("find", reason, site.anchor),))
    found = site.refusal or describe(site, facts)
    if isinstance(found, Refusal):
        return replace(unread, refusals=(found,))
    output = tensor(site.output)
    assert output is not None
    device = settings.device or Device.of(output.device)
    tuned = settings.autotune and not settings.dry and requested(settings.kernel) is None and ring() is None
    timed = times(found, device, inductor=settings.inductor) if tuned else {}
    choice = choose(
        found.spec, found.shapes, device, settings.kernel, inductor=settings.inductor, preferred=tuple(timed)
    )
    read = replace(unread, spec=found.spec, shapes=found.shapes, times=tuple(timed.items()))
    if isinstance(choice, Refusal):
        return replace(read, refusals=(choice,))
    if found.spec.dropout_p:
        found = replace(found, spec=_of_its_own(found.spec, next(random)))
    emitted = emit(site, found, choice.kernel, device, facts) if not settings.dry else None
    if isinstance(emitted, Refusal):
        return replace(read, refusals=(*choice.refused, emitted))
    return replace(read, kernel=choice.kernel.name, refusals=choice.refused)


def _of_its_own(spec: AttentionSpec, n: int) -> AttentionSpec:
    """The same with a probability that is less by some units in the last place. AOTAutograd merges equal calls of
    anything but PyTorch's plain random operators, so that two attentions with equal inputs would drop the same weights
    (`fx_graph_cse` in `torch/_functorch/compile_utils.py`, 2.11 to 2.13)."""
    return replace(spec, dropout_p=spec.dropout_p - n * math.ulp(spec.dropout_p))
