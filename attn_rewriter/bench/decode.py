"""One new token against a static cache: the time of each kernel by how much of the cache is filled.

A static cache has room for all keys from the start, and a mask that hides what is not filled yet: built in the graph
from the position, or handed in as an additive tensor, as transformers' `generate` does. Eager code reads all of the
room, a kernel that knows the mask what is filled. The shapes are those of a layer of Llama-3-8B, batch 8, compiled by
Inductor. GB/s count the keys and values that are filled, read once; the ceiling is a copy on the device, which counts
what it reads and what it writes.

    python -m attn_rewriter bench decode --json decode.json --plot decode.png

Launching is not counted. Outputs are compared with float64 in the first batch. With --json, cells in the file are not
measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_rewriter.bench import run
from attn_rewriter.bench.measure import Cell, Results, off_by, time_step, worst_error

CEILING = "one copy"
MASKS = ("built in the graph", "a tensor")


@dataclass(frozen=True)
class Sizes:
    """A layer's shapes, and the parts of the cache that are filled."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    room: int
    filled: tuple[int, ...]
    copied: int


FULL = Sizes(8, 32, 8, 128, 32768, (1024, 8192, 32768), 2**31)
TINY = Sizes(2, 4, 2, 16, 64, (8, 64), 2**20)


def decode(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """A step of a model that builds its mask from the position of the new token, `[1]`."""
    keep = torch.arange(key.size(2), device=key.device)[None, :] <= position[:, None]
    return _attend(query, key, value, lambda scores: scores.masked_fill(~keep, float("-inf")))


def decode_with_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """A step of a model that is given its mask, `[batch, 1, 1, room]`, zero where a key is attended to."""
    return _attend(query, key, value, lambda scores: scores + mask)


def _attend(query: Tensor, key: Tensor, value: Tensor, hide: Callable[[Tensor], Tensor]) -> Tensor:
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = hide(query @ key.mT * query.size(-1) ** -0.5)
    return scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype) @ value


def inputs(sizes: Sizes, filled: int, mask: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Query `[batch, heads, 1, head_dim]`, key and value `[batch, kv_heads, room, head_dim]`, and the mask's part."""
    torch.manual_seed(0)
    query = torch.randn(sizes.batch, sizes.heads, 1, sizes.head_dim, device=device, dtype=dtype)
    shape = (sizes.batch, sizes.kv_heads, sizes.room, sizes.head_dim)
    key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    if mask == MASKS[0]:
        return [query, key, value, torch.tensor([filled - 1], device=device)]
    hidden = torch.arange(sizes.room, device=device) >= filled
    additive = torch.zeros(sizes.room, device=device, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    return [query, key, value, additive.expand(sizes.batch, 1, 1, -1).contiguous()]


def column(filled: int, mask: str) -> str:
    """The name of a column in the results, a row in the table."""
    return f"{filled} filled, mask {mask}"


def measure(sizes: Sizes, mask: str, kernel: str, device: str, dtype: torch.dtype, repeat: int, filled: int) -> Cell:
    """One cell."""
    given = inputs(sizes, filled, mask, device, dtype)
    eager = decode if mask == MASKS[0] else decode_with_mask
    function = run.rewritten(eager, kernel, "inductor")

    def step() -> Tensor:
        with torch.no_grad():
            return function(*given)

    def seen(output: Tensor) -> Cell:
        return run.used(function, kernel) | off_by(eager, given, output)

    taken, cell = time_step(step, seen, repeat, patience=run.PATIENCE, reading_ms=run.READING_MS)
    read = 2 * sizes.batch * sizes.kv_heads * filled * sizes.head_dim * dtype.itemsize
    return cell | taken | {"gb_s": read / cell["ms"] / 1e6}


def ceiling(count: int, device: str, repeat: int) -> Cell:
    """A copy of so many bytes."""
    x = torch.ones(count, dtype=torch.uint8, device=device)
    _, cell = time_step(lambda: x.clone(), lambda _: None, repeat, patience=run.PATIENCE, reading_ms=run.READING_MS)
    return cell | {"gb_s": 2 * count / cell["ms"] / 1e6}


def rows(results: Results, sizes: Sizes, kernels: list[str]) -> Iterator[list[str]]:
    """One for each cell that was measured: milliseconds and GB/s, the best in bold."""
    for mask, filled in product(MASKS, sizes.filled):
        cells = {kernel: results.get(column(filled, mask), kernel) for kernel in kernels}
        if not any(cells.values()):
            continue
        least = min((cell["ms"] for kernel, cell in cells.items() if kernel != "auto" and "ms" in cell), default=0.0)
        yield [column(filled, mask), *(figures(kernel, cell, least) for kernel, cell in cells.items())]


def figures(kernel: str, cell: Cell, least: float) -> str:
    """As in "0.267 ms, 251 GB/s", or why there are none."""
    if "ms" not in cell:
        return run.why_not(cell)
    time = f"{cell['ms']:.3f} ms"
    time = f"**{time}**" if cell["ms"] == least and kernel != "auto" else time
    return f"{time}, {cell['gb_s']:.0f} GB/s" + (f", {cell['kernel']}" if cell["kernel"] != kernel else "")


def plot(results: Results, sizes: Sizes, kernels: list[str], path: Path) -> None:
    """Milliseconds over what is filled, a panel for each kind of mask, and what a copy's speed would make of it."""
    from matplotlib.figure import Figure  # draws without a display

    figure = Figure(figsize=(9, 4), layout="constrained")
    top = results.get(CEILING, "clone").get("gb_s")
    read = 2 * sizes.batch * sizes.kv_heads * sizes.head_dim * getattr(torch, results.data["setup"]["dtype"]).itemsize
    for i, mask in enumerate(MASKS):
        panel: Any = figure.add_subplot(1, 2, i + 1)
        for kernel in kernels:
            cells = {filled: results.get(column(filled, mask), kernel) for filled in sizes.filled}
            points = [(filled, cell["ms"]) for filled, cell in cells.items() if "ms" in cell]
            chosen = {"marker": "o", "markerfacecolor": "none", "linestyle": "none", "color": "black"}
            if points:
                panel.plot(*zip(*points), label=kernel, **(chosen if kernel == "auto" else {"marker": "."}))
        if top:
            bound = [read * filled / top / 1e6 for filled in sizes.filled]
            panel.plot(sizes.filled, bound, color="gray", linestyle=":", label=CEILING)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(f"mask {mask}", fontsize=11)
        panel.set_xlabel(f"keys filled of {sizes.room}")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[-1].legend(frameon=False)
    figure.suptitle(f"{results.data['setup']['device']}, {results.data['setup']['dtype']}, batch {sizes.batch}")
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_kernels(parser, ["eager", *run.NAMED, "auto"])
    run.add_plot(parser, "draw milliseconds over what is filled")


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    run.check_plot(options)
    sizes = TINY if options.tiny else FULL
    dtype: torch.dtype = getattr(torch, options.dtype)
    tasks = [run.Task(CEILING, "clone", partial(ceiling, sizes.copied, options.device, options.repeat))]
    tasks += [
        run.Task(
            column(filled, mask),
            kernel,
            partial(measure, sizes, mask, kernel, options.device, dtype, options.repeat, filled),
        )
        for mask, kernel, filled in product(MASKS, options.kernels, sizes.filled)
    ]
    results = Results(options.json)
    run.fill(results, tasks, lambda: run.setup(options) | run.unusual(options), options.limit_s)
    table = ("A decode step against a static cache", ["", *options.kernels], [*rows(results, sizes, options.kernels)])
    top = results.get(CEILING, "clone").get("gb_s")
    remarks = [f"{CEILING}: {top:.0f} GB/s"] if top else []
    run.show(results, [table], [*remarks, worst_error(results)], options.markdown)
    if options.plot and results.data["cells"]:
        plot(results, sizes, options.kernels, options.plot)
    return int(results.failures() > 0)
