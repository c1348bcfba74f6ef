"""Which kernel is taken for what, where: on imagined devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sympy import Symbol

from attn_rewriter import AttentionSpec, Device
from attn_rewriter.choose import Choice, choose
from attn_rewriter.spec import Band, Bias, Mask, Scale, Shapes, Softcap, TensorMask

SCALE = Scale(0.125)
CAUSAL = AttentionSpec((SCALE, Mask(None, Band(None, 0), "keep")))
PADDED = AttentionSpec((SCALE, Mask("mask0", TensorMask("mask0", ("batch", "key")), "keep")))
CAPPED = AttentionSpec((SCALE, Softcap(50.0)))
BIASED = AttentionSpec((SCALE, Bias("bias0")))
LONG = Shapes(4, 16, 16, 4096, 4096, 64, 64, torch.bfloat16)
TRAINING, DECODE = replace(LONG, needs_backward=True), replace(LONG, q_len=1)
GROWING = replace(DECODE, batch=Symbol("s0", positive=True), kv_len=Symbol("s1", positive=True))
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
        *((f"sm_{n}", CAPPED, TRAINING, "flex") for n in (80, 86, 89, 90, 100, 103, 120)),
    ],
)
def test_kernel(device: str, spec: AttentionSpec, shapes: Shapes, kernel: str) -> None:
    choice = choose(spec, shapes, Device.parse(device))
    found = choice.kernel.name if isinstance(choice, Choice) else choice.reason
    assert found == kernel if isinstance(choice, Choice) else kernel in found


def test_flex_is_a_kernel_under_inductor_alone() -> None:
    choice = choose(CAPPED, LONG, Device.parse("sm_90"), inductor=False)
    assert "only Inductor" in str(choice)
    assert isinstance(choose(CAPPED, LONG, Device.parse("sm_90"), "flex", inductor=False), Choice)
