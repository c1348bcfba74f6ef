"""Fair measurements: cells that are measured one by one, kept in a file, and shown as tables."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attn_rewriter.errors import KernelUnavailable, is_out_of_memory
from attn_rewriter.packages import version
from attn_rewriter.timing import calls_in, milliseconds, seconds_of, synchronize

GIB = 2**30
OUT_OF_MEMORY = "out of memory"
Answer = TypeVar("Answer")
Seen = TypeVar("Seen")
Cell = dict[str, Any]

console = Console()


def positive(text: str) -> int:
    """An argparse type: an integer from 1 up."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


# --------------------------------------------------------------------------------- time and memory


def time_step(
    step: Callable[[], Answer],
    look: Callable[[Answer], Seen],
    repeat: int,
    *,
    patience: float,
    reading_ms: float = 0.0,
    settle_s: float = 0.0,
) -> tuple[Seen, Cell]:
    """What `look` sees in the first answer, and a cell: the median time of `repeat` readings after the first three
    steps, or of as many (at least three) as begin within `patience` seconds; the time of the first step beyond that;
    and, on CUDA, the peak of the memory over what was allocated before: of these readings, and of the steps before
    them, which compile, and record CUDA graphs, whose memory is not allocated again.

    A reading is one step, launching it included; or as many as take `reading_ms` together, without their launching.
    Before them come steps for `settle_s`, as a card at its limit of power lowers its clock within a second.
    """
    cuda = torch.cuda.is_initialized()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    seen = look(step())
    synchronize()
    first = time.perf_counter() - start
    calls = calls_in(reading_ms, step)
    settled = time.perf_counter() + settle_s * cuda
    while time.perf_counter() < settled:
        seconds_of(step)
    peak_at_first = torch.cuda.max_memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < repeat and (len(times) < 3 or sum(times) * calls < patience * 1e3):
        times.append(milliseconds(step, calls, held_ms=2 * reading_ms))
    ms = statistics.median(times)
    cell = {"ms": ms, "times": times, "compile_s": first - ms / 1e3}
    if cuda:
        cell |= {
            "gib": (torch.cuda.max_memory_allocated() - before) / GIB,
            "gib_at_first": (peak_at_first - before) / GIB,
        }
    return seen, cell


def peak_bytes_of(run: Callable[[], object]) -> int:
    """The most memory that PyTorch's allocator gave out at once during the call, above what it had before."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def off_by(function: Callable[..., Tensor], inputs: Sequence[Tensor], answer: Tensor) -> Cell:
    """How far an answer to the inputs, and what eager code makes of them, are from float64: root mean squares of the
    differences over that of the truth, in the first batch, where there is a truth (rows without keys have none)."""
    alone = [x.detach()[:1] if x.size(0) == answer.size(0) else x.detach() for x in inputs]
    with torch.no_grad():
        truth = function(*(x.double() if x.is_floating_point() else x for x in alone))
        known = truth.isfinite()
        answer, eager = ((x - truth)[known].norm() / truth[known].norm() for x in (answer[:1], function(*alone)))
    return {"errors": {"output": answer.item()}, "errors_of_eager": {"output": eager.item()}}


def to_eager(cell: Cell) -> list[float]:
    """Each error over eager's own."""
    return [
        error / max(cell["errors_of_eager"][name], 1e-30)
        for name, error in cell.get("errors", {}).items()
        if cell["kernel"] != "eager"
    ]


def worst_error(results: Results) -> str:
    """Of all cells that were compared, the largest error over eager's own, in words."""
    cells = (
        (f"{column}, {row}", cell) for column, cells in results.data["cells"].items() for row, cell in cells.items()
    )
    ratios = {name: max(to_eager(cell)) for name, cell in cells if to_eager(cell)}
    if not ratios:
        return "nothing was compared with float64"
    worst = max(ratios, key=lambda name: ratios[name])
    return f"errors are at most {ratios[worst]:.2f} of eager's own ({worst})"


def attempt(measure: Callable[..., Cell], *args: object) -> Cell:
    """The measured cell. A kernel's refusal and any failure become their text, and nothing that was compiled stays in
    memory."""
    torch.compiler.reset()
    cell = _measured(measure, *args)  # by a function that is over, so that no exception holds its tensors
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return cell


def _measured(measure: Callable[..., Cell], *args: object) -> Cell:
    try:
        return measure(*args)
    except Exception as error:  # the other cells are still worth having
        cause = getattr(error, "inner_exception", error)  # of Dynamo's BackendCompilerFailed
        if isinstance(cause, KernelUnavailable):
            return {"refused": str(cause)}
        if is_out_of_memory(error):
            return {"failed": OUT_OF_MEMORY}
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


# ---------------------------------------------------------------------------------------- results


def versions(device: str) -> dict[str, str]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    packages = ("transformers", "triton")
    return {"device": name, "torch": torch.__version__, **{package: version(package) or "none" for package in packages}}


class Results:
    """What was measured, kept in a JSON file where there is one.

    A cell holds "ms" if it was measured, "refused" if the kernel can't compute it, "failed" if something went wrong.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"setup": None, "commands": [], "cells": {}}
        if path and not path.parent.is_dir():
            raise SystemExit(f"there is no folder {str(path.parent)!r} for the results")
        if path and path.exists():
            self.data = json.loads(path.read_text())

    def begin(self, setup: Mapping[str, object]) -> None:
        """Note how the cells to come are measured; those in the file must have been measured alike."""
        if self.data["setup"] not in (None, setup):
            raise SystemExit(f"{self.path} was measured with another setup: {self.data['setup']}, this is {setup}")
        self.data["setup"] = setup
        self.data["commands"].append(shlex.join(["python", *sys.orig_argv[1:]]))

    def get(self, column: str, row: str) -> Cell:
        """A cell, empty where it was not measured."""
        return self.data["cells"].get(column, {}).get(row, {})

    def has(self, column: str, row: str) -> bool:
        """Whether there is nothing to gain from measuring the cell again."""
        cell = self.get(column, row)
        return "ms" in cell or cell.get("failed") == OUT_OF_MEMORY

    def put(self, column: str, row: str, cell: Cell) -> None:
        """Keep a cell, in the file as well."""
        self.data["cells"].setdefault(column, {})[row] = cell
        if self.path:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.data))
            os.replace(partial, self.path)

    def failures(self) -> int:
        """How many cells something went wrong with, other than that memory ran out."""
        cells = (cell for column in self.data["cells"].values() for cell in column.values())
        return sum(cell.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for cell in cells)


# ----------------------------------------------------------------------------------------- tables


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal, its numbers to the right; `**bold**` as in Markdown."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/bold]", cell) for cell in row))
    return table


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    text = "\n".join("| " + " | ".join(cell.replace("\n", ", ") for cell in line) + " |" for line in lines)
    return f"**{title}**\n\n{text}\n"
