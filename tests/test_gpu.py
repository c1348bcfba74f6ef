"""The same promises on a CUDA device, where other kernels run behind SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import attn_rewriter
from attn_rewriter import KernelUnavailable
from attn_rewriter.bench.masks import FORMS
from attn_rewriter.kernels import KERNELS, PAIRS
from attn_rewriter.kernels.flash import flash_attention, missing
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, Exact, double, joined, rewritten, truth, with_gradients
from tests.spellings import SPELLINGS, Spelling
from tests.standins import PACKAGES

pytestmark = pytest.mark.gpu


@contextmanager
def skipped_where_refused(reason: str = "") -> Iterator[None]:
    """Where the kernel that was asked for says that it can't, with these words."""
    try:
        yield
    except BackendCompilerFailed as failed:
        refused = failed.inner_exception
        if not isinstance(refused, KernelUnavailable) or reason not in str(refused):
            raise
        pytest.skip(str(refused))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if not s.random], ids=lambda s: s.name)
def test_result_and_gradients(spelling: Spelling, dtype: torch.dtype) -> None:
    draws = [
        [x.cuda().detach().requires_grad_(x.requires_grad) for x in spelling.inputs(dtype, s)] for s in range(DRAWS)
    ]
    # What PyTorch remembers of cuDNN's backward (see below) must not come from the model's own SDPA calls.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        eager = joined(with_gradients(spelling.function, inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    function, _ = rewritten(spelling.function)
    fused = joined(with_gradients(function, inputs) for inputs in draws)
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs) for inputs in draws))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spelling",
    [s for s in SPELLINGS if not s.random and s.computes and "flex" not in s.impossible],
    ids=lambda s: s.name,
)
def test_flex(spelling: Spelling, dtype: torch.dtype) -> None:
    """FlexAttention as Inductor compiles it."""
    draws = [
        [x.cuda().detach().requires_grad_(x.requires_grad) for x in spelling.inputs(dtype, s)] for s in range(DRAWS)
    ]
    try:
        eager = joined(with_gradients(spelling.function, inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, report = rewritten(spelling.function, kernel="flex", compiler="inductor")
    fused = joined(with_gradients(function, inputs) for inputs in draws)
    assert {site.kernel for site in report().sites} == {"flex"}
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs) for inputs in draws))


BLOCKED = (
    "causal, padding", "mask tensor", "window 512", "softcap, causal", "learned bias, causal", "ALiBi, causal",
    "left padding, additive tensor", "sinks, window", "padding, 2048",
)  # fmt: skip
# flash-attention 4 trains none of these where heads share a key.
BIASED = ("bias", "ALiBi, causal", "left padding, additive tensor")


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("name", "kv_heads"), [*product(BLOCKED, [2]), *product(BIASED, [4])])
@pytest.mark.parametrize("kernel", ["flex", "fa4", "fa2"])
def test_many_blocks(kernel: str, name: str, kv_heads: int, head_dim: int, dtype: torch.dtype, mode: str) -> None:
    """Several batches of several blocks: what a block mask says of one is not read for another."""
    form = replace(FORMS[name], batch=3, heads=4, length=650, head_dim=head_dim, kv_heads=kv_heads)
    inputs = form.inputs("cuda", dtype)
    for mask in {"padding", "mask"} & inputs.keys():
        # No row is without a key; or with a single one, where the gradients of query and key are zero, which eager code
        # computes without an error, and a difference of two sums with one.
        inputs[mask][..., :2] = True
    torch._dynamo.reset()
    function = attn_rewriter.optimize(form.__call__, kernel=kernel, dynamic=False)

    def run(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if mode == "training":
            return with_gradients(lambda *values: function(**dict(zip(inputs, values))), [*inputs.values()])
        with torch.no_grad():
            return function(**inputs)

    with Exact():
        exact = run(form, dict(zip(inputs, double([*inputs.values()]))))
    with skipped_where_refused():
        fused = run(function, inputs)
    assert_as_accurate(fused, run(form, inputs), exact)


def _scores(q: torch.Tensor, k: torch.Tensor, lower: int | None, upper: int | None, cap: float = 0.0) -> torch.Tensor:
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q @ k.mT * q.size(-1) ** -0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(k.size(-2), device=q.device) - torch.arange(q.size(-2), device=q.device)[:, None]
    keep = torch.ones_like(distance, dtype=torch.bool)
    if lower is not None:
        keep = keep & (distance >= lower)
    if upper is not None:
        keep = keep & (distance <= upper)
    return scores.masked_fill(~keep, float("-inf"))


WINDOWS = {
    "full": (384, 384, None, None, 0.0),
    "causal": (384, 384, None, 0, 0.0),
    "causal, new queries": (130, 384, None, 254, 0.0),
    "window": (384, 384, -100, 0, 0.0),
    "both sides": (384, 384, -64, 32, 0.0),
    "softcap, causal": (384, 384, None, 0, 5.0),
    "one query": (1, 384, None, 383, 0.0),
}


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("layout", ["heads first", "positions first"])
@pytest.mark.parametrize("kernel", PACKAGES)
def test_flash_attention(kernel: str, layout: str, name: str, dtype: torch.dtype, head_dim: int, kv_heads: int) -> None:
    """What the packages are declared to compute, they compute, gradients included."""
    q_len, kv_len, lower, upper, cap = WINDOWS[name]

    def attention(q, k, v):
        weights = _scores(q, k, lower, upper, cap).float().softmax(-1).to(q.dtype)
        return (weights @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)).transpose(1, 2)

    sizes = [(2, 8, q_len, head_dim), *[(2, kv_heads, kv_len, head_dim)] * 2]
    inputs = [torch.randn(size, dtype=dtype, device="cuda") for size in sizes]
    if layout == "positions first":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_right(kernel, attention, [x.requires_grad_() for x in inputs])


def assert_right(
    kernel: str, attention: Callable[..., Any], inputs: list[torch.Tensor], refusal: str = "not installed", **how: Any
) -> None:
    """Result and gradients of a kernel that is asked for by name; skipped where it refuses with these words alone."""
    function, report = rewritten(attention, kernel=kernel, **how)
    with skipped_where_refused(refusal):
        fused = with_gradients(function, inputs)
    assert [site.kernel for site in report().sites] == [kernel]
    assert_as_accurate(fused, with_gradients(attention, inputs), truth(attention, inputs))


@pytest.mark.parametrize(("name", "kv_heads"), [("full", 4), ("causal", 1), ("padding, causal", 4)])
@pytest.mark.parametrize("head_dim", [*range(8, 128, 8), *range(128, 257, 16)])
@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash", "flex", *PACKAGES])
def test_any_head_dim(kernel: str, head_dim: int, name: str, kv_heads: int) -> None:
    """That one is right says nothing of another: each is padded and tiled in its own way."""
    length, upper = 330, None if name == "full" else 0

    def attention(q, k, v, padding):
        scores = _scores(q, k, None, upper)
        if "padding" in name:
            scores = scores.masked_fill(~padding[:, None, None], float("-inf"))
        weights = scores.float().softmax(-1).to(q.dtype)
        return (weights @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)).transpose(1, 2)

    drawn = (torch.randn(2, length, n, head_dim, dtype=torch.bfloat16, device="cuda") for n in (4, kv_heads, kv_heads))
    padding = torch.arange(length, device="cuda") != torch.tensor([[7], [200]], device="cuda")
    inputs = [*(x.transpose(1, 2).requires_grad_() for x in drawn), padding]
    how = {"compiler": "inductor"} if kernel == "flex" else {}
    assert_right(kernel, attention, inputs, refusal="", **how)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", ["full", "causal", "padding"])
@pytest.mark.parametrize("kernel", ["sdpa", "fa2"])
def test_dropout(kernel: str, name: str, kv_heads: int) -> None:
    """Rate and scale of what is dropped; what is hidden stays hidden; the backward pass drops what the forward pass
    did. Values of a unit matrix show the weights."""
    length, rate = 64, 0.25
    padding = torch.arange(length, device="cuda") % 2 < torch.tensor([[2], [1]], device="cuda")

    def weighted(q, k, padding):
        scores = q @ k.repeat_interleave(8 // kv_heads, dim=1).mT * 0.125
        if name == "causal":
            scores = scores.masked_fill(scores.new_ones(length, length).triu(1).bool(), float("-inf"))
        if name == "padding":
            scores = scores.masked_fill(~padding[:, None, None], float("-inf"))
        return scores.softmax(-1)

    def attention(q, k, v, padding):
        dropped = torch.nn.functional.dropout(weighted(q, k, padding), rate)
        return dropped @ v.repeat_interleave(8 // kv_heads, dim=1)

    q, k = (torch.randn(2, heads, length, length, dtype=torch.bfloat16, device="cuda") for heads in (8, kv_heads))
    v = torch.eye(length, dtype=torch.bfloat16, device="cuda").expand_as(k).contiguous().requires_grad_()
    function, report = rewritten(attention, kernel=kernel)
    with skipped_where_refused("not installed"):
        found = function(q, k, v, padding)
    assert [site.kernel for site in report().sites] == [kernel]
    weights = weighted(q.double(), k.double(), padding)
    seen = weights > 1e-3  # smaller ones may be zero anyway
    kept = (found != 0) & seen
    share, count = kept.sum() / seen.sum(), seen.sum()
    assert (share - (1 - rate)).abs() < 5 * (rate * (1 - rate) / count) ** 0.5
    torch.testing.assert_close(found[kept].double(), weights[kept] / (1 - rate), rtol=0.02, atol=0)
    assert not found[weights == 0].any()
    way = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, v, way)
    expected = (found.double().mT @ way.double()).unflatten(1, (kv_heads, -1)).sum(2)
    torch.testing.assert_close(gradient.double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        ("full", "heads first", torch.bfloat16),
        ("causal", "positions first", torch.bfloat16),
        ("causal", "packed", torch.float16),
        ("cross", "packed", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kernel", ["cudnn", "flash", *PAIRS])
def test_mixed_passes(kernel: str, name: str, layout: str, dtype: torch.dtype, head_dim: int, kv_heads: int) -> None:
    """PyTorch's own attention by name, and the passes of every two kernels: the logsumexp of one is that of another."""
    q_len, upper = (200 if name == "cross" else 384), 0 if name == "causal" else None

    def attention(q, k, v):
        weights = _scores(q, k, None, upper).float().softmax(-1).to(q.dtype)
        return (weights @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)).transpose(1, 2)

    inputs = []
    for length, heads in ((q_len, 8), (384, kv_heads), (384, kv_heads)):
        x = torch.randn(2, length, 3 if layout == "packed" else 1, heads, head_dim, dtype=dtype, device="cuda")
        x = x[:, :, 0].transpose(1, 2)
        inputs.append((x.contiguous() if layout == "heads first" else x).requires_grad_())
    assert_right(kernel, attention, inputs)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "fa4"])
def test_logsumexp(kernel: str) -> None:
    """Natural, of the scaled scores, one for each query."""
    if reason := missing(KERNELS[kernel].distribution, KERNELS[kernel].module, KERNELS[kernel].at_least):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 256, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    _, found, _ = flash_attention(q, k, v, None, [], [], [], kernel, kernel, 0.125, 0.0, -1, 0, 0.0, "None", False)
    exact = _scores(q.transpose(1, 2).double(), k.transpose(1, 2).double(), None, 0).logsumexp(-1)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=0)


# Realistic sizes, so that cuDNN, flash and memory-efficient attention are taken, each with rows without any key.
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", ["finfo", "inf", "bias"])
@pytest.mark.parametrize(
    ("kernel", "compiler"), [("auto", "eager"), ("auto", "inductor"), ("flex", "inductor"), ("fa4", "eager")]
)
def test_rows_without_any_key_at_realistic_sizes(
    kernel: str, compiler: str, fill: str, dtype: torch.dtype, head_dim: int, kv_heads: int
) -> None:
    batch, heads, length = 2, 8, 128

    def attention(q, k, v, padding, bias):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        i = torch.arange(length, device=q.device)
        keep = (i[None, :] <= i[:, None])[None, None] & padding[:, None, None, :]
        scores = q @ k.mT * head_dim**-0.5
        if fill == "bias":
            scores = scores + bias
        low = torch.finfo(q.dtype).min if fill == "finfo" else float("-inf")
        return (scores + torch.where(keep, q.new_zeros(()), low)).softmax(-1) @ v

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)

    inputs = [draw(batch, heads, length, head_dim), *(draw(batch, kv_heads, length, head_dim) for _ in range(2))]
    padding = torch.arange(length, device="cuda") >= torch.tensor([[0], [40]], device="cuda")
    inputs += [padding, draw(heads, length, length)]
    function, report = rewritten(attention, compiler=compiler, kernel=kernel)
    with skipped_where_refused():
        result, gradients = with_gradients(function, inputs)
    assert report().n_fused == 1
    assert torch.equal(result.isnan(), attention(*inputs).isnan())  # in rows of minus infinities alone
    if fill == "finfo":
        assert all(g is None or g.isfinite().all() for g in gradients)
    # the rows that have a key agree with eager
    full = torch.ones_like(padding)
    inputs[3] = full
    eager, exact = with_gradients(attention, inputs), truth(attention, inputs)
    assert_as_accurate(with_gradients(function, inputs), eager, exact)


def test_decode_reads_grouped_heads_without_copying_them() -> None:
    def decode(q, k, v):
        k, v = (x[:, :, None].expand(8, 8, 4, 4096, 128).reshape(8, 32, 4096, 128) for x in (k, v))
        return (q @ k.mT * 128**-0.5).softmax(-1) @ v

    q = torch.randn(8, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(8, 8, 4096, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    function = attn_rewriter.optimize(decode)
    function(q, k, v)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < k.numel() * k.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("mask", ["keep", "additive", "additive, whole rows"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_decode(mode: str | None, mask: str, q_len: int, dtype: torch.dtype) -> None:
    """Against a static cache, of which each call has filled more: one graph, of CUDA's too, for all of it."""
    batch, room = 3, 3000

    def decode(q, k, v, keep, bias):
        k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
        scores = q @ k.mT * 128**-0.5
        scores = scores.masked_fill(~keep, float("-inf")) if mask == "keep" else scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    torch._dynamo.reset()
    function = attn_rewriter.optimize(decode, kernel="decode", mode=mode)
    k, v = (torch.randn(batch, 2, room, 128, dtype=dtype, device="cuda") for _ in range(2))
    at = torch.arange(room, device="cuda")
    for filled in (5, 700, 701, 2999):
        q = torch.randn(batch, 8, q_len, 128, dtype=dtype, device="cuda")
        keep = (at < filled) & (at >= torch.tensor([[0], [3], [4]], device="cuda"))
        keep = keep[:, None, None].expand(-1, -1, q_len, -1)
        bias = torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
        if mask == "additive, whole rows":
            bias[1] = torch.finfo(dtype).min
        inputs = [q, k, v, keep.contiguous(), bias]
        with torch.no_grad():
            found = function(*inputs).clone()
            with Exact():
                exact = decode(*double(inputs))
            assert_as_accurate(found, decode(*inputs), exact)
    assert [site.kernel for site in attn_rewriter.report_of(function).sites] == ["decode"]


COMBINATIONS = [["sdpa"], ["cudnn"], ["fa4/cudnn"], ["sdpa", "cudnn"], ["cudnn", "sdpa"]]


@pytest.mark.parametrize("kernels", COMBINATIONS, ids=str)
@pytest.mark.parametrize("layout", ["heads first", "positions first"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_gradients_in_two_layouts(compiler: str, layout: str, kernels: list[str]) -> None:
    """PyTorch's cuDNN backward remembers the strides of the first gradient that it saw (see `kernels/sdpa.py`)."""
    if "fa4/cudnn" in kernels and (reason := missing("flash-attn-4", "flash_attn.cute.interface", "4.0.0b30")):
        pytest.skip(reason)
    # Another size for each, as what is remembered outlives a test.
    length = 256 + 8 * (COMBINATIONS.index(kernels) + 5 * (layout == "heads first") + 10 * (compiler == "eager"))

    def attention(q, k, v):
        return (q @ k.mT * 64**-0.5).softmax(-1) @ v

    def heads_last(q, k, v):
        return attention(q, k, v).transpose(1, 2).contiguous()

    def draw() -> torch.Tensor:
        x = torch.randn(2, 6, length, 64, dtype=torch.bfloat16, device="cuda")
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "positions first" else x
        return x.requires_grad_()

    inputs = [draw() for _ in range(3)]
    for kernel, function in product(kernels, (attention, heads_last, attention)):
        fused, _ = rewritten(function, compiler=compiler, kernel=kernel)
        eager, exact = with_gradients(function, inputs), truth(function, inputs)
        assert_as_accurate(with_gradients(fused, inputs), eager, exact)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "cudnn", "flash", "decode", *PACKAGES])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_gpu_that_is_not_the_current_one(compiler: str, kernel: str) -> None:
    """Kernels run where their tensors are, after what is under way there; so do those that check and time them."""

    def attention(q, k, v):
        return (q @ k.mT * 64**-0.5).softmax(-1) @ v

    q, k, v = (torch.randn(2, 4, n, 64, dtype=torch.bfloat16, device="cuda:1") for n in (16, 2048, 2048))
    function, report = rewritten(attention, kernel=kernel, compiler=compiler, verify=True)
    with torch.no_grad(), skipped_where_refused():
        function(q, k, v)
        late = torch.zeros_like(q)
        with torch.cuda.device(1):
            torch.cuda._sleep(100_000_000)
            late.copy_(q)
        torch.cuda.synchronize(0)  # which makes it CUDA's own current device
        found = function(late, k, v)
        assert_as_accurate(found, attention(q, k, v), attention(*double([q, k, v])))
    (site,) = report().sites
    assert site.kernel == kernel and site.verified
    assert torch.cuda.current_device() == 0
