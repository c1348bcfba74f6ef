"""FlexAttention: any elementwise change of the scores, and only the blocks of keys that the mask keeps.

`score_mod` and `mask_mod` are made from the spec (https://arxiv.org/abs/2412.05496,
https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html). They hold no tensors: what they read is handed
to the operator beside them, as Dynamo does it for the public function.

Two kinds of nodes enter the graph: a `block_mask` (`kernels/blocks.py`), and a `flex_attention`, which computes.
"""

from __future__ import annotations

import math
import operator
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import FUSED_HEAD_DIM, Kernel, Limits, Tensors
from attn_rewriter.kernels.blocks import BLOCK, AsNode, block_mask, in_memory, mask_names, perhaps_masks
from attn_rewriter.kernels.fully_masked import completed, lifted_rows, lost, rows_without_keys
from attn_rewriter.kernels.masking import element, holds, modified
from attn_rewriter.spec import (
    AXES,
    EVERY_KEY,
    AttentionSpec,
    Bias,
    Mask,
    Modifier,
    Predicate,
    Scale,
    ScaleBy,
    Shapes,
    TensorMask,
)
from attn_rewriter.torch_private import flex_attention, statically_known_true, tree_leaves

_MIN_HEAD_DIM = {"cuda": 16, "cpu": 24}
"""Of a Triton matrix product; and of one in C++: with vectors of 8 numbers (AVX2), one of 8 or 16 features writes eight
scores too many where the keys are a multiple of 8, but not of 16 (2.13: `CppMicroGemmFP32Vec`, the tail of an operand
that is transposed, whose first implementation is for less than 24 features)."""
_WHOLE = 1 << 30


class Flex(Kernel):
    """Any spec without dropout. Under Inductor alone it is a kernel; otherwise PyTorch computes it densely."""

    name = "flex"
    needs_inductor = True
    adds_fills = True
    limits = Limits(
        platforms=frozenset({"cpu", "cuda", "rocm", "xpu"}),
        min_capability=(8, 0),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_blocks=2**16 - 1,
    )

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, replace(shapes, dtype=shapes.product_dtype or shapes.dtype), device)
        if spec.dropout_p:
            reasons.append("has no dropout")
        size = max((n for n in (shapes.head_dim, shapes.head_dim_v) if isinstance(n, int)), default=0)
        if device.type == "cuda" and size > FUSED_HEAD_DIM:  # tiles of more are too large for a GPU, or were never run
            reasons.append(f"head_dim is at most {FUSED_HEAD_DIM} on CUDA, here {size}")
        if not all(isinstance(n, int) for n in (shapes.num_heads, shapes.head_dim, shapes.head_dim_v)):
            reasons.append("needs the numbers of heads and their sizes to be known")
        scores = shapes.q_len * shapes.kv_len
        read = spec.numeric or any(spec.keep.tensors())
        if read and isinstance(scores, int) and scores >= 2**31:
            reasons.append("its offsets into masks and biases may be of 32 bits, too few for so many scores")
        if device.type == "cpu":
            if shapes.needs_backward:
                reasons.append("has no backward pass on CPU")
            if isinstance(spec.sinks, (str, float)):
                reasons.append("gives no logsumexp, which sinks need, on CPU")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        """Its backward pass adds up the gradients of what `score_mod` reads by atomic operations."""
        read = {name for modifier in spec.modifiers for name in _names(modifier)}
        if shapes.needs_backward and read & {*shapes.learned}:
            return "adds up the gradient of a bias in any order"
        unknown = shapes.needs_backward and device.platform not in ("cpu", "cuda")
        return f"may have a backward pass that varies on {device}" if unknown else ""

    def goes_through_scores(self, shapes: Shapes) -> bool:
        return True

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        dtype = shapes.product_dtype or shapes.dtype
        if dtype != shapes.dtype:  # biases are added in float32 whatever their type, as MPT's in float32
            query, key, value = (x.to(dtype) for x in (query, key, value))
        scale = 1.0
        modifiers: list[Any] = [m for m in spec.modifiers if not isinstance(m, Mask)]
        while modifiers and (first := modifiers[0]):  # what is linear in the query goes there
            if isinstance(first, Scale):
                scale *= first.factor
            elif isinstance(first, ScaleBy) and not first.per_key and dtype == shapes.dtype:
                query = first.apply(query, tensors)
            else:
                break
            modifiers.pop(0)
        keep = spec.keep.within(shapes.q_len, shapes.kv_len)
        varies = keep.varies_over()
        made: dict[Any, Any] = {}  # tensors that take part beside the model's own
        if spec.may_mask or spec.fully_masked_rows == "by fill":
            # In memory, because Inductor fails on what is read by both functions and not laid out yet (2.11).
            made["levels"], made["rows"] = (in_memory(x) for x in lifted_rows(spec, shapes, tensors, biases=False))
            masking = [m for m in modifiers if isinstance(m, Bias) and m.may_mask]
            varies |= {axis for bias in masking for axis in bias.axes}
            added = Bias("levels", axes=tuple(axis for axis in AXES if axis in varies))
            modifiers = [*(m for m in modifiers if m not in masking), _Emptied("rows", shapes.needs_backward), added]
        elif self._shows_rows(spec, shapes):
            made["rows"] = in_memory(rows_without_keys(keep, shapes, tensors))
            through = spec.fully_masked_rows == "mean, added"
            if modifiers or (through and shapes.needs_backward):
                modifiers.append(_Emptied("rows", through))
            else:  # a pass over the query takes less time than one more operation on every score
                query = torch.where(made["rows"], query.new_zeros(()), query)
        if made and keep != EVERY_KEY:
            keep |= TensorMask("rows", tuple(axis for axis in AXES if axis in varies - {"key"}))
        tensors = ChainMap(made, tensors)  # type: ignore[arg-type]
        masks = tuple(tensors[name] for name in mask_names(keep))
        hiding = [*perhaps_masks(modifiers)]
        blocks = block_mask(keep, shapes, tensors, hiding) if hiding or keep != EVERY_KEY else None
        names = tuple(dict.fromkeys(name for m in modifiers for name in _names(m)))
        attend = _Attend(
            keep,
            mask_names(keep),
            tuple(modifiers),
            names,
            scale,
            shapes.needs_backward or spec.sinks is not None,
            dtype != torch.float32,
        )
        least = _MIN_HEAD_DIM.get(device.type, 0)
        scored = query
        small = min(shapes.head_dim, shapes.head_dim_v) < least
        if small:
            query, key, value = (F.pad(x, (0, least)) for x in (query, key, value))
        captured = tuple(tensors[name] for name in names)
        result = attend(query, key, value, blocks, masks, captured)
        output, logsumexp = result[0], result[1]
        if small:
            output = output.narrow(-1, 0, shapes.head_dim_v)
        if spec.sinks is not None:
            sinks = tensors[spec.sinks].squeeze(-1) if isinstance(spec.sinks, str) else spec.sinks
            share = torch.sigmoid(logsumexp * math.log(2) - sinks)  # of the keys in the weight
            output = (output * share.unsqueeze(-1)).to(dtype)
        if "levels" in made:
            return lost(output, made["levels"], spec, shapes)
        if made:
            return output
        return completed(output, scored, scale, spec, shapes, tensors)

    @staticmethod
    def _shows_rows(spec: AttentionSpec, shapes: Shapes) -> bool:
        """Whether rows without a key are computed here as any other, all keys shown and all scores the same: where they
        come by whole sequences, as those that are nothing but padding, or want a gradient that nothing else gives.
        Otherwise that would take longer than to leave them out."""
        if spec.fully_masked_rows not in ("mean", "mean, added"):
            return False
        learned = any(isinstance(m, Bias) and m.tensor in shapes.learned for m in spec.modifiers)
        bent = isinstance(spec.affine(), str) or learned
        through = spec.fully_masked_rows == "mean, added" and shapes.needs_backward
        return "query" not in spec.keep.within(shapes.q_len, shapes.kv_len).varies_over() or (through and bent)


def _tuned(query: torch.Tensor, value: torch.Tensor, captured: Sequence[Any]) -> dict[str, Any]:
    """Options of the Triton kernels (`FlexKernelOptions`) where PyTorch's own choice is a bad one.

    It does not count what the tiles of masks and biases take of the shared memory, for each stage of the pipeline: too
    much, and there is no kernel. On an H200 two stages fit with two of them, one with three, at all head dims.
    """
    if query.device.type != "cuda":
        return {}
    capability = torch.cuda.get_device_capability(query.device)
    head_dim = max(query.size(-1), value.size(-1))
    tiles = sum(1 for x in captured if _is_tile(x))
    if tiles or (head_dim > 128 and head_dim & (head_dim - 1)):
        return {"num_stages": 2 if tiles <= 2 and capability in _LARGE_SHARED_MEMORY else 1}
    many = statically_known_true(query.size(-2) >= BLOCK)  # else PyTorch takes its kernel for decoding
    if many and head_dim > 128 and query.element_size() == 2 and capability == (9, 0):
        forward = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 8}
        return {**forward, "bwd_num_stages": 2, "bwd_num_warps": 8}
    return {}


def _is_tile(x: Any) -> bool:
    """Whether a captured tensor varies over queries and keys."""
    return isinstance(x, torch.Tensor) and x.ndim > 1 and x.size(-1) != 1 and x.size(-2) != 1


_LARGE_SHARED_MEMORY = {(8, 0), (9, 0), (10, 0), (10, 3)}


@dataclass(frozen=True)
class _Emptied:
    """Scores of rows without a key, by the name of a tensor that says which these are: they are zero, but with the
    gradient of what they were where they go `through`."""

    rows: str
    through: bool

    def apply(self, score: Any, tensors: Any) -> Any:
        return torch.where(tensors[self.rows], score - score.detach() if self.through else 0.0, score)


def _names(modifier: Modifier | _Emptied) -> list[str]:
    """The tensors that a modifier reads."""
    fields = (getattr(modifier, field, 0) for field in ("tensor", "factor", "rows"))
    return [field for field in fields if isinstance(field, str)]


class _RowMajor(torch.autograd.Function):
    """The same tensor, computed before it is read, and laid out with its keys next to each other in memory.

    Else Inductor computes a captured tensor again for every score that reads it, such as T5's two lookups, or reads and
    adds up its gradient with a stride: three times as slow as the attention on an H200.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from attn_rewriter.torch_private import force_stride_order  # takes seconds where Inductor is not in use

        strides = [*accumulate(reversed(x.shape[1:]), operator.mul, initial=1)]
        return force_stride_order(x, strides[::-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@dataclass(frozen=True)
class _Attend(AsNode):
    """The operator, with the functions that it takes; gives output and logsumexp, that to the base 2."""

    keep: Predicate
    mask_names: tuple[Any, ...]
    modifiers: tuple[Modifier | _Emptied, ...]
    names: tuple[str, ...]
    scale: float
    logsumexp: bool
    half: bool
    __name__ = "flex_attention"

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: Sequence[torch.Tensor] | None,
        masks: tuple[torch.Tensor, ...],
        captured: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A number that only the run knows becomes a tensor: `score_mod` can hold no such number.
        buffers = tuple(
            x if isinstance(x, torch.Tensor) else query.new_full((1, 1, 1, 1), x, dtype=torch.float32) for x in captured
        )
        in_cpp = query.device.type == "cpu" and not self.logsumexp
        if in_cpp:
            query, key, value = (in_memory(x) for x in (query, key, value))
            sizes = (x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.int64) for x in masks)
            masks, buffers = (tuple(in_memory(x) for x in held) for held in (sizes, buffers))
        elif query.device.type == "cuda":
            masks, buffers = (
                tuple(_RowMajor.apply(x) if _is_tile(x) else x for x in held) for held in (masks, buffers)
            )
        if blocks is None:
            one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
            sparse = BlockMask.from_kv_blocks(one, one.unsqueeze(-1) * 0, BLOCK_SIZE=_WHOLE, seq_lengths=(1, 1))
        else:
            lengths = (query.size(-2), key.size(-2))
            sparse = BlockMask(lengths, *blocks, (BLOCK, BLOCK), self.mask_mod)  # type: ignore[call-arg, arg-type]
        options = {
            "BACKEND": "AUTO",
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "WRITE_DQ": True,
            "OUTPUT_LOGSUMEXP": self.logsumexp,
            "OUTPUT_MAX": False,
            **_tuned(query, value, [*buffers, *masks]),
        }
        output, logsumexp, _ = flex_attention(
            query, key, value, self.score_mod, sparse.as_tuple(), self.scale, options, buffers, masks
        )
        return in_memory(output) if in_cpp else output, logsumexp

    def fake(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What `run` gives for fake tensors. (The operator can't make its backward graph among Dynamo's.)"""
        leaves = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        with torch.no_grad():
            results = self.run(*args)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        output, logsumexp = (result.requires_grad_(differentiable) for result in results)
        return output, logsumexp

    def mask_mod(self, b: Any, h: Any, q: Any, k: Any, *masks: torch.Tensor) -> torch.Tensor:
        return holds(self.keep, dict(zip(self.mask_names, masks)), b, h, q, k)

    def score_mod(self, score: Any, b: Any, h: Any, q: Any, k: Any, *captured: torch.Tensor) -> torch.Tensor:
        tensors = {
            name: element(held, (b, h, q, k), (n != 1 for n in held.shape)) for name, held in zip(self.names, captured)
        }
        for modifier in self.modifiers:
            if isinstance(modifier, _Emptied):
                score = modifier.apply(score, tensors)
            else:
                score = modified(score, modifier, tensors, fast=self.half)
        return score
