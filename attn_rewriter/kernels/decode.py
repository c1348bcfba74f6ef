"""A few queries against many keys, as in decoding with a cache: our own kernel, in Triton (`split_keys.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import util

import torch

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Limits, Tensors
from attn_rewriter.kernels.fully_masked import lifted_rows
from attn_rewriter.kernels.masking import bias_terms, keep_mask, scaled_query, sink_scores
from attn_rewriter.packages import unimportable
from attn_rewriter.spec import AttentionSpec, Mask, Modifier, ScaleBy, Shapes, Softcap

MAX_QUERIES = 64
"""Each 64 rows, which are the queries of all heads that share a key, read the keys and values once more."""


@dataclass(frozen=True)
class DecodeForm:
    """`softcap(query_scales(query) @ keyᵀ * scale) * factor + Σ factor * bias`, under any mask; a softcap of 0 is
    none."""

    scale: float
    query_scales: tuple[ScaleBy, ...]
    softcap: float
    factor: float
    biases: tuple[tuple[str, float], ...]


def decode_form(modifiers: Sequence[Modifier]) -> DecodeForm | str:
    """The modifiers as a `DecodeForm`, or the reason why they are none."""
    cap = next((modifier for modifier in modifiers if isinstance(modifier, Softcap)), None)
    at = len(modifiers) if cap is None else modifiers.index(cap)
    if cap is not None and any(isinstance(modifier, Mask) for modifier in modifiers[:at]):
        return "hides keys before a softcap"
    before, after = (AttentionSpec(tuple(part)).affine() for part in (modifiers[:at], modifiers[at + 1 :]))
    if isinstance(before, str):
        return before
    if isinstance(after, str):
        return after
    if cap is None:
        return DecodeForm(before.scale, before.query_scales, 0.0, 1.0, before.biases)
    if before.biases or after.query_scales:
        return "adds biases after a softcap, and scales by tensors before it"
    return DecodeForm(before.scale, before.query_scales, cap.cap, after.scale, after.biases)


@lru_cache
def _broken() -> str | None:
    """Why Triton, or what is made of it, can't be imported."""
    return unimportable("attn_rewriter.kernels.split_keys")


class Decode(Kernel):
    """Any affine form, and one softcap, in inference; blocks of keys that are masked are not read."""

    name = "decode"
    adds_fills = True
    limits = Limits(
        platforms=frozenset({"cuda"}),
        min_capability=(8, 0),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=256,
    )

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        dtype = shapes.product_dtype or shapes.dtype
        reasons = super().refusals(spec, replace(shapes, dtype=dtype), device)
        form = decode_form(spec.modifiers)
        if isinstance(form, str):
            reasons.append(form)
        elif form.softcap and dtype == torch.float32:
            reasons.append("its softcap is not exact enough for float32")
        elif form.query_scales and dtype != shapes.dtype:
            reasons.append(f"scales the query by a tensor in its own type, not in {shapes.dtype}")
        if not isinstance(shapes.q_len, int) or shapes.q_len > MAX_QUERIES:
            reasons.append(f"takes at most {MAX_QUERIES} queries, here {shapes.q_len}")
        if not isinstance(shapes.num_heads, int):
            reasons.append("needs the number of heads to be known")
        if 0 in (shapes.batch, shapes.q_len, shapes.kv_len):
            reasons.append("takes no empty tensors")
        if shapes.needs_backward:
            reasons.append("has no backward pass")
        if spec.dropout_p:
            reasons.append("has no dropout")
        if not reasons and util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if not reasons and (error := _broken()):
            reasons.append(f"triton can't be used: {error}")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return ""  # each part of the keys has a program and a place, and they are joined in their order

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        from attn_rewriter.kernels import split_keys

        form = decode_form(spec.modifiers)
        assert not isinstance(form, str)
        query, key, value = scaled_query(form.query_scales, tensors), tensors["key"], tensors["value"]
        if shapes.product_dtype is not None:  # scores are of float32 here whatever the type of query and key
            query, key, value = (x.to(shapes.product_dtype) for x in (query, key, value))
        masks = [modifier for modifier in spec.modifiers if isinstance(modifier, Mask)]
        biases = bias_terms(form.biases, tensors)
        sinks = None if spec.sinks is None else sink_scores(spec.sinks, tensors)
        keep = keep_mask(masks, shapes, tensors)
        if spec.may_mask or spec.fully_masked_rows == "by fill":
            lifted, rows = lifted_rows(spec, shapes, tensors)
            biases, keep = [lifted], None if keep is None else keep | rows
            query = torch.where(rows, query.new_zeros(()), query)
        elif keep is not None and spec.fully_masked_rows in ("mean", "mean, added"):
            keep = torch.where(keep.any(-1, keepdim=True), keep.to(torch.uint8), split_keys.EQUAL)
        empty = 0.0 if spec.fully_masked_rows == "zeros" else float("nan")
        numbers = form.scale, form.softcap, form.factor, empty
        return split_keys.decode(query, key, value, keep, biases, sinks, *numbers, split_keys.CODE)
