"""`torch.use_deterministic_algorithms`: only kernels run that give the same twice, in this pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_rewriter import AttentionSpec, Backend, Device, Options, autotune
from attn_rewriter.choose import Choice, choose
from attn_rewriter.kernels import KERNELS, PAIRS, Kernel
from attn_rewriter.kernels.sdpa import SDPA
from attn_rewriter.spec import Band, Bias, Mask, Scale, ScaleBy, Shapes, Softcap, TensorMask
from tests.accuracy import assert_the_same
from tests.running import run_as_is, with_gradients
from tests.standins import installed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
STRICT, WARNS = "error", "warn"

SCALE = Scale(0.125)
CAUSAL = AttentionSpec((SCALE, Mask(None, Band(None, 0), "keep")))
PADDED = AttentionSpec((SCALE, Mask("mask0", TensorMask("mask0", ("batch", "key")), "keep")))
CAPPED = AttentionSpec((SCALE, Softcap(50.0)))
BIASED = AttentionSpec((SCALE, Bias("bias0")))
SCALED = AttentionSpec((ScaleBy("scale0", ("head",)), Softcap(50.0)))
LONG = Shapes(4, 16, 16, 4096, 4096, 64, 64, torch.bfloat16)
TRAINING = replace(LONG, needs_backward=True)
LEARNED = replace(TRAINING, learned=("bias0",))


@pytest.fixture
def mode() -> Iterator[Callable[[str], None]]:
    """Sets it, and in the end puts it back."""
    yield torch.set_deterministic_debug_mode
    torch.set_deterministic_debug_mode("default")


def test_each_kernel_says_it() -> None:
    """One that does not is refused."""
    assert all(type(kernel).varies is not Kernel.varies for kernel in (*KERNELS.values(), *PAIRS.values()))
    assert Kernel().varies(CAUSAL, LONG, Device("cpu"))


VARIES = "varies"


@pytest.mark.parametrize(
    ("kernel", "spec", "shapes", "device", "strict", "warns"),
    [
        ("sdpa", CAUSAL, LONG, "sm_90", True, True),
        ("sdpa", CAUSAL, TRAINING, "sm_90", True, False),
        ("sdpa", BIASED, LEARNED, "sm_80", True, False),
        ("sdpa", CAUSAL, TRAINING, "cpu", True, True),
        ("sdpa", CAUSAL, LONG, "gfx942", True, True),
        ("sdpa", CAUSAL, TRAINING, "gfx942", False, False),
        ("sdpa", CAUSAL, TRAINING, "mps", False, False),
        ("flash", CAUSAL, LONG, "sm_90", True, True),
        ("flash", CAUSAL, TRAINING, "sm_90", True, False),
        ("cudnn", CAUSAL, LONG, "sm_90", False, False),
        ("cudnn", CAUSAL, TRAINING, "sm_90", False, False),
        ("flex", PADDED, TRAINING, "sm_90", True, True),
        ("flex", CAPPED, TRAINING, "sm_90", True, True),
        ("flex", BIASED, LONG, "sm_90", True, True),
        ("flex", BIASED, TRAINING, "sm_90", True, True),
        ("flex", BIASED, LEARNED, "sm_90", False, False),
        ("flex", BIASED, replace(LEARNED, learned=("bias1",)), "sm_90", True, True),
        ("flex", CAPPED, TRAINING, "gfx942", False, False),
        ("flex", CAPPED, LONG, "cpu", True, True),
        ("fa2", CAUSAL, TRAINING, "sm_90", True, True),
        ("fa2", PADDED, TRAINING, "sm_90", True, True),
        ("fa2", CAUSAL, TRAINING, "gfx942", False, False),
        ("fa2", CAUSAL, LONG, "gfx942", True, True),
        ("fa3", CAUSAL, LONG, "sm_90", True, True),
        ("fa3", CAUSAL, TRAINING, "sm_90", False, False),
        ("fa4", CAUSAL, TRAINING, "sm_90", True, True),
        ("fa4", CAUSAL, TRAINING, "sm_100", True, True),
        ("fa4", CAUSAL, TRAINING, "sm_120", False, False),
        ("fa4", PADDED, TRAINING, "sm_90", False, False),
        ("fa4", PADDED, LONG, "sm_90", True, True),
        ("decode", PADDED, replace(LONG, q_len=1), "sm_90", True, True),
        ("chunked", CAUSAL, TRAINING, "sm_90", True, True),
        ("reference", SCALED, TRAINING, "sm_90", True, True),
        ("fa2/fa4", CAUSAL, TRAINING, "sm_90", True, True),
        ("fa4/fa2", CAUSAL, TRAINING, "sm_90", True, True),
        ("fa2/flash", CAUSAL, TRAINING, "sm_90", True, False),
        ("flash/fa2", CAUSAL, TRAINING, "sm_90", True, True),
        ("fa3/fa2", CAUSAL, TRAINING, "sm_90", True, True),
        ("fa2/fa3", CAUSAL, TRAINING, "sm_90", False, False),
        ("cudnn/fa2", CAUSAL, TRAINING, "sm_90", False, False),
    ],
)
def test_declared(
    kernel: str,
    spec: AttentionSpec,
    shapes: Shapes,
    device: str,
    strict: bool,
    warns: bool,
    mode: Callable[[str], None],
) -> None:
    """What each kernel says while deterministic algorithms are enforced, and while PyTorch only warns."""
    found = {**KERNELS, **PAIRS}[kernel]
    for name, expected in ((STRICT, strict), (WARNS, warns)):
        mode(name)
        assert (not found.varies(spec, shapes, Device.parse(device))) == expected
        refused = [r for r in found.refusals(spec, shapes, Device.parse(device)) if "use_deterministic" in r]
        assert bool(refused) != expected
    mode("default")
    assert not any("determinis" in r for r in found.refusals(spec, shapes, Device.parse(device)))


@pytest.mark.parametrize(
    ("spec", "shapes", "device", "plain", "strict", "warns"),
    [
        (BIASED, LEARNED, "sm_90", "flex", "sdpa", None),
        (BIASED, TRAINING, "sm_90", "flex", "flex", "flex"),
        (BIASED, LONG, "sm_90", "flex", "flex", "flex"),
        (replace(BIASED, modifiers=(*BIASED.modifiers, Softcap(5.0))), LEARNED, "sm_90", "flex", None, None),
        (CAUSAL, TRAINING, "cpu", "sdpa", "sdpa", "sdpa"),
        (PADDED, TRAINING, "sm_90", "fa4", "fa2", "fa2"),
    ],
)
def test_chosen(
    spec: AttentionSpec,
    shapes: Shapes,
    device: str,
    plain: str | None,
    strict: str | None,
    warns: str | None,
    mode: Callable[[str], None],
) -> None:
    """Where none is left, the model's own operations stay."""
    for name, expected in (("default", plain), (STRICT, strict), (WARNS, warns)):
        mode(name)
        with installed():
            found = choose(spec, shapes, Device.parse(device))
        assert (found.kernel.name if isinstance(found, Choice) else None) == expected, name


# -- after compiling ------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.ones(6, 6, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.35).masked_fill(~self.causal, float("-inf")).softmax(-1) @ v


def given(grad: bool) -> list[Tensor]:
    return [torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiler", [run_as_is, "aot_eager"])
def test_the_flag_changes(
    compiler: Any, grad: bool, mode: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen by what was compiled before, and by a graph that was compiled again as its buffer changed."""
    monkeypatch.setattr(SDPA, "varies", lambda *args: "varies for this test" if grad else "")
    model, backend, inputs = Causal(), Backend(Options(compiler=compiler)), given(grad)
    compiled = torch.compile(model, backend=backend)
    n = 0
    for again in (False, True):
        if again:
            model.causal[:, 0] = False
            model.causal[0] = True
            model.causal[3] = True
        for name in ("default", STRICT, WARNS, "default", STRICT):
            mode(name)
            assert_the_same(with_gradients(compiled, inputs), with_gradients(model, inputs))
            new, n = backend.report.sites[n:], len(backend.report.sites)
            for site in new:
                assert (site.kernel is None) == (grad and name != "default"), (name, site)
    assert any(site.kernel for site in backend.report.sites)
    assert any("varies for this test" in reason for site in backend.report.sites for reason in site.reasons) == grad


def test_times_are_not_mixed(mode: Callable[[str], None]) -> None:
    """What was timed with the flag is not taken without it."""

    class Found:
        spec, shapes = CAUSAL, LONG

    keys = []
    for name in ("default", STRICT, WARNS):
        mode(name)
        keys.append(str(autotune._about(Found, Device("cpu"), ["sdpa"])))  # type: ignore[arg-type]
    assert len({*keys}) == 3


_ON_A_GPU = """
import torch
from attn_rewriter import Backend, Options

torch.set_deterministic_debug_mode("{mode}")
draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
inputs = [*(draw(4, 8, 1024, 64) for _ in range(3)), draw(8, {rows}, 1024)]
function = lambda q, k, v, b: (q @ k.mT * 0.125 + b).softmax(-1) @ v
compiled = torch.compile(function, backend=Backend(Options()))
found = [torch.autograd.grad(compiled(*inputs).float().square().sum(), inputs) for _ in range(8)]
assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0]))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 1024])
@pytest.mark.parametrize("mode", [STRICT, WARNS])
def test_the_same_twice(mode: str, rows: int) -> None:
    """The gradient of a learned bias. (cuBLAS asks for its setting before CUDA is in use.)"""
    script = _ON_A_GPU.replace("{mode}", mode).replace("{rows}", str(rows))
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not ran.returncode, ran.stderr
