"""Flash attention's two passes in plain PyTorch, some queries at a time: what stands in for a package that raises."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attn_rewriter.kernels.blocks import mask_names
from attn_rewriter.kernels.flash import Flash, How, Kept
from attn_rewriter.kernels.masking import coordinates, holds

_SCORES = 2**24
"""As many at a time, in float32; what a package is asked for may have scores that fit into no memory."""


class Stepwise(Flash):
    """All that a `How` says but dropout, computed in float32. No one chooses it; `flash.py` calls it."""

    name = "stepwise"
    distribution = module = "torch"
    at_least = "2.11"

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, q_len, num_heads, _ = query.shape
        output = query.new_empty(batch, q_len, num_heads, value.size(-1))
        logsumexp = query.new_empty(batch, num_heads, q_len, dtype=torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            value = _by_head(value)
            for some, scores, _ in _scores(query, key, how):
                found = logsumexp[..., some] = scores.logsumexp(-1)
                output[:, some] = _ungrouped(_grouped(_weights(scores, found), value) @ value, num_heads).transpose(
                    1, 2
                )
        return output, logsumexp, None

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        num_heads = kept.query.size(2)
        of_query = kept.query.new_empty(kept.query.shape)
        with torch.autocast(kept.query.device.type, enabled=False):
            key, value = _by_head(kept.key), _by_head(kept.value)
            of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
            for some, scores, slope in _scores(kept.query, kept.key, how):
                query, way, output = (_by_head(x[:, some]) for x in (kept.query, gradient, kept.output))
                weights = _weights(scores, kept.logsumexp[..., some])
                along = _ungrouped(_grouped(way, value) @ value.mT, num_heads)
                of_scores = weights * (along - (way * output).sum(-1, keepdim=True)) * slope * how.scale
                of_query[:, some] = _ungrouped(_grouped(of_scores, key) @ key, num_heads).transpose(1, 2)
                of_key += _grouped(of_scores, key).mT @ _grouped(query, key)
                of_value += _grouped(weights, value).mT @ _grouped(way, value)
        return of_query, of_key.transpose(1, 2).to(kept.key.dtype), of_value.transpose(1, 2).to(kept.value.dtype)


def _scores(query: Tensor, key: Tensor, how: How) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Some queries, their scores, `[batch, num_heads, some, kv_len]`, and the derivative of these by what a softcap
    takes."""
    batch, q_len, num_heads, _ = query.shape
    kv_len = key.size(1)
    key = _by_head(key)
    b, h, q, k = coordinates(batch, num_heads, q_len, kv_len, query.device)
    at_once = max(1, _SCORES // max(1, batch * num_heads * kv_len))
    for start in range(0, q_len, at_once):
        some = slice(start, start + at_once)
        scores = _ungrouped(_grouped(_by_head(query[:, some]), key) @ key.mT, num_heads) * how.scale
        for bias in how.biases:
            scores = scores + (bias[:, :, some] if bias.size(2) > 1 else bias)
        slope: Tensor | float = 1.0
        if how.softcap:
            bent = torch.tanh(scores / how.softcap)
            scores, slope = how.softcap * bent, 1 - bent.square()
        distance = k - (q[:, :, some] + kv_len - q_len)
        if how.left >= 0:
            scores = scores.masked_fill(distance < -how.left, float("-inf"))
        if how.right >= 0:
            scores = scores.masked_fill(distance > how.right, float("-inf"))
        if how.mask is not None:
            tensors = dict(zip(mask_names(how.mask), how.masks))
            scores = scores.masked_fill(~holds(how.mask, tensors, b, h, q[:, :, some], k), float("-inf"))
        yield some, scores, slope


def _weights(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """None where a row has no key."""
    return (scores - logsumexp.unsqueeze(-1)).exp().nan_to_num(0.0)


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).float()


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """The rows of all heads that share a key head, as rows of that one."""
    return x.unflatten(1, (like.size(1), -1)).flatten(2, 3)


def _ungrouped(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (num_heads // x.size(1), -1)).flatten(1, 2)
