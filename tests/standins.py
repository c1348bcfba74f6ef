"""Stand-ins for the flash-attention packages, and for the operators of PyTorch that are for CUDA alone: the functions
that are called, with their published signatures, in plain PyTorch. They show what each is asked for; that the packages
and operators compute it is for `test_gpu.py`. And what Triton's interpreter needs to run a kernel of ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import metadata, util
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attn_rewriter.kernels.aten import CuDNN, TorchFlash
from attn_rewriter.kernels.flash import missing

PACKAGES = ("fa2", "fa3", "fa4")
"""The kernels that are from packages."""

CUTLASS = {
    "Int64": torch.Tensor.long,
    "Int32": lambda x: x,
    "Float32": torch.Tensor.float,
    "min": lambda x, n: x.clamp(max=n),
}

VERSIONS = {"flash-attn": "2.8.3.post2", "flash-attn-3": "3.0.0b1", "flash-attn-4": "4.0.0b36"}


def attention(query: Tensor, key: Tensor, value: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `[batch, length, heads, head_dim]`, windows aligned with the last query and key; rows
    without any key are zero. What it takes more is as for `_opened`."""
    _, _, v, scores = _opened(query, key, value, *how)
    output = scores.softmax(-1).nan_to_num(0.0) @ v
    return output.transpose(1, 2).to(query.dtype).contiguous(), scores.logsumexp(-1).float()


def gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, *how: Any
) -> tuple[Tensor, ...]:
    """Of query, key and value; by hand, as there is no autograd inside an operator, and as the packages do it: from
    output and logsumexp."""
    scale, softcap = how[0], how[3]
    q, k, v, scores = _opened(query, key, value, *how)
    output, gradient = (x.transpose(1, 2).double() for x in (output, gradient))
    weights = (scores - logsumexp.double().unsqueeze(-1)).exp().nan_to_num(0.0)
    along = gradient @ v.mT
    of_scores = weights * (along - (output * gradient).sum(-1, keepdim=True)) * scale
    if softcap:
        of_scores = (of_scores * (1 - (scores / softcap).square())).masked_fill(scores.isinf(), 0.0)
    found = of_scores @ k, of_scores.mT @ q, weights.mT @ gradient
    return tuple(
        x.unflatten(1, (given.size(2), -1)).sum(2).transpose(1, 2).to(given.dtype)
        for x, given in zip(found, (query, key, value))
    )


def _opened(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float,
    keep: Tensor | None = None,
    bias: Tensor | float = 0.0,
) -> tuple[Tensor, ...]:
    """Query, key and value in float64, heads first and repeated, and the masked scores."""
    q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = q @ k.mT * scale + bias
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    q_len, kv_len = scores.shape[-2:]
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None] - (kv_len - q_len)
    hidden = torch.zeros(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    if keep is not None:
        hidden = hidden | ~keep
    return q, k, v, scores.masked_fill(hidden, float("-inf"))


def _into(given: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    for to, x in zip(given, found, strict=True):
        to.copy_(x)


def _open(side: int) -> int | None:
    return None if side < 0 else side


def _version_2() -> dict[str, Any]:
    """With its dropout simplified: each head of each sequence is kept, and scaled, or dropped as a whole."""

    def kept(q, dropout_p, state):
        if not dropout_p:
            return 1.0
        generator = torch.Generator().manual_seed(int(state[0]))
        drawn = torch.rand(q.size(0), 1, q.size(2), 1, generator=generator)
        return (drawn >= dropout_p).to(q.dtype) / (1 - dropout_p)

    def of_no_key(logsumexp):
        return logsumexp.masked_fill(logsumexp == float("-inf"), float("inf"))

    def checked(q, k, dropout_p, causal, window_size_left, window_size_right, softcap):
        assert not (softcap and dropout_p), "Softcapping does not support dropout for now"
        assert not causal or window_size_right == 0
        sides = (side if side < k.size(1) else -1 for side in (window_size_left, window_size_right))
        return tuple(map(_open, sides))

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert alibi_slopes is None and not return_softmax
        sides = checked(q, k, dropout_p, causal, window_size_left, window_size_right, softcap)
        state = torch.randint(1 << 30, (2,)) if dropout_p else torch.zeros(2, dtype=torch.int64)
        output, logsumexp = attention(q, k, v, softmax_scale, *sides, softcap)
        output = torch.empty_like(q).copy_(output * kept(q, dropout_p, state))
        return output, of_no_key(logsumexp), q.new_empty(0), state

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert alibi_slopes is None
        sides = checked(q, k, dropout_p, causal, window_size_left, window_size_right, softcap)
        _into(
            (dq, dk, dv),
            gradients(dout * kept(q, dropout_p, rng_state), q, k, v, out, softmax_lse, softmax_scale, *sides, softcap),
        )

    def sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        """Slices of the queries and of the keys of each."""
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        for starts in zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist()):
            queries, keys = (slice(*pair) for pair in starts)
            assert queries.stop - queries.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
            yield queries, keys

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert alibi_slopes is None and not return_softmax
        sides = checked(q[None], k[None], dropout_p, causal, window_size_left, window_size_right, softcap)
        state = torch.randint(1 << 30, (2,)) if dropout_p else torch.zeros(2, dtype=torch.int64)
        output, logsumexp = torch.empty_like(q), q.new_full((q.size(1), q.size(0)), float("nan"), dtype=torch.float32)
        for queries, keys in sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
            given = (x[None] for x in (q[queries], k[keys], v[keys]))
            found, logsumexp[:, queries] = attention(*given, softmax_scale, *sides, softcap)
            output[queries] = (found * kept(found, dropout_p, state))[0]
        return output, of_no_key(logsumexp), q.new_empty(0), state

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert alibi_slopes is None and softmax_lse.is_contiguous()  # it is read by its address
        sides = checked(q[None], k[None], dropout_p, causal, window_size_left, window_size_right, softcap)
        for x in (dq, dk, dv):
            x.fill_(float("nan"))  # beyond the last key nothing is written
        for queries, keys in sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
            given = dout[queries], q[queries], k[keys], v[keys], out[queries], softmax_lse[:, queries]
            way, *given = (x[None] for x in given)
            found = gradients(way * kept(way, dropout_p, rng_state), *given, softmax_scale, *sides, softcap)
            _into((dq[queries], dk[keys], dv[keys]), tuple(x[0] for x in found))

    functions = _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward
    return {function.__name__: function for function in functions}


def _version_3() -> dict[str, Any]:
    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert k_new is q_descale is k_descale is v_descale is None
        assert not causal or window_size[1] == 0
        return *attention(q, k, v, softmax_scale, *map(_open, window_size), softcap), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert cu_seqlens_q is max_seqlen_k is None
        _into(
            (dq, dk, dv), gradients(dout, q, k, v, out, softmax_lse, softmax_scale, *map(_open, window_size), softcap)
        )

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def _newer_version_3() -> dict[str, Any]:
    """Its functions take the sides of the window as two numbers, and everything has a default."""
    older = _version_3()

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        window = window_size_left, window_size_right
        return older["_flash_attn_forward"](q, k, v, *[None] * 20, softmax_scale, causal, window, softcap=softcap)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        window = window_size_left, window_size_right
        given = dout, q, k, v, out, softmax_lse, *[None] * 6, dq, dk, dv, softmax_scale, is_causal, window, softcap
        older["_flash_attn_backward"](*given)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def _version_4() -> dict[str, Any]:
    def how(
        q, k, softmax_scale, causal, softcap, left, right, mask_mod, score_mod, aux_tensors, block_sparse_tensors,
        by_key,
    ):  # fmt: skip
        keep, bias = None, 0.0
        if mask_mod is not None:
            assert not causal and left is right is None
            keep = _block_sparse(mask_mod, aux_tensors, block_sparse_tensors, q, k, by_key)
        if score_mod is not None:
            assert not softcap
            b, h, q_idx, kv_idx = _coordinates(q.size(0), q.size(2), q.size(1), k.size(1))
            at = {"q_idx": q_idx, "kv_idx": kv_idx, "seqlen_info": _lengths(q, k), "aux_tensors": _aux(aux_tensors)}
            bias = score_mod(torch.zeros(1, 1, 1, 1, dtype=torch.float64), b, h, **at)
            assert ((bias > -1e9) | (bias == -math.inf)).all()  # the kernel makes NaN of a block of others
            assert not by_key or q.size(2) == k.size(2)  # and reads the bias of other heads
        return softmax_scale, left, 0 if causal else right, softcap or 0.0, keep, bias

    def _flash_attn_fwd(
        q, k, v, softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
        mask_mod=None, score_mod=None, block_sparse_tensors=None, return_lse=False, aux_tensors=None, tile_mn=None,
    ):  # fmt: skip
        assert return_lse
        window = window_size_left, window_size_right
        given = softmax_scale, causal, softcap, *window, mask_mod, score_mod, aux_tensors, block_sparse_tensors
        return *attention(q, k, v, *how(q, k, *given, by_key=False)), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, deterministic=False, dq=None, dk=None, dv=None, mask_mod=None, score_mod=None,
        score_mod_bwd=None, aux_tensors=None, block_sparse_tensors=None,
    ):  # fmt: skip
        if score_mod is not None:  # of a sum
            assert score_mod_bwd(dout, None, q_idx=None, kv_idx=None) is dout
        window = window_size_left, window_size_right
        given = softmax_scale, causal, softcap, *window, mask_mod, score_mod, aux_tensors, block_sparse_tensors
        _into((dq, dk, dv), gradients(dout, q, k, v, out, lse, *how(q, k, *given, by_key=True)))
        if q.size(-1) % 32:
            dq.fill_(float("nan"))  # what it adds up there it reads in the wrong order

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def _block_sparse(
    mask_mod: Any, aux_tensors: list[Tensor] | None, blocks: BlockSparseTensorsTorch, q: Tensor, k: Tensor, by_key: bool
) -> Tensor:
    """What is kept: all of the full blocks, what the function keeps of the partial ones, nothing of the others. Listed
    are the blocks of keys of each block of queries, or the other way round. The function is also asked for the rows of
    the last block that are not there."""
    sizes = q.size(0), q.size(2), q.size(1), k.size(1)
    asked = *sizes[:2], sizes[2] + -sizes[2] % blocks.block_size[0], sizes[3]
    keep = mask_mod(*_coordinates(*asked), _lengths(q, k), _aux(aux_tensors))
    keep = keep.expand(torch.broadcast_shapes(keep.shape, (1, 1, asked[2], 1)))[..., : sizes[2], :]

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        taken = torch.arange(indices.size(-1)) < counts.unsqueeze(-1)
        found = torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), taken)
        found = found.mT if by_key else found
        rows, columns = (torch.arange(n) // size for n, size in zip(sizes[2:], blocks.block_size))
        return found[..., rows, :][..., columns]

    return listed(*blocks[2:4]) | (listed(*blocks[:2]) & keep)


def _coordinates(*sizes: int) -> list[Tensor]:
    return [
        torch.arange(n, dtype=torch.int32).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)
    ]


def _lengths(q: Tensor, k: Tensor) -> Any:
    return SimpleNamespace(seqlen_q=q.size(1), seqlen_k=k.size(1))


def _aux(tensors: list[Tensor] | None) -> list[_Aux] | None:
    return [_Aux(x) for x in tensors] if tensors else None


class _Aux:
    """A tensor of one dimension as CuTe has it."""

    def __init__(self, x: Tensor) -> None:
        assert x.ndim == 1 and x.is_contiguous()
        self._x = x

    def __getitem__(self, i: Tensor | int) -> Tensor:
        return self._x[i]


class _ATen:
    """The operators behind `scaled_dot_product_attention`, as CPU implementations of their real schemas."""

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}

    def register(self, library: torch.library.Library) -> None:
        """Unless this is one within another, which serves both."""
        for backend in ("cudnn", "flash"):
            for way in ("", "_backward"):
                operator = f"_scaled_dot_product_{backend}_attention{way}"
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CPU"):
                    library.impl(operator, getattr(self, backend + way), "CPU")

    def cudnn(
        self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
        return_debug_mask=False, *, scale=None,
    ):  # fmt: skip
        assert attn_bias is None and compute_log_sumexp and not dropout_p and not return_debug_mask
        output, logsumexp = self.forward(query, key, value, is_causal, scale)
        none, number = query.new_empty(0), query.new_zeros((), dtype=torch.int64)
        return output, logsumexp.unsqueeze(-1), none, none, query.size(2), key.size(2), number, number, none

    def cudnn_backward(
        self, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
        max_q, max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        """Raises where the real one would take its plan for tensors that lie otherwise."""
        assert attn_bias is cum_seq_q is cum_seq_k is None and not dropout_p and philox_seed.dtype == torch.int64
        assert logsumexp.shape == (*query.shape[:3], 1) and logsumexp.is_contiguous()
        known = (query.dtype, *((x.shape, x.stride()) for x in (query, key, value)), is_causal)
        plan = out.stride(), grad_out.stride()
        assert self.plans.setdefault(known, plan) == plan
        assert out.stride() == torch.empty_like(query).stride() and grad_out.transpose(1, 2).is_contiguous()
        return self.backward(grad_out, query, key, value, out, logsumexp.squeeze(-1), is_causal, scale)

    def flash(self, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert not dropout_p and not return_debug_mask
        output, logsumexp = self.forward(query, key, value, is_causal, scale)
        none, state = query.new_empty(0), query.new_zeros(2, dtype=torch.uint64)
        return output, logsumexp, none, none, query.size(2), key.size(2), state, state[0], none

    def flash_backward(
        self, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        philox_seed, philox_offset, *, scale=None,
    ):  # fmt: skip
        assert cum_seq_q is cum_seq_k is None and not dropout_p and philox_seed.dtype == torch.uint64
        return self.backward(grad_out, query, key, value, out, logsumexp, is_causal, scale)

    @staticmethod
    def forward(query, key, value, is_causal, scale):
        assert not is_causal or query.size(2) == key.size(2)  # where the alignment makes no difference
        given = (x.transpose(1, 2) for x in (query, key, value))
        output, logsumexp = attention(*given, scale, None, 0 if is_causal else None, 0.0)
        return torch.empty_like(query).copy_(output.transpose(1, 2)), logsumexp

    @staticmethod
    def backward(grad_out, query, key, value, out, logsumexp, is_causal, scale):
        assert out.shape == grad_out.shape == query.shape and logsumexp.shape == query.shape[:3]
        given = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        found = gradients(*given, logsumexp, scale, None, 0 if is_causal else None, 0.0)
        return tuple(torch.empty_like(x).copy_(g.transpose(1, 2)) for x, g in zip((query, key, value), found))


def _interpreted(decode: Any) -> Any:
    """`split_keys.decode` in float32 for bfloat16: Triton's interpreter multiplies the bits of these as integers."""

    def widened(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        if not isinstance(query, Tensor) or query.dtype != torch.bfloat16:
            return decode(query, key, value, *rest)
        return decode(query.float(), key.float(), value.float(), *rest).to(query.dtype)

    return widened


FUNCTIONS = {
    ("fa2", "forward"): ("flash_attn.flash_attn_interface", "_flash_attn_forward"),
    ("fa2", "backward"): ("flash_attn.flash_attn_interface", "_flash_attn_backward"),
    ("fa2", "forward, padding"): ("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward"),
    ("fa2", "backward, padding"): ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward"),
    ("fa3", "forward"): ("flash_attn_interface", "_flash_attn_forward"),
    ("fa3", "backward"): ("flash_attn_interface", "_flash_attn_backward"),
    ("fa4", "forward"): ("flash_attn.cute.interface", "_flash_attn_fwd"),
    ("fa4", "backward"): ("flash_attn.cute.interface", "_flash_attn_bwd"),
}


@contextmanager
def raising(
    kernel: str, way: str, error: BaseException, *, from_call: int = 1, to_call: int = 1 << 30
) -> Iterator[list]:
    """Let a package that is `installed` raise in these of its calls; all are noted in what is given."""
    module, name = FUNCTIONS[kernel, way]
    function, calls = getattr(sys.modules[module], name), []

    @wraps(function)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if from_call <= len(calls) <= to_call:
            raise error
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[module], name, faulty)
        yield calls


def _module(name: str, functions: dict[str, Any]) -> dict[str, ModuleType]:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # which Inductor looks at, to know whether there is CUTLASS
    module.__dict__.update(functions)
    return {name: module}


@contextmanager
def installed(*, newer: bool = False, **versions: str | None) -> Iterator[None]:
    """As if the packages were installed, and they and PyTorch's operators could run on CPU; versions by distribution,
    "_" for "-", None for none. `newer` is the newer form of flash-attention 3."""
    found = {**VERSIONS, **{name.replace("_", "-"): version for name, version in versions.items()}}
    modules = {
        **_module("flash_attn", {"__path__": []}),
        **_module("flash_attn.cute", {"__path__": []}),
        **_module("flash_attn.flash_attn_interface", _version_2()),
        **_module("flash_attn_interface", _newer_version_3() if newer else _version_3()),
        **_module("flash_attn.cute.interface", _version_4()),
        **_module("flash_attn.cute.block_sparsity", {"BlockSparseTensorsTorch": BlockSparseTensorsTorch}),
        **_module("flash_attn.cute.utils", {"ssa_to_scalar": lambda x: x, "scalar_to_ssa": lambda x, dtype: x}),
        **_module("cutlass", CUTLASS),
    }
    real = metadata.version

    def version(name: str) -> str:
        if name not in found:
            return real(name)
        if found[name] is None:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    missing.cache_clear()
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as library:
        _ATen().register(library)
        for kernel in (CuDNN, TorchFlash):
            patch.setattr(kernel, "unavailable", staticmethod(lambda: None))
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(metadata, "version", version)
        if util.find_spec("triton") is not None and not torch.cuda.is_available():
            from attn_rewriter.kernels import split_keys

            patch.setattr(split_keys, "decode", _interpreted(split_keys.decode))
        yield
    missing.cache_clear()
