"""A short training run, eager and rewritten side by side: the same initial weights and the same batches.

    python examples/finetune.py --plot finetune.png

Trains a byte-level GPT of three million parameters on the text beside this file. It has dropout, so that eager runs
differ by their random numbers: there are several, and the table says how far from the first one the others are, and how
far the rewritten one is. The loss curves are plotted (with matplotlib).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from _common import add_options, byte_ids
from models import GPT
from rich import box
from rich.table import Table
from torch import Tensor, nn

import attn_rewriter
from attn_rewriter.bench.measure import console, positive
from attn_rewriter.progress import working


class Run:
    """A model in training, with the loss and the time of every step so far."""

    def __init__(self, model: nn.Module, lr: float, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.warm_up = torch.optim.lr_scheduler.LinearLR(self.optimizer, start_factor=0.05, total_iters=20)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Tensor) -> None:
        torch.manual_seed(self.seed + len(self.losses))
        start = time.perf_counter()
        loss = self.model(batch[:, :-1], batch[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.warm_up.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def from_(self, other: Run) -> list[float]:
        """How far the losses of two runs are apart, step by step."""
        return [abs(x - y) for x, y in zip(self.losses, other.losses, strict=True)]


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    model = GPT(256, args.seq_len, dim=256, num_layers=4, num_heads=4, dropout=args.dropout).to(args.device)
    eager = [Run(copy.deepcopy(model), args.lr, i * args.steps) for i in range(args.runs)]
    rewritten = Run(attn_rewriter.optimize(model, kernel=args.kernel), args.lr, 0)

    samples = byte_ids().unfold(0, args.seq_len + 1, 1)
    batches = samples[torch.randint(len(samples), (args.steps, args.batch_size))].to(args.device)
    with working("compiling", total=args.steps) as line:
        for batch in batches:
            for run in (*eager, rewritten):
                run.step(batch)
            losses = f"loss: eager {eager[0].losses[-1]:.3f}, rewritten {rewritten.losses[-1]:.3f}"
            line.advance(losses)

    print(attn_rewriter.report_of(model))
    console.print(loss_table(eager, rewritten))
    if args.plot:
        plot(eager, rewritten, args.plot)
        print(f"The loss curves are in {args.plot}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    for name, default in {"steps": 200, "batch-size": 2, "seq-len": 256, "runs": 3}.items():
        about = "of eager; " if name == "runs" else ""
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{about}default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s; with 0 all runs should agree")
    parser.add_argument("--plot", metavar="PNG", help="draw the loss curves into this file")
    return parser.parse_args()


def loss_table(eager: Sequence[Run], rewritten: Run) -> Table:
    """The losses at about ten steps, the time of a step, and how far the runs are apart."""
    first, *others = eager
    before, after = (statistics.median(run.seconds[1:]) * 1e3 for run in (first, rewritten))
    table = Table(
        title="Loss",
        caption=f"median step, eager: {before:.0f} ms\n"
        f"median step, rewritten: {after:.0f} ms, {before / after:.2f}×\n"
        f"first step, with compilation: {rewritten.seconds[0]:.1f} s\n"
        f"from the first eager run, the rewritten one: {distance([rewritten], first)}\n"
        f"from the first eager run, the other eager ones: {distance(others, first)}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for header in ("step", *(f"eager {i + 1}" for i in range(len(eager))), "rewritten"):
        table.add_column(header, justify="right")
    steps = len(first.losses)
    for step in sorted({0, steps - 1, *range(9, steps, max(10, steps // 100 * 10))}):
        table.add_row(f"{step + 1}", *(f"{run.losses[step]:.5f}" for run in (*eager, rewritten)))
    return table


def distance(runs: Sequence[Run], first: Run) -> str:
    """How far losses are from those of another run."""
    apart = [run.from_(first) for run in runs]
    if not apart:
        return "there are none"
    return f"at most {max(map(max, apart)):.1e}, on average {statistics.mean(map(statistics.mean, apart)):.1e}"


def plot(eager: Sequence[Run], rewritten: Run, path: str) -> None:
    """All curves, and below them how far each is from the first eager one."""
    first, *others = eager
    figure, (top, bottom) = plt.subplots(2, sharex=True, height_ratios=(3, 1), layout="constrained")
    for i, run in enumerate(eager):
        top.plot(run.losses, label=f"eager, run {i + 1}", linewidth=4 - i, alpha=0.4)
    top.plot(rewritten.losses, label="rewritten", linewidth=1.2, color="black")
    top.set(ylabel="loss (nats per byte)", title="The same training run, eager and rewritten")
    top.legend(frameon=False)
    for run in others:
        bottom.semilogy(run.from_(first), ".", alpha=0.4)
    bottom.semilogy(rewritten.from_(first), ".", color="black")
    bottom.set(xlabel="step", ylabel="from eager, run 1")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
