"""Attention alone, in the forms that models write: what each kernel makes of it on one GPU.

Rows are forms, as eager functions; columns the kernels, asked for by name, "auto" for what the rewriter takes by
itself, "eager" for the code as it is; all compiled by Inductor:

    python -m attn_rewriter bench masks --json masks.json

Times are medians after warm-up, launching not counted: forward without gradients, and a training step, forward with
backward. Outputs are compared with float64 in the first batch, but for those with dropout. Memory is the peak over the
inputs. A kernel that can't compute a form has a dash, its reasons are in the file; cells in the file are not measured
again. Without a GPU, without meaning: `--device cpu --tiny`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_rewriter.bench import run
from attn_rewriter.bench.measure import Cell, Results, off_by, time_step, worst_error

DIRECTIONS = ("forward", "training")


@dataclass(frozen=True)
class Form:
    """An eager attention and its sizes; `score` is what it does to the scores, which are scaled or not."""

    score: Callable[..., Any]
    batch: int
    heads: int
    length: int
    head_dim: int
    kv_heads: int | None = None
    extra: Callable[..., dict[str, Tensor]] = field(default=lambda form, device: {})
    scaled: bool = True
    dropout_p: float = 0.0

    @property
    def sizes(self) -> str:
        """As in "4×32/8×4096×128": batch, heads of queries and of keys, length, head_dim."""
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        return f"{self.batch}×{heads}×{self.length}×{self.head_dim}"

    def tiny(self) -> Form:
        """The same at a size without meaning."""
        return replace(self, batch=2, heads=4, length=32, head_dim=16, kv_heads=2 if self.kv_heads else None)

    def inputs(self, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The arguments of the form; queries, keys and values as models have them, heads after positions in memory."""

        def draw(heads: int) -> Tensor:
            shape = (self.batch, self.length, heads, self.head_dim)
            return torch.randn(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_()

        kv_heads = self.kv_heads or self.heads
        extra = {
            name: x.detach().to(dtype).nan_to_num().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in self.extra(self, device).items()
        }
        return {"q": draw(self.heads), "k": draw(kv_heads), "v": draw(kv_heads), **extra}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **extra: Tensor) -> Tensor:
        if self.kv_heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        scores = q @ k.mT
        scores = self.score(scores * self.head_dim**-0.5 if self.scaled else scores, **extra)
        if sinks is not None:
            scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        if sinks is not None:
            weights = weights[..., :-1]
        if self.dropout_p:
            weights = F.dropout(weights, self.dropout_p)
        return (weights @ v).transpose(1, 2).flatten(2)


def _distance(scores: Tensor) -> Tensor:
    i = torch.arange(scores.shape[-1], device=scores.device)
    return i[:, None] - i[None, :]


def _causal(scores: Tensor, window: int | None = None) -> Tensor:
    distance = _distance(scores)
    keep = distance >= 0
    if window is not None:
        keep = keep & (distance < window)
    return scores.masked_fill(~keep, float("-inf"))


def _padded(scores: Tensor, padding: Tensor, low: float = -math.inf) -> Tensor:
    return scores.masked_fill(~padding[:, None, None], low)


def _t5(scores: Tensor, embedding: Tensor) -> Tensor:
    """The score of each bucket and head, `embedding` `[32, heads]`: one bucket for each distance below 8 on either
    side, and 8 up to 128 and beyond, in logarithmic steps."""
    behind = -_distance(scores)
    far = 8 + (torch.log(behind.abs().clamp(min=1) / 8) / math.log(16) * 8).long()
    bucket = torch.where(behind.abs() < 8, behind.abs(), far.clamp(max=15)) + 16 * (behind > 0)
    return scores + embedding[bucket].permute(2, 0, 1).unsqueeze(0)


def _padding(form: Form, device: str) -> dict[str, Tensor]:
    """Padded on the left to a half, a third, … of the length."""
    return _left_padding(form, device, [1 / (i + 1) for i in range(form.batch)])


def _left_padding(form: Form, device: str, lengths: list[float]) -> dict[str, Tensor]:
    """Padded on the left to these parts of the length."""
    first = torch.tensor([form.length - int(form.length * part) for part in lengths[: form.batch]], device=device)
    return {"padding": torch.arange(form.length, device=device)[None] >= first[:, None]}


def _prompts(form: Form, device: str) -> dict[str, Tensor]:
    """A batch of prompts, the longest first."""
    return _left_padding(form, device, [1, 3000 / 4096, 1 / 2, 1 / 4])


def _opaque(padding: Callable[[Form, str], dict[str, Tensor]]) -> Callable[[Form, str], dict[str, Tensor]]:
    """Padding and what comes later as one boolean tensor, which nobody can look into."""

    def mask(form: Form, device: str) -> dict[str, Tensor]:
        i = torch.arange(form.length, device=device)
        return {"mask": (padding(form, device)["padding"][:, None, None, :] & (i[None, :] <= i[:, None]))}

    return mask


def _additive(form: Form, device: str) -> dict[str, Tensor]:
    """Padding and what comes later as transformers' `generate` hands it in, in the type of the scores."""
    keep = _opaque(_prompts)(form, device)["mask"]
    return {"mask": torch.zeros_like(keep, dtype=torch.bfloat16).masked_fill(~keep, torch.finfo(torch.bfloat16).min)}


def _bias(form: Form, device: str) -> dict[str, Tensor]:
    shape = (1, form.heads, form.length, form.length)
    return {"bias": torch.randn(shape, dtype=torch.bfloat16, device=device)}


def _learned_bias(form: Form, device: str) -> dict[str, Tensor]:
    return {name: bias.requires_grad_() for name, bias in _bias(form, device).items()}


def _slopes(form: Form, device: str) -> dict[str, Tensor]:
    slopes = torch.logspace(0, -8, form.heads, base=2.0, device=device)
    return {"alibi": (slopes[:, None, None] * torch.arange(form.length, device=device)).to(torch.bfloat16)}


def _tau(form: Form, device: str) -> dict[str, Tensor]:
    return {
        "tau": torch.rand(form.heads, 1, 1, dtype=torch.bfloat16, device=device).requires_grad_(),
        **_learned_bias(form, device),
    }


def _buckets(form: Form, device: str) -> dict[str, Tensor]:
    return {"embedding": torch.randn(32, form.heads, device=device).requires_grad_()}


def _sinks(form: Form, device: str) -> dict[str, Tensor]:
    return {"sinks": torch.randn(form.heads, 1, 1, device=device).requires_grad_()}


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, float("-inf"))


def _encoder(scores: Tensor, padding: Tensor) -> Tensor:
    return _padded(scores, padding, -1e9)


FORMS = {
    "causal": Form(_causal, 4, 32, 4096, 128, 8),
    "causal, padding": Form(lambda s, padding: _causal(_padded(s, padding)), 4, 32, 4096, 128, 8, _padding),
    "mask tensor": Form(_masked, 4, 32, 4096, 128, 8, _opaque(_padding)),
    "causal, left padding": Form(lambda s, padding: _causal(_padded(s, padding)), 4, 32, 4096, 128, 8, _prompts),
    "left padding, mask tensor": Form(_masked, 4, 32, 4096, 128, 8, _opaque(_prompts)),
    "left padding, additive tensor": Form(lambda s, mask: s + mask, 4, 32, 4096, 128, 8, _additive),
    "causal, 8192": Form(_causal, 2, 32, 8192, 128, 8),
    "window 512": Form(lambda s: _causal(s, 512), 2, 32, 8192, 128, 8),
    "sinks, window": Form(lambda s: _causal(s, 128), 2, 64, 4096, 64, 8, _sinks),
    "softcap, causal": Form(lambda s: _causal(50 * torch.tanh(s / 50)), 4, 16, 4096, 256, 8),
    "ALiBi, causal": Form(lambda s, alibi: _causal(s + alibi), 4, 32, 2048, 128, None, _slopes),
    "bias": Form(lambda s, bias: s + bias, 8, 12, 1024, 64, None, _bias),
    "learned bias": Form(lambda s, bias: s + bias, 8, 12, 1024, 64, None, _learned_bias),
    "learned bias, causal": Form(lambda s, bias: _causal(s + bias), 8, 12, 1024, 64, None, _learned_bias),
    "T5 bias": Form(_t5, 16, 16, 1024, 64, None, _buckets, scaled=False),
    "windows of 49": Form(lambda s, bias: s + bias, 4096, 4, 49, 32, None, _learned_bias),
    "windows of 256, scaled": Form(lambda s, tau, bias: s * tau + bias, 1024, 8, 256, 32, None, _tau),
    "head_dim 512": Form(lambda s: s, 1, 1, 16384, 512),
    "head_dim 512, 4096": Form(lambda s: s, 8, 1, 4096, 512),
    "head_dim 512, causal": Form(_causal, 1, 16, 8192, 512, 4),
    "padding, 512": Form(_encoder, 32, 12, 512, 64, None, _padding),
    "padding, 512, dropout": Form(_encoder, 32, 12, 512, 64, None, _padding, dropout_p=0.1),
    "padding, 2048": Form(_encoder, 8, 16, 2048, 64, None, _padding),
    "padding, 2048, dropout": Form(_encoder, 8, 16, 2048, 64, None, _padding, dropout_p=0.1),
}


def column(name: str, direction: str) -> str:
    """The name of a column in the results."""
    return f"{name}, {direction}"


def measure(
    form: Form, direction: str, kernel: str, device: str, dtype: torch.dtype, compiler: str, repeat: int
) -> Cell:
    """One cell."""
    inputs = form.inputs(device, dtype)
    function = run.rewritten(form.__call__, kernel, compiler)
    wanted = [x for x in inputs.values() if x.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(**inputs)

    def training() -> None:
        output = function(**inputs)
        torch.autograd.grad(output, wanted, torch.ones_like(output))

    def seen(output: Tensor | None) -> Cell:
        taken = run.used(function, kernel)
        if output is None or form.dropout_p:
            return taken
        return taken | off_by(lambda *given: form(**dict(zip(inputs, given))), [*inputs.values()], output)

    step: Callable[[], Any] = {"forward": forward, "training": training}[direction]
    taken, cell = time_step(step, seen, repeat, patience=run.PATIENCE, reading_ms=run.READING_MS)
    return cell | taken


def rows(results: Results, forms: Mapping[str, Form], kernels: list[str]) -> Iterator[list[str]]:
    """One for each form that was measured, the best times in bold."""
    for name, form in forms.items():
        cells = {(k, way): results.get(column(name, way), k) for k, way in product(kernels, DIRECTIONS)}
        if not any(cells.values()):
            continue
        least = {
            way: min((cells[k, way].get("ms", float("inf")) for k in kernels if k != "auto"), default=0.0)
            for way in DIRECTIONS
        }
        texts = []
        for kernel in kernels:
            found = [cells[kernel, way] for way in DIRECTIONS]
            times = [
                milliseconds(cell, least[way] if kernel != "auto" else 0.0) for way, cell in zip(DIRECTIONS, found)
            ]
            peak = [f"{cell['gib']:.2f}" for cell in found[-1:] if "gib" in cell]
            taken = sorted({cell["kernel"] for cell in found if "kernel" in cell} - {kernel})
            texts.append(", ".join([*times, *peak, *taken] if any("ms" in cell for cell in found) else times[:1]))
        yield [f"{name}\n{form.sizes}", *texts]


def milliseconds(cell: Cell, least: float) -> str:
    """The time, or why there is none."""
    if "ms" not in cell:
        return run.why_not(cell)
    digits = 2 if cell["ms"] >= 0.1 else 3
    return f"**{cell['ms']:.{digits}f}**" if cell["ms"] == least else f"{cell['ms']:.{digits}f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_kernels(parser, ["eager", *run.NAMED, "auto"])
    run.add_choice(parser, "--forms", FORMS)
    run.add_compiler(parser)


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    forms = {name: FORMS[name].tiny() if options.tiny else FORMS[name] for name in options.forms}
    how = (options.device, getattr(torch, options.dtype), options.compiler, options.repeat)
    tasks = [
        run.Task(column(name, direction), kernel, partial(measure, form, direction, kernel, *how))
        for (name, form), direction, kernel in product(forms.items(), DIRECTIONS, options.kernels)
    ]
    results = Results(options.json)
    run.fill(results, tasks, lambda: run.setup(options) | run.unusual(options), options.limit_s)
    header = ["", *options.kernels]
    title = "Attention by form: milliseconds forward, milliseconds of a training step, GiB of a training step"
    table = (title, header, [*rows(results, forms, options.kernels)])
    run.show(results, [table], [worst_error(results)], options.markdown)
    return int(results.failures() > 0)
