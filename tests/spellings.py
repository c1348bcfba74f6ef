"""Attention as people write it. Each function is a row of `test_spellings.py`: what it computes, or why it is refused.

Arguments are made by name: `q`, `k`, `v` are `[B, H, S, D]` unless a row says otherwise. All sizes differ, so that a
mix-up of axes can't go unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

B, H, HKV, S, K, D, DV = 2, 6, 2, 5, 7, 8, 12
G = H // HKV
SCALE = f"scale {D**-0.5:.4g}"
ROOT = math.sqrt(D)

FLOAT = {
    "q": (B, H, S, D),
    "k": (B, H, S, D),
    "v": (B, H, S, D),
    "x": (B, S, H * D),
    "bias": (H, S, S),
    "tau": (H, 1, 1),
    "columns": (S,),
    "w": (3 * H * D, H * D),
    "wo": (H * D, H * D),
}
CROSS = {"k": (B, H, K, D), "v": (B, H, K, D)}
GQA = {"k": (B, HKV, S, D), "v": (B, HKV, S, D)}


@dataclass
class Spelling:
    function: Callable[..., Any]
    computes: str | None
    refused: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_kv_heads: int | None = None
    random: bool = False
    impossible: tuple[str, ...] = ()  # the kernels that can't compute it
    n_sites: int = 1

    @property
    def name(self) -> str:
        return self.function.__name__

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
        """Fresh inputs in the order of the parameters; masks keep the diagonal, so that no row is empty."""
        with torch.device("cpu"):
            return self._inputs(dtype, seed)

    def _inputs(self, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
        shapes = {**FLOAT, **self.shapes}
        generator = torch.Generator().manual_seed(seed)
        made = []
        for name in self.function.__code__.co_varnames[: self.function.__code__.co_argcount]:
            if name == "padding":  # [B, K], true where there is a token; the first is one
                made.append(torch.arange(shapes["k"][2]) < torch.tensor([[3], [shapes["k"][2]]]))
            elif name == "keep":  # [B, 1, S, S]
                random = torch.rand(B, 1, S, S, generator=generator) < 0.5
                made.append(random | torch.eye(S, dtype=torch.bool))
            else:
                value = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
                value *= (H * D) ** -0.5 if name in ("w", "wo") else 1.0
                made.append(value.to(dtype).requires_grad_())
        return made


SPELLINGS: list[Spelling] = []
NOT_AFFINE = ("sdpa",)


def spelling(computes: str | None = SCALE, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        SPELLINGS.append(Spelling(function, computes, **options))
        return function

    return register


def refused(reason: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return spelling(None, refused=reason, **options)


# -- scale and softmax ----------------------------------------------------------------------------------------------


@spelling()
def scale_times(q, k, v):
    return torch.softmax((q @ k.transpose(-2, -1)) * D**-0.5, dim=-1) @ v


@spelling()
def scale_divided(q, k, v):
    return F.softmax(torch.matmul(q, k.mT) / math.sqrt(D), dim=-1).matmul(v)


@spelling()
def scale_on_query(q, k, v):
    return ((q / ROOT) @ k.transpose(2, 3)).softmax(-1) @ v


@spelling()
def scale_on_key(q, k, v):
    return (q @ (k * D**-0.5).transpose(2, 3)).softmax(-1) @ v


@spelling()
def scale_on_both(q, k, v):
    return ((q * D**-0.25) @ (D**-0.25 * k).transpose(2, 3)).softmax(-1) @ v


@spelling()
def scores_kept_for_nobody(q, k, v):
    scores = q @ k.mT * D**-0.5
    kept = scores.clone(), scores.detach()[:, 0]  # noqa: F841 x-transformers, for those who ask for them
    weights = scores.softmax(-1)
    seen = weights.clone()  # noqa: F841
    return weights @ v


@spelling("plain")
def scale_absent(q, k, v):
    return (q @ k.transpose(2, 3)).softmax(-1) @ v


@spelling()
def scale_as_tensor(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) / torch.sqrt(torch.tensor(D, device=q.device)), -1) @ v


@spelling()
def scale_as_full_tensor(q, k, v):
    scale = torch.full([], ROOT, dtype=q.dtype, device=q.device)
    return torch.softmax((q @ k.transpose(2, 3)) / scale, -1) @ v


@spelling("scale 0.25")
def scale_twice(q, k, v):
    return ((q * 0.5) @ k.mT * 0.5).softmax(-1) @ v


@spelling("scale -1")
def scale_negative(q, k, v):
    return (-(q @ k.mT)).softmax(-1) @ v


@spelling()
def sliced_to_its_own_length(q, k, v):
    scores = (q @ k.mT * D**-0.5)[:, :, :, : k.shape[-2]]
    return scores.softmax(-1)[..., : v.size(-2)] @ v


@spelling("scale tensor")
def scale_learned_per_head(q, k, v, tau):
    return (q @ k.mT * tau).softmax(-1) @ v


@spelling("scale tensor")
def scale_temperature(q, k, v, tau):
    return (q @ k.mT / (1 + tau.abs())).softmax(-1) @ v


@spelling()
def softmax_in_float32(q, k, v):
    scores = q @ k.transpose(2, 3) * D**-0.5
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling()
def softmax_casts_around(q, k, v):
    return F.softmax((q @ k.mT * D**-0.5).float(), dim=3).type_as(v) @ v


@spelling()
def softmax_shifted(q, k, v):
    return ((q @ k.mT) * D**-0.5 + 3.0).softmax(-1) @ v


@spelling(f"{SCALE}, dropout 0.25", random=True)
def dropout_training(q, k, v):
    return F.dropout((q @ k.mT * D**-0.5).softmax(-1), 0.25, training=True) @ v


@spelling()
def dropout_evaluating(q, k, v):
    return F.dropout((q @ k.mT * D**-0.5).softmax(-1), p=0.25, training=False) @ v


# -- masks ----------------------------------------------------------------------------------------------------------


@spelling(f"{SCALE}, causal")
def causal_tril(q, k, v):
    mask = torch.tril(torch.ones(S, S, dtype=torch.bool, device=q.device))
    return (q @ k.mT * D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_tril_equals_zero(q, k, v):
    mask = torch.ones(S, S, device=q.device).tril().view(1, 1, S, S)
    return (q @ k.mT * D**-0.5).masked_fill(mask[:, :, :S, :S] == 0, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_triu(q, k, v):
    scores = q @ k.mT * D**-0.5
    mask = torch.triu(torch.ones_like(scores[0, 0], dtype=torch.bool), diagonal=1)
    return scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_full_inf_triu(q, k, v):
    mask = torch.full((S, S), float("-inf"), device=q.device).triu(1)
    return (q @ k.mT * D**-0.5 + mask).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_arange(q, k, v):
    i = torch.arange(S, device=q.device)
    return torch.where(i[:, None] >= i[None, :], q @ k.mT * D**-0.5, -1e9).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_where_inverted(q, k, v):
    i = torch.arange(S, device=q.device)
    scores = q @ k.mT * D**-0.5
    future = i.view(1, -1) > i.view(-1, 1)
    return (
        torch.where(future, torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device), scores).softmax(
            -1
        )
        @ v
    )


@spelling(f"{SCALE}, causal")
def causal_one_minus(q, k, v):
    mask = torch.ones(S, S, device=q.device).tril()[None, None]
    return (q @ k.mT * D**-0.5 + (1.0 - mask) * -1e9).softmax(-1) @ v


@spelling(f"causal, {SCALE}")
def causal_before_scale(q, k, v):
    mask = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return (((q @ k.mT).masked_fill(mask, float("-inf"))) * D**-0.5).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_inplace(q, k, v):
    scores = q @ k.mT
    scores *= D**-0.5
    mask = torch.zeros(S, S, device=q.device)
    mask.masked_fill_(torch.ones(S, S, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
    scores += mask
    return scores.softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def causal_fill_inplace(q, k, v):
    scores = q @ k.mT
    scores.div_(ROOT).masked_fill_(torch.ones(S, S, device=q.device).tril() == 0, float("-inf"))
    return scores.softmax(-1) @ v


@spelling(f"{SCALE}, causal, sliding window 3")
def sliding_window(q, k, v):
    i = torch.arange(S, device=q.device)
    near = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3)
    return (q @ k.mT * D**-0.5).masked_fill(~near, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, causal, sliding window 3")
def sliding_window_tril_triu(q, k, v):
    ones = torch.ones(S, S, dtype=torch.bool, device=q.device)
    return (q @ k.mT * D**-0.5).masked_fill(~(ones.tril() & ones.triu(-2)), float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, causal", shapes=CROSS)
def causal_top_left(q, k, v):
    mask = torch.ones(S, K, dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, causal, offset {K - S}", shapes=CROSS)
def causal_bottom_right(q, k, v):
    mask = torch.ones(S, K, dtype=torch.bool, device=q.device).tril(diagonal=K - S)
    return (q @ k.mT * D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, causal, offset {K - S}", shapes=CROSS)
def causal_positions(q, k, v):
    rows, columns = torch.arange(S, device=q.device) + (K - S), torch.arange(K, device=q.device)
    bias = torch.where(columns[None, :] <= rows[:, None], q.new_zeros(()), torch.finfo(q.dtype).min)
    return (q @ k.mT * D**-0.5 + bias[None, None]).softmax(-1) @ v


@spelling(f"{SCALE}, causal, offset {K - S}", shapes=CROSS)
def causal_sliced_square(q, k, v):
    mask = torch.ones(K, K, dtype=torch.bool, device=q.device).tril()[K - S : K, :K]
    return torch.where(mask, q @ k.mT * D**-0.5, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, key padding")
def key_padding(q, k, v, padding):
    return (q @ k.mT * D**-0.5).masked_fill(~padding[:, None, None, :], float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, key padding")
def key_padding_additive(q, k, v, padding):
    bias = (1.0 - padding[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


@spelling(f"{SCALE}, causal and key padding")
def causal_and_padding(q, k, v, padding):
    i = torch.arange(S, device=q.device)
    keep = (i[None, :] <= i[:, None])[None, None] & padding[:, None, None, :]
    return (q @ k.mT * D**-0.5 + torch.where(keep, q.new_zeros(()), torch.finfo(q.dtype).min)).softmax(-1) @ v


@spelling(f"{SCALE}, causal, key padding")
def causal_then_padding(q, k, v, padding):
    scores = (q @ k.mT * D**-0.5).masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), float("-inf"))
    return scores.masked_fill(~padding[:, None, None], float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, mask tensor [batch, query, key]")
def any_boolean(q, k, v, keep):
    return torch.where(keep, q @ k.mT * D**-0.5, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, bias")
def any_additive(q, k, v, bias):
    return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


@spelling(f"{SCALE}, bias")
def bias_of_queries(q, k, v, bias):
    return (q @ k.mT * D**-0.5 + bias.detach()[..., :1]).softmax(-1) @ v


@spelling("bias, scale 0.3536")
def bias_before_scale(q, k, v, bias):
    return ((q @ k.mT + bias) * D**-0.5).softmax(-1) @ v


@spelling(f"{SCALE}, bias, bias, causal")
def biases_and_causal(q, k, v, bias, columns):
    scores = q @ k.mT * D**-0.5 + bias - columns
    return scores.masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, bias")
def small_constants_are_a_bias(q, k, v):
    bias = torch.where(torch.ones(S, S, device=q.device).tril() > 0, 0.0, -5.0)
    return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


@spelling(f"{SCALE}, every key")
def trivial_mask(q, k, v):
    return (q @ k.mT * D**-0.5).masked_fill(torch.arange(S, device=q.device) >= S, float("-inf")).softmax(-1) @ v


@spelling(f"{SCALE}, bias")
def wide_bias(q, k, v, bias):
    scores = q @ k.mT * D**-0.5 + bias.double().float() * 1.5
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


# -- layouts --------------------------------------------------------------------------------------------------------


@spelling()
def packed_unbind(x, w):
    q, k, v = F.linear(x, w).reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.transpose(-2, -1)) * D**-0.5).softmax(-1) @ v


@spelling()
def packed_chunk(x, w, wo):
    q, k, v = (y.view(B, S, H, D).transpose(1, 2) for y in F.linear(x, w).chunk(3, dim=-1))
    out = ((q @ k.transpose(-2, -1)) * D**-0.5).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).contiguous().view(B, S, H * D), wo)


@spelling()
def packed_split(x, w):
    q, k, v = (y.unflatten(-1, (H, D)).movedim(1, 2) for y in torch.split(F.linear(x, w), H * D, dim=2))
    return ((q @ k.transpose(-2, -1)) * D**-0.5).softmax(-1) @ v


@spelling()
def folded_bmm(q, k, v):
    q, k, v = (y.reshape(B * H, S, D) for y in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / ROOT, dim=-1), v).view(B, H, S, D)


@spelling(f"{SCALE}, causal")
def folded_bmm_with_mask(q, k, v):
    q, k, v = (y.reshape(B * H, S, D) for y in (q * D**-0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, S) + torch.full((S, S), float("-inf"), device=q.device).triu(
        1
    )
    return torch.bmm(F.softmax(scores.view(B * H, S, S), dim=-1), v).view(B, H, S, D).transpose(1, 2).reshape(B, S, -1)


@spelling(f"{SCALE}, bias")
def folded_baddbmm(q, k, v, bias):
    q, k, v = (y.reshape(B * H, S, D) for y in (q, k, v))
    added = bias.expand(B, H, S, S).reshape(B * H, S, S)
    return torch.baddbmm(added, q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5).softmax(-1).bmm(v)


@spelling()
def folded_baddbmm_without_input(q, k, v):
    q, k, v = (y.reshape(B * H, S, D) for y in (q, k, v))
    empty = torch.empty(B * H, S, S, dtype=q.dtype, device=q.device)
    return torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=D**-0.5).softmax(-1).bmm(v)


@spelling()
def einsum_letters(q, k, v):
    scores = torch.einsum("nhld,nhsd->nhls", q, k) * D**-0.5
    return torch.einsum("nhls,nhsd->nlhd", scores.softmax(-1), v)


@spelling(shapes={"q": (B, S, H, D), "k": (B, S, H, D), "v": (B, S, H, D)})
def einsum_heads_last(q, k, v):
    scores = torch.einsum("b i h d, b j h d -> b h i j", q, k) / ROOT
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


@spelling()
def einsum_keys_first(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) * D**-0.5
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(dim=2), v)


@spelling()
def transposed_scores(q, k, v):
    weights = (k @ q.mT * D**-0.5).softmax(dim=-2)
    return weights.mT @ v


@spelling()
def value_first(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(dim=-1)
    return v.mT @ weights.mT


@spelling(shapes={"q": (B, S, D), "k": (B, K, D), "v": (B, K, DV)})
def one_head(q, k, v):
    return (q @ k.mT / ROOT).softmax(-1) @ v


@spelling(shapes={"q": (S, D), "k": (K, D), "v": (K, DV)})
def no_batch(q, k, v):
    return (q @ k.T / ROOT).softmax(-1) @ v


@spelling(shapes={"k": (B, H, K, D), "v": (B, H, K, DV)})
def cross_attention_other_head_dim_v(q, k, v):
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling()
def scaled_inplace_on_query(q, k, v):
    q = q + 0.0
    q *= 1.0
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def softmax_of_a_view(q, k, v):
    scores = (q @ k.mT * D**-0.5).masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), float("-inf"))
    return scores.view(B * H, S, S).softmax(-1).view(B, H, S, S) @ v


# -- grouped heads --------------------------------------------------------------------------------------------------


@spelling(f"{SCALE}, causal", shapes=GQA, num_kv_heads=HKV)
def gqa_expand_reshape(q, k, v):
    k, v = (x[:, :, None, :, :].expand(B, HKV, G, S, D).reshape(B, H, S, D) for x in (k, v))
    return (q @ k.mT * D**-0.5 + torch.full((S, S), float("-inf"), device=q.device).triu(1)).softmax(-1) @ v


@spelling(shapes=GQA, num_kv_heads=HKV)
def gqa_repeat_interleave(q, k, v):
    k, v = k.repeat_interleave(G, dim=1), torch.repeat_interleave(v, G, 1)
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling(shapes=GQA, num_kv_heads=HKV)
def gqa_tiled(q, k, v):
    k, v = k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1)
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling(shapes=GQA, num_kv_heads=H)
def gqa_tiled_key_interleaved_value(q, k, v):
    k, v = k.repeat(1, G, 1, 1), v.repeat_interleave(G, dim=1)
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling(f"{SCALE}, causal", shapes=GQA, num_kv_heads=HKV)
def gqa_five_dimensions(q, k, v):
    q = q.view(B, HKV, G, S, D)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * D**-0.5
    weights = scores.masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), float("-inf")).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).reshape(B, H, S, D)


@spelling(shapes=GQA, num_kv_heads=HKV)
def gqa_five_dimensions_matmul(q, k, v):
    weights = (q.unflatten(1, (HKV, G)) @ k.unsqueeze(2).mT * D**-0.5).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


@spelling(shapes={"k": (B, 1, S, D), "v": (B, 1, S, D)}, num_kv_heads=1)
def mqa_broadcast(q, k, v):
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling(shapes={"k": (B, S, D), "v": (B, S, D)}, num_kv_heads=1)
def mqa_einsum(q, k, v):
    return torch.einsum("bhqk,bkd->bhqd", (torch.einsum("bhqd,bkd->bhqk", q, k) / ROOT).softmax(-1), v)


@spelling(shapes={"k": (1, H, S, D), "v": (1, H, S, D)})
def keys_shared_over_the_batch(q, k, v):
    return (q @ k.mT * D**-0.5).softmax(-1) @ v


@spelling(shapes={"q": (1, H, S, D)})
def queries_shared_over_the_batch(q, k, v):
    return (q.expand(B, H, S, D) @ k.mT * D**-0.5).softmax(-1) @ v


# -- attention functions --------------------------------------------------------------------------------------------


@spelling(f"{SCALE}, causal")
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling(f"{SCALE}, causal")
def sdpa_mask_that_is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, torch.ones(S, S, dtype=torch.bool, device=q.device).tril())


@spelling("scale 0.5, key padding", shapes=GQA, num_kv_heads=HKV)
def sdpa_gqa_with_padding(q, k, v, padding):
    mask = padding[:, None, None, :].expand(B, 1, S, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True)


@spelling(f"{SCALE}, bias", shapes=GQA, num_kv_heads=HKV)
def sdpa_repeated_heads_and_bias(q, k, v, bias):
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, bias.expand(B, H, S, S))


@spelling(SCALE)
def multi_head_attention_function(x, w, wo):
    y = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        y, y, y, H * D, H, w, None, None, None, False, 0.1, wo, None, training=False, need_weights=True
    )[0]


@spelling(f"{SCALE}, causal, key padding")
def multi_head_attention_function_masked(x, w, wo, padding):
    y = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        y, y, y, H * D, H, w, None, None, None, False, 0.0, wo, None,
        key_padding_mask=torch.zeros_like(padding, dtype=x.dtype).masked_fill(~padding, float("-inf")),
        attn_mask=torch.full((S, S), float("-inf"), device=x.device).triu(1).to(x.dtype),
    )[0]  # fmt: skip


# -- looks like attention, but isn't, or not alone ------------------------------------------------------------------


@refused("runs over another axis")
def softmax_over_queries(q, k, v):
    return (q @ k.mT * D**-0.5).softmax(dim=-2) @ v


@refused("runs over another axis")
def softmax_over_heads(q, k, v):
    return (q @ k.mT * D**-0.5).softmax(dim=1) @ v


@refused("weights are also returned")
def weights_returned(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    return weights @ v, weights


@refused("weights are also used")
def weights_used(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    return weights @ v + weights.sum()


@refused("scores are also used")
def scores_used(q, k, v):
    scores = q @ k.mT * D**-0.5
    return scores.softmax(-1) @ v + scores.mean()


@refused("not masked before")
def mask_after_softmax(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    return weights.masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), 0.0) @ v


@refused("which is no mask")
def filled_with_zero(q, k, v):
    return (q @ k.mT * D**-0.5).masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), 0.0).softmax(-1) @ v


@refused("scaled by -0.1 after a mask")
def negative_scale_after_mask(q, k, v):
    return ((q @ k.mT).masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), -1e9) * -0.1).softmax(-1) @ v


@refused("scaled by a tensor after a mask")
def tensor_scale_after_mask(q, k, v, tau):
    return ((q @ k.mT).masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), -1e9) * tau).softmax(-1) @ v


@refused("scores are also used by `clone`")
def scores_kept_for_somebody(q, k, v):
    scores = q @ k.mT * D**-0.5
    return scores.softmax(-1) @ v, scores.clone()


@refused("scores are also used")
def scores_kept_and_written(q, k, v):
    scores = q @ k.mT * D**-0.5
    kept = scores.clone()
    kept.mul_(2.0)
    return scores.softmax(-1) @ v


@refused("modified in place")
def scores_written_in_part(q, k, v, bias):
    scores = q @ k.mT * D**-0.5
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + bias[:, 1:, 1:]
    return scores.softmax(-1) @ v


@refused("no rule reads", shapes={"heads": (H, H, 1, 1)})
def talking_heads_after_softmax(q, k, v, heads):
    return F.conv2d((q @ k.mT * D**-0.5).softmax(-1), heads) @ v


@refused("no rule reads `conv2d`", shapes={"heads": (H, H, 1, 1)})
def talking_heads_before_softmax(q, k, v, heads):
    return F.conv2d(q @ k.mT * D**-0.5, heads).softmax(-1) @ v


@refused("dropped out twice", random=True)
def dropout_twice(q, k, v):
    return F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.1), 0.1) @ v


@spelling("scale tensor", impossible=NOT_AFFINE)
def scores_times_a_matrix(q, k, v, bias):
    return (q @ k.mT * bias).softmax(-1) @ v


@refused("modified in place")
def value_modified_through_a_view(q, k, v):
    v = v + 0.0
    scores = q @ k.mT
    row = v[:, :, 0]
    weights = scores.softmax(-1)
    row.mul_(2.0)
    return weights @ v


@refused("modified in place")
def query_modified_after_use(q, k, v):
    q, k = q.detach() + 0.0, k.detach()
    scores = q @ k.mT
    q.mul_(2.0)
    return scores.softmax(-1) @ v + q


# -- caps, clamps, shifts -------------------------------------------------------------------------------------------


@spelling("scale 0.25, softcap 30", impossible=NOT_AFFINE)
def softcap_gemma(q, k, v):
    scores = torch.tanh((q @ k.mT * 0.25) / 30.0) * 30.0
    return scores.softmax(-1) @ v


@spelling(f"{SCALE}, softcap 2, causal", impossible=NOT_AFFINE)
def softcap_then_mask(q, k, v):
    scores = 2.0 * ((q @ k.mT) * D**-0.5 * 0.5).tanh()
    return (scores + torch.full((S, S), float("-inf"), device=q.device).triu(1)).softmax(-1) @ v


@spelling(f"{SCALE}, softcap 3, bias", impossible=NOT_AFFINE)
def softcap_then_bias(q, k, v, bias):
    return (torch.tanh(q @ k.mT * D**-0.5 / 3) * 3 + bias).softmax(-1) @ v


@spelling("bias, softcap 4", impossible=NOT_AFFINE)
def bias_then_softcap(q, k, v, bias):
    return (4 * torch.tanh((q @ k.mT + bias) / 4)).softmax(-1) @ v


@spelling(f"{SCALE}, clamp [-0.5, 0.75]", impossible=NOT_AFFINE)
def clamped_scores(q, k, v):
    return (q @ k.mT * D**-0.5).clamp(-0.5, 0.75).softmax(-1) @ v


@spelling(f"{SCALE}, clamp [-0.5, 0.5]", impossible=NOT_AFFINE)
def clamped_in_two_steps(q, k, v):
    scores = torch.clamp(q @ k.mT * D**-0.5, min=-0.5)
    return torch.clamp(scores, max=0.5).softmax(-1) @ v


@spelling(f"{SCALE}, causal")
def mask_kept_above_the_lowest_number(q, k, v):
    low = torch.finfo(q.dtype).min
    scores = q @ k.mT * D**-0.5 + torch.full((S, S), low, dtype=q.dtype, device=q.device).triu(1)
    return torch.max(scores, torch.tensor(low, dtype=q.dtype, device=q.device)).softmax(-1) @ v


@spelling()
def maximum_subtracted(q, k, v):
    scores = q @ k.mT * D**-0.5
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v


@spelling()
def maximum_subtracted_cogview(q, k, v):
    scores = q @ k.mT * D**-0.5 / 32
    return ((scores - scores.amax(-1).unsqueeze(-1)) * 32).softmax(-1) @ v


@spelling()
def maximum_of_all_subtracted(q, k, v):
    scores = q @ k.mT * D**-0.5
    return (scores - scores.max()).softmax(-1) @ v


@spelling()
def softmax_by_hand(q, k, v):
    scores = q @ k.mT * D**-0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling()
def softmax_by_logsumexp(q, k, v):
    scores = q @ k.mT * D**-0.5
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


# -- sinks ----------------------------------------------------------------------------------------------------------


@spelling(f"{SCALE}, causal, sinks", shapes={**GQA, "sink": (H,)}, num_kv_heads=HKV)
def sinks_gpt_oss(q, k, v, sink):
    k, v = (x[:, :, None].expand(B, HKV, G, S, D).reshape(B, H, S, D) for x in (k, v))
    scores = q @ k.mT * D**-0.5 + torch.full((S, S), float("-inf"), device=q.device).triu(1)
    combined = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1)[..., :-1] @ v


@spelling(f"{SCALE}, sinks", shapes={"sink": (H,)})
def sinks_first(q, k, v, sink):
    scores = torch.cat([sink.view(1, H, 1, 1).expand(B, H, S, 1), q @ k.mT * D**-0.5], dim=3)
    return scores.softmax(-1)[:, :, :, 1:] @ v


@spelling(f"{SCALE}, bias, sinks", shapes={"sink": (H,)})
def sinks_beside_a_bias_of_queries(q, k, v, bias, sink):
    scores = q @ k.mT * D**-0.5 + bias[..., :1]
    return torch.cat([scores, sink.view(1, H, 1, 1).expand(B, H, S, 1)], -1).softmax(-1)[..., :-1] @ v


@spelling(f"{SCALE}, sink 0")
def softmax_off_by_one(q, k, v):
    return F.softmax(F.pad(q @ k.mT * D**-0.5, (1, 0), value=0.0), dim=-1)[..., 1:] @ v


@spelling(f"{SCALE}, sink 0")
def softmax_one(q, k, v):
    weights = torch.exp(q @ k.mT * D**-0.5)
    return weights / (1 + weights.sum(dim=-1, keepdim=True)) @ v


@refused("shifted before a softmax with a constant sink")
def softmax_one_of_what_is_no_more(q, k, v):
    scores = q @ k.mT * D**-0.5
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weights / (1 + weights.sum(dim=-1, keepdim=True)) @ v


@refused("shifted before sinks", shapes={"sink": (H,)})
def sinks_beside_shifted_scores(q, k, v, sink):
    scores = q @ k.mT * D**-0.5
    scores = scores - scores.max(-1, keepdim=True).values
    return torch.cat([scores, sink.view(1, H, 1, 1).expand(B, H, S, 1)], -1).softmax(-1)[..., :-1] @ v


@refused("another column", shapes={"sink": (H,)})
def sinks_dropped_on_the_wrong_side(q, k, v, sink):
    return torch.cat([q @ k.mT, sink.view(1, H, 1, 1).expand(B, H, S, 1)], -1).softmax(-1)[..., 1:] @ v


@refused("together", shapes={"sink": (H,)})
def sinks_scaled_with_the_scores(q, k, v, sink):
    return (torch.cat([q @ k.mT, sink.view(1, H, 1, 1).expand(B, H, S, 1)], -1) * 0.5).softmax(-1)[..., :-1] @ v


@refused("varies over the keys")
def maximum_over_queries_subtracted(q, k, v):
    scores = q @ k.mT * D**-0.5
    return (scores - scores.max(dim=-2, keepdim=True).values).softmax(-1) @ v


@refused("softcap 1 after a mask")
def softcap_after_mask(q, k, v):
    return torch.tanh((q @ k.mT).masked_fill(torch.ones(S, S, device=q.device).triu(1).bool(), -1e9)).softmax(-1) @ v


@refused("softcap 1 after they were shifted")
def maximum_subtracted_before_softcap(q, k, v):
    scores = q @ k.mT * D**-0.5
    return torch.tanh(scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v


# -- what the weights go through ------------------------------------------------------------------------------------


@spelling(f"{SCALE}, gate", shapes={"head_mask": (H,)})
def head_mask(q, k, v, head_mask):
    return ((q @ k.mT * D**-0.5).softmax(-1) * head_mask.view(1, H, 1, 1)) @ v


@spelling(f"{SCALE}, gate", shapes={"gate": (B, H, S, 1)})
def gate_of_the_query(q, k, v, gate):
    return (torch.sigmoid(gate) * (q @ k.mT * D**-0.5).softmax(-1)) @ v


@refused("varies over the keys")
def weights_times_a_matrix(q, k, v, bias):
    return ((q @ k.mT).softmax(-1) * bias) @ v


@spelling(f"{SCALE}, key padding")
def zero_after_softmax(q, k, v, padding):
    drop = ~padding[:, None, None, :]
    weights = (q @ k.mT * D**-0.5).masked_fill(drop, float("-inf")).softmax(-1)
    return weights.masked_fill(drop, 0.0) @ v


@spelling(f"{SCALE}, causal")
def nan_to_num_after_softmax(q, k, v):
    mask = torch.full((S, S), float("-inf"), device=q.device).triu(1)
    return torch.nan_to_num((q @ k.mT * D**-0.5 + mask).softmax(-1), nan=0.0) @ v


@spelling(f"{SCALE}, gate")
def weights_scaled(q, k, v):
    return (0.5 * (q @ k.mT * D**-0.5).softmax(-1)) @ v


TWICE = dict.fromkeys(("q2", "k2"), (B, H, S, D))


@spelling(SCALE, shapes=TWICE, n_sites=2)
def sum_of_attentions(q, k, q2, k2, v):
    return ((q @ k.mT * D**-0.5).softmax(-1) + (q2 @ k2.mT * D**-0.5).softmax(-1)) @ v


@spelling(f"{SCALE}, causal, gate", shapes={**TWICE, "lamb": (1,)}, n_sites=2)
def differential_attention(q, k, q2, k2, v, lamb):
    mask = torch.full((S, S), float("-inf"), device=q.device).triu(1)
    first, second = ((a @ b.mT * D**-0.5 + mask).softmax(-1, dtype=torch.float32) for a, b in ((q, k), (q2, k2)))
    return (first * (1 - lamb) - lamb * second).to(v.dtype) @ v


# -- sums of biases, factors ----------------------------------------------------------------------------------------


@spelling("bias, causal")
def bias_and_mask_added_first(q, k, v, bias):
    mask = torch.full((S, S), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    return (q @ k.mT + (bias + mask)).softmax(-1) @ v


# -- layouts --------------------------------------------------------------------------------------------------------


@spelling()
def weights_on_the_right(q, k, v):
    weights = (q @ k.mT * D**-0.5).softmax(-1)
    return (v.mT @ weights.mT).mT


@spelling("scale 0.1768", shapes={"image": (B, 32, 4, 5)})
def latent_diffusion_block(image):
    b, c, h, w = image.shape
    q = image.reshape(b, c, h * w).permute(0, 2, 1)
    k = (image.flip(0) * 0.5).reshape(b, c, h * w)  # where a key is the query, its weight is nearly 1
    weights = F.softmax(torch.bmm(q, k) * (int(c) ** (-0.5)) * 2, dim=2)
    v = image.reshape(b, c, h * w)
    return torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, h, w)
