"""Which inputs stay where they are, for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import attn_rewriter
from attn_rewriter.caches import keep_in_place

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    eos_token_id=None,
)


def kept(function: Callable[..., Any], *args: Any) -> list[str]:
    """The inputs that are marked in a function's graph."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend(node._dynamo_source.name for node in keep_in_place(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*args)
    return found


def at_an_index(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache.index_copy_(1, at, new)
    return cache.sum()


def in_a_slice(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[:, 3:4].copy_(new)
    return cache.sum()


def by_assignment(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[:, at] = new
    return cache.sum()


def beside_it(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache.index_copy_(1, at, new)
    at.add_(1)
    return cache.sum()


def as_a_whole(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache.add_(1)
    return cache.sum()


def out_of_place(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy(1, at, new).sum()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (at_an_index, ["cache"]),
        (in_a_slice, ["cache"]),
        (by_assignment, ["cache"]),
        (beside_it, ["at", "cache"]),
        (as_a_whole, []),
        (out_of_place, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_inputs_that_are_written_in_part(function: Callable[..., Any], expected: list[str]) -> None:
    found = kept(function, torch.zeros(2, 8), torch.tensor([3]), torch.ones(2, 1))
    assert sorted(found) == [f"L['{name}']" for name in expected]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["patch", "optimize"])
def test_generate_with_a_compiled_prompt_makes_cuda_graphs(how: str) -> None:
    """The cache is made in the compiled prompt, and the graph of a new token writes into it."""
    torch._dynamo.reset()
    ids = torch.randint(99, (2, 9), device="cuda")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval().cuda()
    expected = eager.generate(ids, **{**options, "cache_implementation": "dynamic"})
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    with attn_rewriter.patch() if how == "patch" else torch.no_grad():
        model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval().cuda()
        model.load_state_dict(eager.state_dict())
        if how == "optimize":
            attn_rewriter.optimize(model, mode="reduce-overhead")
        for _ in range(2):  # another cache
            assert torch.equal(model.generate(ids, **options), expected)
    assert attn_rewriter.report_of(model).n_fused > 0
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
