"""Unmodified models of transformers: every attention fused, the answers as right as eager's, no graph break added."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode

import attn_rewriter
from tests.accuracy import assert_as_accurate, error, rounding_unit
from tests.models import ARCHITECTURES, NothingNarrowed, build, inputs

transformers.logging.set_verbosity_error()

architectures = pytest.mark.parametrize("name", list(ARCHITECTURES))
attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])
generating = pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.generates])
padded = pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.takes_padding])

Inputs = dict[str, torch.Tensor]
Result = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------
# Running a model


def run(model: Any, given: Inputs, *, autocast: bool = False) -> Result:
    """One training step's outputs and gradients, without what belongs to padding.

    A gradient is that of a module's parameters together, as one tensor: weight and bias of a linear layer are one
    matrix `[W | b]`, and share a rounding unit. (The bias of a key projection alone has a gradient that is zero but
    for rounding: it shifts all scores of a row alike.)
    """
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**given)
    kept = dict(_without_padding(outputs, given))
    torch.stack([(x.double() * _cotangent(x)).sum() for x in kept.values()]).sum().backward()
    return {"outputs": {name: x.detach() for name, x in kept.items()}, "gradients": dict(_gradients(model))}


def _without_padding(outputs: Any, given: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    masks = {
        "logits": given.get("decoder_attention_mask", given.get("attention_mask")),
        "encoder_last_hidden_state": given.get("attention_mask"),
    }
    for name, x in outputs.items():
        if isinstance(x, torch.Tensor):
            mask = masks.get(name)
            yield name, x if mask is None else x[mask.bool()]


def _cotangent(x: torch.Tensor) -> torch.Tensor:
    """A random gradient for an output, exact in every type."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    return noise.bfloat16().double()


def _gradients(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        gradients = [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            yield name, torch.cat(gradients)


@functools.cache
def truth(name: str, padding: str = "", attention: str = "eager", **shape: int) -> Result:
    """The model computed in float64 throughout."""
    given = {key: x.double() if x.is_floating_point() else x for key, x in inputs(name, padding, **shape).items()}
    with NothingNarrowed():
        return run(build(name, attention, torch.float64), given)


@functools.cache
def eager(name: str, attention: str, padding: str = "", *, autocast: bool = False, **shape: int) -> Result:
    """What the budget is made of: the model as it is, in float32 or under autocast."""
    return run(build(name, attention), inputs(name, padding, **shape), autocast=autocast)


class Graphs:
    """A compiler that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


def assert_all_fused(model: Any, n_sites: int) -> None:
    report = attn_rewriter.report_of(model)
    assert (report.n_fused, report.n_sites) == (n_sites, n_sites), f"expected {n_sites} fused sites\n{report}"


def breaks() -> tuple[int, int]:
    """The numbers of graphs and of graph breaks since the last reset."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def breaks_of_plain_compile(action: Callable[[Any], Any], model: Any) -> tuple[int, int]:
    """What `breaks()` is when PyTorch alone compiles a model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(backend="eager")
    action(model)
    return breaks()


# ---------------------------------------------------------------------------------------------------------------
# The tests' own ground


class _Softmaxes(TorchFunctionMode):
    """Counts softmaxes and SDPA calls."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (F.softmax, torch.softmax, torch.Tensor.softmax, F.scaled_dot_product_attention)
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


@attentions
@architectures
def test_number_of_attentions(name: str, attention: str) -> None:
    """The table in `models.py` has as many attentions as a model computes."""
    with _Softmaxes() as softmaxes:
        build(name, attention)(**inputs(name))
    assert softmaxes.count == ARCHITECTURES[name].n_sites


@pytest.mark.parametrize("padding", ["", "left"])
@architectures
def test_truth(name: str, padding: str) -> None:
    """Two implementations agree to far more digits than float32 has: nothing in the truth was computed in float32."""
    for kind, tensors in truth(name, padding).items():
        for key, x in truth(name, padding, "sdpa")[kind].items():
            assert error(x, tensors[key]) < 1e-6 * rounding_unit(tensors[key], torch.float32), key


# ---------------------------------------------------------------------------------------------------------------
# Forward and backward


@attentions
@architectures
def test_forward_and_backward(name: str, attention: str) -> None:
    model = attn_rewriter.optimize(build(name, attention), compiler="eager")
    fused = run(model, inputs(name))
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)
    assert_as_accurate(fused, eager(name, attention), truth(name))
