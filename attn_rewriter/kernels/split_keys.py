"""Attention of a few queries over many keys, in Triton: the keys are split among the GPU's processors.

Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html): a program attends to some blocks of keys for
all query heads that share them, a second kernel puts the parts together. What is masked is not read: PyTorch lists the
blocks that hold any key that is attended to, and the programs share these out. The grids depend on shapes alone, so
that the list may say something else whenever a CUDA graph is replayed.

This module imports Triton, and is imported where the kernel runs. With `TRITON_INTERPRET=1` it runs on CPU.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803 (constants of a Triton kernel are written in capitals)

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from attn_rewriter.device import made_current
from attn_rewriter.kernels import masking
from attn_rewriter.kernels.masking import any_in_blocks, without_hidden

_TILE_BYTES = 2**14  # of the keys of a block; as much of the values
_MIN_TILE, _MAX_BLOCK, _MAX_ROWS = 16, 128, 64  # 16 is the least that a matrix product of Triton takes
_MAX_SPLITS = 64
_PROGRAMS = 4  # at most for each processor, which runs as many at once: to hide the latency of memory
_WARPS, _STAGES = 4, 3

EQUAL = 2
"""What `keep` holds, in bytes, in a row without a key whose scores all count as zero: its weights are equal."""


@triton.jit
def attend_to_splits(
    query,
    key,
    value,
    keep,
    bias,
    blocks,
    counts,
    partial,
    largest,
    total,
    query_b,
    query_h,
    query_q,
    query_d,
    key_b,
    key_h,
    key_k,
    key_d,
    value_b,
    value_h,
    value_k,
    value_d,
    keep_b,
    keep_h,
    keep_q,
    keep_k,
    bias_b,
    bias_h,
    bias_q,
    bias_k,
    blocks_b,
    blocks_h,
    counts_b,
    counts_h,
    num_kv_heads,
    kv_len,
    splits,
    Q_LEN: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
):
    """A row is a query of one of the heads that share a key head: row `g * Q_LEN + q`.

    Writes, for each row and split, the sum of values weighted by `exp(score - largest)`, the sum of these weights, and
    the largest score: minus infinity where the split has no key for the row. Keep and bias have as many rows as these,
    or one for all, or none: there is no such tensor then.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    first_row = tl.program_id(1) * ROWS
    split = tl.program_id(2)

    row = first_row + tl.arange(0, ROWS)
    head, position = (kv_head * GROUP + row // Q_LEN)[:, None], (row % Q_LEN)[:, None]
    real = row < GROUP * Q_LEN
    d, d_v = tl.arange(0, D).to(tl.int64), tl.arange(0, D_V).to(tl.int64)  # offsets may be of 64 bits
    q = tl.load(
        query + batch * query_b + head * query_h + position * query_q + d[None, :] * query_d,
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    key += batch * key_b + kv_head * key_h
    value += batch * value_b + kv_head * value_h
    if KEEP_ROWS:
        keep_row = first_row + tl.arange(0, KEEP_ROWS)
        keep += batch * keep_b + (kv_head * GROUP + keep_row // Q_LEN)[:, None] * keep_h
        keep += (keep_row % Q_LEN)[:, None] * keep_q
        keep_real = (keep_row < GROUP * Q_LEN)[:, None]
        blocks += batch * blocks_b + kv_head * blocks_h
        count = tl.load(counts + batch * counts_b + kv_head * counts_h).to(tl.int32)
    else:
        count = tl.cdiv(kv_len, BLOCK)
    if BIAS_ROWS:
        bias_row = first_row + tl.arange(0, BIAS_ROWS)
        bias += batch * bias_b + (kv_head * GROUP + bias_row // Q_LEN)[:, None] * bias_h
        bias += (bias_row % Q_LEN)[:, None] * bias_q
        bias_real = (bias_row < GROUP * Q_LEN)[:, None]

    high = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, D_V], tl.float32)
    for i in tl.range(split, count, splits):
        block = tl.load(blocks + i) if KEEP_ROWS else i
        k = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside = k < kv_len
        keys = tl.load(
            key + k[None, :] * key_k + d[:, None] * key_d,
            mask=inside[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        )
        values = tl.load(
            value + k[:, None] * value_k + d_v[None, :] * value_d,
            mask=inside[:, None] & (d_v < HEAD_DIM_V)[None, :],
            other=0.0,
        )
        score = tl.dot(q, keys, input_precision="ieee") * SCALE
        if SOFTCAP != 0:  # times tanh, exact to a rounding unit of the cap
            score = SOFTCAP * (2 / (1 + tl.exp(score * (-2 / SOFTCAP))) - 1)
        score *= FACTOR
        if BIAS_ROWS:
            added = tl.load(bias + k[None, :] * bias_k, mask=inside[None, :] & bias_real, other=0.0)
            score += added.to(tl.float32)
        if KEEP_ROWS:
            kept = tl.load(keep + k[None, :] * keep_k, mask=inside[None, :] & keep_real, other=0).to(tl.int32)
            score = tl.where(kept == 2, 0.0, score)  # EQUAL
            score = tl.where(kept != 0, score, float("-inf"))
        else:
            score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(score - base[:, None])
        decay = tl.exp(high - base)
        weight = weight * decay + tl.sum(weights, 1)
        summed = summed * decay[:, None]
        summed = tl.dot(weights.to(values.dtype), values, summed, input_precision="ieee")
        high = higher

    at = (pair * (GROUP * Q_LEN) + row) * splits + split
    tl.store(largest + at, high, mask=real)
    tl.store(total + at, weight, mask=real)
    used = real & (high > float("-inf"))
    tl.store(
        partial + at[:, None] * HEAD_DIM_V + d_v[None, :],
        summed,
        mask=used[:, None] & (d_v < HEAD_DIM_V)[None, :],
    )


@triton.jit
def join_splits(
    partial,
    largest,
    total,
    sinks,
    output,
    sinks_b,
    sinks_h,
    sinks_q,
    splits,
    Q_LEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D_V: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
    NAN: tl.constexpr,
):
    """One row of the output, `[batch, num_heads, q_len, head_dim_v]`: where there is no key, zeros, or `NAN`. (`SPLITS`
    is the most that `splits` can be.)"""
    row = tl.program_id(0).to(tl.int64)
    split, d_v = tl.arange(0, SPLITS), tl.arange(0, D_V)
    at = row * splits + split
    high = tl.load(largest + at, mask=split < splits, other=float("-inf"))
    weight = tl.load(total + at, mask=split < splits, other=0.0)
    used = high > float("-inf")
    summed = tl.load(
        partial + at[:, None] * HEAD_DIM_V + d_v[None, :],
        mask=used[:, None] & (d_v < HEAD_DIM_V)[None, :],
        other=0.0,
    )
    highest = tl.max(high, 0)
    if SINKS:
        batch, head, position = row // (Q_LEN * NUM_HEADS), row // Q_LEN % NUM_HEADS, row % Q_LEN
        sink = tl.load(sinks + batch * sinks_b + head * sinks_h + position * sinks_q).to(tl.float32)
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp(high - highest)
    whole = tl.sum(weight * share, 0)
    if SINKS:
        whole += tl.exp(sink - highest)
    result = tl.sum(summed * share[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    if NAN:
        result = tl.where(whole == 0, float("nan"), result)
    tl.store(output + row * HEAD_DIM_V + d_v, result.to(output.dtype.element_ty), mask=d_v < HEAD_DIM_V)


@triton_op("attn_rewriter::decode", mutates_args=())
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    biases: Sequence[Tensor],
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    factor: float,
    empty: float,
    code: str,
) -> Tensor:
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len, head_dim_v = value.shape[1:]
    group = num_heads // num_kv_heads
    d, d_v = (max(_MIN_TILE, triton.next_power_of_2(n)) for n in (head_dim, head_dim_v))
    block, most_rows = tile_sizes(max(d, d_v), query.element_size())
    rows = min(most_rows, max(_MIN_TILE, triton.next_power_of_2(group * q_len)))
    for added in biases:
        if added.size(1) == 1 and added.size(-1) == kv_len:  # what varies over the heads, or no keys, is no mask
            shown = without_hidden(added, None if keep is None else keep != 0)
            keep = shown if keep is None or keep.dtype == torch.bool else torch.where(shown | (keep == EQUAL), keep, 0)
    keep = None if keep is None else keep.expand(-1, -1, -1, kv_len)
    bias = reduce(add, biases) if biases else None
    blocks, counts = (query, query) if keep is None else active_blocks(keep, block, num_kv_heads)
    row_blocks = triton.cdiv(group * q_len, rows)
    splits = number_of_splits(batch * num_kv_heads * row_blocks, triton.cdiv(kv_len, block), query.device)
    scores = (batch, num_heads, q_len, kv_len)
    pairs = (batch, num_kv_heads)
    largest, total = (query.new_empty((*scores[:3], splits), dtype=torch.float32) for _ in range(2))
    partial = query.new_empty((*scores[:3], splits, head_dim_v), dtype=torch.float32)
    with made_current(query.device):
        wrap_triton(attend_to_splits)[(batch * num_kv_heads, row_blocks, splits)](
            query,
            key,
            value,
            query if keep is None else keep,  # some pointer, where there is nothing to read
            query if bias is None else bias,
            blocks,
            counts,
            partial,
            largest,
            total,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *_strides(keep, scores),
            *_strides(bias, scores),
            *(_strides(blocks, (*pairs, blocks.size(-1)))[:2] if keep is not None else (0, 0)),
            *(_strides(counts, pairs) if keep is not None else (0, 0)),
            num_kv_heads,
            kv_len,
            splits,
            Q_LEN=q_len,
            GROUP=group,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            SCALE=scale,
            SOFTCAP=softcap,
            FACTOR=factor,
            ROWS=rows,
            BLOCK=block,
            D=d,
            D_V=d_v,
            KEEP_ROWS=_rows(keep, rows),
            BIAS_ROWS=_rows(bias, rows),
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        output = query.new_empty((*scores[:3], head_dim_v))
        wrap_triton(join_splits)[(batch * num_heads * q_len,)](
            partial,
            largest,
            total,
            query if sinks is None else sinks,
            output,
            *_strides(sinks, (*scores[:3], 1))[:3],
            splits,
            Q_LEN=q_len,
            NUM_HEADS=num_heads,
            HEAD_DIM_V=head_dim_v,
            D_V=d_v,
            SPLITS=_MAX_SPLITS,
            SINKS=sinks is not None,
            NAN=math.isnan(empty),
            num_warps=_WARPS,
        )
    return output


@_decode.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.size(-1)))


decode = torch.ops.attn_rewriter.decode.default
"""Query `[batch, num_heads, q_len, head_dim]`, key and value `[batch, num_kv_heads, kv_len, head_dim or head_dim_v]`,
keep (boolean, or bytes with rows of `EQUAL`), each of the biases and sinks that broadcast to the scores, the sinks'
last dimension being 1, to the output, `[batch, num_heads, q_len, head_dim_v]`: of scores that are multiplied by
`scale`, capped where `softcap` is not zero, multiplied by `factor`, and biased. A row without a key is `empty`, zero or
nan. `code` is `CODE`."""

CODE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, masking.__file__))).hexdigest()[:16]
"""Of what PyTorch looks into, but does not count among what its caches depend on: another version must miss them."""


def tile_sizes(d: int, item: int) -> tuple[int, int]:
    """How many keys a block has, and at most how many rows, by head dim (padded) and the size of a number."""
    fitting = _TILE_BYTES // (d * item)
    return max(_MIN_TILE, min(_MAX_BLOCK, fitting)), min(_MAX_ROWS, 2 * fitting)


def number_of_splits(programs: Any, blocks: Any, device: torch.device) -> Any:
    """How many programs share out the blocks of keys, where there are so many programs without splits."""
    wanted = _PROGRAMS * _processors(device) // torch.sym_max(1, programs)
    return torch.sym_max(1, torch.sym_min(torch.sym_min(wanted, blocks), _MAX_SPLITS))


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def active_blocks(keep: Tensor, block: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """The blocks in which any row keeps a key, before all others, `[batch, num_kv_heads, blocks]`, and how many these
    are, `[batch, num_kv_heads]`; dimensions over which `keep` does not vary have one element."""
    kept = (keep != 0).any(2)
    if keep.size(1) != 1:
        kept = kept.unflatten(1, (num_kv_heads, -1)).any(2)
    kept = any_in_blocks(kept, block)
    return kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices, kept.sum(-1)


def _strides(x: Tensor | None, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor that is broadcast to a shape."""
    return (0,) * len(shape) if x is None else x.expand(tuple(shape)).stride()


def _rows(x: Tensor | None, rows: int) -> int:
    """Of a tensor that broadcasts to the scores, how many a program reads."""
    return 0 if x is None else 1 if x.size(1) == x.size(2) == 1 else rows
