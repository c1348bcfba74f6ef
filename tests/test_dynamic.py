"""Dynamic shapes: one compiled model over many lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_rewriter import Backend, Device, Options
from tests import models
from tests.accuracy import assert_as_accurate
from tests.running import Exact

LENGTHS = (5, 6, 7, 9, 11, 12, 14, 17, 21, 26, 30, 33)


def compilations(model: torch.nn.Module, backend: Any, calls: list[Any]) -> tuple[int, list[torch.Tensor]]:
    """How many graphs were compiled for all lengths, and what the model gave for each."""
    calls.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        results = [compiled(**models.inputs("llama", length=length)).logits for length in LENGTHS]
    return len(calls), results


@pytest.mark.parametrize("device", [None, "sm_90"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_no_more_recompilations_than_without(name: str, device: str | None) -> None:
    calls: list[Any] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(gm)
        return gm

    model = models.build(name, "eager")
    plain, _ = compilations(model, compiler, calls)
    kernel = "auto" if device is None else ["flex", "sdpa"]
    imagined = None if device is None else Device.parse(device)
    backend = Backend(Options(kernel, compiler=compiler, strict=True), device=imagined)
    ours, results = compilations(model, backend, calls)
    assert ours <= plain
    assert {site.kernel for site in backend.report.sites} == {"sdpa" if device is None else "flex"}
    for length, result in zip(LENGTHS, results):
        given = models.inputs("llama", length=length)
        with torch.no_grad():
            eager = model(**given).logits
            with Exact(), models.NothingNarrowed():
                exact = models.build(name, "eager", torch.float64)(**given).logits
        assert_as_accurate(result, eager, exact)


@pytest.mark.parametrize(("room", "most", "kv_len"), [(9, 20, "9"), (9, None, "s"), (30, 20, "s"), (2, None, "2")])
def test_lengths_that_were_promised(room: int, most: int | None, kv_len: str) -> None:
    """Keys that no query sees are cut off where Dynamo may guard on the number of queries: where `mark_dynamic` says
    that it may be another, or any, to guard is an error."""

    def attention(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        later = torch.arange(cache.shape[1]) > torch.arange(q.shape[1])[:, None]
        return (q @ cache.mT).masked_fill(later, float("-inf")).softmax(-1) @ cache

    torch._dynamo.reset()
    backend = Backend(Options(compiler="eager", strict=True))
    compiled = torch.compile(attention, backend=backend)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, room, 8, generator=generator)
    for q_len in (2, 7, 12):
        q = torch.randn(2, q_len, 8, generator=generator)
        torch._dynamo.mark_dynamic(q, 1, min=None if most is None else 2, max=most)
        assert_as_accurate(compiled(q, cache), attention(q, cache), attention(q.double(), cache.double()))
    first = backend.report.sites[0]
    assert first.shapes is not None and str(first.shapes.kv_len).startswith(kv_len)


def test_softcap_of_any_length_on_cpu() -> None:
    """FlexAttention as Inductor compiles it, with an offset that only the run knows."""

    def attention(*projected: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (3, 16)).transpose(1, 2) for x in projected)
        i = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
        keep = torch.arange(k.shape[2], device=q.device)[None, :] <= i[:, None]
        return (torch.tanh(q @ k.mT / 4) * 4).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    torch._dynamo.reset()
    backend = Backend(Options(strict=True))
    compiled = torch.compile(attention, backend=backend, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for q_len, kv_len in ((40, 170), (33, 64), (7, 9)):
        q, k, v = (torch.randn(2, n, 48, generator=generator) for n in (q_len, kv_len, kv_len))
        exact = attention(q.double(), k.double(), v.double())
        assert_as_accurate(compiled(q, k, v), attention(q, k, v), exact)
    kernels = [site.kernel for site in backend.report.sites]
    assert kernels in (["flex"], ["flex", "flex"])  # one block of keys, and several
