"""One architecture, in this process: built, run in eager, in float64 and rewritten, its attention counted."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
import torch._inductor.compile_fx
from torch.fx import GraphModule

import attn_rewriter
from attn_rewriter import Backend, Options
from attn_rewriter.choose import Choice, choose
from attn_rewriter.contract import error, measured, worst
from attn_rewriter.device import Device
from attn_rewriter.sites import SiteReport
from tests.models import NothingNarrowed
from tests.running import gradients, run_as_is
from tests.zoo.configs import model_class
from tests.zoo.models import Inputs, Subject, cast, configs_of, in_type, subjects
from tests.zoo.sites import Counted, count

DEVICES = ("sm_80", "sm_90", "sm_100")
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Tensors = dict[str, torch.Tensor]
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------
# Compiling


class Watched:
    """A backend that counts the attention of every graph before it hands it on."""

    def __init__(self, compiler: Callable[..., Any]) -> None:
        self.compiler = compiler
        self.graphs: list[list[Counted]] = []
        self.seconds = 0.0

    def __call__(self, gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append([*count(gm, split=True)])
        started = time.perf_counter()
        compiled = self.compiler(gm, example_inputs)
        self.seconds += time.perf_counter() - started
        return compiled

    @property
    def counted(self) -> list[Counted]:
        return [site for graph in self.graphs for site in graph]


class Enough(Exception):
    """Inductor has run the passes that were to be looked at."""


def through_inductors_patterns(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """A backend that lets Inductor's own pattern matcher count what it would replace, and then runs the graph as it
    is: everything of Inductor up to the first graph that it would generate code for."""

    def enough(*args: Any, **kwargs: Any) -> Any:
        raise Enough

    try:
        with contextlib.suppress(Enough), torch._inductor.config.patch(force_disable_caches=True):
            torch._inductor.compile_fx.compile_fx(copy.deepcopy(gm), example_inputs, inner_compile=enough)
    except Exception:
        torch._dynamo.utils.counters["zoo"]["inductor_failed"] += 1
    return gm.forward


def warm_up() -> None:
    """Inductor's patterns are made once in a process and its children."""
    torch.compile(lambda x: x.softmax(-1), backend=through_inductors_patterns)(torch.randn(2, 3))
    reset()


def reset() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def breaks() -> tuple[int, int]:
    """The numbers of graphs and of graph breaks since the last reset."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


# ---------------------------------------------------------------------------------------------------------------
# Running


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def outputs(call: Callable[..., Any], given: Inputs) -> Tensors:
    """The floating-point tensors that a call returns, by where they are, without what belongs to padding."""
    seed()
    with torch.no_grad():
        found = dict(_tensors(call(**given), ""))
    mask = given.get("attention_mask")
    if mask is None:
        return found
    return {k: x[mask.bool()] if x.shape[:2] == mask.shape else x for k, x in found.items()}


def _tensors(value: Any, name: str, detach: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value.detach() if detach else value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}".lstrip("."), detach)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _tensors(inner, f"{name}[{i}]", detach)


def truth(subject: Subject, given: Inputs) -> tuple[Tensors, str]:
    """The outputs in float64, and a remark where that is not possible and they are those of float32."""
    try:
        with NothingNarrowed():
            return outputs(exactly(subject.model), cast(given, torch.float64)), ""
    except Exception as failure:
        exact = {k: x.double() for k, x in outputs(subject.model, given).items()}
        return exact, f"no float64: {said(failure)}"


def exactly(model: Any) -> Any:
    """A copy in float64."""
    model = in_type(model, torch.float64)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # grouped products know no float64
    return model


def compiled(model: Any, backend: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward under Dynamo, from nothing compiled before."""
    reset()

    def forward(**given: Any) -> Any:
        return model(**given)

    return torch.compile(forward, backend=backend)


def rewriter() -> Backend:
    return Backend(Options(compiler=run_as_is, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Judging


@dataclass(frozen=True)
class Verdict:
    """ "right"; "WRONG"; "unstable", where eager itself is moved as much by a change in its weights' last bit;
    "unspecified", where eager itself has no finite answer; "CRASH"."""

    name: str
    detail: str = ""

    def to_dict(self) -> Row:
        return {"verdict": self.name, **({"detail": self.detail} if self.detail else {})}


def judge(mine: Tensors, eager: Tensors, exact: Tensors, moved: Callable[[], Tensors]) -> Verdict:
    """By the contract of `tests/accuracy.py`, tensor by tensor. `moved` is eager with its weights changed in their
    last bit, asked for only where the contract is not kept."""
    if mine.keys() != eager.keys():
        return Verdict("WRONG", f"other outputs: {sorted(mine.keys() ^ eager.keys())}")
    failed: list[str] = []
    for name, x in mine.items():
        if x.shape != eager[name].shape or x.dtype != eager[name].dtype:
            return Verdict("WRONG", f"{name} is {x.dtype} {[*x.shape]}, not {eager[name].dtype} {[*eager[name].shape]}")
        if name not in exact or exact[name].shape != x.shape:
            continue
        finite = eager[name].isfinite() & exact[name].isfinite()
        if not finite.all() and (eager[name].isnan() | exact[name].isnan()).all():
            continue
        if not (x.isfinite() | ~finite).all():
            return Verdict("WRONG", f"{name} is not finite")
        # As one row: the budget is that of a whole output.
        if finite.any() and not worst(measured(x[finite], eager[name][finite], exact[name][finite])).holds:
            failed.append(name)
    if not failed:
        finite = [n for n, x in eager.items() if x.isfinite().any()]
        return Verdict("right" if finite else "unspecified", "" if finite else "eager's outputs are not finite")
    off = {n: (error(mine[n], exact[n]), error(eager[n], exact[n])) for n in failed}
    words = "; ".join(f"{n} is off by {a:.2g}, eager by {b:.2g}" for n, (a, b) in [*off.items()][:3])
    other = moved()
    if all(a <= 3 * max(b, error(other[n], exact[n])) for n, (a, b) in off.items() if n in other):
        return Verdict(
            "unstable",
            f"{words}; eager with its weights moved by one rounding unit by "
            + ", ".join(f"{error(other[n], exact[n]):.2g}" for n in [*off][:3]),
        )
    return Verdict("WRONG", words)


def nudged(model: Any, dtype: torch.dtype) -> Any:
    """A copy whose weights are changed by a rounding unit of a type."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.mul_(1 + noise * torch.finfo(dtype).eps)
    return model


def said(failure: BaseException) -> str:
    """An exception in one line, with the last line of code outside of torch that raised it."""
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if "/torch/" not in f.filename]
    where = f" ({relative(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    words = relative(" ".join(str(failure).split()))
    return f"{type(failure).__name__}: {words[:200]}{where}"


def relative(text: str) -> str:
    """Paths as they are below the packages, not on this machine."""
    return re.sub(r"[^\s\"'(]*/(?:site-packages/|(?=tests/|attn_rewriter/))", "", text)


# ---------------------------------------------------------------------------------------------------------------
# One architecture


def check(name: str, base: bool = False, train: bool = False, quick: bool = False) -> Row:
    """Everything that is known of an architecture, as plain values; `quick`: only what is read, in float32."""
    started = time.perf_counter()
    row: Row = {"name": name, "torch": torch.__version__}
    try:
        made, note = subjects(name, base)
    except Exception as failure:
        return row | {"not_built": said(failure), "seconds": round(time.perf_counter() - started, 1)}
    row |= {"class": model_class(name, base).__name__, "inputs": [*dict.fromkeys(k for s in made for k in s.given)]}
    if note:
        row["note"] = note
    row |= merged([_looked_at(one) if quick else _checked(one) for one in made])
    if train:
        row["training"] = min(map(_trained, made), key=lambda result: _WORST.index(result["verdict"]))
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _trained(made: Subject) -> Row:
    """A training step without dropout, in float32: the verdict on the gradients of all parameters."""
    model = without_dropout(made.model).train()
    given = made.inputs()
    try:
        eager = step(model, model, given)
    except Exception as failure:
        return {"verdict": "not run", "detail": f"eager raises {said(failure)}"}
    try:
        double = exactly(model)
        with NothingNarrowed():
            exact = step(double, double, cast(given, torch.float64))
    except Exception:
        exact = {k: x.double() for k, x in eager.items()}
    backend = rewriter()
    try:
        mine = step(model, compiled(model, backend), given)
    except Exception as failure:
        return {"verdict": "CRASH" if _runs_plain(model, given) else "not compiled", "detail": said(failure)}

    def moved() -> Tensors:
        other = nudged(model, torch.float32)
        return step(other, other, given)

    fused = {"fused": sum(site.kernel is not None for site in backend.report.sites)}
    return judge(mine, eager, exact, moved).to_dict() | fused


def without_dropout(model: Any) -> Any:
    """A copy in which nothing is dropped, whoever holds the rate."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(module).__name__)):
                setattr(module, name, 0.0)
    for config in configs_of(model.config):
        for name, value in vars(config).items():
            if isinstance(value, float) and ("drop" in name or name.endswith("mask_time_prob")):
                setattr(config, name, 0.0)
    return model


def step(model: Any, call: Callable[..., Any], given: Inputs) -> Tensors:
    """A training step's gradients, for all outputs of a call."""
    seed()
    return gradients(model, [x for _, x in _tensors(call(**given), "", detach=False) if x.requires_grad])


def _given(made: Subject, row: Row) -> Iterator[tuple[str, Inputs, Tensors, str]]:
    """Inputs without and with padding: a suffix for their runs' names, the inputs, their truth and a remark on it. Of
    inputs that have no truth, the row says so."""
    for padding in (False, True)[: 1 + made.takes_padding]:
        given = made.inputs(padding)
        try:
            exact, remark = truth(made, given)
        except Exception as failure:
            row["runs"]["padding"] = {"verdict": "not run", "detail": said(failure)}
        else:
            yield ", padding" if padding else "", given, exact, remark


def _looked_at(made: Subject) -> Row:
    """One run in float32, and one with padding."""
    row: Row = {"runs": {}, "sites": [], "adds_breaks": False}
    for padding, given, exact, _ in _given(made, row):
        result, sites = _run(made, given, torch.float32, exact)
        if result.get("graphs", (1, 0))[1]:  # else there is none to add
            row["adds_breaks"] |= result["graphs"] != plainly(made.model, given)
        row["runs"][f"float32{padding}"] = result
        known = [site["source"] for site in row["sites"] if site["computes"] is None]
        sites = [s for s in sites if not padding or (s["computes"] is None and s["source"] not in known)]
        row["sites"] += aggregated(sites)
    return row


def _checked(made: Subject) -> Row:
    """One model, or one part of one."""
    row = _plain(made)
    row["runs"] = {}
    sites: list[Row] = []
    for padding, given, exact, remark in _given(made, row):
        if remark:
            row["truth"] = remark
        for kind, dtype in _TYPES.items():
            run = f"{kind}{padding}"
            row["runs"][run], found = _run(made, given, dtype, exact)
            if run == "float32":
                sites = found
                row["adds_breaks"] = "graphs" in row and row["runs"][run].get("graphs") != row["graphs"]
            elif len(found) == len(sites):
                for site, other in zip(sites, found):
                    site.setdefault("others", {})[run] = other["computes"] or other["why"]
    for site in sites:
        site["module"] = ".".join(filter(None, (made.path, site["module"])))
    return row | {"sites": aggregated(sites)}


_WORST = ("WRONG", "CRASH", "not compiled", "not run", "unstable", "unspecified", "right")


def merged(rows: list[Row]) -> Row:
    """The rows of several parts as one."""
    first, *rest = rows
    for row in rest:
        for run, result in row["runs"].items():
            old = first["runs"].setdefault(run, result)
            first["runs"][run] = min(old, result, key=lambda r: _WORST.index(r["verdict"]))
        first["sites"] += row["sites"]
        first["adds_breaks"] = first.get("adds_breaks", False) or row.get("adds_breaks", False)
        first["inductor"] = first.get("inductor", 0) + row.get("inductor", 0)
        for key in ("truth", "plain_failure", "graphs"):
            if key in row:
                first.setdefault(key, row[key])
    return first


def _plain(made: Subject) -> Row:
    """What plain Dynamo makes of it, and Inductor's own patterns."""
    backend = Watched(through_inductors_patterns)
    remark = {}
    try:
        outputs(compiled(made.model, backend), made.given)
    except Exception as failure:
        if not breaks()[0]:
            return {"plain_failure": said(failure)}
        remark = {"plain_failure": said(failure)}
    return {
        "graphs": breaks(),
        "inductor": torch._dynamo.utils.counters["inductor"]["fuse_attention"],
        **dict(torch._dynamo.utils.counters["zoo"]),
        **remark,
    }


def _run(made: Subject, given: Inputs, dtype: torch.dtype, exact: Tensors) -> tuple[Row, list[Row]]:
    """One run through the rewriter: the verdict, and its sites."""
    model = in_type(made.model, dtype) if dtype != torch.float32 else made.model
    given = cast(given, dtype)
    try:
        eager = outputs(model, given)
    except Exception as failure:
        return {"verdict": "not run", "detail": f"eager raises {said(failure)}"}, []
    backend = rewriter()
    watched = Watched(backend)
    try:
        mine = outputs(compiled(model, watched), given)
    except Exception as failure:
        graphs = breaks()
        name = "CRASH" if _is_ours(failure) or _runs_plain(model, given) else "not compiled"
        return {"verdict": name, "detail": said(failure), "graphs": graphs}, matched(watched.counted, backend)
    verdict = judge(mine, eager, exact, lambda: outputs(nudged(model, dtype), given))
    return verdict.to_dict() | {"graphs": breaks()}, matched(watched.counted, backend)


def _is_ours(failure: BaseException) -> bool:
    return "RewriteError" in repr(failure) or isinstance(failure.__cause__, attn_rewriter.RewriteError)


def plainly(model: Any, given: Inputs) -> tuple[int, int]:
    """The numbers of graphs and of graph breaks that Dynamo alone makes."""
    outputs(compiled(model, "eager"), given)
    return breaks()


def _runs_plain(model: Any, given: Inputs) -> bool:
    """Whether Dynamo alone gets through."""
    try:
        plainly(model, given)
    except Exception:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------
# Sites


def matched(counted: list[Counted], backend: Backend) -> list[Row]:
    """What was counted, each with what the rewriter said of that line of that module."""
    reports: dict[tuple[str, str], list[SiteReport]] = {}
    for site in backend.report.sites:
        reports.setdefault((site.module, site.source), []).append(site)
    rows = []
    for site in counted:
        left = reports.get((site.module, site.source))
        rows.append(_site(site, left.pop(0) if left else None))
    extra = [site for left in reports.values() for site in left]
    rows += [_site(Counted(site.module, site.source, "extra", "only the rewriter counts it"), site) for site in extra]
    return rows


def _site(counted: Counted, report: SiteReport | None) -> Row:
    row: Row = {
        "module": counted.module,
        "source": relative(counted.source),
        "kind": counted.kind,
        "why_not": counted.why_not,
        "computes": None,
        "why": "not found",
    }
    if report is None:
        return row
    row["why"] = relative("; ".join(str(refusal) for refusal in report.refusals))
    if report.spec is not None and report.shapes is not None:
        row |= {"computes": str(report.spec), "shapes": str(report.shapes), "kernel": report.kernel}
        shapes = replace(report.shapes, dtype=torch.bfloat16)
        for device in DEVICES:
            choice = choose(report.spec, shapes, Device.parse(device))
            row[device] = choice.kernel.name if isinstance(choice, Choice) else None
    return row


def aggregated(sites: list[Row]) -> list[Row]:
    """Equal sites of one model as one, with their number."""

    def key(site: Row) -> str:
        return repr({k: v for k, v in site.items() if k != "module"} | {"at": re.sub(r"\d+", "…", site["module"])})

    numbers = Counter(map(key, sites))
    firsts = {key(site): site for site in reversed(sites)}
    return [{**firsts[k], "times": numbers[k]} for k in dict.fromkeys(map(key, sites))]
