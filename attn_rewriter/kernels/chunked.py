"""Attention of heads too large for fused kernels: some queries at a time, by matrix products.

Of more than 256 features, as in the autoencoders of image models (512), a tile of queries and one of keys fill what
memory a fused kernel computes in. PyTorch has its memory-efficient attention alone for these, and a library's products
with a softmax between them take a fraction of its time (`python -m attn_rewriter bench masks`). The backward pass has
the logsumexp of each row, and computes the scores again, as in FlashAttention (https://arxiv.org/abs/2205.14135);
chunks are those of "Self-attention Does Not Need O(n²) Memory" (https://arxiv.org/abs/2112.05682).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Limits, Tensors
from attn_rewriter.kernels.blocks import AsNode
from attn_rewriter.kernels.masking import scaled_query
from attn_rewriter.spec import EVERY_KEY, AttentionSpec, Shapes

_SCORES, _CHUNKS = 2**24, 16
"""So many scores at a time, unless there would be more chunks than this: each is operations of its own in the graph."""

_MOST = 2**31
"""Scores altogether, in float32: 8 GiB, of which a sixteenth is in memory at a time. But in training Inductor computes
chunks side by side where none of them waits for another, and may have all of them there."""


class Chunked(Kernel):
    """Scores that are but scaled and causal, of known lengths, in half precision. Inductor fuses what is between the
    products."""

    name = "chunked"
    needs_inductor = True
    limits = Limits(
        platforms=frozenset({"cuda"}), min_capability=(8, 0), dtypes=frozenset({torch.float16, torch.bfloat16})
    )

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        if not spec.is_plain(shapes):
            reasons.append(f"computes scores that are scaled, with a causal mask or none, not {spec}")
        if spec.dropout_p:
            reasons.append("has no dropout")
        sizes = (shapes.batch, shapes.num_heads, shapes.q_len, shapes.kv_len)
        if not all(isinstance(n, int) for n in sizes):
            reasons.append("needs batch, heads and lengths to be known")
        elif not 0 < math.prod(sizes) <= _MOST:
            reasons.append(f"takes from one to {_MOST} scores, here {math.prod(sizes)}")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return ""  # chunks are added up in their order

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> Tensor:
        form = spec.affine()
        assert not isinstance(form, str)
        query, key, value = scaled_query(form.query_scales, tensors), tensors["key"], tensors["value"]
        causal = form.keep.within(shapes.q_len, shapes.kv_len) != EVERY_KEY
        if causal and shapes.kv_len > shapes.q_len:  # the last ones are seen by no query
            key, value = (x[:, :, : shapes.q_len] for x in (key, value))
        at_once = _SCORES // (shapes.batch * shapes.num_heads * shapes.kv_len)
        return _InChunks(form.scale, causal, max(at_once, math.ceil(shapes.q_len / _CHUNKS)))(query, key, value)


@dataclass(frozen=True)
class _InChunks(AsNode):
    """The output, of so many queries of each head at once."""

    scale: float
    causal: bool
    at_once: int
    __name__ = "attention_in_chunks"

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = _Attention.apply(query, key, value, self)
        return output

    def chunks(self, q_len: int, kv_len: int) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that any of them sees."""
        for start in range(0, q_len, self.at_once):
            stop = min(start + self.at_once, q_len)
            yield slice(start, stop), slice(min(stop, kv_len) if self.causal else kv_len)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and the logsumexp of each row by groups. Batches and heads of keys are one dimension here, queries
        are grouped by the head of keys that they share."""
        queries, keys, values = _grouped(query, key), key.flatten(0, 1), value.flatten(0, 1)
        outputs, logsumexps = [], []
        for some, seen in self.chunks(queries.size(2), keys.size(1)):
            scores = _product(queries[:, :, some].flatten(1, 2), keys[:, seen].mT) * self.scale
            if self.causal:
                scores = scores.masked_fill(_hidden(some, seen, queries), float("-inf"))
            largest = scores.amax(-1, keepdim=True)
            weights = (scores - largest).exp()
            total = weights.sum(-1, keepdim=True)
            outputs.append(_by_group((weights / total).to(value.dtype) @ values[:, seen], queries))
            logsumexps.append(_by_group(largest + total.log(), queries))
        output, logsumexp = (torch.cat(parts, 2) for parts in (outputs, logsumexps))
        return output.unflatten(0, (key.size(0), -1)).flatten(1, 2), logsumexp

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value. Products are transposed: a compiler that sees both passes would take
        one of them for that of the forward pass, and keep all scores until then."""
        queries, keys, values = _grouped(query, key), key.flatten(0, 1), value.flatten(0, 1)
        ways = _grouped(gradient, key)
        along = (ways.float() * _grouped(output, key).float()).sum(-1, keepdim=True)
        of_queries = []
        of_keys, of_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for some, seen in self.chunks(queries.size(2), keys.size(1)):
            rows, way, total, common = (x[:, :, some].flatten(1, 2) for x in (queries, ways, logsumexp, along))
            weights = (_product(keys[:, seen], rows.mT) * self.scale - total.mT).exp()
            if self.causal:
                weights = weights.masked_fill(_hidden(some, seen, queries).mT, 0.0)
            of_scores = weights * (_product(values[:, seen], way.mT) - common.mT) * self.scale
            of_scores = of_scores.to(query.dtype)
            of_queries.append(_by_group(of_scores.mT @ keys[:, seen], queries))
            rest = (0, 0, 0, keys.size(1) - seen.stop)
            of_keys = of_keys + F.pad(_product(of_scores, rows), rest)
            of_values = of_values + F.pad(_product(weights.to(value.dtype), way), rest)
        of_query = torch.cat(of_queries, 2).unflatten(0, (key.size(0), -1)).flatten(1, 2)
        return of_query, of_keys.to(key.dtype).view_as(key), of_values.to(value.dtype).view_as(value)


class _Attention(torch.autograd.Function):
    """Both passes, in the types of their operands."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: _InChunks) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            output, logsumexp = how.forward(query, key, value)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.how = how
        return output

    @staticmethod
    @once_differentiable  # which would take the logsumexp for a constant
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(gradient.device.type, enabled=False):
            return *ctx.how.backward(gradient, *ctx.saved_tensors), None


def _hidden(some: slice, seen: slice, queries: Tensor) -> Tensor:
    """Whether rows of scores, those of all heads that share a key, do not see a key under a causal mask."""
    rows = torch.arange(some.start, some.stop, device=queries.device).repeat(queries.size(1))
    return rows[:, None] < torch.arange(seen.stop, device=queries.device)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, of what is half precision."""
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """`[batch * num_kv_heads, groups, q_len, features]`."""
    return x.unflatten(1, (key.size(1), -1)).flatten(0, 1)


def _by_group(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, (like.size(1), -1))
