"""Every kernel computes whatever it does not refuse: forms and shapes crossed with each kernel's own declaration.

Packages that are not there are replaced by stand-ins on CPU, FlexAttention is computed densely, and Triton interpreted;
on a GPU the kernels themselves run.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_rewriter import AttentionSpec, Device
from attn_rewriter.kernels import KERNELS, named
from attn_rewriter.spec import Band, Bias, Clamp, Mask, Scale, ScaleBy, Shapes, Softcap, TensorMask
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, double, joined, together, with_gradients
from tests.standins import installed

Q_LEN, KV_LEN = 19, 33

SCALE, CAUSAL = Scale(0.3), Mask(None, Band(None, KV_LEN - Q_LEN), "keep")
PADDING = Mask("mask0", TensorMask("mask0", ("batch", "key")), "keep")
HIDDEN = Mask("mask1", ~TensorMask("mask1", ("batch", "head", "query", "key")), "drop")

FORMS = {
    "plain": AttentionSpec((SCALE,)),
    "unscaled": AttentionSpec(),
    "negative scale": AttentionSpec((Scale(-0.3),)),
    "causal": AttentionSpec((SCALE, Mask(None, Band(None, 0), "keep"))),
    "causal, last query on last key": AttentionSpec((SCALE, CAUSAL)),
    # Every query sees a key, also where there are as many queries.
    "window": AttentionSpec((SCALE, Mask(None, Band(-3, KV_LEN - Q_LEN), "keep"))),
    "both sides": AttentionSpec((SCALE, Mask(None, Band(-3, KV_LEN - Q_LEN + 3), "keep"))),
    "from the query on": AttentionSpec((SCALE, Mask(None, Band(-1, None), "keep"))),
    "padding": AttentionSpec((SCALE, PADDING)),
    "mask tensor, causal": AttentionSpec((SCALE, HIDDEN, CAUSAL)),
    "bias": AttentionSpec((SCALE, Bias("bias0"))),
    "bias, causal": AttentionSpec((SCALE, Bias("bias0", 0.5), CAUSAL)),
    "bias, scale, mask tensor": AttentionSpec((Bias("bias0"), SCALE, HIDDEN)),
    "temperature, causal": AttentionSpec((ScaleBy("factor0", inverse=True), SCALE, CAUSAL)),
    "softcap, causal": AttentionSpec((SCALE, Softcap(1.5), CAUSAL)),
    "temperature, softcap": AttentionSpec((ScaleBy("factor0"), Softcap(1.5))),
    "softcap, scale": AttentionSpec((Softcap(1.5), SCALE)),
    "clamp": AttentionSpec((SCALE, Clamp(-0.7, 0.7))),
    "sinks, causal": AttentionSpec((SCALE, CAUSAL), sinks="sinks0"),
    "a sink of zero": AttentionSpec((SCALE,), sinks=0.0),
    "gate": AttentionSpec((SCALE, CAUSAL), gates=(ScaleBy("gate0"),)),
}

ALL = {"needs_backward": True, "learned": ("bias0", "factor0", "gate0", "sinks0")}

SHAPES = {
    "multi-head": Shapes(2, 4, 4, Q_LEN, KV_LEN, 32, 32, torch.float32, **ALL),
    "grouped": Shapes(2, 4, 2, Q_LEN, KV_LEN, 64, 64, torch.bfloat16, **ALL),
    "multi-query, head_dim 40": Shapes(2, 3, 1, Q_LEN, KV_LEN, 40, 40, torch.float16, **ALL),
    "head_dim 24 and 48": Shapes(1, 2, 2, Q_LEN, KV_LEN, 24, 48, torch.bfloat16, **ALL),
    "as many queries": Shapes(2, 4, 2, KV_LEN, KV_LEN, 64, 64, torch.bfloat16, True),
    "one query": Shapes(2, 4, 2, 1, KV_LEN, 64, 64, torch.bfloat16, False),
    "inference": Shapes(2, 4, 2, Q_LEN, KV_LEN, 128, 128, torch.float16, False),
}

MIXED = ("cudnn/fa4", "fa4/cudnn", "flash/fa2", "fa3/flash")
"""Each in both passes; all others are in `test_mixing.py`."""

HERE = Device.current()
DEVICES = [HERE] if HERE.type == "cuda" else [HERE, Device.parse("sm_90"), Device.parse("sm_80")]


def grid() -> list[Any]:
    """What each kernel but the reference, which is what others are compared with, says that it computes."""
    names = [name for name in (*KERNELS, *MIXED) if name != "reference"]
    with installed() if HERE.type == "cpu" else pytest.MonkeyPatch.context():
        return [
            pytest.param(kernel, form, shapes, device, id=f"{kernel}-{device}-{form}-{shapes}")
            for kernel, form, shapes in product(names, FORMS, SHAPES)
            for device in devices(kernel, FORMS[form], SHAPES[shapes])
        ]


def devices(kernel: str, spec: AttentionSpec, at: Shapes) -> list[Device]:
    """Where it runs: each of these for SDPA, whose call depends on the device, and one for others."""
    if kernel == "decode" and HERE.type == "cpu" and at.q_len != 1:
        return []  # Triton's interpreter takes ten seconds for each; several queries are in `test_decode.py`
    found = [device for device in DEVICES if not named(kernel).refusals(spec, at, device)]
    return found if kernel == "sdpa" else found[:1]


GRID = grid()


def test_every_kernel_takes_something() -> None:
    assert HERE.type != "cpu" or {case.values[0] for case in GRID} == {*KERNELS, *MIXED} - {"reference"}


@pytest.mark.parametrize(("kernel", "form", "shapes", "device"), GRID)
def test_what_is_declared_is_computed(kernel: str, form: str, shapes: str, device: Device) -> None:
    spec, at = FORMS[form], SHAPES[shapes]

    def run(name: str, at: Shapes, inputs: list[Tensor]) -> list[Tensor | None]:
        attention = named(name)
        output, gradients = with_gradients(lambda *given: attention(spec, at, device, dict(zip(NAMES, given))), inputs)
        return [output, together(gradients)]

    draws = [tensors(at, seed) for seed in range(DRAWS)]
    with installed() if HERE.type == "cpu" else pytest.MonkeyPatch.context():
        found = joined(run(kernel, at, inputs) for inputs in draws)
    eager = joined(run("reference", at, inputs) for inputs in draws)
    exact = replace(at, dtype=torch.float64)
    truth = joined(run("reference", exact, double(inputs)) for inputs in draws)
    assert_as_accurate(found, eager, truth)


@pytest.mark.parametrize("head_dim", [32, 128])
def test_gradients_of_large_scores_on_cpu(head_dim: int) -> None:
    """Where weights are near 0 and 1: those of the backward pass are those of the forward pass."""
    spec, device = AttentionSpec((Scale(head_dim**-0.5),)), Device.parse("cpu")
    at = Shapes(16, 4, 4, 64, 64, head_dim, head_dim, torch.float32, True)
    sizes = (at.batch, at.num_heads, at.q_len, head_dim)
    inputs = [(torch.randn(sizes, device="cpu") * factor).requires_grad_() for factor in (4, 1, 1)]

    def run(name: str, at: Shapes, inputs: list[Tensor]) -> Any:
        return with_gradients(lambda *given: named(name)(spec, at, device, dict(zip(NAMES, given))), inputs)

    truth = run("reference", replace(at, dtype=torch.float64), double(inputs))
    assert_as_accurate(run("sdpa", at, inputs), run("reference", at, inputs), truth)


NAMES = ("query", "key", "value", "bias0", "factor0", "sinks0", "gate0", "mask0", "mask1")


def tensors(at: Shapes, seed: int) -> list[Tensor]:
    """One for each of the names, heads after positions in memory; every query sees a key."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator).to(HERE.type, at.dtype)

    query, key, value = (
        draw(at.batch, length, heads, head_dim).transpose(1, 2)
        for length, heads, head_dim in (
            (at.q_len, at.num_heads, at.head_dim),
            (at.kv_len, at.num_kv_heads, at.head_dim),
            (at.kv_len, at.num_kv_heads, at.head_dim_v),
        )
    )
    numeric = [
        draw(1, at.num_heads, at.q_len, at.kv_len),
        draw(1, at.num_heads, 1, 1).abs() + 1,
        draw(1, at.num_heads, 1, 1),
        draw(at.batch, at.num_heads, at.q_len, 1),
    ]
    padding = (torch.rand(at.batch, 1, 1, at.kv_len, generator=generator) < 0.7).to(HERE.type)
    hidden = (torch.rand(at.batch, at.num_heads, at.q_len, at.kv_len, generator=generator) < 0.3).to(HERE.type)
    padding[..., 0], hidden[..., 0] = True, False
    for name, x in zip(NAMES, (query, key, value, *numeric)):
        x.requires_grad_(at.needs_backward and (name in at.learned or name in NAMES[:3]))
    return [query, key, value, *numeric, padding, hidden]
