"""Unmodified models of other libraries: each attention is fused, or left alone for a known reason, and the answers are
as right as eager's."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from attn_rewriter import Backend, Device, Options, Report
from attn_rewriter.api import compile_in_place
from tests.accuracy import assert_as_accurate_over_draws
from tests.libraries import MODELS, Model
from tests.models import NothingNarrowed, randomize
from tests.running import gradients

models = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Nothing compiled yet, and one thread: these models are too small for more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
    torch.set_num_threads(n_threads)


def build(model: Model, dtype: torch.dtype) -> nn.Module:
    """A model with the same random weights in every type, exact in all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = model.build()
    randomize(built)
    return built.bfloat16().to(dtype).train(model.training)


def inputs(model: Model, dtype: torch.dtype, draw: int) -> dict[str, Any]:
    def convert(x: Any) -> Any:
        return x.bfloat16().to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(convert, model.inputs(torch.Generator().manual_seed(1 + draw)))


def outputs(result: Any) -> list[torch.Tensor]:
    """The tensors that a model returns, in a tuple, a dictionary or an output class."""
    held = dict(result) if isinstance(result, dict) else result
    return [x for x in tree_leaves(held) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def step(built: nn.Module, given: dict[str, Any], training: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, and gradients in training."""
    with torch.set_grad_enabled(training):
        found = outputs(built(**given))
    return {
        "outputs": {str(i): x.detach() for i, x in enumerate(found)},
        "gradients": gradients(built, found) if training else {},
    }


def compiled(built: nn.Module, model: Model, compiler: str = "eager") -> Backend:
    """Compile in place, as if for another device where none of the CPU's kernels can compute the model."""
    imagined = None if model.device is None else Device.parse(model.device)
    kernel = "auto" if imagined is None else ["sdpa", "flex"]
    backend = Backend(Options(kernel, compiler=compiler, strict=True), device=imagined)
    compile_in_place(built, backend)
    return backend


def assert_read(report: Report, model: Model) -> None:
    """Every site is fused, and computes what the table says; or is refused for the reason there."""
    fused = Counter(str(site.spec) for site in report.sites if site.kernel is not None)
    assert fused == model.fused, report
    reasons = ["; ".join(refusal.reason for refusal in site.refusals) for site in report.sites if site.kernel is None]
    assert len(reasons) == sum(model.refused.values()), report
    for reason, n in model.refused.items():
        assert sum(reason in said for said in reasons) == n, report


def assert_right(built: nn.Module, model: Model, dtype: torch.dtype, *, training: bool) -> None:
    eager, exact = build(model, dtype), build(model, torch.float64)

    def draw(i: int) -> tuple[Any, Any, Any]:
        fused, plain = (step(each, inputs(model, dtype, i), training) for each in (built, eager))
        with NothingNarrowed():
            return fused, plain, step(exact, inputs(model, torch.float64, i), training)

    assert_as_accurate_over_draws(draw)


@models
def test_training(name: str) -> None:
    train(MODELS[name], "eager")


def train(model: Model, compiler: str) -> None:
    built = build(model, torch.float32)
    step(built, inputs(model, torch.float32, 0), training=False)  # some keep what they make in their first call
    backend = compiled(built, model, compiler)
    assert_right(built, model, torch.float32, training=True)
    assert_read(backend.report, model)


@models
def test_bfloat16(name: str) -> None:
    model = MODELS[name]
    built = build(model, torch.bfloat16)
    try:
        step(built, inputs(model, torch.bfloat16, 0), training=False)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    backend = compiled(built, model)
    assert_right(built, model, torch.bfloat16, training=False)
    if name not in NATIVE:
        assert_read(backend.report, model)


NATIVE = {"torch-encoder"}  # in inference PyTorch runs its own fused operator, which is left alone


@pytest.mark.parametrize(
    "name",
    ["diffusers-dit", "timm-swin", "x_transformers-decoder_masked", "vit_pytorch-simple_vit", "torch-decoder"],
)
def test_inductor(name: str) -> None:
    train(MODELS[name], "inductor")
