"""flash-attention 4, in CuTe DSL (https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute).

Its kernels are compiled on their first call, which takes seconds, once for each head_dim, type, mask and grouping of
heads. FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 makes it keep them on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.flash import Flash, How, Kept
from attn_rewriter.progress import working
from attn_rewriter.spec import AttentionSpec, Shapes, Softcap


class FA4(Flash):
    """Causal, windows, softcap and GQA; backward from Hopper on."""

    name = "fa4"
    distribution = "flash-attn-4"
    module = "flash_attn.cute.interface"
    at_least = "4.0.0b30"

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = super().refusals(spec, shapes, device)
        generation = (device.capability or (9, 0))[0]
        if generation == 8 and shapes.needs_backward:
            reasons.append(f"has a backward pass from sm_90 on, this is {device}")
        large = isinstance(shapes.head_dim, int) and shapes.head_dim > 128
        if large and not (generation == 9 or (generation in (10, 11) and shapes.head_dim == 256)):
            reasons.append(f"head_dim is at most 128 on {device}, here {shapes.head_dim}")
        capped = any(isinstance(modifier, Softcap) for modifier in spec.modifiers)
        if large and generation != 9 and capped and shapes.needs_backward:
            reasons.append(f"has no backward pass with a softcap at head_dim {shapes.head_dim} on {device}")
        if generation == 12 and shapes.needs_backward and torch.are_deterministic_algorithms_enabled():
            reasons.append(f"has no deterministic backward pass on {device}")
        return reasons

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        from flash_attn.cute.interface import _flash_attn_fwd

        with _compiling("forward", query, key, how):
            output, logsumexp, *_ = _flash_attn_fwd(
                query, key, value, softcap=how.softcap or None, return_lse=True, **_common(how)
            )
        return output, logsumexp, None

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd

        found = tuple(x.new_empty(x.shape) for x in kept[:3])
        with _compiling("backward", kept.query, kept.key, how):
            _flash_attn_bwd(
                *kept[:4],
                gradient,
                kept.logsumexp,
                softcap=how.softcap,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                **dict(zip(("dq", "dk", "dv"), found)),
                **_common(how),
            )
        return found


_compiled: set[object] = set()


@contextmanager
def _compiling(direction: str, query: Tensor, key: Tensor, how: How) -> Iterator[None]:
    """Show the first call of its kind as what it mostly is."""
    *_, num_heads, head_dim = query.shape
    window = tuple(side < 0 for side in how.window)
    kind = direction, query.dtype, head_dim, num_heads // key.size(-2), how.causal, window, how.softcap
    if kind in _compiled:
        yield
        return
    with working(f"flash-attn-4 compiles its {direction} pass for head_dim {head_dim}"):
        yield
    _compiled.add(kind)


def _common(how: How) -> dict[str, float | bool | int | None]:
    """The arguments that its two passes share. It takes None for no bound, and 0 on the right as causal."""
    left, right = (None if side < 0 else side for side in how.window)
    return {
        "softmax_scale": how.scale,
        "causal": how.causal,
        "window_size_left": left,
        "window_size_right": None if how.causal else right,
    }
