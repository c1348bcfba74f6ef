"""Attention alone, causal or not, with a key head for each query head or for four: TFLOP/s of each kernel.

What is measured is eager code (matmul, scale, mask, softmax in float32, matmul; key and value heads repeated) through
`attn_rewriter.optimize(..., kernel=name)`, with Inductor where the kernel needs it. "auto" is what the rewriter takes
by itself, "eager" the code under Inductor alone. There are 16384 tokens of 2048 features in all (or of as many heads as
fit into these, by fours), so that no cache holds them, in memory as models have them. Forward is without gradients,
backward is alone; neither counts launching the kernels. Memory is the peak over the inputs: of forward, and of forward
and backward together. Errors are relative root mean squares of the difference from float64, over the first batch, where
scores in float64 are not too many.

    python -m attn_rewriter bench attention --json attention.json --plot attention.png

With --json, cells in the file are not measured again: interrupt it, or give it --limit-s, and run it again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from attn_rewriter import torch_private
from attn_rewriter.api import explain
from attn_rewriter.bench import run
from attn_rewriter.bench.measure import GIB, Cell, Results, peak_bytes_of, positive, time_step, to_eager
from attn_rewriter.choose import choose
from attn_rewriter.device import Device
from attn_rewriter.errors import KernelUnavailable, Refusal
from attn_rewriter.kernels import named

DIRECTIONS = ("forward", "backward")
GROUPS = (1, 4)
LONGEST_COMPARED = 2048
CEILING = "one matrix product"


@dataclass(frozen=True)
class Sizes:
    """What all cases share, and the grid of the others, the most telling first."""

    tokens: int
    hidden: int
    head_dims: tuple[int, ...]
    lengths: tuple[int, ...]
    square: int


FULL = Sizes(16384, 2048, (128, 64, 256), (8192, 512, 2048, 16384), 8192)
TINY = Sizes(128, 128, (32, 16), (64, 32), 256)


@dataclass(frozen=True)
class Case:
    """One attention: `[batch, heads, length, head_dim]`, with `groups` query heads for each key head."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool
    groups: int

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {'causal' if self.causal else 'full'}, {self.groups}:1, {self.length}"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention as eager models write it, `[batch, length, hidden]`."""
        if self.groups > 1:
            key, value = (x.repeat_interleave(self.groups, dim=1) for x in (key, value))
        scores = query @ key.mT * self.head_dim**-0.5
        if self.causal:
            keep = torch.ones(self.length, self.length, dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~keep, float("-inf"))
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        weights = scores.softmax(-1, dtype=wide).to(query.dtype)
        return (weights @ value).transpose(1, 2).flatten(2)

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Query, key and value, the same at every call; heads after positions in memory."""
        torch.manual_seed(0)
        return [
            torch.randn(self.batch, self.length, heads, self.head_dim, device=device, dtype=dtype)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (self.heads, self.heads // self.groups, self.heads // self.groups)
        ]

    def gradient(self, device: str, dtype: torch.dtype) -> Tensor:
        """Of the output, the same at every call."""
        torch.manual_seed(1)
        return torch.randn(self.batch, self.length, self.heads * self.head_dim, device=device, dtype=dtype)

    @property
    def products(self) -> int:
        """Of numbers, in one product of matrices where nothing is masked."""
        return self.batch * self.heads * self.length**2 * self.head_dim

    def flops(self, direction: str) -> float:
        """Two products forward, five backward; half of each where it is causal."""
        times = {"forward": 2, "backward": 5}[direction] * (0.5 if self.causal else 1)
        return times * 2 * self.products


def column(case: Case, direction: str) -> str:
    """The name of a column in the results, a row in the tables."""
    return f"{case}, {direction}"


# -------------------------------------------------------------------------------------- measurement


def measure(case: Case, direction: str, kernel: str, device: str, dtype: torch.dtype, repeat: int) -> Cell:
    """One cell."""
    inputs, gradient = case.inputs(device, dtype), case.gradient(device, dtype)
    training = direction == "backward"
    name = chosen(case, training, device, dtype) if kernel == "auto" else kernel
    inductor = name == "eager" or named(name).needs_inductor
    function = run.rewritten(case.__call__, kernel, "inductor" if inductor else "eager")

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, gradient)

    def timed(step: Callable[[], tuple[Tensor, ...]]) -> Cell:
        return time_step(step, lambda _: None, repeat, patience=run.PATIENCE, reading_ms=run.READING_MS)[1]

    whole = both if training else forward
    # Many backward passes read what one forward pass kept: Inductor may not use that memory for something else.
    with torch_private.functorch_config.patch(donated_buffer=False):
        answer = whole()
        taken = run.used(function, kernel)
        if training:
            cell = timed(partial(torch.autograd.grad, function(*inputs), inputs, gradient, retain_graph=True))
        else:
            cell = timed(forward)
        cell["gib"] = peak_bytes_of(whole) / GIB
    del cell["compile_s"]  # the first call was not timed
    cell |= taken | {"tflops": case.flops(direction) / cell["ms"] / 1e9}
    if case.length > LONGEST_COMPARED:
        return cell | {"not_compared": f"lengths over {LONGEST_COMPARED} are not compared with float64"}
    truth, of_eager = in_float64(case, training, device, dtype)
    return cell | {"errors": errors(answer, truth), "errors_of_eager": of_eager}


def chosen(case: Case, training: bool, device: str, dtype: torch.dtype) -> str:
    """The kernel that would be taken under Inductor; nothing is computed to find out."""
    here = Device.parse(device)
    with torch.set_grad_enabled(training):
        report = explain(case.__call__, *case.inputs("meta", dtype), device=here)
    for site in report.sites:
        if site.spec is not None and site.shapes is not None:
            choice = choose(site.spec, site.shapes, here)
            if isinstance(choice, Refusal):
                raise KernelUnavailable(choice.reason)
            return choice.kernel.name
    raise KernelUnavailable("not read: " + ("; ".join(map(str, report.sites)) or "no attention was found"))


@lru_cache(maxsize=1)
def in_float64(
    case: Case, training: bool, device: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """The first batch of the output, or of the gradients of query, key and value; and how far eager is off."""

    def eager(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x[:1].detach().to(dtype).requires_grad_(training) for x in drawn]
        output = case(*inputs)
        return torch.autograd.grad(output, inputs, gradient[:1].to(dtype)) if training else (output,)

    drawn, gradient = case.inputs(device, dtype), case.gradient(device, dtype)
    truth = eager(torch.float64)
    return truth, errors(eager(dtype), truth)


def errors(answer: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative root mean squares of the differences, over the first batch."""
    names = ("output",) if len(truth) == 1 else ("query", "key", "value")
    apart = (((x[:1] - exact).norm() / exact.norm()).item() for x, exact in zip(answer, truth))
    return dict(zip(names, apart))


def ceiling(size: int, device: str, dtype: torch.dtype, repeat: int) -> Cell:
    """The product of two square matrices, which no attention can outrun."""
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, cell = time_step(lambda: x @ y, lambda _: None, repeat, patience=run.PATIENCE, reading_ms=run.READING_MS)
    return cell | {"tflops": 2 * size**3 / cell["ms"] / 1e9}


# ------------------------------------------------------------------------------------------- tables


def rows(results: Results, cases: list[Case], direction: str, kernels: list[str]) -> Iterator[list[str]]:
    """One for each case that was measured: TFLOP/s, the best in bold, and what was chosen."""
    for case in cases:
        cells = {kernel: results.get(column(case, direction), kernel) for kernel in kernels}
        if not any(cells.values()):
            continue
        best = max((cell.get("tflops", 0.0) for kernel, cell in cells.items() if kernel != "auto"), default=0.0)
        speeds = [speed(cell, best if kernel != "auto" else 0.0) for kernel, cell in cells.items()]
        ratio, auto = auto_to_best(results, case, direction, kernels), cells.get("auto", {}).get("kernel", "–")
        worst = max((of_eager for cell in cells.values() for of_eager in to_eager(cell)), default=None)
        yield [
            str(case),
            *speeds,
            "–" if worst is None else f"{worst:.2f}",
            "–" if ratio is None else f"{ratio:.2f} {auto}",
        ]


def speed(cell: Cell, best: float) -> str:
    """TFLOP/s, or why there are none."""
    if "tflops" not in cell:
        return run.why_not(cell)
    digits = 0 if cell["tflops"] >= 100 else 1 if cell["tflops"] >= 1 else 4
    text = f"{cell['tflops']:.{digits}f}"
    return f"**{text}**" if cell["tflops"] == best else text


def auto_to_best(results: Results, case: Case, direction: str, kernels: list[str]) -> float | None:
    """The speed of what is chosen, over that of the fastest kernel that was measured."""
    speeds = {kernel: results.get(column(case, direction), kernel).get("tflops") for kernel in kernels}
    auto, others = speeds.pop("auto", None), [tflops for tflops in speeds.values() if tflops]
    return auto / max(others) if auto and others else None


def remarks(results: Results, cases: list[Case], kernels: list[str]) -> Iterator[str]:
    """The worst choice in each direction, and the ceiling."""
    for direction in DIRECTIONS:
        ratios = {case: auto_to_best(results, case, direction, kernels) for case in cases}
        known = {case: ratio for case, ratio in ratios.items() if ratio is not None}
        if known:
            worst = min(known, key=lambda case: known[case])
            yield f"{direction}: auto / best is at least {known[worst]:.2f} ({worst})"
    if top := results.get(CEILING, "matmul").get("tflops"):
        yield f"{CEILING}: {top:.{0 if top >= 100 else 2}f} TFLOP/s"


def tables(results: Results, cases: list[Case], kernels: list[str]) -> list[run.Table]:
    """TFLOP/s forward and backward."""
    header = ["", *kernels, "error / eager's", "auto / best"]
    named = [(f"TFLOP/s, {way}", header, [*rows(results, cases, way, kernels)]) for way in DIRECTIONS]
    return [table for table in named if table[2]]


def shipped(results: Results, cases: list[Case]) -> dict[str, Any]:
    """What `attn_rewriter.measured` reads: the milliseconds of every kernel, by case."""
    cells: list[dict[str, Any]] = []
    for case in cases:
        times = {way: _times(results, case, way) for way in DIRECTIONS}
        sizes = {"head_dim": case.head_dim, "length": case.length, "causal": case.causal, "groups": case.groups}
        if any(times.values()):
            cells.append({**sizes, "products": case.products, **times})
    return {"setup": results.data["setup"], "commands": results.data["commands"], "cells": cells}


def _times(results: Results, case: Case, direction: str) -> dict[str, float]:
    cells = {kernel: results.get(column(case, direction), kernel) for kernel in run.NAMED}
    return {kernel: round(cell["ms"], 4) for kernel, cell in cells.items() if "ms" in cell}


# --------------------------------------------------------------------------------------------- plot


def plot(results: Results, cases: list[Case], kernels: list[str], path: Path) -> None:
    """TFLOP/s over the length, a panel for each head_dim, causal or not; with as many key heads as query heads where
    these were measured."""
    from matplotlib.figure import Figure  # draws without a display
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    groups = min(case.groups for case in cases)
    head_dims = sorted({case.head_dim for case in cases})
    figure = Figure(figsize=(3.6 * max(len(head_dims), 2), 6.4), layout="constrained")
    panels = cast(Any, figure.subplots(2, len(head_dims), sharex=True, sharey=True, squeeze=False))
    measured = [cell for row in results.data["cells"].values() for cell in row.values()]
    top = results.get(CEILING, "matmul").get("tflops")
    colors = {kernel: "black" if kernel == "auto" else f"C{i}" for i, kernel in enumerate(kernels)}
    styles: dict[str, Any] = {"forward": "-", "backward": "--"}
    for (i, causal), (j, head_dim) in product(enumerate((False, True)), enumerate(head_dims)):
        panel = panels[i][j]
        shown = [c for c in cases if (c.head_dim, c.causal, c.groups) == (head_dim, causal, groups)]
        for kernel, direction in product(kernels, DIRECTIONS):
            cells = {case.length: results.get(column(case, direction), kernel) for case in shown}
            points = [(length, cell["tflops"]) for length, cell in sorted(cells.items()) if "tflops" in cell]
            open_circles = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": "none"}
            line = {"marker": ".", "linestyle": styles[direction]}
            if points:
                panel.plot(*zip(*points), color=colors[kernel], **(open_circles if kernel == "auto" else line))
        if top:
            panel.axhline(top, color="gray", linewidth=1, linestyle=":")
        lengths = sorted({case.length for case in cases})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, map(str, lengths))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=11)
        panel.tick_params(labelsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylim(0, 1.05 * max([cell["tflops"] for cell in measured if "tflops" in cell], default=1))
    figure.supylabel("TFLOP/s", fontsize=11)
    figure.supxlabel("length", fontsize=11)
    handles = [Line2D([], [], color=colors[kernel], label=kernel) for kernel in kernels if kernel != "auto"]
    if "auto" in kernels:
        handles += [Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="auto")]
    handles += [Line2D([], [], color="gray", linestyle=style, label=way) for way, style in styles.items()]
    handles += [Line2D([], [], color="gray", linestyle=":", label=CEILING)] if top else []
    title = f"{results.data['setup']['device']}, {results.data['setup']['dtype']}, {groups}:1 heads"
    figure.legend(handles=handles, title=title, loc="outside upper center", ncols=5, frameon=False, fontsize=11)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_kernels(parser, [*run.NAMED, "auto"])
    parser.add_argument("--head-dims", nargs="+", type=positive, metavar="N", help=f"{FULL.head_dims}")
    parser.add_argument("--lengths", nargs="+", type=positive, metavar="N", help=f"{FULL.lengths}")
    run.add_plot(parser, "draw TFLOP/s over the length")
    parser.add_argument("--ship", type=Path, metavar="FILE", help="write the table that kernels are chosen by")


def grid(sizes: Sizes, head_dims: list[int] | None, lengths: list[int] | None) -> list[Case]:
    """The cases, in the order in which they are measured."""
    cases = []
    for length, head_dim, causal, groups in product(
        lengths or sizes.lengths, head_dims or sizes.head_dims, (True, False), GROUPS
    ):
        heads = sizes.hidden // head_dim // max(GROUPS) * max(GROUPS)
        if not heads:
            most = sizes.hidden // max(GROUPS)
            raise SystemExit(f"--head-dims: {head_dim} is more than {most}, a fourth of the hidden size")
        if sizes.tokens % length:
            raise SystemExit(f"--lengths: {length} does not divide {sizes.tokens}, the number of tokens")
        cases.append(Case(sizes.tokens // length, heads, length, head_dim, causal, groups))
    return cases


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    run.check_plot(options)
    sizes = TINY if options.tiny else FULL
    dtype: torch.dtype = getattr(torch, options.dtype)
    cases = grid(sizes, options.head_dims, options.lengths)
    how = (options.device, dtype, options.repeat)
    tasks = [run.Task(CEILING, "matmul", partial(ceiling, sizes.square, *how))]
    tasks += [
        run.Task(column(case, direction), kernel, partial(measure, case, direction, kernel, *how))
        for case, direction, kernel in product(cases, DIRECTIONS, options.kernels)
    ]
    results = Results(options.json)
    run.fill(results, tasks, lambda: setup(options, sizes), options.limit_s)
    cases.sort(key=lambda case: (case.head_dim, case.causal, case.groups, case.length))
    known = [*remarks(results, cases, options.kernels)]
    run.show(results, tables(results, cases, options.kernels), known, options.markdown)
    if options.plot and results.data["cells"]:
        plot(results, cases, options.kernels, options.plot)
    if options.ship:
        options.ship.write_text(json.dumps(shipped(results, cases), indent=1) + "\n")
    return int(results.failures() > 0)


def setup(options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """What the figures depend on, in the file."""
    return {**run.setup(options), "tokens": sizes.tokens, "hidden": sizes.hidden}
