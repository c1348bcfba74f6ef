"""From what a site computes, at which shapes and on which device, to the kernel that will compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

import torch

from attn_rewriter.device import Device
from attn_rewriter.errors import KernelUnavailable, Refusal
from attn_rewriter.kernels import KERNELS, Kernel
from attn_rewriter.measured import ranking
from attn_rewriter.spec import EVERY_KEY, AttentionSpec, Shapes, at_most

Request = Union[str, Sequence[str]]

FEW_QUERIES, SHORT = 127, 512
"""Less than a block of FlexAttention, and a few of them."""

MANY_KEYS = 8
"""So many for each query are worth splitting."""

FLASH = ("fa4", "fa3", "fa2")


@dataclass(frozen=True)
class Choice:
    """The kernel that will run, and every other one that was asked before it with its reasons."""

    kernel: Kernel
    refused: tuple[Refusal, ...] = ()


def order(spec: AttentionSpec, shapes: Shapes, device: Device) -> tuple[str, ...]:
    """The kernels to try in automatic mode, the preferred one first.

    On CUDA: where scores are nothing but scaled and causal, as measured (`attn_rewriter/measured.py`), or SDPA first
    where nothing was. SDPA's kernels read any other mask or bias whole, where FlexAttention leaves out what is masked;
    for a few queries there is nothing to leave out, and up to a few blocks of keys and no bias it takes longer to find
    out what (`python -m attn_rewriter bench masks`). In float32 its backward pass has tiles of 16, whatever the card.
    For few queries against many keys, whatever is masked is left out by the kernel for decoding, which comes first.
    """
    if device.platform != "cuda":
        return _in_order("sdpa", "flex")
    few = isinstance(shapes.q_len, int) and shapes.q_len <= FEW_QUERIES
    if spec.is_plain(shapes):
        causal = spec.keep.within(shapes.q_len, shapes.kv_len) != EVERY_KEY
        return _in_order(*(() if few else ranking(shapes, causal, device)), "sdpa")
    if few:
        many_keys = not at_most(shapes.kv_len, MANY_KEYS * shapes.q_len)
        return _in_order(*(("decode",) if many_keys else ()), "sdpa", "flex")
    form = spec.affine()
    unbiased = not isinstance(form, str) and not form.biases and spec.sinks is None
    short = unbiased and isinstance(shapes.q_len, int) and shapes.q_len <= SHORT
    wide = (shapes.product_dtype or shapes.dtype) == torch.float32
    return _in_order("sdpa", "flex") if short or wide else _in_order("flex", *FLASH, "sdpa")


def _in_order(*first: str) -> tuple[str, ...]:
    """These kernels, then the others that are chosen automatically."""
    return tuple(dict.fromkeys([*first, *(name for name in KERNELS if name != "reference")]))


def requested(kernel: Request) -> tuple[str, ...] | None:
    """The names in a request, checked; None for "auto"."""
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    if names == ("auto",):
        return None
    unknown = [name for name in names if name not in KERNELS]
    if unknown or not names:
        asked = f"unknown kernel {unknown[0]!r}" if unknown else "no kernel is named"
        raise ValueError(f"{asked}: choose from 'auto', {', '.join(map(repr, KERNELS))}, or a list of these")
    return names


def choose(
    spec: AttentionSpec,
    shapes: Shapes,
    device: Device,
    kernel: Request = "auto",
    *,
    inductor: bool = True,
    preferred: Sequence[str] = (),
) -> Choice | Refusal:
    """The first usable kernel in the automatic order, `preferred` ones first, or in the order asked for. Some are only
    chosen automatically where Inductor will compile them.

    Raises `KernelUnavailable` where kernels were asked for by name and none of them can run.
    """
    names = requested(kernel)
    refused: list[Refusal] = []
    for name in names or dict.fromkeys([*preferred, *order(spec, shapes, device)]):
        reasons = _reasons(name, spec, shapes, device, inductor or names is not None)
        if not reasons:
            return Choice(KERNELS[name], tuple(refused))
        refused += [Refusal("choose", f"{name}: {reason}") for reason in reasons]
    said = "; ".join(refusal.reason for refusal in refused)
    if names is not None:
        raise KernelUnavailable(f"no requested kernel can compute {spec} at {shapes} on {device}: {said}")
    return Refusal("choose", said)


def usable(spec: AttentionSpec, shapes: Shapes, device: Device, *, inductor: bool = True) -> tuple[str, ...]:
    """All kernels that the automatic choice is between."""
    return tuple(name for name in order(spec, shapes, device) if not _reasons(name, spec, shapes, device, inductor))


def _reasons(name: str, spec: AttentionSpec, shapes: Shapes, device: Device, inductor: bool) -> list[str]:
    reasons = KERNELS[name].refusals(spec, shapes, device)
    if KERNELS[name].needs_inductor and not inductor:
        reasons.append("only Inductor makes a fused kernel of it")
    return reasons
