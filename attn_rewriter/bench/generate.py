"""Tokens in a second: `generate` with a static cache, as transformers compiles it and rewritten.

The model has the shape of Llama-3-8B and random weights. It takes prompts of 4096 tokens and goes on for 256, greedily:
alone, eight at a time, and eight of uneven lengths, padded on the left.
`generate` compiles the model for new tokens, one at a time, by Inductor with mode="reduce-overhead", which is CUDA
graphs; the mask is a tensor that is made outside of what is compiled:

    eager             attn_implementation="eager"; prompts are not compiled
    sdpa              attn_implementation="sdpa", which makes no mask for a prompt without padding; not compiled either
    sdpa, prompt too  the same with `prefill_chunk_size`, with which prompts are compiled as new tokens are
    rewritten         the row "eager", built and run under `with attn_rewriter.patch():`, nothing else is changed. The
                      patch compiles prompts, without CUDA graphs

Tokens in a second count all new tokens but each sequence's first, which comes with the prompt, over the time of
`generate` beyond that of a `generate` of one token. Memory is the peak over the weights, from the first call on: the
cache and what CUDA graphs hold are in it.

    python -m attn_rewriter bench generate --json generate.json --plot generate.png

With --json, cells in the file are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_rewriter.bench import models, run
from attn_rewriter.bench.measure import Cell, Results, time_step
from attn_rewriter.patching import patch


@dataclass(frozen=True)
class Sizes:
    """A model, how long its prompts are, and how many tokens follow."""

    llama: models.Llama
    prompt: int
    new: int


FULL = Sizes(models.Llama(32, 4096, 14336, 32, 8, vocab_size=128256, rope_theta=500000.0), 4096, 256)
TINY = Sizes(models.Llama(2, 64, 128, 4, 2, vocab_size=256), 16, 8)


@dataclass(frozen=True)
class Row:
    """A model's attention, whether it is rewritten, and whether `generate` compiles prompts."""

    attn_implementation: str
    rewrite: bool = False
    prompts: bool = False


ROWS = {
    "eager": Row("eager"),
    "sdpa": Row("sdpa"),
    "sdpa, prompt too": Row("sdpa", prompts=True),
    "rewritten": Row("eager", rewrite=True),
}
COLUMNS = {"batch 1": (1, False), "batch 8": (8, False), "batch 8, padded": (8, True)}


def prompts(sizes: Sizes, batch: int, padded: bool, device: str) -> dict[str, Tensor]:
    """Random tokens and the mask of those that count, `[batch, prompt]` both."""
    torch.manual_seed(1)
    ids = torch.randint(sizes.llama.vocab_size, (batch, sizes.prompt), device=device)
    mask = models.left_padding(batch, sizes.prompt, device) if padded else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask}


def configuration(row: Row, prompt: int, compiler: str) -> Any:
    """How to generate: greedily, never ending early, into a static cache."""
    from transformers import CompileConfig, GenerationConfig

    # `patch` takes over what is compiled by Inductor, and has a compiler of its own.
    compiling: Any = CompileConfig(fullgraph=True, backend="inductor" if row.rewrite else compiler, mode=mode(compiler))
    compiling._compile_all_devices = True  # on a CPU, too
    return GenerationConfig(
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=compiling,
        prefill_chunk_size=prompt if row.prompts else None,
    )


def mode(compiler: str) -> str:
    """CUDA graphs, where the compiler can make them."""
    return "reduce-overhead" if compiler == "inductor" else "default"


def measure(sizes: Sizes, column: str, row: str, device: str, dtype: torch.dtype, compiler: str, repeat: int) -> Cell:
    """One cell, from empty caches."""
    how, (batch, padded) = ROWS[row], COLUMNS[column]
    given = prompts(sizes, batch, padded, device)

    def step(new: int) -> Tensor:
        return model.generate(**given, min_new_tokens=new, max_new_tokens=new)[:, sizes.prompt :]

    around: Any = patch(compiler=compiler) if how.rewrite else contextlib.nullcontext()
    with models.from_scratch(device, compiler), around:
        model = models.build(sizes.llama, device, dtype, how.attn_implementation).eval()
        model.generation_config = configuration(how, sizes.prompt, compiler)
        # The longer one first: its cache has room for the other, which then runs the same graphs.
        tokens, cell = time_step(partial(step, sizes.new), Tensor.tolist, repeat, patience=run.PATIENCE)
        _, prefill = time_step(partial(step, 1), lambda _: None, repeat, patience=run.PATIENCE)
    if any(len(sequence) != sizes.new for sequence in tokens):
        raise AssertionError(f"not {sizes.new} new tokens")
    if "gib_at_first" in cell:
        cell["gib"] = max(cell["gib"], cell.pop("gib_at_first"))
    per_s = batch * (sizes.new - 1) / max(cell["ms"] - prefill["ms"], 1e-3) * 1e3
    cell |= {"prefill_ms": prefill["ms"], "tokens_per_s": per_s, "tokens": tokens}
    return cell | (models.rewriting(around.report) if how.rewrite else {})


# ------------------------------------------------------------------------------------------- tables


def rows(results: Results) -> Iterator[list[str]]:
    """One for each cell that was measured, by columns."""
    for column, row in product(COLUMNS, ROWS):
        cell = results.get(column, row)
        if "tokens_per_s" in cell:
            yield [
                f"{column}: {row}",
                f"{cell['tokens_per_s']:.0f}",
                f"{cell['prefill_ms']:.1f}",
                f"{cell['ms']:.1f}",
                f"{cell['gib']:.2f}" if "gib" in cell else "–",
                f"{cell['compile_s']:.1f}",
                models.sites(cell),
                same(cell, results.get(column, "sdpa")),
            ]
        elif cell:
            yield [f"{column}: {row}", run.why_not(cell), *[""] * 6]


def same(cell: Cell, base: Cell) -> str:
    """The share of tokens before the first that differs, of all sequences."""
    if "tokens" not in base or cell is base:
        return "–"
    pairs = [[x == y for x, y in zip(*sequences)] for sequences in zip(cell["tokens"], base["tokens"])]
    leading = sum([*equal, False].index(False) for equal in pairs)
    return f"{leading / sum(map(len, pairs)):.0%}"


def plot(results: Results, path: Path) -> None:
    """Bars of tokens in a second, a panel for each batch."""
    from matplotlib.figure import Figure  # draws without a display

    columns = [column for column in COLUMNS if any("ms" in results.get(column, row) for row in ROWS)]
    figure = Figure(figsize=(3 * len(columns), 3.4), layout="constrained")
    for i, column in enumerate(columns):
        panel: Any = figure.add_subplot(1, len(columns), i + 1)
        for x, row in enumerate(ROWS):
            speed = results.get(column, row).get("tokens_per_s")
            if speed:
                panel.bar(x, speed, color=f"C{x}")
                panel.text(x, speed, f"{speed:.0f}", ha="center", va="bottom", fontsize=9)
        panel.set_xticks(range(len(ROWS)), [*ROWS], rotation=30, ha="right")
        panel.set_title(column, fontsize=11)
        panel.margins(y=0.1)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens in a second")
    figure.suptitle(f"{results.data['setup']['device']}, {results.data['setup']['dtype']}")
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_choice(parser, "--rows", ROWS)
    run.add_choice(parser, "--columns", COLUMNS)
    run.add_compiler(parser)
    run.add_plot(parser, "draw tokens in a second")


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    run.check_plot(options)
    sizes = TINY if options.tiny else FULL
    how = (options.device, getattr(torch, options.dtype), options.compiler, options.repeat)
    tasks = [
        run.Task(column, row, partial(measure, sizes, column, row, *how))
        for column, row in product(options.columns, options.rows)
    ]
    results = Results(options.json)
    run.fill(results, tasks, lambda: models.setup(options) | run.unusual(options), options.limit_s)
    header = ["", "tokens / s", "prompt, ms", "all, ms", "GiB", "compile, s", "fused / sites", "tokens as sdpa's"]
    run.show(results, [("Generation", header, [*rows(results)])], [], options.markdown)
    if options.plot and results.data["cells"]:
        plot(results, options.plot)
    return int(results.failures() > 0)
