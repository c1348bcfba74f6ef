"""Attention of large heads by matrix products, some queries at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attn_rewriter import AttentionSpec, Device
from attn_rewriter.kernels import KERNELS, chunked
from attn_rewriter.spec import Band, Mask, Scale, Shapes
from tests.accuracy import assert_as_accurate
from tests.running import rewritten, truth, with_gradients

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 272

SIZES = {
    "as many queries": (100, 100, False),
    "causal": (100, 100, True),
    "more keys": (60, 100, False),
    "more keys, causal": (60, 100, True),
    "more queries, causal": (100, 60, True),
}


def inputs(name: str, dtype: torch.dtype, kv_heads: int, device: str) -> list[Tensor]:
    q_len, kv_len, _ = SIZES[name]
    sizes = ((HEADS, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(2, n, length, HEAD_DIM, dtype=dtype, device=device).requires_grad_() for n, length in sizes]


def attention(name: str) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = q @ k.mT * HEAD_DIM**-0.5
        if SIZES[name][2]:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return function


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [(torch.bfloat16, "eager"), (torch.float16, "eager"), (torch.bfloat16, "inductor")],
    ids=["bfloat16", "float16", "bfloat16, compiled"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize("name", SIZES)
def test_in_chunks(
    name: str, kv_heads: int, dtype: torch.dtype, compiler: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result and gradients, where the last chunk is smaller than the others."""
    monkeypatch.setattr(chunked, "_SCORES", 2 * HEADS * 100 * 32)
    imagined = "sm_90" if device == "cpu" else None
    function, report = rewritten(attention(name), kernel="chunked", device=imagined, compiler=compiler)
    given = inputs(name, dtype, kv_heads, device)
    found = with_gradients(function, given)
    assert [site.kernel for site in report().sites] == ["chunked"]
    assert_as_accurate(found, with_gradients(attention(name), given), truth(attention(name), given))


def test_an_sdpa_call() -> None:
    """Of the autoencoders of image models, as diffusers writes it: chosen for its heads."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    function, report = rewritten(call, device="sm_90", compiler="inductor")
    given = [torch.randn(1, 1, 200, 512, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    found = with_gradients(function, given)
    assert [site.kernel for site in report().sites] == ["chunked"]
    assert_as_accurate(found, with_gradients(call, given), truth(call, given))


def test_an_output_that_the_caller_writes_into() -> None:
    """It is kept for the backward pass."""
    function, _ = rewritten(attention("causal"), kernel="chunked", device="sm_90", compiler="inductor")
    given = inputs("causal", torch.bfloat16, KV_HEADS, "cpu")

    def doubled(function: Any) -> Any:
        return lambda *given: function(*given).mul_(2)

    found, eager = (with_gradients(doubled(f), given) for f in (function, attention("causal")))
    assert_as_accurate(found, eager, truth(doubled(attention("causal")), given))


class Largest(TorchDispatchMode):
    """How many elements the largest result of any operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found = max([self.found, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_some_scores_at_a_time(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a chunk has, forward and backward, but for what grows with the length alone."""
    monkeypatch.setattr(chunked, "_SCORES", 2**14)
    n = 400
    spec = AttentionSpec((Scale(0.3), *([Mask(None, Band(None, 0), "keep")] if causal else [])))
    shapes = Shapes(1, 1, 1, n, n, 8, 8, torch.bfloat16, True)
    given = [torch.randn(1, 1, n, 8, dtype=torch.bfloat16, device="cpu").requires_grad_() for _ in range(3)]
    kernel, device = KERNELS["chunked"], Device.parse("sm_90")
    with Largest() as largest:
        with_gradients(lambda *x: kernel(spec, shapes, device, dict(zip(("query", "key", "value"), x))), given)
    assert largest.found <= 2**14 < n * n
