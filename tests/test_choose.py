"""Which kernel is taken for what, where: on imagined devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sympy import Symbol

from attn_rewriter import AttentionSpec, Device, measured
from attn_rewriter.choose import ALIKE, Choice, choose
from attn_rewriter.spec import Band, Bias, Mask, Scale, Shapes, Softcap, TensorMask
from tests.standins import installed

SCALE = Scale(0.125)
CAUSAL = AttentionSpec((SCALE, Mask(None, Band(None, 0), "keep")))
PADDED = AttentionSpec((SCALE, Mask("mask0", TensorMask("mask0", ("batch", "key")), "keep")))
CAPPED = AttentionSpec((SCALE, Softcap(50.0)))
BIASED = AttentionSpec((SCALE, Bias("bias0")))
ADDITIVE = AttentionSpec((SCALE, Bias("bias0", axes=("batch", "key"))))
TWO_ADDITIVE = replace(
    ADDITIVE, modifiers=(*ADDITIVE.modifiers, Bias("bias1", axes=("query", "key")), *CAUSAL.modifiers[1:])
)
ALIBI = AttentionSpec((SCALE, Bias("bias0", axes=("head", "key")), *CAUSAL.modifiers[1:]))
LONG = Shapes(4, 16, 16, 4096, 4096, 64, 64, torch.bfloat16)
TRAINING, DECODE = replace(LONG, needs_backward=True), replace(LONG, q_len=1)
GROWING = replace(DECODE, batch=Symbol("s0", positive=True), kv_len=Symbol("s1", positive=True))
FEW_KEYS = replace(LONG, kv_len=300)
LARGE = replace(LONG, head_dim=512, head_dim_v=512)
SHORT, WIDE = replace(LONG, q_len=512, kv_len=512), replace(LONG, dtype=torch.float32)


@pytest.mark.parametrize(
    ("device", "spec", "shapes", "kernel"),
    [
        ("sm_90", CAUSAL, LONG, "sdpa"),
        ("sm_90", PADDED, LONG, "flex"),
        ("sm_90", PADDED, TRAINING, "flex"),
        ("sm_90", PADDED, SHORT, "sdpa"),
        ("sm_90", PADDED, DECODE, "decode"),
        ("sm_90", BIASED, DECODE, "decode"),
        ("sm_90", PADDED, GROWING, "decode"),
        ("sm_90", AttentionSpec((SCALE,)), DECODE, "sdpa"),
        ("sm_90", BIASED, replace(DECODE, q_len=49, kv_len=49), "sdpa"),
        ("sm_90", PADDED, replace(DECODE, needs_backward=True), "sdpa"),
        ("sm_75", PADDED, DECODE, "sdpa"),
        ("gfx942", PADDED, DECODE, "sdpa"),
        ("sm_90", PADDED, FEW_KEYS, "sdpa"),
        ("sm_90", ADDITIVE, FEW_KEYS, "sdpa"),
        ("sm_90", TWO_ADDITIVE, FEW_KEYS, "sdpa"),
        ("sm_90", ADDITIVE, LONG, "flex"),
        ("sm_90", ALIBI, FEW_KEYS, "flex"),
        ("sm_90", BIASED, SHORT, "flex"),
        ("sm_90", BIASED, WIDE, "sdpa"),
        ("sm_90", CAPPED, WIDE, "flex"),
        ("sm_100", CAPPED, TRAINING, "flex"),
        ("sm_80", CAPPED, DECODE, "decode"),
        ("sm_75", PADDED, LONG, "sdpa"),
        ("sm_75", CAPPED, LONG, "flex: needs sm_80"),
        ("sm_90", replace(CAPPED, dropout_p=0.1), TRAINING, "flex: has no dropout"),
        ("sm_90", replace(PADDED, dropout_p=0.1), TRAINING, "sdpa"),
        ("sm_90", replace(PADDED, sinks="sinks0"), LONG, "flex"),
        ("cpu", PADDED, LONG, "sdpa"),
        ("cpu", replace(PADDED, sinks="sinks0"), TRAINING, "sdpa"),
        ("cpu", CAPPED, LONG, "flex"),
        ("cpu", CAPPED, TRAINING, "flex: has no backward pass on CPU"),
        ("mps", PADDED, LONG, "sdpa"),
        ("mps", CAPPED, LONG, "flex: runs on cpu, cuda, rocm, xpu, not on mps"),
        ("npu", CAUSAL, TRAINING, "sdpa"),
        ("xpu", PADDED, TRAINING, "sdpa"),
        ("xpu", CAPPED, TRAINING, "flex"),
        ("gfx90a", CAUSAL, LONG, "sdpa"),
        ("gfx942", PADDED, TRAINING, "sdpa"),
        ("gfx942", CAPPED, TRAINING, "flex"),
        ("gfx1100", CAPPED, LONG, "flex: runs on gfx90a, gfx942, gfx950 of AMD's, this is gfx1100"),
        ("sm_70", CAUSAL, LONG, "sdpa"),
        *((f"sm_{n}", CAUSAL, LONG, "sdpa") for n in (75, 80, 86, 89, 100, 103, 120)),
        ("sm_80", CAUSAL, LARGE, "chunked"),
        ("sm_90", CAUSAL, replace(LARGE, needs_backward=True), "chunked"),
        ("sm_90", PADDED, LARGE, "sdpa"),
        ("sm_75", CAUSAL, LARGE, "sdpa"),
        ("sm_90", CAUSAL, replace(LARGE, dtype=torch.float32), "sdpa"),
        ("sm_90", CAUSAL, replace(LARGE, q_len=1), "sdpa"),
        ("sm_90", replace(CAUSAL, dropout_p=0.1), LARGE, "sdpa"),
        ("sm_90", CAPPED, replace(LARGE, dtype=torch.float32), "flex: head_dim is at most 256 on CUDA, here 512"),
        ("cpu", CAUSAL, LARGE, "sdpa"),
        *((f"sm_{n}", CAPPED, TRAINING, "flex") for n in (80, 86, 89, 90, 100, 103, 120)),
    ],
)
def test_kernel(device: str, spec: AttentionSpec, shapes: Shapes, kernel: str) -> None:
    choice = choose(spec, shapes, Device.parse(device))
    found = choice.kernel.name if isinstance(choice, Choice) else choice.reason
    assert found == kernel if isinstance(choice, Choice) else kernel in found


def dropping(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, dropout_p=0.1)


@pytest.mark.parametrize(
    ("device", "spec", "shapes", "kernel"),
    [
        ("sm_80", PADDED, LONG, "fa2"),
        ("sm_80", PADDED, TRAINING, "fa2"),
        ("sm_80", PADDED, SHORT, "sdpa"),
        ("sm_90", PADDED, LONG, "fa4"),
        ("sm_100", PADDED, LONG, "flex"),
        ("sm_90", dropping(PADDED), TRAINING, "fa2"),
        ("sm_90", dropping(PADDED), replace(SHORT, needs_backward=True), "fa2"),
        ("sm_90", dropping(replace(PADDED, modifiers=(*PADDED.modifiers, *CAUSAL.modifiers[1:]))), TRAINING, "sdpa"),
        ("sm_90", dropping(PADDED), WIDE, "sdpa"),
        ("sm_90", ALIBI, LONG, "fa4"),
        ("sm_90", ALIBI, TRAINING, "fa4"),
        ("sm_90", ALIBI, replace(TRAINING, num_kv_heads=4), "flex"),
        ("sm_90", replace(ALIBI, modifiers=(*ALIBI.modifiers, *PADDED.modifiers[1:])), LONG, "flex"),
        ("sm_90", BIASED, LONG, "flex"),
        ("sm_90", ADDITIVE, LONG, "flex"),
        ("sm_90", replace(ADDITIVE, modifiers=(SCALE, Bias("bias0", axes=("key",)))), LONG, "flex"),
        ("sm_80", ALIBI, LONG, "flex"),
        ("sm_80", CAPPED, LONG, "flex"),
    ],
)
def test_kernel_with_packages(device: str, spec: AttentionSpec, shapes: Shapes, kernel: str) -> None:
    with installed():
        choice = choose(spec, shapes, Device.parse(device))
    assert isinstance(choice, Choice) and choice.kernel.name == kernel


def test_flex_is_a_kernel_under_inductor_alone() -> None:
    choice = choose(CAPPED, LONG, Device.parse("sm_90"), inductor=False)
    assert "only Inductor" in str(choice)
    assert isinstance(choose(CAPPED, LONG, Device.parse("sm_90"), "flex", inductor=False), Choice)


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    times: dict[str, tuple[float, float]],
    shapes: Shapes,
    spec: AttentionSpec = CAUSAL,
    **versions: None,
) -> Choice:
    """The choice on a card where kernels take these milliseconds forward and backward."""
    forward, backward = ({name: passes[i] for name, passes in times.items()} for i in range(2))
    sizes = {"head_dim": 64, "length": 4096, "products": 4 * 16 * 4096**2 * 64}
    cell = {**sizes, "causal": True, "groups": 1, "forward": forward, "backward": backward}
    monkeypatch.setattr(measured, "table", lambda capability: (cell,))
    with installed(**versions):
        choice = choose(spec, shapes, Device.parse("sm_90"))
    assert isinstance(choice, Choice)
    return choice


CROSSED = {"sdpa": (1.0, 3.0), "cudnn": (1.0, 3.0), "fa4": (1.2, 2.0), "fa2": (2.0, 2.5)}


@pytest.mark.parametrize(
    ("times", "shapes", "kernel"),
    [
        (CROSSED, TRAINING, "cudnn/fa4"),
        (CROSSED, LONG, "sdpa"),
        ({**CROSSED, "fa4": (0.9, 3.5)}, TRAINING, "fa4/fa2"),
        ({**CROSSED, "fa4": (0.9, 2.0)}, TRAINING, "fa4"),
        ({**CROSSED, "flex": (0.5, 1.0)}, TRAINING, "flex"),
        ({"sdpa": (1.0, 3.0), "cudnn": (1 / ALIKE, 3.0)}, TRAINING, "sdpa"),
        ({"sdpa": (1.0, 3.0), "cudnn": (0.9, 3.0)}, TRAINING, "cudnn"),
        ({"sdpa": (1.0, 3.0), "cudnn": (0.9, 3.0)}, replace(TRAINING, q_len=100), "sdpa"),
        ({"cudnn": (1.0, 3.0), "fa4": (1.0, 2.0)}, replace(TRAINING, dtype=torch.float32), "sdpa"),
        # The less there is to compute, the less there is to gain; of how much only the run knows, as much as measured.
        (CROSSED, replace(TRAINING, batch=4, q_len=512, kv_len=512), "cudnn/fa4"),
        (CROSSED, replace(TRAINING, batch=1, q_len=256, kv_len=256), "sdpa"),
        (CROSSED, replace(TRAINING, batch=Symbol("s0", positive=True), q_len=256, kv_len=256), "cudnn/fa4"),
    ],
)
def test_each_pass_goes_to_what_was_measured(
    times: dict[str, tuple[float, float]], shapes: Shapes, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(monkeypatch, times, shapes).kernel.name == kernel


def test_what_lies_between_two_sizes_is_the_mean_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 keys are as far from 2048 as from 8192; each cell counts by as many products as there are here."""
    sizes = {"head_dim": 64, "causal": True, "groups": 1, "backward": {}}
    times = {2048: {"sdpa": 1.0, "fa4": 2.0}, 8192: {"sdpa": 6.0, "fa4": 1.0, "cudnn": 1.0}}
    cells = tuple(
        {**sizes, "length": length, "products": 4 * 16 * 4096 * length * 64, "forward": found}
        for length, found in times.items()
    )
    monkeypatch.setattr(measured, "table", lambda capability: cells)
    assert measured.passes(LONG, True, Device.parse("sm_90")) == {"sdpa": (2.5,), "fa4": (2.25,)}


def test_a_pair_needs_both(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chosen(monkeypatch, {**CROSSED, "fa4": (0.8, 2.0)}, TRAINING, flash_attn_4=None, flash_attn=None)
    assert choice.kernel.name == "sdpa"
    assert [refusal.reason for refusal in choice.refused] == ["fa4: flash-attn-4 is not installed"]


def test_no_pass_is_mixed_where_weights_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, CROSSED, TRAINING, replace(CAUSAL, dropout_p=0.1)).kernel.name == "sdpa"
