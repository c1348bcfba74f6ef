"""Inductor's own attention patterns: kept out of what went through us, and of nothing else."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import attn_rewriter
from attn_rewriter import Backend, Options, inductor
from tests.accuracy import assert_as_accurate
from tests.running import with_gradients

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty one, in use."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        config.patch(force_disable_caches=False, fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
    ):
        yield


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.125).softmax(1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.125).softmax(-2) @ v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.125).softmax(-1) @ v


def given(grad: bool = False) -> list[Tensor]:
    return [
        torch.randn(2, 4, 24, 64, generator=torch.Generator().manual_seed(i)).requires_grad_(grad) for i in range(3)
    ]


def ours(function: Any, **options: Any) -> tuple[Any, Backend]:
    backend = Backend(Options(**options))
    return torch.compile(function, backend=backend), backend


def assert_right(function: Callable[..., Any], compiled: Callable[..., Any], grad: bool = False) -> None:
    exact = with_gradients(function, [x.detach().double().requires_grad_(grad) for x in given()])
    assert_as_accurate(with_gradients(compiled, given(grad)), with_gradients(function, given(grad)), exact)


def n_fused() -> int:
    return counters["inductor"]["fuse_attention"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("function", [over_heads, over_queries])
def test_what_is_left_is_not_fused(function: Callable[..., Any], grad: bool) -> None:
    compiled, backend = ours(function)
    assert_right(function, compiled, grad)
    assert not n_fused() and not backend.report.n_fused


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("function", [over_heads, over_queries])
def test_what_is_left_on_a_gpu(function: Callable[..., Any], grad: bool, dtype: torch.dtype) -> None:
    """In half precision, where its patterns match."""
    inputs = [x.detach().to("cuda", dtype).requires_grad_(grad) for x in given()]
    exact = with_gradients(function, [x.detach().double().requires_grad_(grad) for x in inputs])
    compiled, _ = ours(function)
    assert_as_accurate(with_gradients(compiled, inputs), with_gradients(function, inputs), exact)
    assert not n_fused()


def beside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One that is fused, and one whose weights are wanted."""
    weights = (q @ k.mT * 0.125).softmax(1)
    return attention(k, q, v), weights @ v


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(over_heads, q, k, v, use_reentrant=False)


def with_a_break(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = over_heads(q, k, v)
    torch._dynamo.graph_break()
    return over_queries(first, k, v)


@pytest.mark.parametrize("function", [beside, checkpointed, with_a_break])
def test_in_programs(function: Callable[..., Any]) -> None:
    assert_right(function, ours(function)[0], grad=True)
    assert not n_fused()


def test_plain_compilations_are_as_they_were() -> None:
    """Before, after, and what they compile later: their backward pass, while ours is compiled in between."""
    plain = torch.compile(attention)
    inputs = given(grad=True)
    result = plain(*inputs)
    fused = n_fused()
    assert fused
    assert_right(over_heads, ours(over_heads)[0])
    assert n_fused() == fused
    gradients = torch.autograd.grad(result.square().sum(), inputs)
    expected = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    torch.compile(lambda q, k, v: attention(q, k, v) * 3)(*given())
    assert n_fused() > fused
    assert config.joint_custom_pre_pass is None and config.joint_custom_post_pass is None


def test_a_thread_beside() -> None:
    """Whatever another thread compiles while one of ours is being compiled is as it was."""
    within, done, found = threading.Event(), threading.Event(), list[Any]()

    def compiler(gm: Any, inputs: Any) -> Any:
        within.set()
        assert done.wait(600)
        return torch._TorchCompileInductorWrapper(None, {}, None)(gm, inputs)

    def plainly() -> None:
        from torch._inductor.compile_fx import compile_fx
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            assert within.wait(600)
            with torch.no_grad():  # not through Dynamo, which has one thread compile at a time
                compile_fx(make_fx(lambda *x: (attention(*x),))(*given()), given())
            found.append((n_fused(), config.joint_custom_pre_pass))
        finally:
            done.set()

    thread = threading.Thread(target=plainly)
    thread.start()
    compiled, _ = ours(over_heads, compiler=compiler)
    assert_right(over_heads, compiled)
    thread.join()
    ((fused, before),) = found
    assert fused == n_fused() > 0 and before is None


@pytest.mark.parametrize(("plain_first", "grad"), [(False, False), (True, False), (True, True)])
def test_caches(plain_first: bool, grad: bool) -> None:
    """Neither is served with what the other one compiled."""

    def run_plain() -> None:
        torch._dynamo.reset()
        counters.clear()
        try:
            with_gradients(torch.compile(over_heads, backend="inductor"), given(grad))
        except Exception:  # in training, the pattern may raise
            assert grad

    def run_ours() -> None:
        torch._dynamo.reset()
        counters.clear()
        assert_right(over_heads, ours(over_heads)[0], grad)
        assert not n_fused()

    for run in (run_plain, run_ours) if plain_first else (run_ours, run_plain):
        run()
        run()
    run_ours()
    assert counters["aot_autograd"]["autograd_cache_hit"]  # of our own


_PROGRAM = """
import sys
import torch
import tests.test_inductor as t
from torch._dynamo.utils import counters

way = sys.argv[1]
if way == "plain":
    torch.compile(t.over_heads)(*t.given())
else:
    t.assert_right(t.over_heads, t.ours(t.over_heads)[0])
    assert not t.n_fused()
print(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_caches_of_several_processes() -> None:
    def run(way: str) -> list[int]:
        found = subprocess.run([sys.executable, "-c", _PROGRAM, way], capture_output=True, text=True, check=True)
        return [int(n) for n in found.stdout.split()[-2:]]

    assert run("plain") == [0, 0]
    assert not any(run("ours"))
    assert any(run("ours"))
    assert any(run("plain"))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.ones(24, 24, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.125).masked_fill(~self.causal, -1e9)
        return scores.softmax(-1) @ v + over_heads(q, k, v)


def test_graphs_that_are_compiled_again() -> None:
    model = Causal()
    backend = Backend(Options())
    compiled = torch.compile(model, backend=backend)
    assert_right(model, compiled)
    model.causal.logical_not_()
    model.causal[:, 0] = True
    assert_right(model, compiled)
    assert not n_fused() and len(backend.report.sites) > 2


class Seen(CustomGraphPass):
    """Someone else's pass, which counts exponentials."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)))

    def uuid(self) -> str:
        return "seen"


@pytest.mark.parametrize("by", ["options", "process", "one of each"])
def test_passes_of_others_still_run(by: str) -> None:
    """And see the graph as it is."""
    before, after = Seen(), Seen()
    mine = {"joint_custom_pre_pass": before} | ({"joint_custom_post_pass": after} if by != "one of each" else {})
    process = {"joint_custom_pre_pass": before, "joint_custom_post_pass": after} if by != "options" else {}
    backend = Backend(Options(compiler_options=mine if by != "process" else {}))
    with config.patch(process):
        assert_right(over_queries, torch.compile(over_queries, backend=backend))
    assert before.seen == after.seen == [1]
    assert not n_fused()


def test_a_future_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without these settings nothing happens, and it is said once."""
    monkeypatch.setattr(inductor, "_BEFORE", "no_such_setting")
    inductor._warn.cache_clear()
    compiled, _ = ours(attention, compiler="aot_eager")
    with pytest.warns(UserWarning, match="can't keep PyTorch's own attention patterns out"):
        compiled(*given())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*[x[:1] for x in given()])
    inductor._warn.cache_clear()


def test_other_patterns_stay() -> None:
    """Such as that for two casts in a row, right behind an exponential."""

    def function(x: Tensor) -> Tensor:
        return x.exp().double().to(torch.float32) * attn_rewriter.__name__.count("_")

    x = torch.randn(8, 8)
    torch.compile(function)(x)
    plain = dict(counters["inductor"])
    torch._dynamo.reset()
    counters.clear()
    ours(function)[0](x)
    assert counters["inductor"]["pattern_matcher_count"] == plain["pattern_matcher_count"] > 0
