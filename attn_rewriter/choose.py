"""From what a site computes, at which shapes and on which device, to the kernel that will compute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Union

import torch

from attn_rewriter.device import Device
from attn_rewriter.errors import KernelUnavailable, Refusal
from attn_rewriter.kernels import KERNELS, PAIRS, Kernel, named
from attn_rewriter.kernels.base import FUSED_HEAD_DIM
from attn_rewriter.kernels.blocks import perhaps_masks
from attn_rewriter.measured import passes
from attn_rewriter.spec import EVERY_KEY, AttentionSpec, Bias, Shapes, at_most

Request = Union[str, Sequence[str]]

FEW_QUERIES, SHORT = 127, 512
"""Less than a block of FlexAttention, and a few of them (of queries, or of keys)."""

MANY_KEYS = 8
"""So many for each query are worth splitting."""

FLASH = ("fa4", "fa3", "fa2")

ALIKE = 1.015
"""How much longer `sdpa` may take and still come first: as a plain PyTorch operator it is cached and read more easily,
and repeated measurements differ by as much."""

GAIN_MS = 0.003
"""What another kernel has to gain in each pass. A Python operator takes the CPU 0.06 to 0.15 ms more (H100), which is
of no account only where the GPU has more to do: for less than this it is not worth it."""


@dataclass(frozen=True)
class Choice:
    """The kernel that will run, and every other one that was asked before it with its reasons."""

    kernel: Kernel
    refused: tuple[Refusal, ...] = ()


def order(spec: AttentionSpec, shapes: Shapes, device: Device) -> tuple[str, ...]:
    """The kernels to try in automatic mode, the preferred one first.

    On CUDA: where scores are nothing but scaled and causal, as measured (`attn_rewriter/measured.py`), in training each
    pass for itself, or SDPA first where nothing was. SDPA's kernels read any other mask or bias whole. For few queries
    against many keys, the kernel for decoding leaves out what is masked; for more, flash-attention 4 does from Hopper
    on, and FlexAttention; and flash-attention 2 where all that is masked is padding of the keys, which alone has
    dropout as well. Up to a few blocks of queries, or of keys, and no other bias than one that may be a mask, it takes
    longer to find out what can be left out (`python -m attn_rewriter bench masks`). In float32 FlexAttention's backward
    pass has tiles of 16, whatever the card. With biases, flash-attention 4 is taken where they vary over heads and
    keys alone, as ALiBi's: others it reads number by number, and takes longer. Of heads with more than 256 features
    matrix products take less time than what SDPA has for them.
    """
    if device.platform != "cuda":
        return _in_order("sdpa", "flex")
    few = isinstance(shapes.q_len, int) and shapes.q_len <= FEW_QUERIES
    if isinstance(shapes.head_dim, int) and shapes.head_dim > FUSED_HEAD_DIM and not few:
        return _in_order("chunked", "sdpa")
    if spec.is_plain(shapes):
        causal = spec.keep.within(shapes.q_len, shapes.kv_len) != EVERY_KEY
        times = {} if few else with_pairs(passes(shapes, causal, device), spec, shapes, device)
        return _in_order(*_fastest_first(times), "sdpa")
    if few:
        many_keys = not at_most(shapes.kv_len, MANY_KEYS * shapes.q_len)
        return _in_order(*(("decode",) if many_keys else ()), "sdpa", "flex")
    if spec.dropout_p:
        return _in_order("fa2", "sdpa")
    capability = device.capability or (0, 0)
    newest = ("fa4",) if capability >= (9, 0) else ()
    biases = [modifier for modifier in spec.modifiers if isinstance(modifier, Bias)]
    perhaps_alone = len([*perhaps_masks(biases)]) == len(biases)
    masks_alone = not isinstance(spec.affine(), str) and spec.sinks is None and perhaps_alone
    short = any(isinstance(length, int) and length <= SHORT for length in (shapes.q_len, shapes.kv_len))
    if (shapes.product_dtype or shapes.dtype) == torch.float32 or (short and masks_alone):
        first: tuple[str, ...] = ("sdpa", "flex")
    elif biases:
        first = (*newest, "flex", "sdpa")
    else:
        axes = spec.keep.varies_over()
        padded = "key" in axes and axes <= {"batch", "key"} and capability < (10, 0)
        first = (*newest, *(("fa2",) if padded else ()), "flex", *FLASH, "sdpa")
    like_alibi = all("head" in bias.axes and {*bias.axes} <= {"head", "key"} for bias in biases)
    return tuple(name for name in _in_order(*first) if name != "fa4" or like_alibi)


def with_pairs(
    times: Mapping[str, tuple[float, ...]], spec: AttentionSpec, shapes: Shapes, device: Device
) -> dict[str, tuple[float, ...]]:
    """Times of kernels by pass, and of all that can be made of two of them. (Where one of two is refused, it says so
    itself.)"""
    mixed = {
        name: (times[pair.forward.name][0], *times[pair.backward.name][1:])
        for name, pair in PAIRS.items()
        if {pair.forward.name, pair.backward.name} <= times.keys() and not pair.refusals(spec, shapes, device)
    }
    return {**times, **mixed}


def _fastest_first(times: Mapping[str, tuple[float, ...]]) -> list[str]:
    """By all passes together, but `sdpa` before those that are hardly faster in any, or gain next to nothing."""
    ranked = sorted(times, key=lambda name: sum(times[name]))
    if "sdpa" not in times:
        return ranked
    plain = times["sdpa"]
    least = sum(plain) - GAIN_MS * len(plain)
    faster = [name for name in ranked[: ranked.index("sdpa")] if sum(times[name]) < least]
    clearly = [name for name in faster if any(t > ALIKE * other for t, other in zip(plain, times[name]))]
    return [*dict.fromkeys([*clearly, "sdpa", *ranked])]


def _in_order(*first: str) -> tuple[str, ...]:
    """These kernels, then the others; but not `chunked`, which is fast for large heads alone, nor the reference."""
    return tuple(dict.fromkeys([*first, *(name for name in KERNELS if name not in ("chunked", "reference"))]))


def requested(kernel: Request) -> tuple[str, ...] | None:
    """The names in a request, checked; None for "auto"."""
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    if names == ("auto",):
        return None
    unknown = [name for name in names if name not in KERNELS and name not in PAIRS]
    if unknown or not names:
        asked = f"unknown kernel {unknown[0]!r}" if unknown else "no kernel is named"
        raise ValueError(
            f"{asked}: choose from 'auto', {', '.join(map(repr, KERNELS))}, a pair such as 'cudnn/fa4', or a list"
        )
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
            return Choice(named(name), tuple(refused))
        refused += [Refusal("choose", f"{name}: {reason}") for reason in reasons]
    said = "; ".join(refusal.reason for refusal in refused)
    if names is not None:
        raise KernelUnavailable(f"no requested kernel can compute {spec} at {shapes} on {device}: {said}")
    return Refusal("choose", said)


def usable(spec: AttentionSpec, shapes: Shapes, device: Device, *, inductor: bool = True) -> tuple[str, ...]:
    """All kernels, without pairs of them, that the automatic choice is between."""
    names = (name for name in order(spec, shapes, device) if name in KERNELS)
    return tuple(name for name in names if not _reasons(name, spec, shapes, device, inductor))


def _reasons(name: str, spec: AttentionSpec, shapes: Shapes, device: Device, inductor: bool) -> list[str]:
    reasons = named(name).refusals(spec, shapes, device)
    if named(name).needs_inductor and not inductor:
        reasons.append("only Inductor makes a fused kernel of it")
    return reasons
