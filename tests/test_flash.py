"""The flash-attention packages, through stand-ins: what each is asked to compute, and why one is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from attn_rewriter import AttentionSpec, Device, measured
from attn_rewriter.choose import Choice, choose
from attn_rewriter.kernels import KERNELS
from attn_rewriter.kernels.flash import Flash, flash_form
from attn_rewriter.spec import Band, Mask, Scale, Shapes, Softcap
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, joined, rewritten, truth, with_gradients
from tests.spellings import SPELLINGS, Spelling
from tests.standins import installed


@pytest.fixture(autouse=True)
def _packages() -> Iterator[None]:
    with installed():
        yield


def band(lower: int | None, upper: int | None) -> AttentionSpec:
    return AttentionSpec((Scale(0.125), Mask(None, Band(lower, upper), "keep")))


def shapes(q_len: int = 256, kv_len: int = 256, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Shapes:
    return Shapes(2, 8, 2, q_len, kv_len, head_dim, head_dim, dtype, True)


VERSIONS = sorted(Flash.versions)

# One spelling of each form: that all spellings are read as it, `test_spellings.py` shows.
FORMS = [*{s.computes: s for s in SPELLINGS if not s.random and s.computes and s.n_sites == 1}.values()]


@pytest.mark.parametrize("spelling", FORMS, ids=lambda s: s.computes)
def test_result_and_gradients(spelling: Spelling) -> None:
    """In a graph, where one operator serves all versions; each by itself is for `test_kernels.py`."""
    kernel = "fa4"
    draws = [spelling.inputs(torch.bfloat16, seed) for seed in range(DRAWS)]
    try:
        eager = joined(with_gradients(spelling.function, inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, report = rewritten(spelling.function, kernel=[kernel, "reference"], device="sm_90")
    fused = joined(with_gradients(function, inputs) for inputs in draws)
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs) for inputs in draws))
    for site in report().sites:  # what it refuses, it refuses for a reason
        assert site.kernel == kernel or any(refusal.reason.startswith(f"{kernel}: ") for refusal in site.refusals)


@pytest.mark.parametrize("kernel", VERSIONS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(256, 256), (64, 256), (1, 256)])
@pytest.mark.parametrize("window", [None, 16])
def test_every_version_is_taken_for_windows(kernel: str, q_len: int, kv_len: int, window: int | None) -> None:
    """Causal from the last query and key on, as decoding with a cache has it."""
    last = kv_len - q_len
    spec = band(None if window is None else last - window, last)
    assert not KERNELS[kernel].refusals(spec, shapes(q_len, kv_len), Device.parse("sm_90"))


@pytest.mark.parametrize(
    ("spec", "at", "device", "reason"),
    [
        (band(None, 0), shapes(64, 256), "sm_90", "aligns its windows with the last query and key"),
        (band(3, None), shapes(), "sm_90", "aligns its windows"),
        (band(None, 0), shapes(head_dim=512), "sm_90", "head_dim is at most 256"),
        (band(None, 0), shapes(head_dim=36), "sm_90", "a multiple of 8"),
        (band(None, 0), shapes(dtype=torch.float32), "sm_90", "bfloat16, float16, not in float32"),
        (band(None, 0), shapes(), "sm_75", "or newer, this is sm_75"),
        (band(None, 0), shapes(), "cpu", "not on cpu"),
        (AttentionSpec((Softcap(5.0), Scale(2.0))), shapes(), "sm_90", "after a softcap"),
        (AttentionSpec(sinks="sinks0"), shapes(), "sm_90", "computes no sinks"),
    ],
)
@pytest.mark.parametrize("kernel", VERSIONS)
def test_reasons(kernel: str, spec: AttentionSpec, at: Shapes, device: str, reason: str) -> None:
    assert reason in "; ".join(KERNELS[kernel].refusals(spec, at, Device.parse(device)))


@pytest.mark.parametrize(
    ("kernel", "device", "head_dim", "reason"),
    [
        ("fa3", "sm_100", 64, "is for sm_90"),
        ("fa3", "sm_80", 64, "needs sm_90"),
        ("fa4", "sm_80", 64, "has a backward pass from sm_90 on"),
        ("fa4", "sm_100", 192, "head_dim is at most 128 on sm_100"),
        ("fa4", "sm_100", 256, ""),
        ("fa4", "sm_90", 192, ""),
        ("fa2", "gfx942", 128, ""),
        ("fa2", "gfx1100", 128, "runs on gfx90a, gfx942, gfx950"),
        ("fa4", "gfx942", 128, "runs on cuda, not on rocm"),
        ("fa3", "gfx942", 128, "runs on cuda, not on rocm"),
    ],
)
def test_generations(kernel: str, device: str, head_dim: int, reason: str) -> None:
    reasons = KERNELS[kernel].refusals(band(None, 0), shapes(head_dim=head_dim), Device.parse(device))
    assert reason in "; ".join(reasons) and bool(reason) == bool(reasons)


@pytest.mark.parametrize(
    ("distribution", "version", "reason"),
    [
        ("flash_attn", None, "flash-attn is not installed"),
        ("flash_attn", "2.0.4", "needs flash-attn 2.7 or newer, this is 2.0.4"),
    ],
)
def test_packages_that_do_not_do(distribution: str, version: str | None, reason: str) -> None:
    with installed(**{distribution: version}):
        assert KERNELS["fa2"].refusals(band(None, 0), shapes(), Device.parse("sm_90")) == [reason]


def test_a_broken_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn.flash_attn_interface", None)
    (reason,) = KERNELS["fa2"].refusals(band(None, 0), shapes(), Device.parse("sm_90"))
    assert reason.startswith("flash-attn 2.8.3.post2 can't be imported: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("absent", "kernel"),
    [([], "fa4"), (["flash_attn_4"], "fa3"), (["flash_attn_4", "flash_attn_3"], "fa2")],
)
def test_without_inductor_a_window_goes_to_the_newest_version(absent: list[str], kernel: str) -> None:
    with installed(**dict.fromkeys(absent)):
        choice = choose(band(-100, 0), shapes(1024, 1024), Device.parse("sm_90"), inductor=False)
        assert isinstance(choice, Choice) and choice.kernel.name == kernel


@pytest.mark.parametrize(
    ("device", "length", "head_dim", "training", "kernel"),
    [
        ("sm_90", 8192, 128, False, "fa4"),
        ("sm_90", 100_000, 96, True, "fa4"),
        ("sm_90", 512, 128, False, "sdpa"),
        ("sm_90", 8192, 256, False, "fa4"),
        ("sm_90", 8192, 256, True, "sdpa"),
        ("sm_100", 8192, 128, False, "sdpa"),
        ("sm_75", 8192, 128, False, "sdpa"),
    ],
)
def test_causal_goes_to_what_was_measured(device: str, length: int, head_dim: int, training: bool, kernel: str) -> None:
    at = replace(shapes(length, length, head_dim), needs_backward=training)
    choice = choose(band(None, 0), at, Device.parse(device))
    assert isinstance(choice, Choice) and choice.kernel.name == kernel


def test_tables_name_kernels_and_where_they_are_from() -> None:
    paths = [*measured.FOLDER.glob("*.json")]
    assert paths
    for path in paths:
        held = json.loads(path.read_text())
        assert held["setup"]["device"] and held["commands"]
        for cell in held["cells"]:
            assert {*cell["forward"], *cell["backward"]} <= KERNELS.keys()


def test_dropout_is_for_version_2() -> None:
    spec = AttentionSpec((Scale(0.125), Softcap(30.0)), dropout_p=0.1)
    choice = choose(spec, shapes(), Device.parse("sm_90"))
    assert isinstance(choice, Choice) and choice.kernel.name == "fa2"
    assert [refusal.reason for refusal in choice.refused] == [
        f"{name}: has no dropout" for name in ("flex", "fa4", "fa3")
    ]


def test_form_of_a_negative_side() -> None:
    """A window that ends before its query has no counterpart: -1 means no bound there."""
    assert isinstance(flash_form(band(None, -1), shapes()), str)
    assert isinstance(flash_form(band(1, 5), shapes()), str)
