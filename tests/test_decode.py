"""The kernel for few queries, in Triton: interpreted where there is no GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_rewriter import AttentionSpec, Device
from attn_rewriter.kernels import KERNELS
from attn_rewriter.spec import Band, Bias, Clamp, FullyMasked, Mask, Scale, ScaleBy, Shapes, Softcap, TensorMask
from tests.accuracy import assert_as_accurate
from tests.running import double, joined, rewritten
from tests.spellings import SPELLINGS, Spelling
from tests.standins import installed

split_keys = pytest.importorskip("attn_rewriter.kernels.split_keys", exc_type=ImportError)

SM_90 = Device.parse("sm_90")
HERE = Device.current().type
DRAWS = 4  # the interpreter takes milliseconds for what a GPU does in a microsecond
ONE = Shapes(2, 4, 2, 1, 290, 64, 64, torch.float16)
SEVERAL = replace(ONE, q_len=5)
WIDE = replace(ONE, dtype=torch.float32, kv_len=150)

SCALE = Scale(0.3)
PADDING = Mask("mask", TensorMask("mask", ("batch", "key")), "keep")
PAIRS = Mask("pairs", TensorMask("pairs", ("batch", "head", "query", "key")), "drop")
QUERIES = Mask("queries", TensorMask("queries", ("batch", "query")), "keep")


@pytest.fixture(autouse=True)
def _several_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(split_keys, "_PROGRAMS", 12)
    with installed():
        yield


def drawn(at: Shapes, seed: int, **more: Tensor) -> dict[str, Tensor]:
    """A tensor of every kind; the first 40 keys of the first sequence are padding, and what is not filled of both."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator).to(HERE, at.dtype)

    keep = torch.arange(at.kv_len) < at.kv_len - 110
    keep = (keep & (torch.arange(at.kv_len) >= torch.tensor([[40], [0]])))[:, None, None].to(HERE)
    pairs = (torch.rand(at.batch, at.num_heads, at.q_len, at.kv_len, generator=generator) < 0.3).to(HERE)
    pairs[..., 140] = False
    return {
        "query": draw(at.batch, at.num_heads, at.q_len, at.head_dim),
        "key": draw(at.batch, at.num_kv_heads, at.kv_len, at.head_dim),
        "value": draw(at.batch, at.num_kv_heads, at.kv_len, at.head_dim_v),
        "mask": keep,
        "pairs": pairs,
        "additive": torch.zeros_like(keep, dtype=at.dtype).masked_fill(~keep, torch.finfo(at.dtype).min),
        "bias": draw(1, at.num_heads, at.q_len, at.kv_len),
        "alibi": draw(1, at.num_heads, 1, at.kv_len),
        "by query": draw(1, 1, at.q_len, 1),
        "number": draw(1, 1, 1, 1),
        "queries": torch.ones(at.batch, 1, at.q_len, 1, dtype=torch.bool, device=HERE),
        "factor": draw(1, at.num_heads, 1, 1).abs() + 1,
        "sinks": draw(1, at.num_heads, 1, 1),
        **more,
    }


def check(spec: AttentionSpec, at: Shapes, draws: list[dict[str, Tensor]]) -> None:
    """The kernel is as near to float64 as the reference is."""
    assert not KERNELS["decode"].refusals(spec, at, SM_90)

    def run(name: str, at: Shapes, tensors: dict[str, Tensor]) -> Tensor:
        return KERNELS[name](spec, at, SM_90, tensors)

    exact = replace(at, dtype=torch.float64)
    assert_as_accurate(
        joined(run("decode", at, tensors) for tensors in draws),
        joined(run("reference", at, tensors) for tensors in draws),
        joined(run("reference", exact, dict(zip(tensors, double([*tensors.values()])))) for tensors in draws),
    )


FORMS = {
    "plain": AttentionSpec((SCALE,)),
    "negative scale": AttentionSpec((Scale(-0.3), PADDING)),
    "scale zero": AttentionSpec((Scale(0.0), PADDING)),
    "causal": AttentionSpec((SCALE, Mask(None, Band(None, 150), "keep"))),
    "window": AttentionSpec((SCALE, Mask(None, Band(10, 135), "keep"))),
    "padding": AttentionSpec((SCALE, PADDING)),
    "every pair, padding": AttentionSpec((SCALE, PAIRS, PADDING)),
    "additive": AttentionSpec((SCALE, Bias("additive"))),
    "bias and additive": AttentionSpec((SCALE, Bias("bias", 0.5), Bias("additive"))),
    "alibi, padding": AttentionSpec((SCALE, Bias("alibi"), PADDING)),
    "bias of each query": AttentionSpec((SCALE, Bias("by query"))),
    "one bias, alibi": AttentionSpec((SCALE, Bias("number"), Bias("alibi"))),
    "mask of queries": AttentionSpec((SCALE, QUERIES)),
    "temperature, padding": AttentionSpec((ScaleBy("factor", inverse=True), SCALE, PADDING)),
    "sinks, padding": AttentionSpec((SCALE, PADDING), sinks="sinks"),
    "a sink of one": AttentionSpec((SCALE, PADDING), sinks=1.0),
}
CAPPED = {
    "softcap, additive": AttentionSpec((SCALE, Softcap(1.5), Bias("additive"))),
    "temperature, softcap, scale, bias, padding": AttentionSpec(
        (ScaleBy("factor"), Softcap(1.5), Bias("bias"), Scale(0.7), PADDING)
    ),
}


for _forms in (FORMS, CAPPED):
    for _name, _spec in _forms.items():
        if {PADDING, QUERIES} & {*_spec.modifiers} and _spec.sinks is None:  # which may hide all keys
            _forms[_name] = replace(_spec, fully_masked_rows="zeros")


@pytest.mark.parametrize("at", [ONE, SEVERAL, WIDE], ids=str)
@pytest.mark.parametrize("form", [*FORMS, *CAPPED])
def test_forms(form: str, at: Shapes) -> None:
    spec = {**FORMS, **CAPPED}[form]
    if at.dtype == torch.float32 and form in CAPPED:
        pytest.skip("refused")
    if form in ("causal", "window") and at.kv_len < 290:
        pytest.skip("hides nothing")
    check(spec, at, [drawn(at, seed) for seed in range(DRAWS)])


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 4, "num_kv_heads": 4},
        {"num_heads": 20, "num_kv_heads": 1},
        {"num_heads": 20, "num_kv_heads": 1, "q_len": 4},  # more rows than a tile has
        {"head_dim": 40, "head_dim_v": 80},
        {"head_dim": 128, "head_dim_v": 64},
        {"head_dim": 8, "head_dim_v": 4},
        {"head_dim": 192, "head_dim_v": 256},
        {"kv_len": 1},
        {"kv_len": 128},
        {"kv_len": 1000},
    ],
    ids=str,
)
def test_sizes(sizes: dict[str, int]) -> None:
    at = replace(ONE, **sizes)
    many = at.kv_len > 140
    spec = AttentionSpec((SCALE, Bias("alibi"), *((PADDING, PAIRS) if many else ())))
    given = at if many else replace(at, kv_len=290)
    draws = [drawn(given, seed) for seed in range(2)]
    if not many:
        draws = [{**x, **{name: x[name][:, :, : at.kv_len] for name in ("key", "value")}} for x in draws]
        draws = [{**x, "alibi": x["alibi"][..., : at.kv_len]} for x in draws]
    check(spec, at, draws)


@pytest.mark.parametrize("form", ["padding", "bias and additive"])
def test_strides(form: str) -> None:
    """Heads after positions, key dimension after its positions, one key for all sequences, one mask for all."""
    draws = []
    for seed in range(2):
        tensors = drawn(SEVERAL, seed)
        tensors["query"] = tensors["query"].transpose(1, 2).contiguous().transpose(1, 2)
        tensors["key"] = tensors["key"][:1].mT.contiguous().mT.expand(2, -1, -1, -1)
        tensors["value"] = (
            torch.cat([tensors["value"]] * 2, -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 32:96]
        )
        tensors["mask"], tensors["additive"] = (tensors[name][:1] for name in ("mask", "additive"))
        draws.append(tensors)
    check(FORMS[form], SEVERAL, draws)


@pytest.mark.parametrize("at", [ONE, WIDE], ids=str)
@pytest.mark.parametrize("low", [None, -1e4])
def test_an_additive_mask_that_hides_a_whole_row_is_added(at: Shapes, low: float | None) -> None:
    draws = [drawn(at, seed) for seed in range(DRAWS)]
    for tensors in draws:
        tensors["additive"][1] = torch.finfo(at.dtype).min if low is None else low
    check(FORMS["additive"], at, draws)


def test_an_additive_mask_that_hides_all_that_a_mask_keeps_is_added() -> None:
    draws = [drawn(WIDE, seed) for seed in range(DRAWS)]
    for tensors in draws:
        tensors["additive"] = torch.where(tensors["mask"], torch.finfo(torch.float32).min, 0.0)
    check(AttentionSpec((SCALE, Bias("additive"), PADDING), fully_masked_rows="zeros"), WIDE, draws)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["drop", "keep"])
@pytest.mark.parametrize("rows", ["zeros", "nan", "mean"])
@pytest.mark.parametrize("by", ["sequence", "query"])
def test_rows_without_a_key(by: str, rows: FullyMasked, form: str, bias: bool) -> None:
    """They are what the model's own fill makes of them, beside others of the same sequence."""
    draws = [drawn(SEVERAL, seed) for seed in range(DRAWS)]
    for tensors in draws:
        keep = tensors["mask"].expand(-1, 1, SEVERAL.q_len, -1).clone()
        keep[..., 0] = True
        keep[0, :, slice(None) if by == "sequence" else 1] = False
        tensors["mask"] = keep if form == "keep" else ~keep
    fill = -1e9 if rows == "mean" else -math.inf
    mask = Mask("mask", TensorMask("mask", ("batch", "query", "key")), form, (fill,))
    spec = AttentionSpec((SCALE, *([Bias("bias")] if bias else []), mask), fully_masked_rows=rows)
    if rows == "nan":
        output = KERNELS["decode"](spec, SEVERAL, SM_90, draws[0])
        assert torch.equal(output.isnan(), (~keep.any(-1, keepdim=True)).expand_as(output))
    else:
        check(spec, SEVERAL, draws)


def test_a_row_of_sinks_alone_is_zero() -> None:
    tensors = drawn(SEVERAL, 0)
    tensors["mask"][0] = False
    output = KERNELS["decode"](FORMS["sinks, padding"], SEVERAL, SM_90, tensors)
    assert (output[0] == 0).all() and output.isfinite().all()


@pytest.mark.parametrize("form", ["padding", "additive", "softcap, additive"])
def test_what_is_hidden_does_not_matter(form: str) -> None:
    tensors = drawn(ONE, 0)
    output = KERNELS["decode"](({**FORMS, **CAPPED})[form], ONE, SM_90, tensors)
    hidden = ~tensors["mask"].transpose(-1, -2)
    for name in ("key", "value"):
        tensors[name] = tensors[name].masked_fill(hidden, 1000.0)
    assert torch.equal(KERNELS["decode"](({**FORMS, **CAPPED})[form], ONE, SM_90, tensors), output)


@pytest.mark.parametrize("form", ["padding", "additive"])
def test_blocks_that_are_hidden_are_not_read(form: str) -> None:
    at = replace(ONE, kv_len=600)
    tensors = drawn(at, 0)
    keep = (torch.arange(600, device=HERE) >= 256) & (torch.arange(600, device=HERE) < 500)
    tensors["mask"] = keep.expand(2, 1, 1, 600)
    tensors["additive"] = torch.zeros(2, 1, 1, 600, device=HERE, dtype=at.dtype).masked_fill(~keep, -65504.0)
    for name in ("key", "value"):
        tensors[name][:, :, :256] = tensors[name][:, :, 512:] = float("nan")
    assert KERNELS["decode"](FORMS[form], at, SM_90, tensors).isfinite().all()


def test_the_list_of_blocks() -> None:
    keep = torch.zeros(2, 4, 3, 70, dtype=torch.bool)
    keep[0, 1, 2, 69] = keep[0, 0, 0, 17] = keep[0, 3, 1, 5] = keep[1, 2, 0, 33] = True
    blocks, counts = split_keys.active_blocks(keep, 16, 2)
    assert counts.tolist() == [[2, 1], [0, 1]] and blocks.shape == (2, 2, 5)
    assert [blocks[0, 0, :2].tolist(), blocks[0, 1, 0].item(), blocks[1, 1, 0].item()] == [[1, 4], 0, 2]
    blocks, counts = split_keys.active_blocks(keep.any(1, keepdim=True), 16, 2)
    assert counts.tolist() == [[3], [1]] and blocks[0, 0, :3].tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("spec", "at", "reason"),
    [
        (FORMS["plain"], replace(ONE, q_len=65), "at most 64 queries, here 65"),
        (FORMS["plain"], replace(ONE, needs_backward=True), "has no backward pass"),
        (replace(FORMS["plain"], dropout_p=0.1), ONE, "has no dropout"),
        (FORMS["plain"], replace(ONE, head_dim=512), "head_dim is at most 256"),
        (AttentionSpec((Clamp(-1.0, 1.0),)), ONE, "scores go through clamp"),
        (AttentionSpec((Softcap(1.0), Softcap(2.0))), ONE, "scores go through softcap"),
        (AttentionSpec((Bias("bias"), Softcap(1.0))), ONE, "adds biases after a softcap"),
        (AttentionSpec((Softcap(1.0), ScaleBy("factor"))), ONE, "scales by tensors before it"),
        (AttentionSpec((Softcap(1.0),)), WIDE, "not exact enough for float32"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_reasons(spec: AttentionSpec, at: Shapes, reason: str) -> None:
    (found,) = KERNELS["decode"].refusals(spec, at, SM_90)
    assert reason in found


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert KERNELS["decode"].refusals(FORMS["plain"], ONE, SM_90) == ["triton is not installed"]


def test_it_compiles() -> None:
    """In a process of its own, as Triton interprets in this one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-m", "tests.compiled"], env=environment, check=True, timeout=300)


SPELLED = [*{s.computes: s for s in SPELLINGS[::-1] if not s.random and s.computes}.values()]


@pytest.mark.skipif(HERE != "cpu", reason="compiled in test_gpu.py")
@pytest.mark.parametrize("spelling", SPELLED, ids=lambda s: s.computes)
def test_in_a_graph(spelling: Spelling) -> None:
    """One spelling of each form."""
    draws = [[x.detach() for x in spelling.inputs(torch.float32, seed)] for seed in range(2)]
    try:
        eager = joined(spelling.function(*inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, report = rewritten(spelling.function, kernel=["decode", "reference"], device="sm_90")
    found = joined(function(*inputs) for inputs in draws)
    wanted = {"reference"} if any(word in spelling.computes or "" for word in REFUSED) else {"decode"}
    assert {site.kernel for site in report().sites} == wanted
    assert_as_accurate(found, eager, joined(spelling.function(*double(inputs)) for inputs in draws))


REFUSED = ("softcap", "clamp", "dropout")


def test_symbolic_lengths() -> None:
    """A cache that grows: one graph for all lengths and batches."""

    def step(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    function, report = rewritten(step, kernel="decode", device="sm_90")
    for batch, length in ((2, 130), (3, 300), (4, 513)):
        q, k, v = (torch.randn(batch, 4, n, 16).to(HERE) for n in (1, length, length))
        keep = (torch.arange(length) >= torch.arange(batch)[:, None]).to(HERE)[:, None, None]
        for x, dim in ((k, 2), (v, 2), (keep, 3), *((x, 0) for x in (q, k, v, keep))):
            torch._dynamo.mark_dynamic(x, dim)
        exact = step(*double([q, k, v, keep]))
        assert_as_accurate(function(q, k, v, keep), step(q, k, v, keep), exact)
    assert [site.kernel for site in report().sites] == ["decode"]


def test_caches_depend_on_its_code() -> None:
    """PyTorch looks into the operator, but its caches know the operator's name and arguments alone."""
    graphs = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    function, _ = rewritten(
        lambda q, k, v, mask: (q @ k.mT + mask).softmax(-1) @ v, device="sm_90", compiler=compiler, kernel="decode"
    )
    tensors = drawn(WIDE, 0)
    key, value = (tensors[name].repeat_interleave(2, dim=1) for name in ("key", "value"))
    with torch.no_grad():
        function(tensors["query"], key, value, tensors["additive"])
    (node,) = (x for graph in graphs for x in graph.graph.nodes if x.target is torch.ops.attn_rewriter.decode.default)
    assert node.args[-1] == split_keys.CODE
