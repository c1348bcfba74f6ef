"""Whatever is rewritten computes what it did: random attention programs and near misses, and every bug found so far.

A `Program` is a sentence of a small grammar. Each table below holds the ways to write one part of attention, as models
write it; `NEAR` and `MISSES` are the ways to be almost attention. No rule says what the rewriter makes of a program: it
may refuse any, but what it rewrites must agree with float64, and what it refuses must stay bit by bit as it was.

`ATTN_REWRITER_EXAMPLES` sets how many programs are tried, `ATTN_REWRITER_SEED` which, `ATTN_REWRITER_DEVICE` where;
`--hypothesis-show-statistics` counts what they were made of, and how many were fused.
"""

from __future__ import annotations

import operator
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_rewriter import AttentionSpec, Device, Refusal, Report
from attn_rewriter.choose import Choice, choose
from attn_rewriter.contract import error, rounding_unit
from attn_rewriter.spec import Mask, Shapes, TensorMask
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, joined, rewritten, together, truth, with_gradients
from tests.standins import installed

EXAMPLES = int(os.environ.get("ATTN_REWRITER_EXAMPLES", 50))
SEED = os.environ.get("ATTN_REWRITER_SEED")
DEVICE = os.environ.get("ATTN_REWRITER_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if DEVICE == "cpu":
        yield
    else:
        with torch.device(DEVICE):
            yield


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------
# The grammar


class Sizes(NamedTuple):
    batch: int
    kv_heads: int
    groups: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor  # [heads, q_len, kv_len]
    tau: Tensor  # [heads, 1, 1]
    sinks: Tensor  # [heads]
    gate: Tensor  # [batch, heads, q_len, 1]
    padding: Tensor  # [batch, kv_len], true where there is a token
    keep: Tensor  # [batch, 1, q_len, kv_len], any mask
    documents: Tensor  # [batch, kv_len], to which each token belongs
    lengths: Tensor  # [batch]
    offset: Tensor  # []


SIZES = (
    Sizes(2, 2, 2, 5, 5, 8, 8),
    Sizes(2, 2, 3, 5, 7, 8, 6),
    Sizes(2, 3, 1, 6, 4, 8, 8),
    Sizes(1, 2, 2, 1, 6, 8, 8),
    Sizes(2, 1, 4, 4, 4, 4, 4),  # multi-query
    Sizes(4, 4, 1, 4, 4, 4, 4),  # all the same
    Sizes(4, 2, 2, 4, 4, 4, 4),  # all the same, two groups
    Sizes(3, 1, 1, 3, 3, 3, 3),  # one head
    Sizes(1, 1, 1, 2, 3, 1, 1),
    Sizes(2, 2, 1, 3, 2, 2, 5),
    Sizes(2, 2, 2, 2, 40, 8, 8),  # a few queries against several blocks of keys
)


def _grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    return (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT).flatten(1, 2)


def _grouped_output(w: Tensor, v: Tensor) -> Tensor:
    return (w.unflatten(1, (v.shape[1], -1)) @ v.unsqueeze(2)).flatten(1, 2)


def _folded_scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], k.shape[2])


def _folded_output(w: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).view(*w.shape[:3], v.shape[3])


def _baddbmm_scores(q: Tensor, k: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], dtype=q.dtype)
    return torch.baddbmm(empty, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.5).view(*q.shape[:3], k.shape[2])


# How the two products are written: from query and key to scores, and from weights and value to the output.
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "matmul": (lambda q, k: q @ k.transpose(-2, -1), lambda w, v: w @ v),
    "torch.matmul": (lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)), lambda w, v: w.matmul(v)),
    "bmm": (_folded_scores, _folded_output),
    "baddbmm": (_baddbmm_scores, _folded_output),
    "einsum": (
        lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
        lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w, v),
    ),
    "einsum, sequence first": (
        lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)),
        lambda w, v: torch.einsum("bhqk,bkhd->bqhd", w, v.transpose(1, 2)).transpose(1, 2),
    ),
    "einsum, other letters": (
        lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
        lambda w, v: torch.einsum("xyij,xyjz->yxiz", w, v).transpose(0, 1),
    ),
    "keys first": (lambda q, k: (k @ q.mT).mT, lambda w, v: (v.mT @ w.mT).mT),
    "grouped": (_grouped_scores, _grouped_output),
}

# How the heads of key or value become as many as the query's. "tiled" is another mapping of heads, not a spelling.
GROUPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "repeat_interleave": lambda x, g: x.repeat_interleave(g, dim=1),
    "expand": lambda x, g: x[:, :, None].expand(*x.shape[:2], g, *x.shape[2:]).flatten(1, 2),
    "expand, reshape": lambda x, g: (
        x.unsqueeze(2).expand(-1, -1, g, -1, -1).reshape(x.shape[0], x.shape[1] * g, x.shape[2], x.shape[3])
    ),
    "tiled": lambda x, g: x.repeat(1, g, 1, 1),
}

# Where the scale goes: onto the query, onto the key, onto the scores.
SCALES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "absent": (lambda q: q, lambda k: k, lambda s: s),
    "multiplied": (lambda q: q, lambda k: k, lambda s: s * 0.3),
    "divided": (lambda q: q, lambda k: k, lambda s: s / 3),
    "on the query": (lambda q: q * 0.3, lambda k: k, lambda s: s),
    "on the key": (lambda q: q, lambda k: k / 3, lambda s: s),
    "on both": (lambda q: q * 0.6, lambda k: 0.5 * k, lambda s: s),
    "everywhere": (lambda q: q / 1.5, lambda k: k * 0.7, lambda s: 0.5 * s),
    "a tensor": (lambda q: q, lambda k: k, lambda s: s * torch.tensor(0.3)),
    "a root": (lambda q: q, lambda k: k, lambda s: s / torch.sqrt(torch.tensor(7.0, dtype=s.dtype))),
    "negative": (lambda q: -q, lambda k: k, lambda s: s * 0.3),
    "in place": (lambda q: q, lambda k: k, lambda s: s.mul_(0.3)),
    "augmented": (lambda q: q, lambda k: k, lambda s: operator.itruediv(s, 3.0)),
}

# What else is done to scores.
SCORES: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "a bias": lambda s, x: s + x.bias,
    "a bias of all heads": lambda s, x: x.bias[0] + s,
    "a bias subtracted": lambda s, x: s - x.bias,
    "a bias in place": lambda s, x: s.add_(x.bias),
    "a sum of biases": lambda s, x: s + (x.bias + x.gate),
    "ALiBi": lambda s, x: (
        s - 0.2 * (torch.arange(s.shape[-2])[:, None] - torch.arange(s.shape[-1])).abs().to(s.dtype) * x.tau.abs()
    ),
    "shifted": lambda s, x: s - 2.5,
    "doubled": lambda s, x: s * 2.0,
    "negated": lambda s, x: -s,
    "a temperature": lambda s, x: s * x.tau,
    "an inverse temperature": lambda s, x: s / (x.tau.abs() + 0.5),
    "a temperature of queries": lambda s, x: s * x.gate,
    "a factor of keys": lambda s, x: s * x.bias[0, 0],
    "divided by a matrix": lambda s, x: s / (x.bias.abs() + 0.5),
    "softcap": lambda s, x: 2.0 * torch.tanh(s / 2.0),
    "softcap, scaled apart": lambda s, x: (s * 0.4).tanh().mul(3.0),
    "softcap in place": lambda s, x: s.div_(3.0).tanh_().mul_(3.0),
    "tanh": lambda s, x: s.tanh(),
    "clamp": lambda s, x: torch.clamp(s, -1.0, 1.25),
    "clamp_": lambda s, x: s.clamp_(min=-0.75),
    "clamp max": lambda s, x: s.clamp(max=1.0),
    "clip": lambda s, x: s.clip(-2.0, 0.5),
    "min and max": lambda s, x: torch.max(torch.min(s, torch.tensor(1.0, dtype=s.dtype)), torch.tensor(-1.0)),
    "minimum": lambda s, x: torch.minimum(torch.tensor(0.5, dtype=s.dtype), s),
    "clamp above the lowest": lambda s, x: s.clamp(min=torch.finfo(s.dtype).min),
    "less its maximum": lambda s, x: s - s.amax(-1, keepdim=True),
    "less its maximum, detached": lambda s, x: s - s.max(dim=-1, keepdim=True).values.detach(),
    "less its maximum, in place": lambda s, x: s.sub_(s.max(-1, True)[0]),
    "less its maximum, unsqueezed": lambda s, x: s - s.amax(-1).unsqueeze(-1),
    "less the maximum of all": lambda s, x: s - s.max(),
    "less the maximum of heads": lambda s, x: s - s.amax((1, -1), keepdim=True),
}
CLAMPS = {"clamp", "clamp_", "clamp max", "clip", "min and max", "minimum"}
NEAR_SCORES: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "less the queries' maximum": lambda s, x: s - s.amax(-2, keepdim=True),
    "less the heads' maximum": lambda s, x: s - s.amax(1, keepdim=True),
    "less the batch's maximum": lambda s, x: s - s.max(0).values,
    "less its maximum, no dimension kept": lambda s, x: s - s.amax(-1),
    "less its maximum, of all but one key": lambda s, x: s - s[..., :1].amax(-1, keepdim=True),
    "less its maximum, transposed": lambda s, x: s - s.amax(-1, keepdim=True).transpose(1, 2),
    "less its maximum, reshaped": lambda s, x: s - s.amax(-1).reshape(s.shape[0], s.shape[1], 1, s.shape[2]),
    "less its maximum, expanded": lambda s, x: s - s.amax(-1, keepdim=True).expand_as(s).mT,
    "less its mean": lambda s, x: s - s.mean(-1, keepdim=True),
    "less half its maximum": lambda s, x: s - 0.5 * s.amax(-1, keepdim=True),
    "plus its maximum": lambda s, x: s + s.amax(-1, keepdim=True),
    "its maximum less it": lambda s, x: s.amax(-1, keepdim=True) - s,
    "a bias by factor": lambda s, x: torch.add(s, x.bias, alpha=0.5),
    "clamp by a tensor": lambda s, x: torch.minimum(s, x.tau),
    "clamp by tensors": lambda s, x: torch.clamp(s, x.tau - 1, x.tau + 1),
    "clamp the wrong way": lambda s, x: s.clamp(0.5, -0.5),
    "clamp of tiny scores": lambda s, x: s.clamp(-1e-3, 1e-3),
    "clamp high": lambda s, x: s.clamp(min=-500.0),
    "a lift": lambda s, x: s + 1e9,
    "relu": lambda s, x: s.relu(),
    "absolute": lambda s, x: s.abs(),
    "squared": lambda s, x: s * s,
    "doubled by itself": lambda s, x: s + s,
    "heads as keys": lambda s, x: s * x.sinks,
    "heads as queries": lambda s, x: s + x.sinks[:, None],
    "filled": lambda s, x: s.masked_fill(x.keep, 0.5),
    "no scores": lambda s, x: s * 0.0,
    "halved in part": lambda s, x: torch.cat([s[..., :1] * 0.5, s[..., 1:]], -1),
    "rolled": lambda s, x: s.roll(1, -1),
}
# What else is done to masked scores, or could be.
MASKED = ("a bias", "a sum of biases", "shifted", "doubled", "less its maximum", "clamp above the lowest")


def _grid(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None, :]


def _ones(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2], s.shape[-1], dtype=torch.bool)


class _Module(nn.Module):
    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.ones(48, 48, dtype=torch.bool, device=DEVICE).tril()[None, None])
        generator = torch.Generator("cpu").manual_seed(0)
        for n, m in {(s.q_len, s.kv_len) for s in SIZES}:
            drop = (normal((n, m), generator) > 0) & (torch.arange(m, device=DEVICE) > 0)
            self.register_buffer(f"scattered_{n}_{m}", torch.zeros(n, m, device=DEVICE).masked_fill(drop, -1e9))

    def scattered(self, s: Tensor) -> Tensor:
        """A mask that is added, of the sizes of scores; causal where there is none."""
        n, m = s.shape[-2:]
        return getattr(self, f"scattered_{n}_{m}", -1e9 * ~self.causal[0, 0, :n, :m])


MODULE = _Module()

# Masks, true where a query attends to a key.
MASKS: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "tril": lambda s, x: _ones(s).tril(),
    "not triu": lambda s, x: ~torch.triu(_ones(s), diagonal=1),
    "arange": lambda s, x: operator.ge(*_grid(s)),
    "arange, 4-D": lambda s, x: (torch.arange(s.shape[-1])[None, :] <= torch.arange(s.shape[-2])[:, None])[None, None],
    "int32 and floats": lambda s, x: torch.arange(s.shape[-2]).float()[:, None] >= torch.arange(s.shape[-1]).int(),
    "a slice of a buffer": lambda s, x: (
        torch.ones(48, 48).tril().view(1, 1, 9, 9)[:, :, : s.shape[-2], : s.shape[-1]] > 0
    ),
    "indexed": lambda s, x: torch.ones(48, 48, dtype=torch.bool).tril()[_grid(s)],
    "at the bottom right": lambda s, x: _ones(s).tril(s.shape[-1] - s.shape[-2]),
    "a slice from the end": lambda s, x: torch.ones(48, 48, dtype=torch.bool).tril()[-s.shape[-2] :, -s.shape[-1] :],
    "off by one": lambda s, x: _ones(s).tril(1),
    "strict": lambda s, x: torch.lt(_grid(s)[1], _grid(s)[0]) | (_grid(s)[1] == 0),
    "transposed": lambda s, x: _ones(s).triu(),
    "reversed": lambda s, x: _grid(s)[1].flip(1) <= _grid(s)[0],
    "a window": lambda s, x: (_grid(s)[1] <= _grid(s)[0]) & (_grid(s)[1] > _grid(s)[0] - 2),
    "a double step": lambda s, x: 2 * _grid(s)[1] <= _grid(s)[0],
    "a prefix": lambda s, x: (_grid(s)[1] <= _grid(s)[0]) | (_grid(s)[1] < 2),
    "padding": lambda s, x: x.padding[:, None, None, :],
    "padding, as numbers": lambda s, x: x.padding.long()[:, None, None, :] != 0,
    "padding and tril": lambda s, x: x.padding[:, None, None] & _ones(s).tril(),
    "any": lambda s, x: x.keep,
    "any and tril": lambda s, x: x.keep & _ones(s).tril(),
    "any or tril": lambda s, x: x.keep | _ones(s).tril(),
    "by head": lambda s, x: torch.arange(s.shape[1])[:, None, None] + _grid(s)[0] >= _grid(s)[1],
    "by batch": lambda s, x: torch.arange(s.shape[0])[:, None, None, None] + _grid(s)[0] >= _grid(s)[1],
    "all": lambda s, x: _ones(s),
    "chunks": lambda s, x: operator.eq(*(i // 2 for i in _grid(s))),
    "chunks and tril": lambda s, x: (_grid(s)[0] // 3 == _grid(s)[1] // 3) & operator.ge(*_grid(s)),
    "chunks by a mask": lambda s, x: (_grid(s)[1] // 2 <= _grid(s)[0] // 2).logical_and(x.keep),
    "documents": lambda s, x: x.documents[:, None, : s.shape[-2], None] == x.documents[:, None, None],
    "documents and tril": lambda s, x: (
        (x.documents[:, : s.shape[-2], None] == x.documents[:, None])[:, None] & _ones(s).tril()
    ),
    "other documents": lambda s, x: x.documents[:, None, : s.shape[-2], None] >= x.documents[:, None, None],
    "a prefix of its own": lambda s, x: operator.ge(*_grid(s)) | (_grid(s)[1] < x.lengths[:, None, None, None]),
    "lengths": lambda s, x: torch.arange(s.shape[-1]) < x.lengths[:, None, None, None],
    "an offset": lambda s, x: _grid(s)[1] <= _grid(s)[0] + x.offset,
    "an offset, subtracted": lambda s, x: _grid(s)[1] - x.offset <= _grid(s)[0],
    "a window from an offset": lambda s, x: (_grid(s)[1] - _grid(s)[0] - x.offset).abs() <= 1,
    "a buffer": lambda s, x: MODULE.causal[:, :, : s.shape[-2], : s.shape[-1]],
    "a buffer from the end": lambda s, x: MODULE.causal[0, 0, -s.shape[-2] :, -s.shape[-1] :] != 0,
    "a buffer of numbers": lambda s, x: MODULE.scattered(s) == 0,
    "a buffer of numbers and tril": lambda s, x: torch.minimum(MODULE.scattered(s), -1e9 * ~_ones(s).tril()) > -1,
    "a buffer and padding": lambda s, x: (
        MODULE.causal[..., : s.shape[-2], : s.shape[-1]].bool() & x.padding[:, None, None]
    ),
}


def _additive(s: Tensor, keep: Tensor, low: float) -> Tensor:
    return torch.where(keep, torch.zeros((), dtype=s.dtype), torch.full((), low, dtype=s.dtype))


# How a mask is applied to the scores.
APPLIED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda s, keep: s.masked_fill(~keep, float("-inf")),
    "masked_fill with the lowest": lambda s, keep: torch.masked_fill(s, keep == 0, torch.finfo(s.dtype).min),
    "masked_fill with -1e9": lambda s, keep: s.masked_fill(keep.logical_not(), -1e9),
    "masked_fill_": lambda s, keep: s.masked_fill_(~keep, float("-inf")),
    "where": lambda s, keep: torch.where(keep, s, float("-inf")),
    "where, inverted": lambda s, keep: torch.where(~keep, torch.finfo(s.dtype).min, s),
    "added": lambda s, keep: s + _additive(s, keep, float("-inf")),
    "added, the lowest": lambda s, keep: _additive(s, keep, torch.finfo(s.dtype).min) + s,
    "added in place": lambda s, keep: operator.iadd(s, torch.zeros_like(s).masked_fill_(~keep, -1e9)),
    "added, one minus": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * -1e9,
    "subtracted": lambda s, keep: s - (1.0 - keep.to(s.dtype)) * 1e9,
    "added, but soft": lambda s, keep: s + _additive(s, keep, -3.0),
}

# A column beside the keys, put there before the softmax and taken away after it.
COLUMNS: dict[str, tuple[Callable[[Tensor, Inputs], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda s, x: s, lambda w: w),
    "sinks": (lambda s, x: torch.cat([s, _sinks(s, x)], dim=-1), lambda w: w[..., :-1]),
    "sinks, first": (lambda s, x: torch.cat((_sinks(s, x), s), 3), lambda w: w[:, :, :, 1:]),
    "sinks, shifted": (
        lambda s, x: operator.sub(s := torch.cat([s, _sinks(s, x)], -1), s.amax(-1, True)),
        lambda w: w[..., : w.shape[-1] - 1],
    ),
    "sinks of queries": (lambda s, x: torch.cat([s, x.gate], -1), lambda w: w[:, :, :, :-1]),
    "sinks in float32": (
        lambda s, x: torch.cat([s.float(), _sinks(s, x).float()], -1),
        lambda w: w[..., :-1],
    ),
    "zeros": (lambda s, x: F.pad(s, (0, 1)), lambda w: w[..., :-1]),
    "zeros, first": (lambda s, x: F.pad(s, (1, 0), value=0.0), lambda w: w[..., 1:]),
    "ones": (lambda s, x: F.pad(s, [0, 1], "constant", 1.0), lambda w: w[..., 0:-1]),
    "new zeros": (lambda s, x: torch.cat([s.new_zeros(s[..., :1].shape), s], -1), lambda w: w[..., 1:]),
}
NEAR_COLUMNS: dict[str, tuple[Callable[[Tensor, Inputs], Tensor], Callable[[Tensor], Tensor]]] = {
    "dropped at the start": (lambda s, x: torch.cat([s, _sinks(s, x)], -1), lambda w: w[..., 1:]),
    "dropped at the end": (lambda s, x: F.pad(s, (1, 0)), lambda w: w[..., :-1]),
    "scaled": (lambda s, x: torch.cat([s, _sinks(s, x)], -1) * 0.5, lambda w: w[..., :-1]),
    "capped": (lambda s, x: torch.cat([s, _sinks(s, x)], -1).tanh(), lambda w: w[..., :-1]),
    "clamped": (lambda s, x: torch.cat([s, _sinks(s, x)], -1).clamp(-1, 1), lambda w: w[..., :-1]),
    "another maximum": (
        lambda s, x: torch.cat([s - s.amax(-1, True), _sinks(s, x)], -1),
        lambda w: w[..., :-1],
    ),
    "the maximum of the queries": (
        lambda s, x: operator.sub(s := torch.cat([s, _sinks(s, x)], -1), s.amax(-2, True)),
        lambda w: w[..., :-1],
    ),
    "three": (lambda s, x: torch.cat([_sinks(s, x), s, x.gate], -1), lambda w: w[..., 1:-1]),
    "cut by three": (lambda s, x: torch.cat([_sinks(s, x), s, x.gate], -1), lambda w: w[..., :-2]),
    "two": (lambda s, x: F.pad(s, (0, 2)), lambda w: w[..., :-2]),
    "two, on both sides": (lambda s, x: F.pad(s, (1, 1)), lambda w: w[..., 1:-1]),
    "two, one after the other": (
        lambda s, x: torch.cat([torch.cat([s, _sinks(s, x)], -1), x.gate], -1),
        lambda w: w[..., :-1][..., :-1],
    ),
    "two, cut alike": (lambda s, x: F.pad(F.pad(s, (1, 0)), (0, 1)), lambda w: w[..., 1:][..., :-1]),
    "of the queries": (lambda s, x: F.pad(s, (0, 0, 0, 1)), lambda w: w[..., :-1, :]),
    "of the queries, cat": (lambda s, x: torch.cat([s, s[:, :, :1]], -2), lambda w: w[:, :, 1:]),
    "of the scores": (lambda s, x: torch.cat([s, s.mean(-1, keepdim=True)], -1), lambda w: w[..., :-1]),
    "of a key": (lambda s, x: torch.cat([s, s[..., :1]], -1), lambda w: w[..., :-1]),
    "a key less": (lambda s, x: F.pad(s[..., 1:], (1, 0)), lambda w: w),
    "reflected": (lambda s, x: F.pad(s, (0, 1, 0, 0), "replicate"), lambda w: w[..., :-1]),
    "gated": (lambda s, x: torch.cat([s, _sinks(s, x)], -1), lambda w: (w * 0.5)[..., :-1]),
    "normalised again": (
        lambda s, x: torch.cat([s, _sinks(s, x)], -1),
        lambda w: (w := w[..., :-1]) / w.sum(-1, keepdim=True),
    ),
    "low": (lambda s, x: F.pad(s, (0, 1), value=torch.finfo(s.dtype).min), lambda w: w[..., :-1]),
    "infinitely low": (lambda s, x: F.pad(s, (0, 1), value=float("-inf")), lambda w: w[..., :-1]),
}


def _sinks(s: Tensor, x: Inputs) -> Tensor:
    return x.sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda s: s.softmax(-1),
    "function": lambda s: F.softmax(s, dim=-1),
    "in float32": lambda s: torch.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "of floats": lambda s: s.float().softmax(dim=3).type_as(s),
    "of the other axis, transposed": lambda s: s.transpose(-1, -2).softmax(-2).transpose(-1, -2),
    "by hand": lambda s: (e := s.exp()) / e.sum(-1, keepdim=True),
    "by hand, twice": lambda s: torch.exp(s) / torch.exp(s).sum(dim=3, keepdim=True),
    "by hand, less its maximum": lambda s: (e := (s - s.amax(-1, True)).exp()) / e.sum((-1,), True),
    "by hand, in place": lambda s: (e := (s - s.amax(-1, True)).exp_()).div_(e.sum(-1, keepdim=True)),
    "by logsumexp": lambda s: torch.exp(s - s.logsumexp(-1, keepdim=True)),
    "off by one": lambda s: (e := s.exp()) / (1 + e.sum(-1, keepdim=True)),
}
NEAR_SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "over the queries": lambda s: s.softmax(-2),
    "over the heads": lambda s: s.softmax(1),
    "by hand over the queries": lambda s: (e := s.exp()) / e.sum(-2, keepdim=True),
    "by hand over all": lambda s: (e := s.exp()) / e.sum((-1, -2), keepdim=True),
    "by hand, no dimension kept": lambda s: (e := s.exp()) / e.sum(-1),
    "by hand of two": lambda s: s.exp() / (s * 0.5).exp().sum(-1, keepdim=True),
    "by hand, partly": lambda s: (e := s.exp()) / e[..., :-1].sum(-1, keepdim=True),
    "by logsumexp over the queries": lambda s: torch.exp(s - s.logsumexp(-2, keepdim=True)),
    "by logsumexp, no dimension kept": lambda s: torch.exp(s - s.logsumexp(-1)),
    "by logsumexp, halved": lambda s: torch.exp(s - s.logsumexp(-1, keepdim=True) * 0.5),
    "off by two": lambda s: (e := s.exp()) / (2 + e.sum(-1, keepdim=True)),
    "off by one, less its maximum": lambda s: (e := (s - s.amax(-1, True)).exp()) / (1 + e.sum(-1, keepdim=True)),
    "off by one key": lambda s: (e := s.exp()) / (e + 1).sum(-1, keepdim=True),
    "of the exponential": lambda s: s.exp().softmax(-1),
    "a sigmoid": lambda s: s.sigmoid(),
    "base two": lambda s: (e := s.exp2()) / e.sum(-1, keepdim=True),
    "log": lambda s: s.log_softmax(-1).exp(),
    "negative": lambda s: F.softmin(s, dim=-1),
    "twice": lambda s: s.softmax(-1).softmax(-1),
}

# What is done to weights, `kept` being the mask if there is one.
WEIGHTS: dict[str, Callable[[Tensor, Inputs, Tensor], Tensor]] = {
    "of a head mask": lambda w, x, kept: w * x.tau,
    "of a head mask, in place": lambda w, x, kept: w.mul_(x.tau),
    "gated": lambda w, x, kept: torch.sigmoid(x.gate) * w,
    "halved": lambda w, x, kept: w * torch.tensor(0.5),
    "zeroed": lambda w, x, kept: w.masked_fill(~kept, 0.0),
    "zeroed in place": lambda w, x, kept: w.masked_fill_(kept.logical_not(), 0),
    "zeroed by where": lambda w, x, kept: torch.where(kept, w, 0.0),
    "zeroed by where, inverted": lambda w, x, kept: torch.where(~kept, torch.zeros((), dtype=w.dtype), w),
    "nan_to_num": lambda w, x, kept: w.nan_to_num(0.0),
}
NEAR_WEIGHTS: dict[str, Callable[[Tensor, Inputs, Tensor], Tensor]] = {
    "times a number": lambda w, x, kept: w * 0.5,
    "divided": lambda w, x, kept: w / 2.0,
    "times a matrix": lambda w, x, kept: w * x.bias,
    "gated, transposed": lambda w, x, kept: w * x.gate.mT,
    "gated, squeezed": lambda w, x, kept: w * x.gate[..., 0],
    "a head mask as keys": lambda w, x, kept: w * x.sinks,
    "a head mask as queries": lambda w, x, kept: w * x.sinks[:, None],
    "of lengths": lambda w, x, kept: w * x.lengths.to(w.dtype),
    "times the mask": lambda w, x, kept: w * kept,
    "zeroed where kept": lambda w, x, kept: w.masked_fill(kept, 0.0),
    "zeroed elsewhere": lambda w, x, kept: w.masked_fill(~x.keep, 0.0),
    "zeroed, too": lambda w, x, kept: w.masked_fill(~kept | ~x.keep, 0.0),
    "zeroed, less": lambda w, x, kept: w.masked_fill(~kept & x.keep, 0.0),
    "zeroed, transposed": lambda w, x, kept: w.masked_fill(~kept.mT, 0.0),
    "zeroed above": lambda w, x, kept: w.tril(),
    "zeroed by a buffer": lambda w, x, kept: w.masked_fill(~MODULE.causal[..., : w.shape[-2], : w.shape[-1]], 0.0),
    "filled": lambda w, x, kept: w.masked_fill(~kept, 0.1),
    "nan_to_num with one": lambda w, x, kept: w.nan_to_num(1.0),
    "plus a number": lambda w, x, kept: w + 0.1,
    "normalised": lambda w, x, kept: w / w.sum(-1, keepdim=True),
    "normalised by queries": lambda w, x, kept: w / w.sum(-2, keepdim=True),
    "squared": lambda w, x, kept: w * w,
    "clamped": lambda w, x, kept: w.clamp(0.1, 0.5),
    "cut": lambda w, x, kept: F.pad(w[..., :-1], (0, 1)),
    "rolled": lambda w, x, kept: w.roll(1, -1),
    "softened": lambda w, x, kept: 0.5 * w + 0.5 * w.mean(-1, keepdim=True),
}

# All of them, and which part of a program is a near miss, and what it may be.
ANY_SCORES, ANY_COLUMNS = {**SCORES, **NEAR_SCORES}, {**COLUMNS, **NEAR_COLUMNS}
ANY_SOFTMAX, ANY_WEIGHTS = {**SOFTMAX, **NEAR_SOFTMAX}, {**WEIGHTS, **NEAR_WEIGHTS}
NEAR: dict[str, dict[str, Any]] = {
    "scores": NEAR_SCORES,
    "masked": ANY_SCORES,
    "column": NEAR_COLUMNS,
    "softmax": NEAR_SOFTMAX,
    "weights": NEAR_WEIGHTS,
}

DROPOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "absent": lambda w: w,
    "of nothing": lambda w: F.dropout(w, p=0.0, training=True),
    "not training": lambda w: F.dropout(w, 0.5, False),
}

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda o: o,
    "merged": lambda o: o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1),
    "merged, contiguous": lambda o: o.permute(0, 2, 1, 3).contiguous().view(o.shape[0], o.shape[2], -1),
    "viewed": lambda o: o.view(-1, o.shape[-1]),
    "added to": lambda o: o.add_(1.0),
    "merged and added to": lambda o: o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1).mul_(2.0) + o.sum(),
}


def _without_gradients(function: Callable[..., Any], inputs: Inputs) -> Any:
    with torch.no_grad():
        return function(*inputs)


def _in_autocast(function: Callable[..., Any], inputs: Inputs) -> Any:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return function(*inputs)


AROUND: dict[str, Callable[[Callable[..., Any], Inputs], Any]] = {
    "nothing": lambda f, inputs: f(*inputs),
    "no_grad": _without_gradients,
    "checkpoint": lambda f, inputs: checkpoint(f, *inputs, use_reentrant=False),
    "autocast": _in_autocast,
}

MISSES = (
    "keys in another order",
    "keys and values in another order",
    "keys and values in different orders",
    "mask written by index",
    "weights returned",
    "scores returned",
    "whole scores",
    "query changed in place",
    "key changed in place",
    "value changed in place",
    "mask changed in place",
    "key changed afterwards",
    "scores without gradients",
    "key detached",
    "heads swapped",
    "value of the weights' transpose",
)
IN_PLACE = tuple(miss for miss in MISSES if "in place" in miss or "afterwards" in miss)


@dataclass(frozen=True)
class Program:
    """One way to write attention, or something like it. The defaults are the plainest."""

    sizes: Sizes = SIZES[0]
    dtype: torch.dtype = torch.float32
    products: str = "matmul"
    key_groups: str = "repeat_interleave"
    value_groups: str = "repeat_interleave"
    scale: str = "multiplied"
    scores: tuple[str, ...] = ()
    mask: str = "none"
    applied: str = "masked_fill"
    masked: tuple[str, ...] = ()
    column: str = "none"
    softmax: str = "method"
    weights: tuple[str, ...] = ()
    dropout: str = "absent"
    output: str = "as it is"
    around: str = "nothing"
    gradients: bool = True
    lengths: str = "one"
    kernel: str = "auto"
    miss: str = "none"

    def __repr__(self) -> str:
        said = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Program({', '.join(f'{name}={value!r}' for name, value in said)})"

    def __call__(self, *inputs: Tensor) -> Any:
        return AROUND[self.around](self.attention, Inputs(*inputs))

    def attention(self, *inputs: Tensor) -> Any:
        x = Inputs(*inputs)
        miss = self.miss
        on_query, on_key, on_scores = SCALES[self.scale]
        to_scores, to_output = PRODUCTS[self.products]

        q, k, v = x.q, x.k, x.v
        if miss in IN_PLACE:
            q, k, v = q * 1, k * 1, v * 1
        if miss == "keys in another order":
            k = k.flip(2)
        elif miss == "keys and values in another order":
            k, v = k.flip(2), v.flip(2)
        elif miss == "keys and values in different orders":
            k, v = k.flip(2), v.roll(1, dims=2)
        elif miss == "key detached":
            k = k.detach()
        keys, values = k, v
        if self.products != "grouped":
            groups = self.sizes.groups
            keys, values = GROUPS[self.key_groups](k, groups), GROUPS[self.value_groups](v, groups)

        with torch.set_grad_enabled(torch.is_grad_enabled() and miss != "scores without gradients"):
            s = to_scores(on_query(q), on_key(keys))
        s = on_scores(s)
        if miss == "heads swapped":
            s = s.roll(1, dims=1)
        elif miss == "whole scores":
            s = (s * 3).long().to(s.dtype)
        kept = MASKS[self.mask](s, x) if self.mask != "none" else None
        for step in self.scores:
            s = ANY_SCORES[step](s, x)
        if kept is not None:
            if miss == "mask changed in place":
                inverted = ~kept
                s = s.masked_fill(inverted, float("-inf"))
                inverted.fill_(False)
            elif miss == "mask written by index":
                s[~kept.expand_as(s)] = float("-inf")
            else:
                s = APPLIED[self.applied](s, kept)
        for step in self.masked:
            s = ANY_SCORES[step](s, x)

        if miss == "query changed in place":
            q.mul_(2.0)
        elif miss == "key changed in place":
            k[:, :, 0] = 1.0
        put, take = ANY_COLUMNS[self.column]
        w = take(ANY_SOFTMAX[self.softmax](put(s, x)))
        for step in self.weights:
            w = ANY_WEIGHTS[step](w, x, _ones(s) if kept is None else kept)
        if miss == "value changed in place":
            torch._foreach_add_([v], 1.0)
        elif miss == "value of the weights' transpose" and w.shape[-1] == w.shape[-2]:
            w = w.mT
        o = OUTPUTS[self.output](to_output(DROPOUT[self.dropout](w), values))
        if miss == "key changed afterwards":
            k.zero_()
        if miss == "weights returned":
            return o, w
        if miss == "scores returned":
            return o, s
        if miss in IN_PLACE:
            return o, q + 1, k + 1, v + 1
        return o

    def mask_of(self, inputs: Inputs) -> Tensor | None:
        """The mask alone, to leave out rows in which every key is masked."""
        scores = torch.empty(*inputs.q.shape[:3], inputs.k.shape[2])
        return MASKS[self.mask](scores, inputs).expand_as(scores) if self.mask != "none" else None

    def inputs(self, seed: int, longer: int = 0) -> Inputs:
        s, generator = self.sizes, torch.Generator("cpu").manual_seed(seed)
        q_len, kv_len = s.q_len + longer, s.kv_len + longer

        def leaf(*shape: int) -> Tensor:
            return normal(shape, generator).to(self.dtype).requires_grad_(self.has_gradients)

        return Inputs(
            q=leaf(s.batch, s.heads, q_len, s.head_dim),
            k=leaf(s.batch, s.kv_heads, kv_len, s.head_dim),
            v=leaf(s.batch, s.kv_heads, kv_len, s.head_dim_v),
            bias=leaf(s.heads, q_len, kv_len),
            tau=leaf(s.heads, 1, 1),
            sinks=leaf(s.heads),
            gate=leaf(s.batch, s.heads, q_len, 1),
            padding=torch.arange(kv_len, device=DEVICE) <= normal((s.batch, 1), generator).abs() * kv_len / 2,
            keep=(normal((s.batch, 1, q_len, kv_len), generator) < 0.3) | (torch.arange(kv_len, device=DEVICE) == 0),
            documents=(normal((s.batch, kv_len), generator) > 0.5).cumsum(-1),
            lengths=(normal((s.batch,), generator).abs() * 2).long() + 1,
            offset=(normal((), generator).abs() * 1.5).long(),
        )

    @property
    def dynamic(self) -> bool | None:
        return True if self.lengths == "symbolic" else None

    @property
    def has_gradients(self) -> bool:
        return self.gradients and self.miss not in IN_PLACE


def program(choose: Callable[[str, Sequence[Any]], Any], near: str = "none", miss: str = "none") -> Program:
    """A sentence of the grammar; `choose` settles every choice."""
    plain = Program()

    def steps(name: str, options: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
        chosen = [choose(name, options) for _ in range(choose(f"number of {name}", counts))]
        missed = [choose(f"near {name}", tuple(NEAR[name]))] if near == name else []
        return (*chosen, *missed)

    return Program(
        sizes=choose("sizes", SIZES),
        dtype=(dtype := choose("dtype", (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        products=choose("products", tuple(PRODUCTS)),
        key_groups=(groups := choose("groups", tuple(GROUPS))),
        value_groups=choose("value_groups", (groups, groups, groups, *GROUPS)),
        scale=choose("scale", tuple(SCALES)),
        scores=steps("scores", tuple(SCORES), (0, 0, 1, 1, 2, 3)),
        mask=(mask := choose("mask", ("none", *MASKS))),
        applied=choose("applied", tuple(APPLIED)) if mask != "none" else plain.applied,
        masked=steps("masked", MASKED, (0, 0, 0, 0, 1)),
        column=choose("column", tuple(NEAR_COLUMNS) if near == "column" else ("none",) * len(COLUMNS) + (*COLUMNS,)),
        softmax=choose("softmax", tuple(NEAR_SOFTMAX if near == "softmax" else SOFTMAX)),
        weights=steps("weights", [name for name in WEIGHTS if mask != "none" or "zeroed" not in name], (0, 0, 0, 1, 2)),
        dropout=choose("dropout", tuple(DROPOUT)),
        output=choose("output", tuple(OUTPUTS)),
        around=(around := choose("around", ("nothing", "nothing", "nothing", *AROUND))),
        gradients=choose("gradients", (True, False)),
        lengths=(lengths := choose("lengths", ("one",) * 5 + ("several", "several", "symbolic"))),
        # Where even the number of heads is symbolic, kernels that are asked for by name may have to say no.
        kernel=choose("kernel", kernels_for(dtype, around)) if lengths != "symbolic" else plain.kernel,
        miss=miss,
    )


def kernels_for(dtype: torch.dtype, around: str) -> tuple[str, ...]:
    """Triton's interpreter knows no bfloat16. In a checkpoint that is not compiled, FlexAttention has no backward
    pass."""
    interpreted = dtype != torch.bfloat16 and around != "autocast"
    blocks = ("flex", "flex", "fa4", "fa2") if around != "checkpoint" else ()
    return "auto", "sdpa", *blocks, *(("decode",) if interpreted else ())


@st.composite
def programs(draw: st.DrawFn) -> Program:
    def choose(name: str, options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(options), label=name)

    kind = choose("kind", ("plain",) * 4 + ("near", "miss"))
    near = choose("near", tuple(NEAR)) if kind == "near" else "none"
    return program(choose, near, choose("miss", MISSES) if kind == "miss" else "none")


def has_empty_rows(p: Program, inputs: Inputs) -> bool:
    """Whether any row has no key, not even a sink, and so no result."""
    kept = p.mask_of(inputs) if p.column not in COLUMNS or p.column == "none" else None
    return kept is not None and not bool(kept.any(-1).all())


# ---------------------------------------------------------------------------------------------------------------
# What must hold


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """Leaves of their own for every run, because programs may write into their inputs."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]


def outcome(function: Callable[..., Any], inputs: Sequence[Any], run: Any = with_gradients) -> dict[str, Any]:
    """What a program can be seen to do: its outputs, the gradients of its inputs, and what it wrote into these."""
    given = fresh(inputs)
    result, gradients = run(function, given)
    outputs = [result] if isinstance(result, Tensor) else [*result]
    written = [] if run is truth else [x.detach() for x in given if isinstance(x, Tensor)]
    return {"outputs": outputs, "gradients": gradients, "written": written}


def assert_sound(
    function: Callable[..., Any],
    draws: Sequence[Sequence[Any]],
    *,
    dynamic: bool | None = None,
    kernel: str | list[str] = "auto",
    device: str | None = None,
    exact: Callable[..., Any] | None = None,
    has_corners: bool = False,
    **options: Any,
) -> Report:
    """A function that was rewritten computes what it did, for every draw of its inputs; one that was not computes it
    bit by bit. `exact` is the same function for float64, None where there is none; `has_corners` says that it
    clamps."""
    eager = [outcome(function, inputs) for inputs in draws]
    compiled, report = rewritten(function, dynamic, device, kernel=kernel, **options)
    fused = [outcome(compiled, inputs) for inputs in draws]
    for ours, theirs in zip(fused, eager):
        for mine, its in zip(ours["outputs"], theirs["outputs"]):
            assert mine.dtype == its.dtype
            assert mine.requires_grad == its.requires_grad
            assert [n for n, size in zip(mine.stride(), mine.shape) if size > 1] == [
                n for n, size in zip(its.stride(), its.shape) if size > 1
            ], "the output lies in memory in another way"
        assert [g is None for g in ours["gradients"]] == [g is None for g in theirs["gradients"]]
        for mine, its in zip(ours["written"], theirs["written"]):
            assert torch.equal(mine.nan_to_num(0.0), its.nan_to_num(0.0)), "an input was left with other contents"
    if not report().n_fused:
        for ours, theirs in zip(fused, eager):
            for mine, its in zip(ours["outputs"] + ours["gradients"], theirs["outputs"] + theirs["gradients"]):
                assert mine is None or torch.equal(mine, its), "nothing was rewritten, but the result is another"
        return report()
    for shapes in dict.fromkeys(map(_shapes, draws)):
        alike = [i for i, inputs in enumerate(draws) if _shapes(inputs) == shapes]
        right = [outcome(exact, draws[i], truth) for i in alike] if exact else None
        ours = [fused[i] for i in alike]
        try:
            _assert_accurate(ours, [eager[i] for i in alike], right)
        except AssertionError:
            moved = ([outcome(function, nudged(draws[i], by)) for i in alike] for by in range(NUDGES))
            if not has_corners or not any(_is_accurate(ours, theirs, right) for theirs in moved):
                raise
    return report()


NUDGES = 16
"""How often eager is run again with its inputs moved by a rounding unit, before an error beyond its own counts in a
program that clamps: where a score lies at the end of a clamp, rounding says whether it has a gradient."""


def nudged(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Inputs moved at random, by a rounding unit in the root mean square."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        by = 1 + torch.finfo(x.dtype).eps * normal(x.shape, generator).double()
        return (x.detach().double() * by).to(x.dtype).requires_grad_(x.requires_grad)

    return [move(x) for x in inputs]


def _is_accurate(*results: Any) -> bool:
    try:
        _assert_accurate(*results)
    except AssertionError:
        return False
    return True


def _shapes(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.shape if isinstance(x, Tensor) else x for x in inputs)


def _assert_accurate(fused: list[Any], eager: list[Any], right: list[Any] | None) -> None:
    for part in ("outputs", "gradients"):
        of = together if part == "gradients" else tuple
        ours, theirs, true = (results and joined([of(r[part]) for r in results]) for results in (fused, eager, right))
        if ours is None:
            continue
        for mine, its, truly in (
            [(ours, theirs, theirs if true is None else true)]
            if part == "gradients"
            else zip(ours, theirs, true or theirs)
        ):
            if mine.dtype != torch.float64 and true is not None:
                assert_as_accurate(mine, its, truly, part)
            else:  # what was computed in float64 is no truer than what is to be judged by it
                unit = rounding_unit(its, its.dtype) if its.is_floating_point() else 0.0
                assert error(mine, truly.double()) <= 1.5 * error(its, truly.double()) + 32 * unit, part


# Kernels in order of preference, and the device for which they are chosen. (On an imagined GPU, and without Inductor,
# PyTorch computes FlexAttention densely.)
KERNELS: dict[str, tuple[str | list[str], str | None]] = {
    "auto": ("auto", None),
    "sdpa": (["sdpa", "reference"], None),
    "flex": (["flex", "sdpa", "reference"], "sm_90"),
    "fa4": (["fa4", "flex", "reference"], "sm_90"),
    "fa2": (["fa2", "flex", "reference"], "sm_90"),
    "decode": (["decode", "sdpa", "reference"], "sm_90"),
}


@pytest.fixture(autouse=True, scope="module")
def _gpu_kernels() -> Iterator[None]:
    """Stand-ins for what is not there, and blocks of 16 keys, so that there are several."""
    with installed(), pytest.MonkeyPatch.context() as patch:
        if find_spec("triton") is not None:
            from attn_rewriter.kernels import split_keys

            patch.setattr(split_keys, "_TILE_BYTES", 512)
        yield


def draws_of(p: Program) -> list[Inputs]:
    longer = (0,) * DRAWS if p.lengths == "one" else (0, 1) * (DRAWS // 2)
    return [p.inputs(n, more) for n, more in enumerate(longer)]


def assert_program_sound(p: Program) -> Report:
    kernel, device = KERNELS[p.kernel]
    corners = not CLAMPS.isdisjoint(p.scores)
    options = {"dynamic": p.dynamic, "kernel": kernel, "device": device}
    return assert_sound(p, draws_of(p), **options, exact=exact_of(p), has_corners=corners)


def exact_of(p: Program) -> Program:
    """The program for float64: a checkpoint computes again where `truth` does not see it."""
    return replace(p, around="nothing") if p.around == "checkpoint" else p


@(seed(int(SEED)) if SEED else lambda test: test)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="ATTN_REWRITER_EXAMPLES" not in os.environ,
    suppress_health_check=[*HealthCheck],
)
@given(programs())
def test_whatever_is_rewritten_is_right(p: Program) -> None:
    draws = draws_of(p)
    try:
        results = [outcome(p, inputs) for inputs in draws]
        outcome(exact_of(p), draws[0], truth)
        assume(not any(has_empty_rows(p, inputs) for inputs in draws))
    except RuntimeError:
        assume(False)  # eager raises
    assume(all(x is None or x.isfinite().all() for r in results for x in r["outputs"] + r["gradients"]))
    report = assert_program_sound(p)
    how = "fused" if report.n_fused else "refused"
    event(how)
    for name in ("scores", "masked", "weights", "column", "softmax", "mask", "kernel"):
        for step in dict.fromkeys(x if isinstance(x := getattr(p, name), tuple) else (x,)):
            event(f"{name}: {step}: {how}")


def test_most_programs_are_rewritten() -> None:
    """A property of programs that are never rewritten would show nothing."""
    refused: dict[Program, str] = {}
    tried = 0
    for n in range(80):
        rng = random.Random(n)
        p = program(lambda name, options, rng=rng: rng.choice(options))
        # Models know their numbers of heads.
        p = replace(exact_of(p), lengths="one" if p.lengths == "one" else "several")
        inputs = p.inputs(n)
        try:
            p(*fresh(inputs))
        except RuntimeError:
            continue
        tried += 1
        kernel, device = KERNELS["flex"]
        compiled, report = rewritten(p, p.dynamic, device, kernel=kernel)
        compiled(*fresh(inputs))
        if not report().n_fused:
            refused[p] = "; ".join(refusal.reason for site in report().sites for refusal in site.refusals)
    assert tried > 40
    assert len(refused) < tried / 3, "\n".join(f"{p}: {why}" for p, why in refused.items())


# ---------------------------------------------------------------------------------------------------------------
# Bugs found, each with the reason why it is not what it looks like


@dataclass(frozen=True)
class Bug:
    """A program that was once rewritten wrongly. Its inputs are normal numbers, `[2, 4, 6, 8]` unless said otherwise;
    it wants gradients for all of them unless it writes into one."""

    function: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    gradients: bool
    dtype: torch.dtype
    exact: bool

    def inputs(self, seed: int) -> list[Tensor]:
        generator = torch.Generator("cpu").manual_seed(seed)
        names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
        made = [normal(self.shapes.get(name, (2, 4, 6, 8)), generator) for name in names]
        return [x.to(self.dtype).requires_grad_(self.gradients) for x in made]


BUGS: list[Bug] = []


def bug(
    *, gradients: bool = True, dtype: torch.dtype = torch.float32, exact: bool = True, **shapes: tuple[int, ...]
) -> Callable[..., Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        BUGS.append(Bug(function, shapes, gradients, dtype, exact))
        return function

    return register


@pytest.mark.parametrize("case", BUGS, ids=lambda case: case.function.__name__)
def test_bug_stays_fixed(case: Bug) -> None:
    exact = case.function if case.exact else None
    assert_sound(case.function, [case.inputs(seed) for seed in range(DRAWS)], exact=exact)


# The same, as programs.
PROGRAMS = {
    "a shift that tanh can see": Program(scores=("less its maximum, detached", "softcap"), kernel="flex"),
    "a shift that a clamp can see": Program(scores=("shifted", "clamp"), kernel="flex"),
    "a shift that is scaled key by key": Program(scores=("shifted", "a factor of keys"), kernel="flex"),
    "masked sinks in float64": Program(dtype=torch.float64, mask="padding", column="sinks"),
    "a column beside keys of symbolic length": Program(column="zeros", lengths="several"),
    "blocks of symbolic number": Program(mask="padding", lengths="several", kernel="flex"),
}


@pytest.mark.parametrize("p", PROGRAMS.values(), ids=PROGRAMS)
def test_program_stays_right(p: Program) -> None:
    assert_program_sound(p)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.35).softmax(-1) @ v


# -- types ------------------------------------------------------------------------------------------------------


@bug()
def scores_rounded_to_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A cast of scores is not always one between floating-point types."""
    return (q @ k.mT * 3).long().to(q.dtype).softmax(-1) @ v


@bug()
def softmax_of_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, hidden in the softmax's own cast."""
    return torch.softmax((q @ k.mT * 3).int(), -1, dtype=q.dtype) @ v


@bug()
def scores_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kernels hold the scores of float32 operands in float32: who casts these to float64 wants more."""
    return (q.double() @ k.double().mT * 3).softmax(-1).to(v.dtype) @ v


@bug(dtype=torch.float64)
def scale_that_float32_rounds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A constant tensor is read in its own type."""
    return (q @ k.mT * torch.full((), 0.1, dtype=torch.float64)).softmax(-1) @ v


@bug(q=(1, 2, 300, 8), k=(1, 2, 300, 8), v=(1, 2, 300, 8))
def positions_that_overflow_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Position 128 is -128."""
    i = torch.arange(300).to(torch.int8)
    return (q @ k.mT * 0.35).masked_fill((i > i[:, None]) & (i != 0), float("-inf")).softmax(-1) @ v


@bug(q=(1, 2, 300, 8), k=(1, 2, 300, 8), v=(1, 2, 300, 8))
def positions_made_as_uint8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, where `arange` itself has the type."""
    i = torch.arange(300, dtype=torch.uint8)
    return (q @ k.mT * 0.35).masked_fill(i > i[:, None], float("-inf")).softmax(-1) @ v


@bug()
def positions_that_overflow_int32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, further out."""
    i = torch.arange(6, dtype=torch.int32) + (2**31 - 3)
    return (q @ k.mT * 0.35).masked_fill((i > i[:, None]) & (torch.arange(6) != 0), float("-inf")).softmax(-1) @ v


@bug()
def mask_compared_in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A comparison happens in the type of its tensor: -1e4 is -9984 on both sides."""
    added = torch.full((6, 6), -1e4, dtype=torch.bfloat16).triu(1)
    return (q @ k.mT * 0.35).masked_fill(added == -1e4, float("-inf")).softmax(-1) @ v


@bug()
def mask_compared_in_uint8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """257 is 1."""
    drop = torch.ones(6, 6, dtype=torch.uint8).triu(1)
    return (q @ k.mT * 0.35).masked_fill(drop == 257, float("-inf")).softmax(-1) @ v


@bug()
def positions_handed_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`torch.as_tensor` makes tensors of tensors, too."""
    i = torch.as_tensor(torch.arange(6), dtype=torch.float32)
    return (q @ k.mT * 0.35).masked_fill(i > i[:, None], float("-inf")).softmax(-1) @ v


@bug(exact=False)
def scores_outside_of_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused call would run where the value product does, and autocast round its query and key."""
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        with torch.autocast(DEVICE, enabled=False):
            weights = (q @ k.mT).softmax(-1)
        return weights @ v


@bug(bias=(6, 6))
def wide_bias_in_autocast(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eager adds it in float32; a fused call in autocast would round it to bfloat16."""
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return (q @ k.mT * 0.35 + (333.3 + bias)).softmax(-1) @ v


# -- gradients --------------------------------------------------------------------------------------------------


@bug()
def scores_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`no_grad` around a part is a detach."""
    with torch.no_grad():
        scores = q @ k.mT
    return scores.softmax(-1) @ v


@bug(k=(2, 2, 6, 8))
def view_of_key_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for an operand, whose views are looked through."""
    with torch.no_grad():
        repeated = k.repeat_interleave(2, 1)
    return (q @ repeated.mT).softmax(-1) @ v


@bug()
def without_gradients_in_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in the body of a higher-order operator."""

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            scores = q @ k.mT
        return scores.softmax(-1) @ v

    return checkpoint(body, q, k, v, use_reentrant=False)


@bug()
def value_changed_behind_autograd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is written into `x.data` is in `x`, but has no gradients."""
    v = v * 1
    weights = (q @ k.mT * 0.35).softmax(-1)
    v.data.mul_(3.0)
    return weights @ v


@bug(bias=(8, 6, 6))
def baddbmm_of_nothing(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """With `beta=0`, the gradient of the first argument is zero, not missing."""
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.35)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1))


@bug(gradients=False)
def second_derivative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused kernels have no second derivative."""
    return torch.func.grad(lambda q: torch.func.grad(lambda q: attention(q, k, v).sin().sum())(q).square().sum())(q)


@bug(gradients=False)
def forward_derivative(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Nor forward derivatives."""
    return torch.func.jvp(lambda q: attention(q, k, v), (q,), (k,))


@bug()
def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The nodes under `vmap` stand for more than their shapes say."""
    return torch.vmap(attention, in_dims=(0, None, None))(q, k[0], v[0])


# -- numbers ----------------------------------------------------------------------------------------------------


@bug()
def shift_that_swallows_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """To add one number to all scores changes no weight, if they survive it."""
    return (q @ k.mT + 1e30).softmax(-1) @ v


@bug()
def shift_as_low_as_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A fill of -1e9 masks nothing where all scores are as low."""
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return (q @ k.mT - 1e9).masked_fill(mask, -1e9).softmax(-1) @ v


@bug()
def zero_scale_and_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kernels mask before they scale: 0 * -inf is NaN."""
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.0).masked_fill(mask, float("-inf")).softmax(-1) @ v


@bug()
def negative_scale_and_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """And -1 * -inf is inf."""
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return (q @ k.mT * -0.35).masked_fill(mask, float("-inf")).softmax(-1) @ v


@bug(k=(2, 4, 6, 1))
def einsum_over_a_repeated_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """einsum sums over an axis that one operand has in size 1."""
    return (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3).softmax(-1) @ v


@bug(k=(2, 4, 1, 8), v=(2, 4, 9, 8), bias=(6, 9))
def one_key_for_all_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A repeated key is cut where the values are that no query sees."""
    mask = torch.ones(6, 9, dtype=torch.bool).triu(1)
    return (q @ k.expand(-1, -1, 9, -1).mT + bias).masked_fill(mask, float("-inf")).softmax(-1) @ v


@bug()
def everything_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash attention takes no dropout of 1."""
    return F.dropout((q @ k.mT * 0.35).softmax(-1), 1.0, training=True) @ v


@pytest.mark.parametrize("masked", [False, True])
def test_sizes_that_cuda_kernels_do_not_take(masked: bool) -> None:
    """They raise from 65536 batches on, and read the wrong element of a mask from 2**32 on."""
    modifiers = (Mask("mask0", TensorMask("mask0", ("query", "key")), "keep"),) if masked else ()
    hopper, plain = Device("cuda", (9, 0)), Shapes(2, 8, 8, 64, 64, 64, 64, torch.bfloat16, needs_backward=True)
    assert isinstance(choose(AttentionSpec(modifiers), plain, hopper), Choice)
    assert isinstance(choose(AttentionSpec(modifiers), replace(plain, batch=2**16), hopper), Refusal)
    long = choose(AttentionSpec(modifiers), replace(plain, q_len=2**17, kv_len=2**17), hopper)
    assert isinstance(long, Refusal if masked else Choice)


def test_size_that_only_the_run_knows() -> None:
    """Where PyTorch would decide by it, the site stays as it is, without a word of warning."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = (k[0, 0, :, 0] > 0).nonzero().squeeze(-1)
        return attention(q, k[:, :, chosen], v[:, :, chosen])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        case = Bug(function, {}, False, torch.float32, True)
        assert_sound(function, [case.inputs(seed) for seed in range(DRAWS)], exact=function)


# -- names ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("attn_rewriter_tests::softmax", mutates_args=())
def someones_softmax(x: Tensor, dim: int) -> Tensor:
    return torch.sigmoid(x)


@someones_softmax.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("attn_rewriter_tests::bump", mutates_args=("x",))
def bump(x: Tensor) -> Tensor:
    x.add_(1.0)
    return x * 2


@bump.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@bug(gradients=False)
def operator_with_a_known_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Someone's operator may have the name of one of PyTorch's."""
    return someones_softmax(q @ k.mT, -1) @ v


@bug(keep=(6, 6))
def where_as_an_operator(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """`aten.where` takes the condition first, `Tensor.where` second."""
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    drop = torch.ops.aten.where.self(keep > 0.5, causal, keep > 2.0)
    return (q @ k.mT).masked_fill(drop, float("-inf")).softmax(-1) @ v


# -- what is written in place -----------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "torch._foreach_mul_([x])": lambda x: torch._foreach_mul_([x], 3.0),
    "F.relu(x, True)": lambda x: F.relu(x, True),
    "F.hardtanh(x, -1, 1, True)": lambda x: F.hardtanh(x, -1.0, 1.0, True),
    "x.__iadd__(1)": lambda x: x.__iadd__(1.0),
    "x //= 2": lambda x: operator.ifloordiv(x, 2.0),
    "an operator": bump,
    "an operator, by name": lambda x: torch.ops.attn_rewriter_tests.bump(x),
    "aten._foreach_add_": lambda x: torch.ops.aten._foreach_add_.Scalar([x], 1.0),
    "numpy": lambda x: x.numpy().fill(0.5),
    "x[0] = 1": lambda x: operator.setitem(x, 0, 1.0),
    "out=": lambda x: torch.sin(x, out=x),
    "a view": lambda x: x.transpose(0, 1)[:, 1:].mul_(3.0),
    "x.data": lambda x: x.data.mul_(3.0),
}


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_operand_is_written(write: Callable[[Tensor], Any], operand: str) -> None:
    """Between the products, in every way to say so: the fused call reads its operands later than eager did."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = q * 1, k * 1, v * 1
        weights = (q @ k.mT * 0.35).softmax(-1)
        write({"q": q, "k": k, "v": v}[operand])
        return weights @ v, q + 1, k + 1, v + 1

    if DEVICE != "cpu" and write is WRITES["numpy"]:
        pytest.skip("NumPy is on the CPU")
    draws = Bug(function, {}, False, torch.float32, True)
    exact = function if write is not WRITES["numpy"] else None
    assert_sound(function, [draws.inputs(seed) for seed in range(DRAWS)], exact=exact)


@pytest.mark.parametrize(("kernel", "compiler"), [("sdpa", "eager"), ("flex", "eager"), ("sdpa", "inductor")])
@pytest.mark.parametrize("kind", ["bias", "padding"])
def test_what_a_kernel_keeps_is_written(kind: str, kernel: str, compiler: str) -> None:
    """After the attention: for the backward pass a fused call keeps what it read, eager code its weights."""

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scores, keys = q @ k.mT * 0.35, keys.detach()[:, None, None]
        held = keys > 0.0 if kind == "padding" else keys * 1
        scores = scores.masked_fill(~held, -1e9) if kind == "padding" else scores + held
        return scores.softmax(-1) @ v, held.zero_()

    draws = Bug(function, {"keys": (2, 6)}, True, torch.float32, True)
    inputs = [draws.inputs(seed) for seed in range(DRAWS)]
    device = "sm_90" if compiler == "eager" else None
    report = assert_sound(function, inputs, exact=function, kernel=kernel, device=device, compiler=compiler)
    assert report.n_fused == 1


KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a bias": lambda scores, held: scores + held,
    "a bias for every head": lambda scores, held: scores + held.expand(2, 4, 6, 6),
    "a mask": lambda scores, held: scores.masked_fill(held > 0, float("-inf")) + held,
    "a boolean mask": lambda scores, held: scores.masked_fill(~held, -1e9),
}


@pytest.mark.parametrize(
    ("kernel", "compiler", "form"),
    [
        *product(["sdpa"], ["eager", "inductor"], KEPT),
        *product(["fa4"], ["eager", "aot_eager"], [form for form in KEPT if form != "a mask"]),
    ],
)
def test_what_a_kernel_keeps_is_written_by_the_caller(form: str, kernel: str, compiler: str) -> None:
    """Between the two passes, when eager code no longer needs it. The copy that is kept serves both sites."""

    def function(q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        for _ in range(2):
            q = KEPT[form](q @ k.mT * 0.35, held).softmax(-1) @ v
        return q

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 4, 6, 8, generator=generator).bfloat16().to(dtype) for _ in range(3))
        held = torch.randn(6, 6, generator=generator).bfloat16().to(dtype)
        held = held < 0.5 if "boolean" in form else held
        held[:, 0] = "boolean" in form
        if kernel == "fa4" and "bias" in form:  # it takes none that may be a mask, in training
            held = torch.nn.Parameter(held, requires_grad=False)
        output = function(*(x.requires_grad_() for x in (q, k, v)), held)
        held.zero_()
        return torch.autograd.grad(output.square().sum(), (q, k, v))

    dtype = torch.float32 if kernel == "sdpa" else torch.bfloat16
    with installed():
        fused, report = rewritten(
            function, kernel=kernel, compiler=compiler, device=None if kernel == "sdpa" else "sm_90"
        )
        found = gradients(fused, dtype)
    assert report().n_fused == 2
    assert_as_accurate(found, gradients(function, dtype), gradients(function, torch.float64))


RETURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "a view": lambda y: y.transpose(1, 2),
    "heads side by side": lambda y: y.transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize(("kernel", "compiler"), [("sdpa", "inductor"), ("sdpa", "aot_eager"), ("fa4", "aot_eager")])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("form", RETURNED)
def test_an_output_is_written_by_the_caller(form: str, heads: int, kernel: str, compiler: str) -> None:
    """A kernel keeps it for its backward pass, which eager code has no need of."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return RETURNED[form]((q @ k.mT * 0.35).softmax(-1) @ v)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, heads, 40, 8, generator=generator).bfloat16().to(dtype) for _ in range(3))
        output = function(*(x.requires_grad_() for x in (q, k, v)))
        return torch.autograd.grad(output.mul_(3).square().sum(), (q, k, v))

    dtype = torch.float32 if kernel == "sdpa" else torch.bfloat16
    fused, report = rewritten(function, kernel=kernel, compiler=compiler, device=None if kernel == "sdpa" else "sm_90")
    found = gradients(fused, dtype)
    assert report().n_fused == 1
    assert_as_accurate(found, gradients(function, dtype), gradients(function, torch.float64))


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_checkpoint_around_what_is_compiled(compiler: str, kernel: str) -> None:
    """It counts what the first call keeps, and not what was tried while it was compiled."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.35).softmax(-1) @ v

    fused, report = rewritten(function, kernel=kernel, compiler=compiler)
    inputs = [torch.randn(2, 4, 40, 8).requires_grad_() for _ in range(3)]
    found = with_gradients(lambda *x: checkpoint(fused, *x, use_reentrant=False), inputs)
    assert report().n_fused == 1
    assert_as_accurate(found, with_gradients(function, inputs), truth(function, inputs))


@bug(gradients=False, into=(8, 6, 8))
def product_written_into_an_input(q: Tensor, k: Tensor, v: Tensor, into: Tensor) -> Tensor:
    """A fused call returns the product, but the caller looks into the tensor."""
    weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
    return into.baddbmm_(weights, v.flatten(0, 1), beta=0)


@bug(gradients=False, scores=(2, 4, 6, 6))
def scores_added_into_an_input(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    """The same for a bias that takes the scores up."""
    scores += q @ k.mT
    return scores.softmax(-1) @ v


@bug()
def output_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kernels keep their output for the backward pass, a product does not."""
    return attention(q, k, v).mul_(2.0)


@bug()
def query_written_after_it_was_scaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A fused call that scales for itself keeps the query, for the backward pass, and not the scaled one."""
    q = q * 1
    output = ((q * 0.35) @ k.mT).softmax(-1) @ v
    return output, q.mul_(2.0)


@bug()
def query_written_that_has_the_only_gradient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A fused call keeps its query for the backward pass, where a product needs it only for the gradient of the key."""
    q, k = q * 1, k.detach()
    return (q @ k.mT * 0.35).softmax(-1) @ v.detach(), q.mul_(2.0)


@bug(gradients=False)
def copy_of_the_output_written(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What is a copy of a product can be a view of a fused output, which lies in memory in another order."""
    output = attention(q, k, v)
    merged = output.transpose(1, 2).reshape(2, 6, 32)
    merged.add_(1.0)
    return output * 2, merged


@bug(gradients=False)
def copies_of_the_output(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same with two copies, of which one is written."""
    swapped = attention(q, k, v).transpose(1, 2)
    one, other = swapped.contiguous(), swapped.reshape(2, 6, 32)
    one.add_(1.0)
    return one, other


@bug(gradients=False)
def output_of_another_site_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output is the next attention's query, and has another place in memory since it was rewritten."""
    output = attention(q, k, v)
    scores = output @ k.mT
    output.add_(1.0)
    return scores.softmax(-1) @ v + output


# -- memory -----------------------------------------------------------------------------------------------------


@bug()
def einsum_output_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An einsum's result lies in memory in an order of its own, and whoever has it can see that."""
    return torch.einsum("bhqk,bhkd->qbhd", (q @ k.mT * 0.35).softmax(-1), v)


@bug(k=(6, 8), v=(4, 6, 8))
def broadcast_einsum_output_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Another such order."""
    scores = torch.einsum("...qd,...kd->...qk", q, k) * 0.3
    return torch.einsum("...qk,...kd->...qd", scores.softmax(-1), v)


@bug()
def einsum_output_viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A `view` that only this order allows."""
    output = torch.einsum("bhqk,bhkd->bqhd", (q @ k.mT * 0.35).softmax(-1), v)
    return output.transpose(1, 2).view(8, 6, 8)


# -- PyTorch's own functions ------------------------------------------------------------------------------------


@bug(k=(2, 1, 6, 8), v=(2, 2, 6, 8))
def grouped_by_different_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA repeats key and value each by a number of its own."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@bug(x=(3, 6, 8), w=(24, 8), wo=(8, 8))
def hint_that_contradicts_the_mask(x: Tensor, w: Tensor, wo: Tensor) -> Tensor:
    """PyTorch takes `is_causal` for the truth, and does not look at the mask then."""
    mask = torch.zeros(6, 6, dtype=torch.bool)
    x = x.transpose(0, 1)
    names = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    return F.multi_head_attention_forward(
        x, x, x, 8, 2, w, None, None, None, False, 0.0, wo, None, training=True, **names
    )[0]
