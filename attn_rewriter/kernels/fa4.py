"""flash-attention 4, in CuTe DSL (https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute).

Its kernels are compiled on their first call, which takes seconds, once for each head_dim, type, mask and grouping of
heads. FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 makes it keep them on disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_rewriter.spec
from attn_rewriter.device import Device
from attn_rewriter.kernels import masking
from attn_rewriter.kernels.base import Tensors
from attn_rewriter.kernels.blocks import BLOCK, TENSORS, block_mask, mask_names
from attn_rewriter.kernels.flash import Flash, FlashForm, How, Kept, flash_form
from attn_rewriter.progress import working
from attn_rewriter.spec import AXES, AttentionSpec, Predicate, Shapes, Softcap, TensorMask, Values, at_most, parts


class FA4(Flash):
    """Causal, windows, softcap and GQA; backward from Hopper on. On Hopper also any mask, and the blocks that it hides
    are left out: its `mask_mod` is made from the predicate; and biases that want no gradient, by its `score_mod`."""

    name = "fa4"
    distribution = "flash-attn-4"
    extra = "flash4"
    module = "flash_attn.cute.interface"
    at_least = "4.0.0b36"  # its functions are not public, and change from one to the next

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
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        """Its backward pass is told to be deterministic, and refuses where it can't be (4.0.0b36)."""
        generation = (device.capability or (0, 0))[0]
        if shapes.needs_backward and generation not in (9, 10, 11):
            return f"has no deterministic backward pass on {device}"
        form = flash_form(spec, shapes)
        masked = isinstance(form, FlashForm) and form.mask is not None
        return "has no deterministic backward pass with a mask" if shapes.needs_backward and masked else ""

    @staticmethod
    def no_bias(form: FlashForm, shapes: Shapes, device: Device) -> list[str]:
        reasons = _unreadable("biases", [bias.axes for bias in form.biases], shapes)
        if not _is_hopper(device):
            reasons.append(f"takes biases on sm_90 alone, this is {device}")
        if form.mask is not None:  # with blocks left out, an additive mask was wrong on an H100 (4.0.0b36)
            reasons.append(f"takes no bias beside a mask: {form.no_window}")
        if form.right is not None and not at_most(shapes.q_len, shapes.kv_len):
            reasons.append("takes causal biases over at least as many keys as queries")  # it reads those of no key
        if any(bias.tensor in shapes.learned for bias in form.biases):
            reasons.append("computes no gradient of a bias")
        if shapes.needs_backward and shapes.is_gqa:  # 4.0.0b36 takes heads there to be packed, which they are not
            reasons.append("takes the bias of another head in its backward pass where heads share a key")
        return reasons

    @staticmethod
    def no_mask(form: FlashForm, shapes: Shapes, device: Device) -> list[str]:
        assert form.mask is not None
        reasons = _unreadable("masks", _axes(form.mask).values(), shapes)
        if not _is_hopper(device):  # elsewhere its blocks have other sizes
            reasons.append(f"takes masks on sm_90 alone: {form.no_window}")
        return reasons

    @staticmethod
    def mask_parts(form: FlashForm, shapes: Shapes, tensors: Tensors) -> list[Tensor]:
        """The tensors of a `BlockMask`."""
        assert form.mask is not None
        found = block_mask(form.mask, shapes, tensors)
        return [found[i] for i in range(len(TENSORS))]

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        from flash_attn.cute.interface import _flash_attn_fwd

        with _compiling("forward", query, key, how):
            output, logsumexp, *_ = _flash_attn_fwd(
                query,
                key,
                value,
                softcap=how.softcap or None,
                return_lse=True,
                tile_mn=_tile(query, how),
                **_common(how, query, "kv"),
            )
        return output, logsumexp, None

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd

        head_dim = kept.query.size(-1)
        query, key, value, output, gradient = (_in_whole_columns(x) for x in (*kept[:4], gradient))
        found = tuple(x.new_empty(x.shape) for x in (query, key, value))
        with _compiling("backward", query, key, how):
            _flash_attn_bwd(
                query,
                key,
                value,
                output,
                gradient,
                kept.logsumexp,
                softcap=how.softcap,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                **dict(zip(("dq", "dk", "dv"), found)),
                **_common(how, query, "q"),
            )
        return tuple(x[..., :head_dim] for x in found)


COLUMNS = 32
"""Features that its backward pass needs a multiple of. On sm_90, 4.0.0b36 adds up the gradient of a query in a row of a
multiple of 16, and reads it in one of 32: with 72 or 80 features most of it is wrong, without an error
(https://github.com/Dao-AILab/flash-attention/pull/2896)."""


def _in_whole_columns(x: Tensor) -> Tensor:
    """With zeros for the features that are missing."""
    missing = -x.size(-1) % COLUMNS
    return F.pad(x, (0, missing)) if missing else x


def _is_hopper(device: Device) -> bool:
    return device.capability is not None and device.capability[0] == 9


def _unreadable(what: str, varying: Iterable[Sequence[str]], shapes: Shapes) -> list[str]:
    """Why a function of coordinates can't read tensors that vary over these axes."""
    reasons = []
    if not isinstance(shapes.head_dim, int) or shapes.head_dim > 128:
        reasons.append(f"takes {what} up to head_dim 128, here {shapes.head_dim}")
    if not isinstance(shapes.num_heads, int):
        reasons.append(f"takes {what} where the number of heads is known")
    sizes = dict(zip(AXES, (shapes.batch, shapes.num_heads, shapes.q_len, shapes.kv_len)))
    counts = [math.prod(sizes[axis] for axis in axes) for axes in varying]
    if any(isinstance(count, int) and count >= 2**31 for count in counts):
        reasons.append(f"takes {what} of less than 2**31 elements")
    return reasons


_compiled: set[object] = set()


@contextmanager
def _compiling(direction: str, query: Tensor, key: Tensor, how: How) -> Iterator[None]:
    """Show the first call of its kind as what it mostly is."""
    *_, num_heads, head_dim = query.shape
    window = tuple(side < 0 for side in how.window)
    added = tuple((x.dtype, _varies(x)) for x in how.biases)
    kind = direction, query.dtype, head_dim, num_heads // key.size(-2), how.causal, window, how.softcap, how.mask, added
    if kind in _compiled:
        yield
        return
    with working(f"flash-attn-4 compiles its {direction} pass for head_dim {head_dim}"):
        yield
    _compiled.add(kind)


NARROW, LONG = 1024, 16384
"""Keys in a window up to which, and queries without a window from which on, tiles of another size pay off."""


def _tile(query: Tensor, how: How) -> tuple[int, int] | None:
    """Queries and keys of a tile where its own choice of 128 and 128 is not the best. Of a narrow window, more queries
    at a time see less that is masked; in a long causal pass, more keys at a time take less time each. (H200: of 8192
    keys, 6 to 11 % less for windows of 128 to 512 keys, 2 % for 1024, none for 2048; causal, 2 % less at 32768, none
    at 8192, 5 % more at 2048. A head_dim of 112 takes more with the first.)"""
    changed = how.mask is not None or how.softcap or how.biases
    if not _is_hopper(Device.of(query.device)) or query.size(-1) != 128 or changed:
        return None
    if min(how.window) >= 0:
        return (192, 80) if sum(how.window) < NARROW else None
    return (128, 160) if how.causal and query.size(1) >= LONG else None


def _common(how: How, query: Tensor, side: str) -> dict[str, Any]:
    """The arguments that its two passes share. It takes None for no bound, and 0 on the right as causal. Of a block
    mask, the forward pass wants the keys of each query, the backward pass the queries of each key."""
    common: dict[str, Any] = {"softmax_scale": how.scale}
    auxiliary = []
    if how.mask is None:
        left, right = (None if bound < 0 else bound for bound in how.window)
        common |= {"causal": how.causal, "window_size_left": left, "window_size_right": None if how.causal else right}
    else:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        half = len(how.parts) // 2
        blocks = how.parts[:half] if side == "kv" else how.parts[half:]
        common["mask_mod"] = _mask_mod(how.mask, query.size(-2))
        common["block_sparse_tensors"] = BlockSparseTensorsTorch(*blocks, block_size=(BLOCK, BLOCK))
        auxiliary += _auxiliary(how.mask, how.masks)
    if how.biases:
        common["score_mod"] = _score_mod(tuple(map(_varies, how.biases)), query.size(-2))
        if side == "q":
            common["score_mod_bwd"] = _gradient_of_score
        auxiliary += [x.contiguous().flatten() for x in how.biases]
    if any(x.numel() >= 2**31 for x in auxiliary):  # which only the run knows where sizes are dynamic
        raise ValueError("flash-attn-4 reads masks and biases of less than 2**31 elements")
    return common | ({"aux_tensors": auxiliary} if auxiliary else {})


def _varies(bias: Tensor) -> tuple[bool, ...]:
    """Over which axes of the scores it does."""
    return tuple(n != 1 for n in bias.shape)


def _axes(mask: Predicate) -> dict[str, tuple[str, ...]]:
    """Over which axes each tensor of a predicate varies."""
    found: dict[str, set[str]] = {}
    for part in parts(mask):
        if isinstance(part, (TensorMask, Values)):
            found.setdefault(str(part.tensor), set()).update(part.axes)
    return {name: tuple(axis for axis in AXES if axis in axes) for name, axes in found.items()}


def _auxiliary(mask: Predicate, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a predicate as it takes them: with one dimension, and bytes for booleans."""
    axes = _axes(mask)
    flat = []
    for name, x in zip(mask_names(mask), tensors):
        for i, axis in enumerate(AXES):
            if axis not in axes[name]:
                x = x.narrow(i, 0, 1)
        x = x.contiguous().flatten()
        flat.append(x.view(torch.uint8) if x.dtype == torch.bool else x)
    return flat


@lru_cache
def _mask_mod(mask: Predicate, num_heads: int) -> Callable[..., Any]:
    """A predicate as a function of (batch, head, query, key) in CuTe, which traces it when it compiles."""
    import cutlass
    from flash_attn.cute.utils import scalar_to_ssa, ssa_to_scalar

    axes = _axes(mask)
    boolean = {str(part.tensor) for part in parts(mask) if isinstance(part, TensorMask) and not part.additive}

    def mask_mod(b: Any, h: Any, q: Any, k: Any, seqlen_info: Any, auxiliary: Any) -> Any:
        sizes = dict(zip(AXES, (None, num_heads, seqlen_info.seqlen_q, seqlen_info.seqlen_k)))
        tensors: Any = {}
        for name, flat in zip(mask_names(mask), auxiliary or ()):
            varies = tuple((axis in axes[name], sizes[axis]) for axis in AXES)
            tensors[name] = _Flat(flat, varies, name in boolean, cutlass.Int64)
        b, h, q, k = map(ssa_to_scalar, (b, h, q, k))
        q = cutlass.min(q, seqlen_info.seqlen_q - 1)  # it asks for rows of the last tile that are not there
        kept = masking.holds(mask, tensors, b, h, q, k, wide=cutlass.Int64)
        return scalar_to_ssa(cutlass.Int32(kept), cutlass.Int32)

    return _known_by(mask_mod, mask, num_heads)


@lru_cache
def _score_mod(biases: tuple[tuple[bool, ...], ...], num_heads: int) -> Callable[..., Any]:
    """The sum of a score and of the last of the auxiliary tensors, which vary over these axes."""
    import cutlass
    from flash_attn.cute.utils import scalar_to_ssa, ssa_to_scalar

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        sizes = None, num_heads, seqlen_info.seqlen_q, seqlen_info.seqlen_k
        at = tuple(map(ssa_to_scalar, (b, h, q_idx, kv_idx)))  # in the last tile it wraps them around
        total = ssa_to_scalar(score)
        for varies, flat in zip(biases, aux_tensors[len(aux_tensors) - len(biases) :]):
            total = total + cutlass.Float32(_Flat(flat, tuple(zip(varies, sizes)), False, cutlass.Int32)[at])
        return scalar_to_ssa(total, cutlass.Float32)

    return _known_by(score_mod, biases, num_heads)


def _gradient_of_score(grad: Any, score: Any, *at: Any, **more: Any) -> Any:
    """That of what is added to a score is the score's own."""
    return grad


def _known_by(function: Any, *values: object) -> Any:
    """It keeps what it compiled by this, on disk as well."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(attn_rewriter.spec.__file__)]
    code = repr(values).encode() + b"".join(file.read_bytes() for file in files)
    function.__cute_hash__ = hashlib.sha256(code).hexdigest()
    return function


class _Flat:
    """A tensor of one dimension that is read at (batch, head, query, key); `axes` are whether it varies over each, and
    the size. Where it is `boolean`, it holds bytes."""

    def __init__(self, tensor: Any, axes: tuple[tuple[bool, Any], ...], boolean: bool, wide: Any) -> None:
        self._tensor, self._axes, self._boolean, self._wide = tensor, axes, boolean, wide

    def __getitem__(self, at: tuple[Any, ...]) -> Any:
        offset: Any = 0
        for i, (varies, size) in zip(at, self._axes):
            if varies:
                i = self._wide(i)
                offset = i if isinstance(offset, int) else offset * size + i
        element = self._tensor[offset]
        return element != 0 if self._boolean else element
