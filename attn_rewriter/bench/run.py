"""What all benchmarks do: options, the loop over cells, and what is shown in the end."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attn_rewriter.api import optimize, report_of
from attn_rewriter.bench.measure import (
    Cell,
    Results,
    attempt,
    console,
    markdown_table,
    positive,
    rich_table,
    versions,
)
from attn_rewriter.errors import KernelUnavailable
from attn_rewriter.kernels import KERNELS, named
from attn_rewriter.packages import version
from attn_rewriter.progress import working

NAMED = tuple(name for name in KERNELS if name != "reference")
PATIENCE = 5.0
"""Seconds, for the timed steps of a cell."""

READING_MS = 4.0
"""What a reading takes together with its launching, where that is not counted."""

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, header, rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all benchmarks."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes without meaning, to try it without a GPU")
    parser.add_argument("--repeat", type=positive, default=20, help=f"readings of a cell, within {PATIENCE:.0f} s (20)")
    parser.add_argument("--limit-s", type=float, metavar="S", help="begin no cell after S seconds; 0: show the file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every cell; its cells are kept")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown too")


def add_kernels(parser: argparse.ArgumentParser, kernels: Sequence[str]) -> None:
    """The option of those that compare kernels; `kernels` are measured where none are named."""
    add_choice(parser, "--kernels", ("eager", *NAMED, "auto"), kernels)


def add_choice(
    parser: argparse.ArgumentParser, flag: str, choices: Iterable[str], default: Iterable[str] | None = None
) -> None:
    """An option that takes several of these names, all of them by default."""
    names = [*choices]
    given = names if default is None else [*default]
    parser.add_argument(flag, nargs="+", choices=names, default=given, metavar="NAME", help=", ".join(names))


def add_compiler(parser: argparse.ArgumentParser) -> None:
    """The option of those that can do without Inductor, to try them out."""
    parser.add_argument("--compiler", default="inductor", help="a torch.compile backend (default: %(default)s)")


def add_plot(parser: argparse.ArgumentParser, help: str) -> None:
    """The option of those that draw."""
    parser.add_argument("--plot", type=Path, metavar="PNG", help=help)


def check_plot(options: argparse.Namespace) -> None:
    """Before anything is measured: whether it can be drawn."""
    if options.plot:
        require("matplotlib", "--plot")


def require(package: str, what: str) -> None:
    """End with a line where a package of the extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{what} needs {package}: pip install 'attn-rewriter[bench]'")


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, in the file."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: use --device cpu with --tiny, or --limit-s 0 to show a file")
    return {**versions(options.device), "dtype": options.dtype}


def unusual(options: argparse.Namespace) -> dict[str, Any]:
    """What is only for trying it out, where it is not the default."""
    given = {"tiny": True} if options.tiny else {}
    compiler = getattr(options, "compiler", "inductor")
    return given | ({"compiler": compiler} if compiler != "inductor" else {})


def rewritten(function: Callable[..., Any], kernel: str, compiler: str) -> Callable[..., Any]:
    """A function through the rewriter with static shapes, or for "eager" through the compiler alone."""
    if kernel == "eager":
        return torch.compile(function, backend=compiler, dynamic=False)
    return optimize(function, kernel=kernel, compiler=compiler, dynamic=False)


def used(function: Callable[..., Any], kernel: str) -> Cell:
    """The kernel in a function that was `rewritten` and called, and its package where it has one of its own.

    Raises `KernelUnavailable` where its attention is not fused.
    """
    if kernel == "eager":
        return {"kernel": kernel}
    report = report_of(function)
    names = {site.kernel for site in report.sites}
    if len(names) != 1 or None in names:
        raise KernelUnavailable("not fused: " + ("; ".join(map(str, report.sites)) or "no attention was found"))
    name = str(names.pop())
    package = getattr(named(name), "distribution", None)
    return {"kernel": name} | ({"package": f"{package} {version(package)}"} if package else {})


@dataclass(frozen=True)
class Task:
    """A cell to be measured."""

    column: str
    row: str
    measure: Callable[[], Cell]


def fill(results: Results, tasks: Sequence[Task], setup: Callable[[], dict[str, Any]], limit_s: float | None) -> None:
    """Measure the cells that are not in the results yet, until the limit; a line for each."""
    started = time.perf_counter()
    wanted = [task for task in tasks if not results.has(task.column, task.row)]
    with working("measuring", total=len(wanted)) as line:
        for i, task in enumerate(wanted):
            if limit_s is not None and time.perf_counter() - started >= limit_s:
                console.print(f"{len(wanted) - i} cells are left, after {limit_s:g} s")
                break
            if i == 0:
                results.begin(setup())
            line.say(f"{task.column}: {task.row}")
            cell = attempt(task.measure)
            results.put(task.column, task.row, cell)
            console.print(f"{task.column}: {in_words(task.row, cell)}", markup=False, highlight=False, soft_wrap=True)
            if "report" in cell:
                console.print(cell["report"], markup=False)
            line.advance()


def in_words(row: str, cell: Cell) -> str:
    """A cell in a line."""
    if "ms" not in cell:
        return f"{row} " + (cell.get("failed") or f"– ({cell['refused']})")
    words = [f"{row} {cell['ms']:.3f} ms"]
    words += [f"{cell['tflops']:.0f} TFLOP/s"] if "tflops" in cell else []
    words += [f"{cell['gib']:.2f} GiB"] if "gib" in cell else []
    words += [f"{cell['tokens_per_s']:.0f} tokens/s"] if "tokens_per_s" in cell else []
    words += [f"off by {cell['off_by']:.1e}"] if "off_by" in cell else []
    words += [cell["kernel"]] if cell.get("kernel", row) != row else []
    words += [f"{cell['fused']} of {cell['sites']} sites fused"] if "sites" in cell else []
    return ", ".join(words)


def why_not(cell: Cell) -> str:
    """In a table: why there is no figure; nothing where it was not measured."""
    return str(cell.get("failed", "–" if "refused" in cell else "")).split(":")[0]


def show(results: Results, tables: Sequence[Table], remarks: Sequence[str], markdown: bool) -> None:
    """All that the results hold; the Markdown last."""
    about = ", ".join(f"{name} {value}" for name, value in (results.data["setup"] or {}).items())
    commands = list(dict.fromkeys(results.data["commands"]))
    for line in (about, *commands):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    wide = console if console.is_terminal else Console(width=150)
    for table in tables:
        wide.print(rich_table(*table))
    for line in remarks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if markdown:
        body = [about, *(f"`{command}`" for command in commands), *(markdown_table(*table) for table in tables)]
        print("", *body, *remarks, sep="\n\n")
