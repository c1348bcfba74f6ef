"""find → describe → choose → emit, over a graph and the bodies that it calls."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

from torch.fx import GraphModule

from attn_rewriter.autotune import times
from attn_rewriter.choose import Request, choose, requested
from attn_rewriter.context_parallel import ring
from attn_rewriter.describe import Description, describe
from attn_rewriter.device import Device
from attn_rewriter.distribute import distribute
from attn_rewriter.emit import emit, narrowed
from attn_rewriter.errors import KernelUnavailable, Refusal, RewriteError
from attn_rewriter.find import Site, find
from attn_rewriter.forward_ad import forward_gradients
from attn_rewriter.graph import Facts, erase_unused, module_path, source, tensor
from attn_rewriter.inline import open_checkpoints
from attn_rewriter.kernels import Kernel
from attn_rewriter.lower import lower, obstacle
from attn_rewriter.report import Report
from attn_rewriter.second_opinion import Opinions
from attn_rewriter.sites import Check, SiteReport
from attn_rewriter.spec import AttentionSpec
from attn_rewriter.splice import share
from attn_rewriter.torch_private import is_traceable_wrapper_subclass
from attn_rewriter.withhold import withhold

log = logging.getLogger("attn_rewriter")
Result = TypeVar("Result")
Checks = Mapping[int, Check]
"""What was found of the sites of a graph, by their number."""


@dataclass(frozen=True)
class Settings:
    """What the pipeline is told: the kernels to choose from, the device to choose for (None: the tensors' own),
    whether something unexpected raises, whether to choose only and replace nothing, whether Inductor will compile the
    graph, whether it may run without AOTAutograd, where gradients can be differentiated `twice`, whether to choose by
    timing the kernels here, and the modules whose weights are wanted where a model returns them (None: all)."""

    kernel: Request = "auto"
    device: Device | None = None
    strict: bool = False
    dry: bool = False
    inductor: bool = True
    twice: bool = False
    autotune: bool = False
    keep_weights: tuple[str, ...] | None = None


def rewrite(
    gm: GraphModule, settings: Settings, checks: Checks | None = None, opinions: Opinions | None = None
) -> Report:
    """Rewrite every site of a graph in place, and report on each; but not those, by their number, whose check says that
    they had better stay, nor those that `opinions`, where they are asked for, are against."""
    started = time.perf_counter()
    sites: list[SiteReport] = []
    random = count()
    for facts in graphs(gm, settings):
        for site in [*find(facts)]:
            found = plan(site, facts, settings, (checks or {}).get(len(sites)))
            if isinstance(found, Plan) and opinions is not None:
                found = _confirmed(found, facts, settings, opinions)
            report = _carried_out(found, facts, settings, random) if isinstance(found, Plan) else found
            if _must_not_stay(report, site, settings):
                raise RewriteError(
                    "within context_parallel(), this attention would see the keys of its own process alone, and it "
                    f"can't be rewritten: {report}"
                )
            sites.append(_without_graph(report))
        share(facts)
        owner = facts.graph.owning_module
        assert owner is not None
        owner.recompile()
    for report in sites:
        log.info("%s", report)
    return Report(tuple(sites), rewrite_seconds=time.perf_counter() - started)


def graphs(gm: GraphModule, settings: Settings) -> Iterator[Facts]:
    """The graph, then the bodies that it calls, each with its multi-head attention calls opened and without what
    nobody uses, or wants; but for those in which nothing is rewritten."""
    queue = [Facts(gm.graph, dict(gm.named_children()))]
    while queue:
        facts = queue.pop()
        if facts.obstacle:
            queue += facts.bodies()
            yield facts
            continue
        while open_checkpoints(facts):  # which may have some in them
            facts = replace(facts)
        opened = lower(facts)
        withheld = facts.outer is None and settings.keep_weights is not None and withhold(facts, settings.keep_weights)
        if erase_unused(facts.graph) or opened or withheld:
            facts = replace(facts)
        if distribute(facts):
            facts = replace(facts)
        queue += facts.bodies()
        yield facts


def _without_graph(site: SiteReport) -> SiteReport:
    """A report outlives the graph, and is copied and pickled with a compiled model."""
    return replace(site, refusals=tuple(replace(refusal, node=None) for refusal in site.refusals))


def _must_not_stay(report: SiteReport, site: Site, settings: Settings) -> bool:
    """Whether the model's own code would be wrong."""
    return report.kernel is None and not settings.dry and ring() is not None and not _is_wrapped(site)


def _is_wrapped(site: Site) -> bool:
    """Whether a site's tensors are of a class that says itself what operations do, as `DTensor` and `NestedTensor`."""
    return is_traceable_wrapper_subclass(tensor(site.output))


@dataclass(frozen=True)
class Plan:
    """What will be done at a site, and what is reported of it."""

    site: Site
    found: Description
    kernel: Kernel
    device: Device
    report: SiteReport


def plan(site: Site, facts: Facts, settings: Settings, check: Check | None = None) -> Plan | SiteReport:
    """What to do at a site; a report where it stays as it is.

    Raises `KernelUnavailable` where a kernel was asked for by name and can't compute it, `RewriteError` for what is
    unexpected where the settings are strict."""
    unread = SiteReport(module_path(site.anchor), source(site.anchor))
    return _guarded(unread, site, settings, lambda: _planned(site, facts, settings, check, unread))


def _confirmed(plan: Plan, facts: Facts, settings: Settings, opinions: Opinions) -> Plan | SiteReport:
    """A plan, unless the model's own operations say that the site was misread: then a report of that."""
    said = opinions.on(plan.found, plan.site.output, facts, plan.kernel, plan.device)
    if not said:
        return plan
    place = plan.report.place
    if settings.strict:
        raise RewriteError(f"the attention at {place} was misread: {said}")
    warnings.warn(
        f"attn_rewriter leaves the attention at {place} as it is, because it misread it: {said}. Please report this, "
        "with the code of this line and of its mask",
        stacklevel=2,
    )
    refused = Refusal("verify", f"misread: {said}", plan.site.anchor)
    return replace(plan.report, kernel=None, refusals=(*plan.report.refusals, refused))


def _carried_out(plan: Plan, facts: Facts, settings: Settings, random: Iterator[int]) -> SiteReport:
    return _guarded(plan.report, plan.site, settings, lambda: _emitted(plan, facts, settings, random))


def _guarded(report: SiteReport, site: Site, settings: Settings, stage: Callable[[], Result]) -> Result | SiteReport:
    """What a stage returns, or a report of what went wrong."""
    try:
        return stage()
    except KernelUnavailable as error:
        raise KernelUnavailable(f"{report.place}: {error}") from None
    except Exception as error:
        message = f"{report.place}: {type(error).__name__}: {error}"
        if settings.strict:
            raise RewriteError(f"could not rewrite the attention at {message}") from error
        warnings.warn(f"attn_rewriter leaves this attention as it is, after an error at {message}", stacklevel=2)
        log.debug("internal error at %s", message, exc_info=error)
        unread = SiteReport(report.module, report.source)
        return replace(unread, refusals=(Refusal("internal", f"{type(error).__name__}: {error}", site.anchor),))


def _planned(
    site: Site, facts: Facts, settings: Settings, check: Check | None, unread: SiteReport
) -> Plan | SiteReport:
    if forward_gradients():
        reason = "a level of forward-mode AD is alive, which fused kernels don't have"
        return replace(unread, refusals=(Refusal("find", reason, site.anchor),))
    if facts.obstacle:
        return replace(unread, refusals=(Refusal("find", facts.obstacle, site.anchor),))
    if site.kind == "mha":
        reason = obstacle(site.anchor, site.call) or "it could not be opened"
        return replace(unread, refusals=(Refusal("lower", reason, site.anchor),))
    if _is_wrapped(site):
        reason = f"its tensors are {type(tensor(site.output)).__name__}s, which fused kernels don't take"
        return replace(unread, refusals=(Refusal("find", reason, site.anchor),))
    found = site.refusal or describe(site, facts)
    if isinstance(found, Refusal):
        return replace(unread, refusals=(found,))
    if refused := narrowed(site, found, facts):
        return replace(unread, spec=found.spec, shapes=found.shapes, refusals=(refused,))
    output = tensor(site.output)
    assert output is not None
    device = settings.device or Device.of(output.device)
    automatic = requested(settings.kernel) is None
    tuned = settings.autotune and not settings.dry and automatic and ring() is None
    timed = times(found, device, inductor=settings.inductor) if tuned else {}
    choice = choose(
        found.spec, found.shapes, device, settings.kernel, inductor=settings.inductor, preferred=tuple(timed)
    )
    read = replace(unread, spec=found.spec, shapes=found.shapes, times=tuple(timed.items()), device=device, check=check)
    if isinstance(choice, Refusal):
        return replace(read, refusals=(choice,))
    if check is not None and check.verdict:
        refused = Refusal("verify", f"{choice.kernel.name} {check.verdict}", site.anchor)
        if settings.strict:
            raise RuntimeError(refused.reason)
        warnings.warn(f"attn_rewriter leaves the attention at {read.place} as it is: {refused.reason}", stacklevel=2)
        return replace(read, refusals=(*choice.refused, refused))
    return Plan(site, found, choice.kernel, device, replace(read, kernel=choice.kernel.name, refusals=choice.refused))


def _emitted(plan: Plan, facts: Facts, settings: Settings, random: Iterator[int]) -> SiteReport:
    found, report = plan.found, plan.report
    if found.spec.dropout_p:
        found = replace(found, spec=_of_its_own(found.spec, next(random)))
    falls_back = not settings.strict and requested(settings.kernel) is None
    kernel = plan.kernel.with_fallback() if falls_back else plan.kernel
    emitted = emit(plan.site, found, kernel, plan.device, facts, settings.twice) if not settings.dry else None
    if isinstance(emitted, Refusal):
        return replace(report, kernel=None, refusals=(*report.refusals, emitted))
    return report


def _of_its_own(spec: AttentionSpec, n: int) -> AttentionSpec:
    """The same with a probability that is less by some units in the last place. AOTAutograd merges equal calls of
    anything but PyTorch's plain random operators, so that two attentions with equal inputs would drop the same weights
    (`fx_graph_cse` in `torch/_functorch/compile_utils.py`, 2.11 to 2.13)."""
    return replace(spec, dropout_p=spec.dropout_p - n * math.ulp(spec.dropout_p))
