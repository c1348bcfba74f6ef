"""PyTorch's own attention by name, and the forward pass of one kernel with the backward pass of another, through
stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from attn_rewriter import AttentionSpec, Device
from attn_rewriter.errors import KernelUnavailable
from attn_rewriter.kernels import KERNELS, PAIRS
from attn_rewriter.kernels.aten import CuDNN
from attn_rewriter.kernels.flash import Flash, flash_attention
from attn_rewriter.spec import Band, Mask, Scale, Shapes, Softcap
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, double, joined, rewritten, truth, with_gradients
from tests.standins import installed


@pytest.fixture(autouse=True)
def _packages() -> Iterator[None]:
    with installed():
        yield


CAUSAL = AttentionSpec((Scale(0.125), Mask(None, Band(None, 0), "keep")))
AT = Shapes(2, 8, 2, 256, 256, 64, 64, torch.bfloat16, True)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    keep = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril()
    return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 4, 24, 16), *[(2, 2, 24, 16)] * 2]
    return [torch.randn(n, generator=generator).bfloat16().requires_grad_() for n in sizes]


@pytest.mark.parametrize("kernel", PAIRS)
def test_every_pair(kernel: str) -> None:
    draws = [drawn(seed) for seed in range(DRAWS)]
    function, report = rewritten(causal, kernel=kernel, device="sm_90")
    found = joined(with_gradients(function, inputs) for inputs in draws)
    assert [site.kernel for site in report().sites] == [kernel]
    eager = joined(with_gradients(causal, inputs) for inputs in draws)
    assert_as_accurate(found, eager, joined(truth(causal, inputs) for inputs in draws))


@pytest.mark.parametrize(("forward", "backward"), [("cudnn", "fa4"), ("fa4", "cudnn")])
def test_each_pass_is_its_own_kernels(forward: str, backward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("cudnn", "fa4"):
        for way in ("forward", "backward"):
            call = getattr(Flash.versions[name], way)
            noted = lambda *args, call=call, about=(name, way): asked.append(about) or call(*args)  # noqa: E731
            monkeypatch.setattr(Flash.versions[name], way, staticmethod(noted))
    function, _ = rewritten(causal, kernel=f"{forward}/{backward}", device="sm_90")
    with_gradients(function, drawn(0))
    assert asked == [(forward, "forward"), (backward, "backward")]


@pytest.mark.parametrize("kernel", ["cudnn", "fa4/cudnn"])
def test_gradients_in_every_layout(kernel: str) -> None:
    """The stand-in raises where cuDNN's plan would be for another one."""
    forward, backward = kernel.split("/") if "/" in kernel else (kernel, kernel)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        given = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attention(*given, None, [], [], [], forward, backward, 0.25, 0.0, -1, 0, 0.0, "None", False)[
            0
        ].transpose(1, 2)

    for arranged in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), _packed):
        given = [arranged(x.detach()).requires_grad_() for x in drawn(0)]
        eager, exact = (
            torch.autograd.grad(causal(*inputs).square().sum(), inputs) for inputs in (given, double(given))
        )
        for around in (lambda y: y, lambda y: y.transpose(1, 2).contiguous(), lambda y: y.mT.contiguous()):
            found = torch.autograd.grad(around(attention(*given)).square().sum(), given)
            assert_as_accurate(found, eager, exact)
        torch.autograd.grad(attention(*given).sum(), given)  # strides of 0


def _packed(x: torch.Tensor) -> torch.Tensor:
    """With gaps between positions, as one of three that a product gave."""
    held = x.transpose(1, 2).repeat(1, 1, 3, 1)
    return held[:, :, : x.size(1)].transpose(1, 2)


@pytest.mark.parametrize(
    ("kernel", "spec", "at", "device", "reason"),
    [
        ("cudnn", CAUSAL, AT, "cpu", "not on cpu"),
        ("cudnn", CAUSAL, AT, "sm_75", "needs sm_80 or newer"),
        ("cudnn", CAUSAL, replace(AT, dtype=torch.float32), "sm_90", "not in float32"),
        ("cudnn", CAUSAL, replace(AT, head_dim=256, head_dim_v=256), "sm_90", ""),
        ("cudnn", CAUSAL, replace(AT, head_dim=256, head_dim_v=256), "sm_80", "head_dim is at most 128 on sm_80"),
        ("cudnn", CAUSAL, replace(AT, head_dim=256, head_dim_v=256), "sm_100", "head_dim is at most 128 on sm_100"),
        ("cudnn", AttentionSpec(), replace(AT, kv_len=1), "sm_90", "takes more than one query and key"),
        ("cudnn", CAUSAL, replace(AT, q_len=0, kv_len=0), "sm_90", "takes no empty tensors"),
        ("cudnn", AttentionSpec((Softcap(5.0),)), AT, "sm_90", "computes no softcap"),
        ("cudnn", AttentionSpec((Mask(None, Band(-9, 0), "keep"),)), AT, "sm_90", "takes no window"),
        ("cudnn", AttentionSpec((Mask(None, Band(None, 156), "keep"),)), replace(AT, q_len=100), "sm_90", "as many"),
        ("cudnn", CAUSAL, replace(AT, q_len=100), "sm_90", "aligns its windows"),
        ("cudnn", AttentionSpec(), replace(AT, q_len=100), "sm_90", ""),
        ("cudnn", replace(CAUSAL, dropout_p=0.1), AT, "sm_90", "has no dropout"),
        ("flash", CAUSAL, replace(AT, head_dim=256, head_dim_v=256), "sm_89", "up to head_dim 192 on sm_89"),
        ("flash", CAUSAL, replace(AT, head_dim=256, head_dim_v=256), "sm_80", ""),
        ("cudnn/fa4", CAUSAL, replace(AT, needs_backward=False), "sm_90", "is for training"),
        ("cudnn/fa4", CAUSAL, AT, "sm_80", "has a backward pass from sm_90 on"),
        ("fa4/cudnn", CAUSAL, AT, "sm_80", ""),
        ("fa2/flash", replace(CAUSAL, dropout_p=0.1), AT, "sm_90", "would not drop what the other did"),
    ],
)
def test_reasons(kernel: str, spec: AttentionSpec, at: Shapes, device: str, reason: str) -> None:
    reasons = {**KERNELS, **PAIRS}[kernel].refusals(spec, at, Device.parse(device))
    assert reason in "; ".join(reasons) and bool(reason) == bool(reasons)


def test_what_is_switched_off_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.backends
    monkeypatch.setattr(here.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(here.cudnn, "version", lambda: 91900)
    unavailable = UNAVAILABLE.__func__
    assert unavailable() is None
    monkeypatch.setattr(here.cuda, "cudnn_sdp_enabled", lambda: False)
    assert "enable_cudnn_sdp" in unavailable()
    monkeypatch.setattr(here.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "another layout" in unavailable()
    monkeypatch.setattr(here.cudnn, "version", lambda: 8907)
    assert unavailable() == "needs cuDNN 9.10 or newer, this is 8907"
    monkeypatch.setattr(here.cudnn, "is_available", lambda: False)
    assert unavailable() == "this PyTorch has no cuDNN"


UNAVAILABLE = vars(CuDNN)["unavailable"]


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert KERNELS["cudnn"].refusals(CAUSAL, AT, Device.parse("sm_90")) == [
            "is not deterministic, and torch.use_deterministic_algorithms is on"
        ]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_name_that_is_no_pair() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'sdpa/fa4'"):
        rewritten(causal, kernel="sdpa/fa4")
    function, _ = rewritten(causal, kernel="cudnn/fa4", device="sm_75")
    with pytest.raises(Exception, match="needs sm_80") as caught:
        function(*drawn(0))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), KernelUnavailable)
