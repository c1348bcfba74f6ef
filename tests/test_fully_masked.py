"""Rows in which every key is masked are what the model's own code makes of them, in the output and in gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_rewriter.hidden import Done, NotHidden, fully_masked_rows, levels
from attn_rewriter.spec import (
    Band,
    Bias,
    Clamp,
    Compare,
    Index,
    Mask,
    Predicate,
    Quotient,
    Scale,
    TensorMask,
    Values,
    every_row_sees_a_key,
)
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.running import DRAWS, joined, rewritten, truth, with_gradients
from tests.standins import installed

INF = float("-inf")
GPU = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("gpu") else installed():
        yield


# ---------------------------------------------------------------------------------------------------------------
# Programs


def empty_sequence(length: int) -> Tensor:
    """The first of three sequences is all padding, the second on the left, the third nowhere."""
    first = torch.tensor([length, length // 3, 0])
    return (torch.arange(length) >= first[:, None])[:, None, None]


def left_padding(length: int) -> Tensor:
    """The same under a causal mask: the first queries of the second sequence see no key."""
    return empty_sequence(length) & torch.ones(length, length, dtype=torch.bool).tril()


def both_sides(length: int) -> Tensor:
    """Padding of queries and keys, as a Conformer masks it."""
    keep = empty_sequence(length)
    return keep & keep.mT


def scattered(length: int) -> Tensor:
    """Rows here and there, of single heads."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(3, 4, length, length, generator=generator) < 0.7
    return keep & (torch.rand(3, 4, length, 1, generator=generator) < 0.7)


MASKS: dict[str, Callable[[int], Tensor]] = {
    mask.__name__: mask for mask in (empty_sequence, left_padding, both_sides, scattered)
}


def lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


# How the mask is applied; `keep` is where a query attends.
FILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled with -1e9": lambda s, keep: s.float().masked_fill(~keep, -1e9) if _half(s) else s.masked_fill(~keep, -1e9),
    "filled with the lowest": lambda s, keep: s.masked_fill(~keep, lowest(s)),
    "where": lambda s, keep: torch.where(keep, s, torch.full((), lowest(s), dtype=s.dtype, device=s.device)),
    "added": lambda s, keep: s + torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, lowest(s)),
    "added, one minus": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * lowest(s),
    "filled twice": lambda s, keep: s.masked_fill(~keep, lowest(s)).masked_fill(~keep, lowest(s)),
    "scaled afterwards": lambda s, keep: s.masked_fill(~keep, lowest(s)) * 0.5,
}


def _half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Program:
    """Attention under a mask that hides whole rows, and what follows: a mixing of positions, as by a convolution, so
    that these rows reach all others."""

    fill: str
    bias: str = ""  # "learned", "given"
    dropout_p: float = 0.0
    groups: int = 1
    softcap: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        s = q @ k.mT * 0.3
        if self.softcap:
            s = torch.tanh(s / 2) * 2
        if self.bias:
            s = s + bias
        w = FILLS[self.fill](s, keep).softmax(-1).to(v.dtype)
        o = F.dropout(w, self.dropout_p) @ v
        return o + 0.5 * o.roll(1, 2)

    def inputs(self, mask: str, seed: int, dtype: torch.dtype, device: str = "cpu", length: int = 24) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        head_dim = 16 if length < 100 else 64

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        q, k, v = (draw(3, heads, length, head_dim) for heads in (4, 4 // self.groups, 4 // self.groups))
        bias = draw(1, 4, length, length)
        for x in (q, k, v):
            x.requires_grad_()
        return [q, k, v, MASKS[mask](length).to(device), bias.requires_grad_(self.bias == "learned")]


PROGRAMS = [
    *(Program(fill) for fill in FILLS),
    Program("filled with -1e9", "learned"),
    Program("added", "learned"),
    Program("added", "given", groups=2),
    Program("filled with the lowest", groups=4),
]


# ---------------------------------------------------------------------------------------------------------------
# Results and gradients


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "reference"])
def test_exactly(kernel: str, program: Program, mask: str, training: bool) -> None:
    """In float64, where only rounding is left."""
    inputs = program.inputs(mask, 0, torch.float64)
    function, report = rewritten(program, kernel=kernel)
    run = with_gradients if training else _inference
    found = run(function, inputs)
    if report().n_fused:
        assert_the_same(found, run(program, inputs))
    else:  # -1e9 does not swallow scores of float64 where it is added
        assert kernel == "auto"


def _inference(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    with torch.no_grad():
        return function(*inputs)


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    """Every program under every mask, in half precision, in inference and in training."""
    for names, values, ids in (
        ("program", PROGRAMS, str),
        ("mask", MASKS, None),
        ("dtype", [torch.bfloat16, torch.float16], str),
        ("training", [False, True], None),
    ):
        test = pytest.mark.parametrize(names, values, ids=ids)(test)
    return test


KERNELS = ("sdpa", "flex", "fa2", "fa4", "decode")


def compare(program: Program, kernel: str, mask: str, dtype: torch.dtype, training: bool, **how: Any) -> str:
    """Compare under the contract, with the truth in float64; the reason where the kernel can't."""
    device = how.pop("where", "cpu")
    length = how.pop("length", 24)
    draws = [program.inputs(mask, seed, dtype, device, length) for seed in range(DRAWS)]
    if kernel == "decode":
        for inputs in draws:
            inputs[0], inputs[3], inputs[4] = (
                x[:, :, -2:].detach() if x.size(2) > 1 else x for x in (*inputs[:1], *inputs[3:])
            )
    function, report = rewritten(program, kernel=kernel, **how)
    run = with_gradients if training else _inference
    try:
        found = joined(run(function, inputs) for inputs in draws)
    except Exception as error:
        refused = str(getattr(error, "inner_exception", error))
        if "no requested kernel can compute" not in refused:
            raise
        return refused
    assert [site.kernel for site in report().sites] == [kernel]
    eager = joined(run(program, inputs) for inputs in draws)
    exact = joined(truth(program, inputs) for inputs in draws)
    assert_as_accurate(found, eager, exact if training else exact[0])
    return ""


REFUSED = ("no dropout", "takes a window", "no bias", "computes no bias", "in training", "backward", "head_dim", "mask")


@everywhere
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel: str, program: Program, mask: str, dtype: torch.dtype, training: bool) -> None:
    """Through stand-ins, as if for an H200."""
    if kernel == "decode" and (training or dtype == torch.bfloat16):
        pytest.skip("has no backward pass; Triton's interpreter knows no bfloat16")
    refused = compare(program, kernel, mask, dtype, training, device="sm_90")
    if refused:
        assert any(words in refused for words in REFUSED), refused
        pytest.skip(refused)


@GPU
@everywhere
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_a_gpu(kernel: str, program: Program, mask: str, dtype: torch.dtype, training: bool) -> None:
    if kernel == "decode" and training:
        pytest.skip("has no backward pass")
    compiler = {"compiler": "inductor"} if kernel == "flex" else {}
    refused = compare(program, kernel, mask, dtype, training, where="cuda", length=200, **compiler)
    if refused:
        pytest.skip(refused)


@GPU
@everywhere
@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_backends_of_sdpa(backend: SDPBackend, program: Program, mask: str, dtype: torch.dtype, training: bool) -> None:
    if backend is not SDPBackend.MATH and program.groups > 1:
        pytest.skip("PyTorch chooses by itself where heads are grouped")
    if backend is SDPBackend.CUDNN_ATTENTION and program.bias == "learned" and training:
        pytest.skip("cuDNN has no gradient of a bias")
    with sdpa_kernel([backend]):
        compare(program, "sdpa", mask, dtype, training, where="cuda", length=200)


# ---------------------------------------------------------------------------------------------------------------
# No number, and zeros


def no_number(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, INF).softmax(-1)


def no_number_added(s: Tensor, keep: Tensor) -> Tensor:
    return (s + torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, INF)).softmax(-1)


def zeroed(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, INF).softmax(-1).masked_fill(~keep, 0.0)


def zeroed_finite(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, -1e9).softmax(-1).masked_fill(~keep, 0.0)


def without_nan(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, INF).softmax(-1).nan_to_num(0.0)


def without_nan_finite(s: Tensor, keep: Tensor) -> Tensor:
    """There is none: the mean stays."""
    return s.masked_fill(~keep, -1e9).softmax(-1).nan_to_num(0.0)


WEIGHTS = (no_number, no_number_added, zeroed, zeroed_finite, without_nan, without_nan_finite)


@pytest.mark.parametrize(("kernel", "device"), [("sdpa", None), ("reference", None), ("flex", "sm_90")])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_outputs_are_no_number_where_eager_ones_are(
    weights: Callable[..., Tensor], mask: str, kernel: str, device: str | None
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return weights(q @ k.mT * 0.3, keep) @ v

    dtype = torch.float32 if kernel == "flex" else torch.float64
    inputs = [x.detach() for x in Program("where").inputs(mask, 0, dtype)[:4]]
    fused, report = rewritten(function, kernel=kernel, device=device)
    found, eager = fused(*inputs), function(*inputs)
    assert report().n_fused == 1
    assert torch.equal(found.isnan(), eager.isnan())
    torch.testing.assert_close(found, eager, equal_nan=True)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("kind", ["bool", "added", "added, the lowest"])
@pytest.mark.parametrize("mask", MASKS)
def test_calls_of_sdpa_give_zeros(mask: str, kind: str, kernel: str) -> None:
    """PyTorch's own softmax is a safe one. What is finite is added like anything else."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        low = INF if kind == "added" else torch.finfo(q.dtype).min
        added = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, low)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep if kind == "bool" else added)

    inputs = Program("where").inputs(mask, 0, torch.float64)[:4]
    fused, report = rewritten(function, kernel=kernel)
    found = with_gradients(fused, inputs)
    assert report().n_fused == 1
    with sdpa_kernel([SDPBackend.MATH]):  # the kernel for CPUs takes such rows' weights for 1 in its backward pass
        assert_the_same(found, with_gradients(function, inputs))


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_calls_of_sdpa_give_zeros_on_a_gpu(backend: SDPBackend, mask: str, kind: str, dtype: torch.dtype) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        added = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, INF)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep if kind == "bool" else added)

    if backend is SDPBackend.CUDNN_ATTENTION and dtype == torch.float32:
        pytest.skip("cuDNN takes half precision")
    inputs = [x.detach() for x in Program("where").inputs(mask, 0, dtype, "cuda", 200)[:4]]
    with sdpa_kernel([backend]):
        output = rewritten(function, kernel="sdpa")[0](*inputs)
    rows = ~inputs[3].any(-1, keepdim=True)
    assert not output.masked_select(rows).any() and output.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axes", ["key", "query, key", "head, query, key"])
@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_a_mask_that_is_handed_in_as_numbers(kernel: str, axes: str, training: bool) -> None:
    """Nothing is known of it; its rows of the lowest number have equal weights all the same."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        o = (q @ k.mT * 0.3 + mask).softmax(-1) @ v
        return o + 0.5 * o.roll(1, 2)

    keep = {"key": empty_sequence(24), "query, key": left_padding(24), "head, query, key": scattered(24)}[axes]
    mask = torch.zeros_like(keep, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float64).min)
    inputs = [*Program("added").inputs("scattered", 0, torch.float64)[:3], mask]
    fused, report = rewritten(function, kernel=kernel)
    run = with_gradients if training else _inference
    found = run(fused, inputs)
    assert report().n_fused == 1
    assert_the_same(found, run(function, inputs))


def test_numbers_of_two_masks_that_are_added() -> None:
    """A key that both hide is hidden more than one that one of them hides, which is seen in a row without others."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        causal = torch.full((24, 24), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
        padding = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
        return (q @ k.mT * 0.3 + causal + padding).softmax(-1) @ v

    inputs = [x.detach() for x in Program("where").inputs("empty_sequence", 0, torch.float64)[:4]]
    fused, report = rewritten(function)
    found = fused(*inputs)
    assert [site.spec.fully_masked_rows for site in report().sites] == ["by fill"]
    assert report().n_fused == 1
    assert_the_same(found, function(*inputs))


def by_hand(s: Tensor) -> Tensor:
    return s.exp() / s.exp().sum(-1, keepdim=True)


def by_hand_less_the_maximum(s: Tensor) -> Tensor:
    return by_hand(s - s.amax(-1, keepdim=True))


def by_hand_less_its_log_sum(s: Tensor) -> Tensor:
    return torch.exp(s - s.logsumexp(-1, keepdim=True))


def by_hand_less_the_largest_of_all(s: Tensor) -> Tensor:
    return by_hand(s - s.amax((-2, -1), keepdim=True))


SOFTMAXES = (by_hand, by_hand_less_the_maximum, by_hand_less_its_log_sum, by_hand_less_the_largest_of_all)


@pytest.mark.parametrize("fill", ["filled with -1e9", "filled with the lowest", "added", "scaled afterwards"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_a_softmax_by_hand(softmax: Callable[[Tensor], Tensor], mask: str, fill: str) -> None:
    """It divides zero by zero, unless the maximum of the row is subtracted. Where something else is, anything may come
    out: beside the lowest number the logarithm of the sum is lost, and each weight is 1."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return softmax(FILLS[fill](q @ k.mT * 0.3, keep)) @ v

    inputs = [x.detach() for x in Program("where").inputs(mask, 0, torch.float64)[:4]]
    fused, report = rewritten(function)
    found, eager = fused(*inputs), function(*inputs)
    assert report().n_fused == (softmax in (by_hand, by_hand_less_the_maximum))
    assert torch.equal(found.isnan(), eager.isnan())
    torch.testing.assert_close(found, eager, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low", [-1e4, -1e9, -1e30, INF])
@pytest.mark.parametrize("shape", [(), (24, 1), (3, 1, 24, 1), (3, 1, 24, 24)], ids=str)
def test_rows_that_are_handed_in(shape: tuple[int, ...], low: float, dtype: torch.dtype) -> None:
    """Numbers that hide all keys of a row, or are the same for all of them, and swallow the scores or do not."""

    def function(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + added).softmax(-1) @ v

    inputs = [x.detach() for x in Program("where").inputs("scattered", 0, dtype)[:3]]
    added = torch.zeros(shape, dtype=dtype)
    (added[..., :7, :] if shape else added).fill_(low)
    fused, report = rewritten(function)
    found, eager = fused(*inputs, added), function(*inputs, added)
    assert report().n_fused == 1
    assert torch.equal(found.isnan(), eager.isnan())
    swallows = low < (-1e9 if dtype == torch.float64 else -1e4)
    exact = eager.double() if swallows else function(*(x.double() for x in (*inputs, 0 * added)))
    assert_as_accurate(found.nan_to_num(), eager.nan_to_num(), exact.nan_to_num())


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_gradients_beside_rows_of_minus_infinity(kernel: str) -> None:
    """A fill passes no gradient on; what is no number in one row spoils no other one's query, and no key."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        return ((q @ k.mT * 0.3).masked_fill(~keep, INF) + bias).softmax(-1) @ v

    inputs = Program("where", "given").inputs("scattered", 0, torch.float64)
    fused, report = rewritten(function, kernel=kernel)
    (found, gradients), (eager, expected) = (with_gradients(f, inputs) for f in (fused, function))
    assert report().n_fused == 1
    assert torch.equal(found.isnan(), eager.isnan()) and found.isnan().any()
    assert all(x.isfinite().all() for x in expected[:2])
    assert_the_same(gradients[:2], expected[:2])


def test_a_mask_that_is_turned_around_beside_a_sink() -> None:
    """There is always something to attend to, but what was hidden is seen."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.pad(-(q @ k.mT).masked_fill(~keep, INF), (1, 0)).softmax(-1)[..., 1:] @ v

    inputs = [x.detach() for x in Program("where").inputs("scattered", 0, torch.float64)[:4]]
    fused, report = rewritten(function)
    assert torch.equal(fused(*inputs).isnan(), function(*inputs).isnan())
    assert "scaled by -1 after a mask" in str(report().sites[0].reasons)


def test_a_fill_above_minus_infinity() -> None:
    """Keys that a fill hides less than an added mask does have equal weights where there are no others."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        added = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, INF)
        drop = torch.ones(24, 24, dtype=torch.bool).triu(1)
        return (q @ k.mT * 0.3 + added).masked_fill(drop, -1e9).softmax(-1) @ v

    inputs = [x.detach() for x in Program("where").inputs("left_padding", 0, torch.float64)[:4]]
    fused, report = rewritten(function)
    found, eager = fused(*inputs), function(*inputs)
    assert report().n_fused == 1
    torch.testing.assert_close(found, eager, equal_nan=True)


def test_a_fill_beside_a_bias_that_may_be_a_mask() -> None:
    """In float64 -1e9 swallows no score: in a row that both hide, some keys would show theirs."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).masked_fill(~keep, -1e9).softmax(-1) @ v

    inputs = [x.detach() for x in Program("where").inputs("scattered", 0, torch.float64)]
    fused, report = rewritten(function)
    torch.testing.assert_close(fused(*inputs), function(*inputs))
    assert "does not swallow scores" in str(report().sites[0].reasons)


def test_dropout_keeps_its_distribution() -> None:
    """Of equal weights as of others: so many are dropped, and the rest is scaled up."""
    p, length = 0.25, 64

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).masked_fill(~keep, -1e9).softmax(-1), p) @ v

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, length, 8, generator=generator) for _ in range(2))
    keep = torch.ones(2, 1, length, length, dtype=torch.bool)
    keep[0, :, : length // 2] = False
    values = torch.eye(length).expand(2, 3, length, length)
    fused, report = rewritten(function)
    weights = torch.stack([fused(q, k, values, keep)[0, :, : length // 2] for _ in range(40)])
    assert report().n_fused == 1
    kept = weights != 0
    assert torch.allclose(weights[kept], torch.tensor(1 / (length * (1 - p))))
    share = kept.double().mean()
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / (40 * 3 * length)) ** 0.5  # rows of a head may share their draw


# ---------------------------------------------------------------------------------------------------------------
# What is known


def mask(form: str = "keep", *fills: float) -> Mask:
    return Mask("mask", TensorMask("mask", ("batch", "key")), form, fills or (INF,))


F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("steps", "zeroing", "rows"),
    [
        ([(mask(), F32)], "nothing", "nan"),
        ([(mask(), F32)], "nan", "zeros"),
        ([(mask(), F32)], "hidden", "zeros"),
        ([(mask("drop", -1e9), F32)], "nothing", "mean"),
        ([(mask("drop", -1e9), F32)], "nan", "mean"),
        ([(mask("drop", -1e9), F32)], "hidden", "zeros"),
        ([(mask("additive", -3e38), F32)], "nothing", "mean, added"),
        ([(mask("additive", -1e9), F32)], "nothing", "mean, added"),
        ([(mask("additive", -65504.0), F16)], "nothing", "mean, added"),
        ([(mask("drop", -1e9), F32), (Scale(0.125), F32)], "nothing", "mean"),
        ([(mask("drop", -1e9), F32), (Bias("bias"), F32)], "nothing", "mean"),
        ([(mask("additive", -3e38), F32), (Bias("bias"), F32)], "nothing", "mean, added"),
        ([(mask("drop", -1e9), F32), (mask("drop", -1e9), F32)], "nothing", "mean"),
        ([(mask("drop", -1e9), F32), (mask("drop", -2e9), F32)], "nothing", "by fill"),
        ([(mask("additive", -3e38), F32), (mask("additive", -3e38), F32)], "nothing", "by fill"),
        ([(mask("additive", -3e38, INF), F32)], "nothing", "by fill"),
        ([(mask("drop", -1e9), F32), (None, F32), (Scale(2.0), F32)], "nothing", "mean"),
    ],
)
def test_rows(steps: list[tuple[Any, torch.dtype]], zeroing: Any, rows: str) -> None:
    assert fully_masked_rows([Done(*step) for step in steps], zeroing) == rows


def test_rows_whose_gradients_are_not_known() -> None:
    """In inference there are none."""
    late = [Done(mask("drop", -1e9), F32), Done(Bias("bias"), F32)]
    clamped = [Done(mask("additive", -3e38), F32), Done(Clamp(-3e38), F32)]
    assert fully_masked_rows(late, "nothing", {"another"}) == "mean"
    assert fully_masked_rows(clamped, "nothing") == "mean, added"
    with pytest.raises(NotHidden, match="a bias that wants a gradient"):
        fully_masked_rows(late, "nothing", {"bias"})
    with pytest.raises(NotHidden, match="clamped after a mask was added"):
        fully_masked_rows(clamped, "nothing", {"bias"})


def added_and_filled(s: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    added = torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, lowest(s) / 2)
    return (s + added).masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), lowest(s) / 2)


def filled_beside_a_bias(s: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    return s.masked_fill(~keep, lowest(s)) + bias


@pytest.mark.parametrize("score", [added_and_filled, filled_beside_a_bias])
def test_gradients_of_rows_that_are_filled_in_part(score: Callable[..., Tensor]) -> None:
    """Keys that are filled pass no gradient on, others do: no kernel tells them apart in training."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        return score(q @ k.mT * 0.3, keep, bias).softmax(-1) @ v

    inputs = Program("where", "given").inputs("left_padding", 0, torch.float64)
    fused, report = rewritten(function)
    assert_the_same(with_gradients(fused, inputs), with_gradients(function, inputs))
    assert "in training" in str(report().sites[0].reasons)
    fused, report = rewritten(function)
    assert_the_same(_inference(fused, inputs), _inference(function, inputs))
    assert report().n_fused == 1


@pytest.mark.parametrize(
    ("steps", "zeroing", "reason"),
    [
        ([(mask("additive", -1e9), F64)], "nothing", "does not swallow"),
        ([(mask("drop", -1e9), F64), (Bias("bias"), F64)], "nothing", "does not swallow"),
        ([(mask("drop", -1e9), F32)], "some", "only some weights"),
        ([(mask("drop", -1e9), F32), (mask(), F32)], "nan", "only some weights"),
        ([(mask("drop", -1e9), F32), (None, F32), (mask("drop", -1e9), F32)], "nothing", "shifted between"),
        ([(mask("drop", -1e9), F32), (None, F32), (Bias("bias"), F32)], "nothing", "shifted between"),
    ],
)
def test_rows_that_are_not_known(steps: list[tuple[Any, torch.dtype]], zeroing: Any, reason: str) -> None:
    with pytest.raises(NotHidden, match=reason):
        fully_masked_rows([Done(*step) for step in steps], zeroing)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([(mask("drop", -65504.0), F16), (Scale(1e-5), F16)], "scaled by 1e-05"),
        ([(mask("drop", -65504.0), F16), (Scale(0.02), F16)], "scaled by 0.02"),
        ([(mask("drop", -1e9), F32), (Scale(1e-6), F32)], "scaled by 1e-06"),
        ([(mask("drop", -1e9), F32), (Scale(-1.0), F32)], "scaled by -1"),
        ([(mask(), F32), (Scale(0.0), F32)], "scaled by 0"),
        ([(mask("drop", -1e9), F32), (Clamp(-5e4), F32)], "clamp"),
        ([(mask(), F32), (Clamp(-1e3), F32)], "clamp"),
    ],
)
def test_scores_that_come_back(steps: list[tuple[Any, torch.dtype]], reason: str) -> None:
    with pytest.raises(NotHidden, match=reason):
        levels([Done(*step) for step in steps])


QUERY, KEY = Index(0, (("query", 1),)), Index(0, (("key", 1),))
DOCUMENT = {axis: Index(0, ((Values(("documents", axis), ("batch", axis)), 1),)) for axis in ("query", "key")}
CHUNKS = [Index(0, ((Quotient(x, 4), 1),)) for x in (QUERY, KEY)]
SAME = Compare(DOCUMENT["query"], DOCUMENT["key"], "eq")


@pytest.mark.parametrize(
    ("keep", "sizes", "sees"),
    [
        (Band(None, 0), (6, 6), True),
        (Band(None, 0), (6, 4), True),  # the first key
        (Band(None, 2), (4, 6), True),
        (Band(None, -1), (6, 6), False),  # the first query sees none
        (Band(0, None), (6, 6), True),
        (Band(0, None), (6, 4), False),
        (Band(-2, 0), (6, 6), True),
        (Band(-2, 0), (6, 4), False),
        (Band(1, 1), (6, 6), False),
        (SAME & Band(None, 0), (6, 6), True),
        (SAME & Band(-3, 0), (6, 6), True),
        (SAME & Band(None, -1), (6, 6), False),
        (Compare(DOCUMENT["query"] + Index(1), DOCUMENT["key"], "eq"), (6, 6), False),
        (Compare(DOCUMENT["query"] + Index(1), DOCUMENT["key"], "le"), (6, 6), False),
        (Compare(*CHUNKS, "eq") & Band(None, 0), (8, 8), True),
        (Compare(KEY, Index(2), "le"), (6, 6), True),
        (Compare(KEY, Index(-1), "le"), (6, 6), False),
        (TensorMask("padding", ("batch", "key")), (6, 6), False),
        (TensorMask("padding", ("batch", "key")) & Band(None, 0), (6, 6), False),
        (TensorMask("any", ("query", "key")) | Band(0, 0), (6, 6), True),
    ],
    ids=str,
)
def test_a_witness(keep: Predicate, sizes: tuple[int, int], sees: bool) -> None:
    named = dict(zip(("batch", "head", "query", "key"), (2, 3, *sizes)))
    assert every_row_sees_a_key(keep, named, lambda values: Values("documents", ())) == sees


def test_nothing_is_spent_where_no_row_can_be_without_a_key() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        n = q.size(-2)
        keep = torch.ones(n, n, dtype=torch.bool).tril() & (documents[:, None, :, None] == documents[:, None, None])
        return (q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v

    graphs: list[Any] = []

    def keep_graph(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    fused, report = rewritten(function, compiler=keep_graph)
    q, k, v = (x.detach() for x in Program("where").inputs("scattered", 0, torch.float64)[:3])
    documents = torch.arange(24).expand(3, 24) // 5
    assert_the_same(fused(q, k, v, documents), function(q, k, v, documents))
    assert [site.spec.fully_masked_rows for site in report().sites] == ["impossible"]
    named = {getattr(node.target, "__name__", str(node.target)) for node in graphs[0].graph.nodes}
    assert "mean" not in named and "any" not in named


# ---------------------------------------------------------------------------------------------------------------
# Gradients of scores to which masks were added, where no product with one matrix gives them


def dropped(weights: Tensor, kept: Tensor | None) -> Tensor:
    """Half of the weights, by chance, or those that were `kept`."""
    return F.dropout(weights, 0.5) if kept is None else weights * kept * 2


def dropping(fill: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, kept: Tensor | None) -> Tensor:
    s = q @ k.mT * 0.3
    s = s + bias + mask if fill == "numbers" else FILLS[fill](s + bias if fill == "added" else s, mask)
    return dropped(s.softmax(-1).to(v.dtype), kept) @ v


def inputs_for_dropping(fill: str, mask: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    q, k, _, keep, bias = Program(fill, bias="learned").inputs(mask, 0, dtype, device)
    if fill == "numbers":
        keep = torch.zeros(keep.shape, dtype=dtype, device=device).masked_fill(~keep, lowest(q))
    unit = torch.eye(24, dtype=dtype, device=device).expand(3, 4, -1, -1).clone().requires_grad_()
    return [q, k, unit, keep, bias]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("fill", ["added", "filled with -1e9", "numbers"])
@pytest.mark.parametrize("mask", MASKS)
def test_dropout_in_rows_without_keys(mask: str, fill: str, compiler: str) -> None:
    """Values that are a unit matrix show which weights were kept; eager code then keeps the same."""
    inputs = inputs_for_dropping(fill, mask, torch.float64)
    fused, report = rewritten(lambda *given: dropping(fill, *given, None), kernel="sdpa", compiler=compiler)
    found = with_gradients(fused, inputs)
    assert report().n_fused == 1
    kept = (found[0] != 0).double()
    assert_the_same(found, with_gradients(lambda *given: dropping(fill, *given, kept), inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", ["added", "filled with -1e9", "numbers"])
@pytest.mark.parametrize("mask", MASKS)
def test_dropout_in_rows_without_keys_on_a_gpu(mask: str, fill: str, dtype: torch.dtype) -> None:
    inputs = inputs_for_dropping(fill, mask, dtype, "cuda")
    fused, report = rewritten(lambda *given: dropping(fill, *given, None), kernel="sdpa", compiler="inductor")
    found = with_gradients(fused, inputs)
    assert report().n_fused == 1
    kept = (found[0] != 0).to(dtype)
    eager = with_gradients(lambda *given: dropping(fill, *given, kept), inputs)
    assert_as_accurate(found, eager, truth(lambda *given: dropping(fill, *given, kept.double()), inputs))


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("second", MASKS)
@pytest.mark.parametrize("first", MASKS)
def test_numbers_that_hide_a_row_unequally(first: str, second: str, kernel: str) -> None:
    """Where both hide a key, the lowest number twice is minus infinity."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, handed_in: Tensor) -> Tensor:
        added = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, lowest(q))
        return (q @ k.mT * 0.3 + handed_in + added).softmax(-1) @ v

    q, k, v, keep, _ = Program("added").inputs(first, 0, torch.float64)
    hidden = ~MASKS[second](24).roll(5, -1)
    handed_in = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, lowest(q))
    inputs = [q, k, v, keep, handed_in]
    fused, report = rewritten(function, kernel=kernel)
    found, expected = with_gradients(fused, inputs), with_gradients(function, inputs)
    assert report().n_fused == 1
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    if not expected[0].isnan().any():  # which no gradient beside it is free of
        assert_the_same(found, expected)


def test_attention_of_pytorch_adds_in_float32() -> None:
    """Of float16's lowest number a row's scores are left there."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        added = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, lowest(q))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    inputs = [x.detach() for x in Program("added").inputs("empty_sequence", 0, torch.float16)[:4]]
    fused, report = rewritten(function)
    torch.testing.assert_close(fused(*inputs), function(*inputs))
    assert "swallow" in str(report().sites[0].reasons)
    inputs = [*(x.bfloat16() for x in inputs[:3]), inputs[3]]
    fused, report = rewritten(function)
    fused(*inputs)
    assert report().n_fused == 1


def test_a_fill_that_overflows_is_doubted_by_nobody() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return torch.where(~keep, -1e9, q @ k.mT * 0.3).softmax(-1) @ v

    inputs = Program("where").inputs("empty_sequence", 0, torch.float16)[:4]
    fused, report = rewritten(function)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = fused(*inputs)
    assert report().n_fused == 1
    assert torch.equal(found.isnan(), function(*inputs).isnan()) and found.isnan().any()


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("fill", ["added", "filled", "filled with infinity"])
def test_no_number_that_becomes_zero(fill: str, kernel: str) -> None:
    """In rows that a bias hides, beside a mask."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.mT * 0.3 + bias
        if fill == "added":
            s = s + torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, lowest(q))
        else:
            s = s.masked_fill(~keep, lowest(q) if fill == "filled" else INF)
        return s.softmax(-1).nan_to_num(0.0) @ v

    q, k, v, keep, _ = (x.detach() for x in Program("added").inputs("left_padding", 0, torch.float64))
    bias = torch.zeros(3, 1, 24, 24, dtype=torch.float64)
    bias[0, :, :9] = INF
    fused, _ = rewritten(function, kernel=kernel, strict=False, verify=False)
    try:
        found = fused(q, k, v, keep, bias)
    except torch._dynamo.exc.BackendCompilerFailed as refused:
        assert "no requested kernel" in str(refused)  # noqa: PT017
    else:
        torch.testing.assert_close(found, function(q, k, v, keep, bias))


def test_exponentials_that_overflow() -> None:
    """A softmax by hand, to whose scores a large number is added."""
    inputs = [torch.randn(2, 3, 6, 4) for _ in range(3)]
    for large in (300.0, torch.full((6,), 300.0)):

        def function(q: Tensor, k: Tensor, v: Tensor, large: Any = large) -> Tensor:
            e = torch.exp(q @ k.mT * 0.5 + (large if isinstance(large, float) else torch.full((6,), 300.0)))
            return e / e.sum(-1, keepdim=True) @ v

        fused, report = rewritten(function)
        assert torch.equal(fused(*inputs).isnan(), function(*inputs).isnan())
        assert report().n_fused == 0
