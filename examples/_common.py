"""What the examples share: the text, the truth in float64, models compared with and without the rewriter."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import attn_rewriter
from attn_rewriter.bench.measure import peak_bytes_of
from attn_rewriter.progress import working
from attn_rewriter.timing import seconds_of

TEXT = Path(__file__).with_name("text.txt").read_text(encoding="utf-8")
RUNS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every example takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s")
    parser.add_argument("--kernel", default="auto", help="a kernel's name (default: the fastest usable)")


def byte_ids(vocab_size: int = 256) -> Tensor:
    """The text as token ids for a model without a tokenizer: its bytes."""
    return torch.tensor(list(TEXT.encode())) % vocab_size


def windows(ids: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Consecutive windows `[batch_size, seq_len]` of the ids, which start over when they run out."""
    return ids[torch.arange(batch_size * seq_len) % len(ids)].view(batch_size, seq_len)


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
    with working("running in float64"):
        truth = call_in_float64(model, inputs, train=train)
    before = attn_rewriter.report_of(model)
    with working("running for the first time"):
        first_seconds = [seconds_of(run) for run in runs.values()]
    after = attn_rewriter.report_of(model)
    fused = "", f"{after.n_fused - before.n_fused}/{after.n_sites - before.n_sites} fused"
    with working("measuring"):
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
