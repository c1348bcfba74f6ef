"""Llama on one GPU: what the rewriter makes of an unmodified eager model, next to the alternatives.

Four rows, all over the same random weights, all compiled by Inductor with static shapes:

    eager       transformers' attn_implementation="eager"
    sdpa        transformers' attn_implementation="sdpa"; under torch.compile its mask is a tensor
    hand        written by hand: scaled_dot_product_attention(is_causal=True, enable_gqa=...), no mask
    rewritten   the eager model through attn_rewriter.optimize(model)

Columns are named workload-BATCHxTOKENS:

    prefill     Llama-2-7B shape; no_grad, no cache, logits of the last token only, as in generate()
    train       the same; forward and backward, loss over all tokens, gradients freed before each step
    decode      at most 4 layers of Llama-3-8B (32 heads over 8 KV heads); one more token per sequence,
                with TOKENS in the DynamicCache

Times are medians of CUDA events after warm-up. Memory is the peak over what was allocated before the
first call: the weights, the inputs and, in decode, the filled cache. Compile time is the first call
less a warm one; each cell compiles from empty caches, and is measured with nothing else running.

    python examples/benchmark_llama.py --json llama.json --markdown

With --json every cell is written as soon as it is measured, and cells in the file are not measured
again: after an interruption run the same command again, or measure what matters first and add the
rest later (--rows hand rewritten, then --rows sdpa eager). Without a GPU, at a tiny size:

    python examples/benchmark_llama.py --device cpu --dtype float32 --hidden 64 --layers 2 --repeat 3 \\
        --columns prefill-1x64 train-2x32 decode-2x64
"""

import argparse
import copy
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _common import rewritten, unchanged
from rich.console import Console
from torch._inductor.utils import fresh_cache
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

import attn_rewriter
from attn_rewriter.bench.measure import (
    GIB,
    OUT_OF_MEMORY,
    Results,
    attempt,
    markdown_table,
    rich_table,
    time_step,
    versions,
)

COLUMNS = (
    "prefill-1x2048",
    "prefill-1x8192",
    "prefill-1x32768",
    "train-4x2048",
    "train-1x8192",
    "decode-8x8192",
)


# --------------------------------------------------------------------------------------------- rows


def by_hand(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What one writes who knows that the model is causal and nothing is padded."""
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


# Registered as attention but not as a mask: transformers then builds no mask (attention_mask is None).
AttentionInterface.register("by_hand", by_hand)


class Row(NamedTuple):
    label: str
    attn_implementation: str
    compile: Callable


ROWS = {
    "eager": Row("HF eager + Inductor", "eager", unchanged),
    "sdpa": Row("HF sdpa + Inductor", "sdpa", unchanged),
    "hand": Row("by hand + Inductor", "by_hand", unchanged),
    "rewritten": Row("HF eager, rewritten", "eager", rewritten),
}


# ------------------------------------------------------------------------------------------ columns


class Shape(NamedTuple):
    """Llama-2-7B's sizes, or Llama-3-8B's for decode; a smaller hidden size keeps their ratios."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, workload, layers, hidden):
        heads = hidden // (128 if hidden % 1024 == 0 else 16)
        if workload == "decode":
            return cls(min(layers, 4), hidden, hidden * 14336 // 4096, heads, max(heads // 4, 1))
        return cls(layers, hidden, hidden * 11008 // 4096, heads, heads)

    @property
    def head_dim(self):
        return self.hidden // self.heads


@lru_cache(maxsize=1)
def build(shape, device, dtype):
    """A Llama with random weights, made where it will be used."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager")


def prefill(model, batch, tokens):
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
    model.eval()

    @torch.no_grad()
    def step():
        return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    return step


def train(model, batch, tokens):
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
    model.train()

    def step():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.v_proj.weight.grad

    return step


def decode(model, batch, tokens):
    config = model.config
    ids = torch.randint(config.vocab_size, (batch, 1), device=model.device)
    shape = (2, batch, config.num_key_value_heads, tokens, config.head_dim)
    cache = DynamicCache(config=config)
    filled = [torch.randn(shape, device=model.device, dtype=model.dtype).unbind() for _ in cache.layers]
    for layer, (keys, values) in zip(cache.layers, filled, strict=True):
        layer.lazy_initialization(keys, values)
    model.eval()

    @torch.no_grad()
    def step():
        for layer, (keys, values) in zip(cache.layers, filled, strict=True):  # forget the step before
            layer.keys, layer.values = keys, values
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return step


WORKLOADS = {"prefill": prefill, "train": train, "decode": decode}


def parse_column(text):
    match = re.fullmatch(r"(prefill|train|decode)-([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not like prefill-1x2048, train-4x2048, decode-8x8192")
    return text, match[1], int(match[2]), int(match[3])


# -------------------------------------------------------------------------------------- measurement


def sample(tensor):
    """About 64 values, to compare between rows. Off the device, so this also waits for it."""
    values = tensor.detach().flatten()
    return values[:: math.ceil(len(values) / 64)].tolist()


def measure(model, row, workload, batch, tokens, repeat):
    """One cell, from empty caches."""
    torch.manual_seed(1)
    view = copy.copy(model)  # a module of its own, to be compiled and thrown away, over the same weights
    view.set_attn_implementation(row.attn_implementation)
    row.compile(view)
    try:
        with fresh_cache():
            answer, cell = time_step(WORKLOADS[workload](view, batch, tokens), sample, repeat, patience=10)
    finally:
        model.zero_grad(set_to_none=True)
    cell["answer"] = answer
    if row.compile is rewritten:
        report = attn_rewriter.report_of(view)
        cell |= {"sites": report.n_sites, "fused": report.n_fused, "rewrite_ms": report.rewrite_seconds * 1e3}
        if report.n_fused < report.n_sites:
            cell["report"] = str(report)
    return cell


def warm_up(device):
    """Imports, compile workers and library handles, so that the first cell doesn't pay for them."""
    square = torch.randn(256, 256, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
    with fresh_cache():
        torch.compile(lambda x: (x @ x).relu() + x)(square)


# ------------------------------------------------------------------------------------------ results


def describe_setup(args):
    return {**versions(args.device), "dtype": args.dtype, "layers": args.layers, "hidden": args.hidden}


# ------------------------------------------------------------------------------------------- tables


def time_and_memory(cell):
    if "ms" not in cell:
        return cell.get("failed", "–").split(":")[0]
    return f"{cell['ms']:.2f} ms" + (f"\n{cell['gib']:.2f} GiB" if "gib" in cell else "")


def in_words(cell):
    """For the line that is printed when the cell is done."""
    if "ms" not in cell:
        return cell["failed"]
    runs = f"{len(cell['times'])} runs, {min(cell['times']):.2f} to {max(cell['times']):.2f} ms"
    return f"{time_and_memory(cell)} ({runs}; compiled in {cell['compile_s']:.0f} s)".replace("\n", ", ")


def ratio(cell, base):
    if "ms" not in cell or "ms" not in base:
        return "–"
    text = f"{cell['ms'] / base['ms']:.3f} ×"
    return text + (f"\n{cell['gib'] / base['gib']:.3f} ×" if base.get("gib") else "")


def difference(cell, base):
    """Of a sample of the answers (logits or gradients): bf16 noise when both compute the same attention."""
    if "ms" not in cell or "ms" not in base:
        return "–"
    x, y = torch.tensor(cell["answer"]), torch.tensor(base["answer"])
    return f"{((x - y).norm() / y.norm()).item():.1e}"


def speed_table(results):
    columns = list(results.data["cells"])
    rows = [
        [row.label, *(time_and_memory(results.get(c, name)) for c in columns)]
        for name, row in ROWS.items()
        if any(results.get(c, name) for c in columns)
    ]
    ratios = [ratio(results.get(c, "rewritten"), results.get(c, "hand")) for c in columns]
    return "Time and peak memory over the weights", ["", *columns], [*rows, ["rewritten / by hand", *ratios]]


def rewriting_table(results):
    header = ["", "fused / sites", "rewriting", "compile", "share", "compile by hand", "answers differ by"]
    rows = []
    for column in results.data["cells"]:
        cell, base = results.get(column, "rewritten"), results.get(column, "hand")
        if "ms" in cell:
            rows.append(
                [
                    column,
                    f"{cell['fused']} / {cell['sites']}",
                    f"{cell['rewrite_ms']:.1f} ms",
                    f"{cell['compile_s']:.1f} s",
                    f"{cell['rewrite_ms'] / cell['compile_s'] / 10:.2f} %",
                    f"{base['compile_s']:.1f} s" if "ms" in base else "–",
                    difference(cell, base),
                ]
            )
    return "The rewriting (find to emit), and the rewritten model against by hand", header, rows


def repeated_kv(results):
    """A line for each decode column: were K and V copied to as many heads as the query has?"""
    setup = results.data["setup"]
    for column, cells in results.data["cells"].items():
        _, workload, batch, tokens = parse_column(column)
        base = cells.get("hand", {})
        if workload != "decode" or "gib" not in base:
            continue
        shape = Shape.of(workload, setup["layers"], setup["hidden"])
        itemsize = getattr(torch, setup["dtype"]).itemsize
        copies = 2 * batch * shape.heads * (tokens + 1) * shape.head_dim * itemsize / GIB
        over = {row: cells[row]["gib"] - base["gib"] for row in ROWS if "gib" in cells.get(row, {})}
        line = f"{column}: a layer's K and V repeated to {shape.heads} heads are {copies:.2f} GiB; "
        line += "peak over by hand's: "
        line += ", ".join(f"{row} {gib:+.2f} GiB" for row, gib in over.items() if row != "hand")
        if "rewritten" in over:  # K alone, or V alone, would be half of it
            line += f" (rewritten: {'no copy' if over['rewritten'] < copies / 4 else 'K or V is copied'})"
        yield line


def show(results, markdown):
    console = Console(width=max(Console().width, 130), highlight=False)
    header = ", ".join(f"{key} {value}" for key, value in results.data["setup"].items())
    commands = list(dict.fromkeys(results.data["commands"]))
    tables = [speed_table(results), rewriting_table(results)]
    tables = [table for table in tables if table[2]]
    for line in (header, *commands):
        console.print(line, markup=False, soft_wrap=True)
    for table in tables:
        console.print(rich_table(*table))
    for line in repeated_kv(results):
        console.print(line, markup=False, soft_wrap=True)
    if markdown:
        body = [header, *(f"`{command}`" for command in commands)]
        body += [markdown_table(*table) for table in tables] + list(repeated_kv(results))
        print("", *body, sep="\n\n")


def plot(results, path):
    """Time and peak memory of each column, as multiples of the row by hand."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    columns = results.data["cells"]
    width = 0.8 / len(ROWS)
    for panel, key, unit in zip(panels, ("ms", "gib"), ("ms", "GiB")):
        for i, (name, row) in enumerate(ROWS.items()):
            for x, cells in enumerate(columns.values()):
                cell, at = cells.get(name, {}), x + (i - (len(ROWS) - 1) / 2) * width
                value, base = cell.get(key), cells.get("hand", {}).get(key)
                label = row.label if x == 0 else None
                if value is None or base is None:
                    text = "out of memory" if cell.get("failed") == OUT_OF_MEMORY else ""
                    panel.text(at, 0.1, text, rotation=90, ha="center", va="bottom", fontsize=7)
                    continue
                height = min(value / base, 5)
                panel.bar(at, height, width * 0.92, color=f"C{i}", label=label)
                panel.text(at, height + 0.05, f"{value:.4g}", rotation=90, ha="center", va="bottom", fontsize=7)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_ylabel(f"× by hand (figures: {unit})")
        panel.set_ylim(0, 6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_title("Time", loc="left", fontsize=10)
    panels[1].set_title("Peak memory over the weights (bars end at 5 ×)", loc="left", fontsize=10)
    panels[1].set_xticks(range(len(columns)), columns)
    panels[0].legend(ncols=2, frameon=False, fontsize=8, loc="upper left")
    setup = ", ".join(f"{name} {value}" for name, value in results.data["setup"].items())
    figure.suptitle(setup, fontsize=9)
    figure.savefig(path, dpi=150)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--columns", nargs="+", type=parse_column, default=[parse_column(c) for c in COLUMNS])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs of a cell, within ten seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every cell; its cells are kept")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw time and memory of every row and column")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown too")
    return parser.parse_args()


def main():
    args = parse_args()
    results = Results(args.json)
    wanted = [(c, row) for c in args.columns for row in args.rows if not results.has(c[0], row)]
    if wanted:
        results.begin(describe_setup(args))
        warm_up(args.device)
    console = Console(highlight=False)
    for (column, workload, batch, tokens), row in wanted:
        with console.status(f"{column}: {ROWS[row].label}: compiling and measuring"):
            shape = Shape.of(workload, args.layers, args.hidden)
            model = build(shape, args.device, getattr(torch, args.dtype))
            cell = attempt(measure, model, ROWS[row], workload, batch, tokens, args.repeat)
        results.put(column, row, cell)
        console.print(f"{column:16} {row:10} {in_words(cell)}", markup=False, soft_wrap=True)
        if "report" in cell:
            console.print(cell["report"], markup=False)
    show(results, args.markdown)
    if args.plot:
        plot(results, args.plot)
    return int(results.failures() > 0)


if __name__ == "__main__":
    sys.exit(main())
