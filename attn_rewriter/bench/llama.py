"""Llama as a whole: what the rewriter makes of an unmodified eager model, next to the alternatives.

Rows share their random weights, and are compiled by Inductor with static shapes, but for one:

    eager               transformers' attn_implementation="eager"
    sdpa                transformers' attn_implementation="sdpa". Compiled, it makes the mask that it does without
                        uncompiled (up to torch 2.13), and calls SDPA with that tensor and with repeated key heads
    flash_attention_2   transformers' attn_implementation="flash_attention_2", which breaks the graph where there is
                        padding; what does not compile runs as it is ("flash_attention_2, uncompiled": all of it)
    hand                written by hand: scaled_dot_product_attention(is_causal=True, enable_gqa=...), no mask
    rewritten           the eager model through attn_rewriter.optimize(model)

Columns are named workload-BATCHxTOKENS:

    prefill     Llama-2-7B shape; no_grad, no cache, logits of the last token only, as in generate()
    padded      the same with prompts of uneven lengths, padded on the left, their 2-D mask handed to the model: the
                first as long as TOKENS, then 3000/4096, a half, a fourth of it, and so on
    train       the same as prefill; forward and backward, loss over all tokens, gradients freed before each step
    decode      at most 4 layers of Llama-3-8B (32 heads over 8 KV heads); one more token per sequence, with TOKENS in
                the DynamicCache

Times are medians of CUDA events after warm-up. Memory is the peak over what was allocated before the first call: the
weights, the inputs and, in decode, the filled cache. Compile time is the first call less a warm one; each cell compiles
from empty caches.

    python -m attn_rewriter bench llama --json llama.json --markdown

With --json every cell is written as soon as it is measured, and cells in the file are not measured again: after an
interruption run the same command again, or measure what matters first and add the rest later (--rows hand rewritten,
then --rows sdpa eager).
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_rewriter import torch_private
from attn_rewriter.api import report_of
from attn_rewriter.bench import models, run
from attn_rewriter.bench.measure import GIB, OUT_OF_MEMORY, Cell, Results, positive, time_step
from attn_rewriter.errors import KernelUnavailable
from attn_rewriter.packages import version

# --------------------------------------------------------------------------------------------- rows


def by_hand(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What one writes who knows that the model is causal and nothing is padded. It is registered as attention but not
    as a mask: transformers then builds no mask."""
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Row:
    """A model's attention, what it can't do without (a package, an unpadded batch, running what doesn't compile), and
    whether it is compiled."""

    label: str
    attn_implementation: str
    rewrite: bool = False
    package: str | None = None
    pads: bool = True
    may_break: bool = False
    compiled: bool = True

    def check(self, workload: str) -> None:
        """Raise `KernelUnavailable` where it can't be measured."""
        if self.package and version(self.package) is None:
            raise KernelUnavailable(f"{self.package} is not installed")
        if workload == "padded" and not self.pads:
            raise KernelUnavailable("takes no padding")


ROWS = {
    "eager": Row("HF eager + Inductor", "eager"),
    "sdpa": Row("HF sdpa + Inductor", "sdpa"),
    "flash_attention_2": Row(
        "HF flash_attention_2 + Inductor", "flash_attention_2", package="flash-attn", may_break=True
    ),
    "flash_attention_2, uncompiled": Row(
        "HF flash_attention_2", "flash_attention_2", package="flash-attn", compiled=False
    ),
    "hand": Row("by hand + Inductor", "by_hand", pads=False),
    "rewritten": Row("HF eager, rewritten", "eager", rewrite=True),
}


# ------------------------------------------------------------------------------------------ columns


Step = Callable[[], Tensor]


def tokens(model: Any, batch: int, length: int) -> Tensor:
    """Random ones, `[batch, length]`."""
    return torch.randint(model.config.vocab_size, (batch, length), device=model.device)


def prefill(model: Any, batch: int, length: int, **given: Tensor) -> Step:
    """A step that answers with the logits of the last tokens."""
    ids = tokens(model, batch, length)
    model.eval()

    @torch.no_grad()
    def step() -> Tensor:
        return model(ids, **given, use_cache=False, logits_to_keep=1).logits[:, -1]

    return step


def padded(model: Any, batch: int, length: int) -> Step:
    """The same for prompts of uneven lengths."""
    return prefill(model, batch, length, attention_mask=models.left_padding(batch, length, model.device))


def train(model: Any, batch: int, length: int) -> Step:
    """A step that answers with a gradient."""
    ids = tokens(model, batch, length)
    model.train()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.v_proj.weight.grad

    return step


def decode(model: Any, batch: int, length: int) -> Step:
    """A step that answers with the logits of one more token."""
    from transformers import DynamicCache

    config = model.config
    ids = tokens(model, batch, 1)
    shape = (2, batch, config.num_key_value_heads, length, config.head_dim)
    cache: Any = DynamicCache(config=config)
    filled = [torch.randn(shape, device=model.device, dtype=model.dtype).unbind() for _ in cache.layers]
    for layer, (keys, values) in zip(cache.layers, filled, strict=True):
        layer.lazy_initialization(keys, values)
    model.eval()

    @torch.no_grad()
    def step() -> Tensor:
        for layer, (keys, values) in zip(cache.layers, filled, strict=True):  # forget the step before
            layer.keys, layer.values = keys, values
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return step


WORKLOADS: dict[str, Callable[[Any, int, int], Step]] = {
    "prefill": prefill,
    "padded": padded,
    "train": train,
    "decode": decode,
}


class Column(models.Column):
    """A workload, and the batch and length it is done for."""

    kinds = tuple(WORKLOADS)

    def llama(self, layers: int, hidden: int) -> models.Llama:
        """Llama-2-7B's sizes, or Llama-3-8B's for decode; a smaller hidden size keeps their ratios."""
        heads = hidden // (128 if hidden % 1024 == 0 else 16)
        if self.kind == "decode":
            return models.Llama(min(layers, 4), hidden, hidden * 14336 // 4096, heads, max(heads // 4, 1))
        return models.Llama(layers, hidden, hidden * 11008 // 4096, heads, heads)


COLUMNS = (
    Column("prefill", 1, 512),
    Column("prefill", 1, 2048),
    Column("prefill", 1, 8192),
    Column("prefill", 1, 32768),
    Column("padded", 4, 4096),
    Column("train", 4, 2048),
    Column("train", 1, 8192),
    Column("decode", 8, 8192),
)
TINY = (Column("prefill", 1, 64), Column("padded", 4, 64), Column("train", 2, 32), Column("decode", 2, 64))


# -------------------------------------------------------------------------------------- measurement


SETTLE_S = 3.0


def sample(tensor: Tensor) -> list[float]:
    """About 64 values, to compare between rows."""
    values = tensor.detach().flatten()
    return values[:: math.ceil(len(values) / 64)].tolist()


build = lru_cache(maxsize=1)(models.build)


def view(model: Any, attn_implementation: str) -> Any:
    """A module of its own over the same weights, to be compiled and thrown away."""
    view = copy.copy(model)
    view.set_attn_implementation(attn_implementation)
    return view


def measure(
    column: Column, row: Row, sizes: models.Llama, device: str, dtype: torch.dtype, compiler: str, repeat: int
) -> Cell:
    """One cell, from empty caches."""
    row.check(column.kind)
    from transformers import AttentionInterface

    AttentionInterface.register("by_hand", by_hand)
    whole = build(sizes, device, dtype)
    model = view(whole, row.attn_implementation)
    if row.compiled:
        models.compile_in_place(model, row.rewrite, compiler)
    torch.manual_seed(1)
    step = WORKLOADS[column.kind](model, column.batch, column.tokens)
    try:
        with models.from_scratch(device, compiler), torch_private.dynamo_config.patch(suppress_errors=row.may_break):
            answer, cell = time_step(step, sample, repeat, patience=run.PATIENCE, settle_s=SETTLE_S)
    finally:
        whole.zero_grad(set_to_none=True)
    cell["answer"] = answer
    return cell | (models.rewriting(report_of(model)) if row.rewrite else {})


# ------------------------------------------------------------------------------------------- tables


def time_and_memory(cell: Cell) -> str:
    """As in "46.97 ms" over "0.15 GiB", or why there is none."""
    if "ms" not in cell:
        return run.why_not(cell) or "–"
    return f"{cell['ms']:.2f} ms" + (f"\n{cell['gib']:.2f} GiB" if "gib" in cell else "")


def ratio(cell: Cell, base: Cell) -> str:
    """Of the times, and of the memory."""
    if "ms" not in cell or "ms" not in base:
        return "–"
    text = f"{cell['ms'] / base['ms']:.3f} ×"
    return text + (f"\n{cell['gib'] / base['gib']:.3f} ×" if base.get("gib") else "")


def difference(cell: Cell, base: Cell) -> str:
    """Of a sample of the answers (logits or gradients): bf16 noise when both compute the same attention."""
    if "ms" not in cell or "ms" not in base:
        return "–"
    x, y = torch.tensor(cell["answer"]), torch.tensor(base["answer"])
    return f"{((x - y).norm() / y.norm()).item():.1e}"


def baseline(cells: dict[str, Cell]) -> str:
    """The row that a column is held against: by hand, where that can be measured, else sdpa."""
    return next((row for row in ("hand", "sdpa") if "ms" in cells.get(row, {})), "hand")


def measured_rows(results: Results) -> dict[str, Row]:
    """Those with a cell."""
    return {name: row for name, row in ROWS.items() if any(name in cells for cells in results.data["cells"].values())}


def speed_table(results: Results) -> run.Table:
    """Rows by columns, and what rewriting costs over writing by hand."""
    columns = list(results.data["cells"])
    rows = [
        [row.label, *(time_and_memory(results.get(c, name)) for c in columns)]
        for name, row in measured_rows(results).items()
    ]
    for base, label in (("hand", "by hand"), ("sdpa", "sdpa")):
        ratios = [ratio(results.get(c, "rewritten"), results.get(c, base)) for c in columns]
        rows += [[f"rewritten / {label}", *ratios]] if {*ratios} != {"–"} else []
    return "Time and peak memory over the weights", ["", *columns], rows


def training_table(results: Results) -> run.Table:
    """What training steps come to: two columns for each that was measured."""
    setup = results.data["setup"]
    columns = [column for column in map(Column.parse, results.data["cells"]) if column.kind == "train"]
    header = ["", *(f"{column} {what}" for column in columns for what in ("tokens/s", "TFLOP/s"))]
    rows = []
    for name, row in measured_rows(results).items():
        figures = []
        for column in columns:
            cell = results.get(str(column), name)
            if "ms" not in cell:
                figures += [run.why_not(cell) or "–", "–"]
                continue
            rate = column.batch * column.tokens / cell["ms"] * 1e3
            flops = column.llama(setup["layers"], setup["hidden"]).training_flops(column.tokens)
            figures += [f"{rate:.0f}", f"{rate * flops / 1e12:.0f}"]
        if {*figures} != {"–"}:
            rows.append([row.label, *figures])
    return "Training, and the model's own products, causal attention counted by half", header, rows


def rewriting_table(results: Results) -> run.Table:
    """A row for each column that was measured rewritten."""
    header = ["", "fused / sites", "rewriting", "compile", "share", "compile by hand", "answers differ by"]
    rows = []
    for column, cells in results.data["cells"].items():
        cell, hand = results.get(column, "rewritten"), results.get(column, "hand")
        if "ms" in cell:
            rows.append(
                [
                    column,
                    models.sites(cell),
                    f"{cell['rewrite_ms']:.1f} ms",
                    f"{cell['compile_s']:.1f} s",
                    f"{cell['rewrite_ms'] / cell['compile_s'] / 10:.2f} %",
                    f"{hand['compile_s']:.1f} s" if "ms" in hand else "–",
                    difference(cell, results.get(column, baseline(cells))),
                ]
            )
    return "The rewriting (find to emit), and the rewritten model against by hand, or sdpa", header, rows


def repeated_kv(results: Results) -> Iterator[str]:
    """A line for each decode column: were K and V copied to as many heads as the query has?"""
    setup = results.data["setup"]
    for name, cells in results.data["cells"].items():
        column, base = Column.parse(name), cells.get("hand", {})
        if column.kind != "decode" or "gib" not in base:
            continue
        llama = column.llama(setup["layers"], setup["hidden"])
        heads, itemsize = llama.num_attention_heads, getattr(torch, setup["dtype"]).itemsize
        copies = 2 * column.batch * heads * (column.tokens + 1) * llama.head_dim * itemsize / GIB
        over = {row: cells[row]["gib"] - base["gib"] for row in ROWS if "gib" in cells.get(row, {})}
        line = f"{name}: a layer's K and V repeated to {heads} heads are {copies:.2f} GiB; "
        line += "peak over by hand's: "
        line += ", ".join(f"{row} {gib:+.2f} GiB" for row, gib in over.items() if row != "hand")
        if "rewritten" in over:  # K alone, or V alone, would be half of it
            line += f" (rewritten: {'no copy' if over['rewritten'] < copies / 4 else 'K or V is copied'})"
        yield line


def plot(results: Results, path: Path) -> None:
    """Time and peak memory of each column, as multiples of what the column is held against."""
    from matplotlib.figure import Figure  # draws without a display

    columns: dict[str, dict[str, Cell]] = results.data["cells"]
    rows = measured_rows(results)
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels: Any = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(rows)
    for panel, key, unit in zip(panels, ("ms", "gib"), ("ms", "GiB")):
        for i, (name, row) in enumerate(rows.items()):
            panel.bar(0, 0, color=f"C{i}", label=row.label)
            for x, cells in enumerate(columns.values()):
                cell, at = cells.get(name, {}), x + (i - (len(rows) - 1) / 2) * width
                value, base = cell.get(key), cells.get(baseline(cells), {}).get(key)
                if value is None or base is None:
                    height, text = 0.0, OUT_OF_MEMORY if cell.get("failed") == OUT_OF_MEMORY else ""
                else:
                    height, text = min(value / base, 5), f"{value:.3g}" if value < 1000 else f"{value:.0f}"
                panel.bar(at, height, width * 0.92, color=f"C{i}")
                panel.text(at, height + 0.05, text, rotation=90, ha="center", va="bottom", fontsize=7)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_ylabel(f"× by hand, or sdpa\n(figures: {unit})")
        panel.set_ylim(0, 6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_title("Time", loc="left", fontsize=10)
    panels[1].set_title("Peak memory over the weights (bars end at 5 ×)", loc="left", fontsize=10)
    panels[1].set_xticks(range(len(columns)), columns)
    figure.legend(
        *panels[0].get_legend_handles_labels(), ncols=3, frameon=False, fontsize=8, loc="outside lower center"
    )
    figure.suptitle(", ".join(f"{name} {value}" for name, value in results.data["setup"].items()), fontsize=9)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_choice(parser, "--rows", ROWS)
    parser.add_argument("--columns", nargs="+", type=Column.parse, help=", ".join(map(str, COLUMNS)))
    parser.add_argument("--layers", type=positive, default=32, help="of the model (%(default)s; tiny: 2)")
    parser.add_argument("--hidden", type=positive, default=4096, help="its hidden size (%(default)s; tiny: 64)")
    run.add_compiler(parser)
    run.add_plot(parser, "draw time and memory of every row and column")


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    run.check_plot(options)
    layers, hidden = (2, 64) if options.tiny else (options.layers, options.hidden)
    how = (options.device, getattr(torch, options.dtype), options.compiler, options.repeat)
    tasks = [
        run.Task(str(column), row, partial(measure, column, ROWS[row], column.llama(layers, hidden), *how))
        for column, row in product(options.columns or (TINY if options.tiny else COLUMNS), options.rows)
    ]
    results = Results(options.json)
    run.fill(
        results,
        tasks,
        lambda: models.setup(options) | {"layers": layers, "hidden": hidden} | run.unusual(options),
        options.limit_s,
    )
    tables = [table for table in (speed_table(results), training_table(results), rewriting_table(results)) if table[2]]
    run.show(results, tables, [*repeated_kv(results)], options.markdown)
    if options.plot and results.data["cells"]:
        plot(results, options.plot)
    return int(results.failures() > 0)
