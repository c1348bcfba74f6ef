"""What the examples share: the text, the truth in float64, fair measurements, and how both are shown; and for the
benchmarks, cells that are measured one by one, kept in a file, and shown as tables."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import math
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import attn_rewriter

TEXT = Path(__file__).with_name("text.txt").read_text(encoding="utf-8")
RUNS = 5
GIB = 2**30
OUT_OF_MEMORY = "out of memory"

Answer = TypeVar("Answer")
Seen = TypeVar("Seen")
Cell = dict[str, Any]

console = Console()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every example takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s")
    parser.add_argument("--kernel", default="auto", help="a kernel's name (default: the fastest usable)")


def positive(text: str) -> int:
    """An argparse type: an integer from 1 up."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def byte_ids(vocab_size: int = 256) -> Tensor:
    """The text as token ids for a model without a tokenizer: its bytes."""
    return torch.tensor(list(TEXT.encode())) % vocab_size


def windows(ids: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Consecutive windows `[batch_size, seq_len]` of the ids, which start over when they run out."""
    return ids[torch.arange(batch_size * seq_len) % len(ids)].view(batch_size, seq_len)


@contextmanager
def working(task: str) -> Iterator[None]:
    """A spinner with the elapsed time; nothing where the output is not a terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(task, total=None)
        yield


def call(model: nn.Module, inputs: Mapping[str, Tensor], *, train: bool) -> list[Tensor]:
    """The model's (first) output and, when training, the gradients of its parameters."""
    with torch.set_grad_enabled(train):
        output = model(**inputs)
        output = output if isinstance(output, Tensor) else output[0]
        if not train:
            return [output]
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(output, parameters, weights_like(output), materialize_grads=True)
    return [output.detach(), *gradients]


def weights_like(output: Tensor) -> Tensor:
    """What the loss weighs each output by: uneven, of norm about 1, and exact in every dtype."""
    count = output.numel()
    weights = torch.arange(count, device=output.device) % 7 - 3
    return weights.view_as(output).to(output.dtype) * 2.0 ** -(count.bit_length() // 2 + 1)


def call_in_float64(model: nn.Module, inputs: Mapping[str, Tensor], *, train: bool) -> list[Tensor]:
    """`call` on a float64 copy of the model: the truth that the others are compared with."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.compiler.set_stance("force_eager"):
        return call(copy.deepcopy(model).double(), exact, train=train)


@dataclass(frozen=True)
class Measurement:
    """One way to run a model. The differences are the largest from float64, NaN where there is nothing."""

    label: str
    fused: str
    first_seconds: float
    seconds: float
    peak_bytes: int
    output_difference: float
    gradient_difference: float


def compare(model: nn.Module, inputs: Mapping[str, Tensor], *, train: bool) -> list[Measurement]:
    """Measure an optimised model with and without its compiled code, in turns: other load hits both alike."""

    def eager() -> list[Tensor]:
        with torch.compiler.set_stance("force_eager"):
            return call(model, inputs, train=train)

    def rewritten() -> list[Tensor]:
        return call(model, inputs, train=train)

    runs = {"eager": eager, "rewritten": rewritten}
    with working("Running in float64"):
        truth = call_in_float64(model, inputs, train=train)
    before = attn_rewriter.report_of(model)
    with working("Compiling"):
        first_seconds = [seconds_of(run) for run in runs.values()]
    after = attn_rewriter.report_of(model)
    fused = "", f"{after.n_fused - before.n_fused}/{after.n_sites - before.n_sites} fused"
    with working("Measuring"):
        errors = [differences(run(), truth) for run in runs.values()]
        peak_bytes = [peak_bytes_of(run) for run in runs.values()]
        rounds = [[seconds_of(run) for run in runs.values()] for _ in range(RUNS)]
    return [
        Measurement(label, sites, first, statistics.median(seconds), peak, *error)
        for label, sites, first, seconds, peak, error in zip(
            runs, fused, first_seconds, zip(*rounds, strict=True), peak_bytes, errors, strict=True
        )
    ]


def differences(answer: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """The largest absolute difference of the output, and of the gradients (NaN if there are none)."""
    output, *gradients = ((x - y).abs().max() for x, y in zip(answer, truth, strict=True))
    return output.item(), torch.stack(gradients).max().item() if gradients else math.nan


def seconds_of(run: Callable[[], object]) -> float:
    """How long one call takes, a GPU's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for what a GPU still has in its queue."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def results(title: str, sections: Mapping[str, Sequence[Measurement]]) -> Table:
    """A table of measurements; speed-ups are counted from the first row of each section."""
    table = Table(
        title=title,
        caption=f"time: median of {RUNS} calls after the first ones; memory: the most that PyTorch "
        "allocated above weights and inputs; off by: largest difference from the same model in float64",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column()
    table.add_column()
    for header in ("first\ncall", "time", "speed-up", "memory", "output\noff by", "gradient\noff by"):
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    for section, rows in sections.items():
        for row in rows:
            table.add_row(
                section if row is rows[0] else row.fused,
                row.label,
                f"{row.first_seconds:.1f} s",
                f"{row.seconds * 1e3:.1f} ms",
                f"{rows[0].seconds / row.seconds:.2f}×",
                f"{row.peak_bytes / 2**20:.0f} MiB",
                f"{row.output_difference:.1e}",
                "–" if math.isnan(row.gradient_difference) else f"{row.gradient_difference:.1e}",
            )
        table.add_section()
    return table


# --------------------------------------------------------------------------------------- benchmarks


def unchanged(model: nn.Module, compiler: str = "inductor") -> None:
    """Compile a model in place as it is, with static shapes."""
    model.compile(backend=compiler, dynamic=False)


def rewritten(model: nn.Module, compiler: str = "inductor") -> None:
    """Compile a model in place with its attention rewritten, with static shapes."""
    attn_rewriter.optimize(model, compiler=compiler, dynamic=False)


def time_step(
    step: Callable[[], Answer], look: Callable[[Answer], Seen], repeat: int, *, patience: float
) -> tuple[Seen, Cell]:
    """What `look` sees in the first answer, and a cell: the median time of `repeat` steps after the first three, or of
    as many (at least three) as begin within `patience` seconds; the time of the first step beyond that; and, on CUDA,
    the peak of the memory over what was allocated before."""
    cuda = torch.cuda.is_initialized()
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    seen = look(step())
    synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        milliseconds(step)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < repeat and (len(times) < 3 or sum(times) < patience * 1e3):
        times.append(milliseconds(step))
    ms = statistics.median(times)
    cell = {"ms": ms, "times": times, "compile_s": first - ms / 1e3}
    if cuda:
        cell["gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    return seen, cell


def milliseconds(step: Callable[[], object]) -> float:
    """How long one step takes: between two events on a GPU in use, else by the clock."""
    if not torch.cuda.is_initialized():
        return seconds_of(step) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def attempt(measure: Callable[..., Cell], *args: object) -> Cell:
    """The measured cell. A failure becomes its text, and nothing that was compiled stays in memory."""
    torch.compiler.reset()
    try:
        cell = measure(*args)
    except Exception as error:  # the other cells are still worth having
        if "out of memory" in str(error):
            cell = {"failed": OUT_OF_MEMORY}
        else:
            traceback.print_exc()
            cell = {"failed": f"{type(error).__name__}: {error}"[:300]}
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return cell


def versions(device: str) -> dict[str, str]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    packages = ("transformers", "triton")
    return {"device": name, "torch": torch.__version__, **{package: version(package) for package in packages}}


def version(package: str) -> str:
    """A package's version, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


class Results:
    """What was measured, kept in a JSON file where there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"setup": None, "commands": [], "cells": {}}
        if path and path.exists():
            self.data = json.loads(path.read_text())

    def begin(self, setup: Mapping[str, object]) -> None:
        """Note how the cells to come are measured; those in the file must have been measured alike."""
        if self.data["setup"] not in (None, setup):
            raise SystemExit(f"{self.path} was measured with another setup: {self.data['setup']}")
        self.data["setup"] = setup
        self.data["commands"].append(shlex.join(["python", *sys.argv]))

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


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal, its numbers to the right."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    text = "\n".join("| " + " | ".join(cell.replace("\n", ", ") for cell in line) + " |" for line in lines)
    return f"**{title}**\n\n{text}\n"
