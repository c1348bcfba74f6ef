"""What breaks while models run: no fault gives a wrong answer, and none but `strict=True` takes the run down."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attn_rewriter import AttentionSpec, Device, choose
from attn_rewriter.errors import is_out_of_memory
from attn_rewriter.kernels import KERNELS, decode, flash, stepwise
from attn_rewriter.spec import Scale, Shapes, Softcap
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, joined, rewritten, truth, with_gradients
from tests.spellings import Spelling
from tests.standins import PACKAGES, installed, raising
from tests.test_flash import FORMS, NOT_COMPUTED


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    def forget() -> None:
        flash._raised.clear()
        flash._failed.clear()
        torch._dynamo.reset()

    forget()
    yield
    forget()


# -- packages that can't be imported --------------------------------------------------------------------------------


class Panic(BaseException):
    """As Rust's, in Python."""


IMPORTS = {
    "ImportError": "raise ImportError('libcudart.so.12: cannot open shared object file')",
    "OSError": "raise OSError('undefined symbol: _ZN3c10')",
    "RuntimeError": "raise RuntimeError('no GPU found')",
    "AttributeError": "import torch; torch.no_such_function()",
    "SyntaxError": "def (",
    "SystemExit": "import sys; sys.exit('not for this machine')",
    "Panic": "from tests.test_faults import Panic; raise Panic('unwrap on None')",
}


@pytest.mark.parametrize("kind", IMPORTS)
@pytest.mark.parametrize("kernel", ["fa4", "decode"])
def test_a_package_that_raises_on_import_is_a_reason(
    kernel: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another kernel is taken."""
    module = "flash_attn.cute.interface" if kernel == "fa4" else "triton"
    spec = AttentionSpec((Scale(0.125), Softcap(5.0)))
    at = Shapes(2, 4, 4, 2048 if kernel == "fa4" else 1, 2048, 64, 64, torch.bfloat16)
    with installed(flash_attn_3=None):
        for name in [*sys.modules]:
            if name.partition(".")[0] == module.partition(".")[0] or name == "attn_rewriter.kernels.split_keys":
                monkeypatch.delitem(sys.modules, name)
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(IMPORTS[kind])
        monkeypatch.syspath_prepend(str(tmp_path))
        decode._broken.cache_clear()
        choice = choose.choose(spec, at, Device.parse("sm_90"))
    decode._broken.cache_clear()
    assert isinstance(choice, choose.Choice) and choice.kernel.name == "flex"
    assert kernel in KERNELS
    (reason,) = (refused.reason for refused in choice.refused if refused.reason.startswith(f"{kernel}: "))
    assert kind in reason and ("can't be imported" in reason or "can't be used" in reason)


def test_an_interrupt_is_none_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_rewriter.packages import unimportable

    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        unimportable("interrupted")


# -- kernels that raise while the model runs ------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installed, and taken where they can compute something."""
    monkeypatch.setattr(choose, "order", lambda *about: (TAKEN[-1], "sdpa", "reference"))
    with installed():
        yield
    TAKEN[1:] = []


TAKEN = ["fa4"]

ERROR = RuntimeError("no kernel image is available")


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(k.size(-2)) - torch.arange(q.size(-2))[:, None]
    keep = (distance <= 0) & (distance > -5)
    return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def drawn(length: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, length, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


def assert_right(function: Any, inputs: list[Tensor], eager: Any = window) -> None:
    found = with_gradients(function, inputs)
    assert_as_accurate(found, with_gradients(eager, inputs), truth(eager, inputs))


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "attn_rewriter" in str(w.message)]


@pytest.mark.parametrize("at_once", [1, stepwise._SCORES], ids=["row by row", "at once"])
@pytest.mark.parametrize("spelling", FORMS, ids=lambda s: s.computes)
def test_every_form_is_computed_step_by_step(
    spelling: Spelling, at_once: int, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepwise, "_SCORES", at_once)
    draws = [spelling.inputs(torch.bfloat16, seed) for seed in range(DRAWS)]
    try:
        eager = joined(with_gradients(spelling.function, inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, report = rewritten(spelling.function, device="sm_90", strict=False)
    with raising("fa4", "forward", ERROR), raising("fa4", "backward", ERROR), warnings.catch_warnings(record=True) as w:
        fused = joined(with_gradients(function, inputs) for inputs in draws)
    (site,) = report().sites
    computed = not any(word in str(spelling.computes) for word in NOT_COMPUTED)
    assert (site.kernel == "fa4") == computed == (len(ours(w)) == 1), site
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs) for inputs in draws))


@pytest.mark.parametrize(
    ("kernel", "failing", "way"),
    [
        *((name, name, way) for name in PACKAGES for way in ("forward", "backward")),
        ("fa2/fa4", "fa4", "backward"),
        ("cudnn/fa4", "fa4", "backward"),
        ("fa4/flash", "fa4", "forward"),
    ],
)
def test_a_kernel_that_raises_in_the_middle_of_a_run(kernel: str, failing: str, way: str, packages: None) -> None:
    attention = plain if {"cudnn", "flash"} & {*kernel.split("/")} else window
    TAKEN.append(kernel)
    function, report = rewritten(attention, device="sm_90", strict=False, compiler="aot_eager", dynamic=False)
    with raising(failing, way, ERROR, from_call=3) as calls, warnings.catch_warnings(record=True) as caught:
        for length, n in ((20, 1), (16, 2), (16, 3), (16, 3), (20, 4)):
            assert_right(function, drawn(length), attention)
            assert len(calls) == n  # what failed is not tried again, but another kind of call is
        (said,) = ours(caught)  # once
        assert f"{failing} raised in its {way} pass, given torch.bfloat16 of (2, 16, 4, 16)" in said
        assert f"RuntimeError: {ERROR}" in said
    assert {site.kernel for site in report().sites} == {kernel}
    again, report = rewritten(attention, device="sm_90", strict=False, compiler="aot_eager")
    assert_right(again, drawn(), attention)
    (site,) = report().sites
    assert site.kernel == "sdpa"
    assert f"{kernel}: raised in this process: RuntimeError: {ERROR}" in [r.reason for r in site.refusals]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


@pytest.mark.parametrize("options", [{"strict": True}, {"kernel": "fa4"}, {"kernel": ["fa4", "sdpa"]}], ids=str)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_is_asked_for_raises(way: str, options: dict[str, Any], packages: None) -> None:
    """A kernel that is asked for by name never falls back."""
    function, _ = rewritten(window, device="sm_90", **{"strict": False, **options})
    with raising("fa4", way, ERROR), pytest.raises(RuntimeError, match=str(ERROR)):
        with_gradients(function, drawn())
    assert not flash._raised


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_passes(way: str, error: BaseException, packages: None) -> None:
    """No other way needs less memory, and the kernel is not to blame: the next call takes it again."""
    function, _ = rewritten(window, device="sm_90", strict=False)
    with raising("fa4", way, error, to_call=1) as calls:
        with pytest.raises(type(error)):
            with_gradients(function, drawn())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*attn_rewriter.*")
            assert_right(function, drawn())
        assert len(calls) == 2


def test_dropout_passes(packages: None) -> None:
    """What was dropped is known to the package alone: a checkpoint may compute it again by another, and be wrong."""
    TAKEN.append("fa2")
    function, report = rewritten(
        lambda q, k, v: F.dropout((q @ k.mT * 0.25).softmax(-1), 0.5) @ v, device="sm_90", strict=False
    )
    with raising("fa2", "forward", ERROR), pytest.raises(RuntimeError, match=str(ERROR)):
        function(*drawn())
    assert report().sites[0].kernel == "fa2"


def test_what_the_steps_raise_too_passes(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all does when it is CUDA that is out of order: no kernel is blamed for it."""

    def out_of_order(*args: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(stepwise.Stepwise, "forward", out_of_order)
    function, _ = rewritten(window, device="sm_90", strict=False)
    with raising("fa4", "forward", ERROR), pytest.raises(RuntimeError, match="illegal") as caught:
        function(*drawn())
    assert caught.value.__context__ is ERROR and not flash._raised


AROUND = {
    "checkpoint": (lambda q, k, v: checkpoint(window, q, k, v, use_reentrant=False), nullcontext),
    "autocast": (window, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize("around", AROUND)
def test_around_it(around: str, packages: None) -> None:
    attention, context = AROUND[around]
    function, report = rewritten(attention, device="sm_90", strict=False)
    with raising("fa4", "forward", ERROR, from_call=2), raising("fa4", "backward", ERROR), context():
        with pytest.warns(UserWarning, match="fa4 raised in its"):
            assert_right(function, drawn())
        assert_right(function, drawn(seed=1))
    assert report().sites[0].kernel == "fa4"


def test_under_inductor(packages: None) -> None:
    function, report = rewritten(window, device="sm_90", strict=False, compiler="inductor", dynamic=False)
    with raising("fa4", "forward", ERROR, from_call=2), raising("fa4", "backward", ERROR, from_call=3):
        assert_right(function, drawn())
        with pytest.warns(UserWarning, match="fa4 raised in its forward pass"):
            assert_right(function, drawn())
        assert_right(function, drawn())
    assert report().sites[0].kernel == "fa4"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(ERROR)
