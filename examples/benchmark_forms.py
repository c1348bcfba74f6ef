"""Attention alone, in the forms that models write: what each kernel makes of it on one GPU.

Rows are forms, as eager functions; columns the kernels, asked for by name, all compiled by Inductor:

    python examples/benchmark_forms.py --json forms.json

Times are medians of CUDA events after warm-up, in milliseconds: forward, and forward with backward. Memory is the peak
of forward with backward over the inputs, in GiB. A kernel that can't compute a form has a dash. Without a GPU, at tiny
sizes and without meaning: `--device cpu --tiny`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import attn_rewriter

KERNELS = ("eager", "sdpa", "flex")


@dataclass(frozen=True)
class Form:
    """An eager attention and its sizes; `score` is what it does to the scaled scores."""

    score: Callable[..., Any]
    batch: int
    heads: int
    length: int
    head_dim: int
    kv_heads: int | None = None
    extra: Callable[..., dict[str, torch.Tensor]] = field(default=lambda form, device: {})

    def inputs(self, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """The arguments of the form; queries, keys and values as models have them, heads after positions in memory."""

        def draw(heads: int) -> torch.Tensor:
            shape = (self.batch, self.length, heads, self.head_dim)
            return torch.randn(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_()

        kv_heads = self.kv_heads or self.heads
        extra = {
            name: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in self.extra(self, device).items()
        }
        return {"q": draw(self.heads), "k": draw(kv_heads), "v": draw(kv_heads), **extra}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **extra: torch.Tensor) -> torch.Tensor:
        if self.kv_heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        scores = self.score(q @ k.mT * self.head_dim**-0.5, **extra)
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def _distance(scores: torch.Tensor) -> torch.Tensor:
    i = torch.arange(scores.shape[-1], device=scores.device)
    return i[:, None] - i[None, :]


def _causal(scores: torch.Tensor, window: int | None = None) -> torch.Tensor:
    distance = _distance(scores)
    keep = distance >= 0
    if window is not None:
        keep = keep & (distance < window)
    return scores.masked_fill(~keep, float("-inf"))


def _padding(form: Form, device: str) -> dict[str, torch.Tensor]:
    """Padded on the left to a half, a third, … of the length."""
    first = torch.tensor([form.length - form.length // (i + 1) for i in range(form.batch)], device=device)
    return {"padding": torch.arange(form.length, device=device)[None] >= first[:, None]}


def _opaque(form: Form, device: str) -> dict[str, torch.Tensor]:
    i = torch.arange(form.length, device=device)
    return {"mask": (_padding(form, device)["padding"][:, None, None, :] & (i[None, :] <= i[:, None]))}


def _bias(form: Form, device: str) -> dict[str, torch.Tensor]:
    shape = (1, form.heads, form.length, form.length)
    return {"bias": torch.randn(shape, dtype=torch.bfloat16, device=device)}


def _learned_bias(form: Form, device: str) -> dict[str, torch.Tensor]:
    return {name: bias.requires_grad_() for name, bias in _bias(form, device).items()}


def _slopes(form: Form, device: str) -> dict[str, torch.Tensor]:
    slopes = torch.logspace(0, -8, form.heads, base=2.0, device=device)
    return {"alibi": (slopes[:, None, None] * torch.arange(form.length, device=device)).to(torch.bfloat16)}


def _tau(form: Form, device: str) -> dict[str, torch.Tensor]:
    return {
        "tau": torch.rand(form.heads, 1, 1, dtype=torch.bfloat16, device=device).requires_grad_(),
        **_learned_bias(form, device),
    }


FORMS = {
    "causal": Form(_causal, 4, 32, 4096, 128, 8),
    "causal, padding": Form(
        lambda s, padding: _causal(s.masked_fill(~padding[:, None, None], float("-inf"))), 4, 32, 4096, 128, 8, _padding
    ),
    "mask tensor": Form(lambda s, mask: s.masked_fill(~mask, float("-inf")), 4, 32, 4096, 128, 8, _opaque),
    "window 512": Form(lambda s: _causal(s, 512), 2, 32, 8192, 128, 8),
    "softcap, causal": Form(lambda s: _causal(50 * torch.tanh(s / 50)), 4, 16, 4096, 256, 8),
    "ALiBi, causal": Form(lambda s, alibi: _causal(s + alibi), 4, 32, 2048, 128, None, _slopes),
    "bias": Form(lambda s, bias: s + bias, 8, 12, 1024, 64, None, _bias),
    "learned bias": Form(lambda s, bias: s + bias, 8, 12, 1024, 64, None, _learned_bias),
    "learned bias, causal": Form(lambda s, bias: _causal(s + bias), 8, 12, 1024, 64, None, _learned_bias),
    "windows of 49": Form(lambda s, bias: s + bias, 4096, 4, 49, 32, None, _learned_bias),
    "windows of 256, scaled": Form(lambda s, tau, bias: s * tau + bias, 1024, 8, 256, 32, None, _tau),
    "padding, 512": Form(
        lambda s, padding: s.masked_fill(~padding[:, None, None], -1e9), 32, 12, 512, 64, None, _padding
    ),
}


def compiled(form: Form, kernel: str) -> Callable[..., torch.Tensor]:
    """The form through Inductor, with the kernel asked for, or as it is."""
    torch._dynamo.reset()
    if kernel == "eager":
        return torch.compile(form)
    return attn_rewriter.optimize(form.__call__, kernel=kernel)


def measure(form: Form, kernel: str, device: str, repeat: int) -> dict[str, float] | None:
    """Times and memory of one cell; None where the kernel can't compute the form."""
    inputs = form.inputs(device)
    function = compiled(form, kernel)
    wanted = [x for x in inputs.values() if x.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            function(**inputs)

    def both() -> None:
        output = function(**inputs)
        torch.autograd.grad(output, wanted, torch.ones_like(output))

    try:
        times = {"forward": _median(forward, device, repeat), "both": _median(both, device, repeat)}
    except torch.cuda.OutOfMemoryError:
        return {"forward": float("nan"), "both": float("nan"), "peak": float("nan")}
    except Exception as error:
        if "KernelUnavailable" not in str(error):
            raise
        return None
    peak = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = torch.cuda.max_memory_allocated() - before
    return {**times, "peak": peak / 2**30}


def _median(function: Callable[[], None], device: str, repeat: int) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeat):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=[*FORMS], metavar="FORM")
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=[*KERNELS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in options.forms:
        form = FORMS[name]
        if options.tiny:
            form = Form(form.score, 2, 4, 32, 16, 2 if form.kv_heads else None, form.extra)
        for kernel in options.kernels:
            if f"{name}/{kernel}" not in cells:
                cells[f"{name}/{kernel}"] = measure(form, kernel, options.device, options.repeat)
                if options.json:
                    options.json.write_text(json.dumps(cells, indent=1))
    table = Table("form", *(f"{kernel}: forward, both, GiB" for kernel in options.kernels))
    for name in options.forms:
        found = [cells[f"{name}/{kernel}"] for kernel in options.kernels]
        table.add_row(
            name, *("–" if c is None else f"{c['forward']:.3f}, {c['both']:.3f}, {c['peak']:.2f}" for c in found)
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
