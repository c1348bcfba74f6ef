"""Unmodified models of transformers: every attention fused, the answers as right as eager's, no graph break added."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode

import attn_rewriter
from attn_rewriter import distribute
from attn_rewriter.contract import error, rounding_unit
from tests.accuracy import assert_as_accurate_over_draws
from tests.models import ARCHITECTURES, NothingNarrowed, build, inputs
from tests.running import double, gradients

transformers.logging.set_verbosity_error()

architectures = pytest.mark.parametrize("name", list(ARCHITECTURES))
attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])
generating = pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.generates])
padded = pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.takes_padding])

Inputs = dict[str, torch.Tensor]
Result = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Nothing compiled yet, and one thread: these models are too small for more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(n_threads)


# ---------------------------------------------------------------------------------------------------------------
# Running a model


def step(model: Any, given: Inputs, *, autocast: bool = False) -> Result:
    """The outputs and gradients of a training step, without what belongs to padding."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**given)
    kept = dict(_without_padding(outputs, given))
    return {"outputs": {name: x.detach() for name, x in kept.items()}, "gradients": gradients(model, kept.values())}


def _without_padding(outputs: Any, given: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    masks = {
        "logits": given.get("decoder_attention_mask", given.get("attention_mask")),
        "encoder_last_hidden_state": given.get("attention_mask"),
    }
    for name, x in outputs.items():
        if isinstance(x, torch.Tensor):
            mask = masks.get(name)
            yield name, x if mask is None else x[mask.bool()]


unchanged = functools.cache(build)


@functools.cache
def truth(name: str, padding: str = "", attention: str = "eager", **drawn: int) -> Result:
    """The model computed in float64 throughout."""
    given = inputs(name, padding, **drawn)
    with NothingNarrowed():
        return step(unchanged(name, attention, torch.float64), dict(zip(given, double([*given.values()]))))


@functools.cache
def eager(name: str, attention: str, padding: str = "", *, autocast: bool = False, **drawn: int) -> Result:
    """What the budget is made of: the model as it is, in float32 or under autocast."""
    return step(unchanged(name, attention), inputs(name, padding, **drawn), autocast=autocast)


def assert_right(
    model: Any, name: str, attention: str, padding: str = "", *, autocast: bool = False, **shape: int
) -> None:
    def draw(i: int) -> tuple[Result, Result, Result]:
        fused = step(model, inputs(name, padding, draw=i, **shape), autocast=autocast)
        plain = eager(name, attention, padding, autocast=autocast, draw=i, **shape)
        return fused, plain, truth(name, padding, draw=i, **shape)

    assert_as_accurate_over_draws(draw)


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
    for site in report.sites:
        assert site.module
        model.get_submodule(site.module)


def breaks() -> tuple[int, int]:
    """The numbers of graphs and of graph breaks since the last reset."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


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


def optimized(name: str, attention: str, **options: Any) -> Any:
    return attn_rewriter.optimize(build(name, attention), **{"compiler": "eager", "strict": True, **options})


@attentions
@architectures
def test_forward_and_backward(name: str, attention: str) -> None:
    model = optimized(name, attention)
    assert_right(model, name, attention)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)


@attentions
@padded
def test_padding(name: str, attention: str) -> None:
    """One compiled graph serves both sides: the mask is a tensor."""
    model = optimized(name, attention)
    for padding in ("left", "right"):
        assert_right(model, name, attention, padding)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)


@attentions
@padded
def test_rows_without_keys_are_finite(name: str, attention: str) -> None:
    """In every layer: one NaN row becomes a NaN key and value in the next. Left padding makes such rows in causal
    attention, a sequence that is all padding makes them everywhere."""
    given = inputs(name, "left")
    for key in given:
        if key.endswith("attention_mask"):
            given[key][-1] = 0
    model = build(name, attention)
    with torch.no_grad():
        model(**given, output_hidden_states=True)  # transformers installs its hooks in the first call
        attn_rewriter.optimize(model, compiler="eager", strict=True)
        outputs = model(**given, output_hidden_states=True)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)
    layers = [*_hidden_states(outputs)]
    assert len(layers) >= 3
    for layer in layers:
        assert layer.isfinite().all()


def _hidden_states(outputs: Any) -> Iterator[torch.Tensor]:
    """Of every layer, and of the models inside a model."""
    for name, x in outputs.items():
        if name.endswith("hidden_states"):
            yield from x
        elif isinstance(x, transformers.utils.ModelOutput):
            yield from _hidden_states(x)
        elif isinstance(x, torch.Tensor):
            yield x


def checkpointed(model: Any) -> Any:
    """With its layers checkpointed, for training: each is a graph of its own, called by a higher-order operator."""
    model.config.use_cache = False  # else transformers logs a warning in the forward, which breaks the graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename the method
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@attentions
@architectures
def test_gradient_checkpointing(name: str, attention: str) -> None:
    padding = "left" if ARCHITECTURES[name].takes_padding else ""
    graphs = Graphs()
    model = checkpointed(optimized(name, attention, compiler=graphs))
    assert_right(model, name, attention, padding)
    (graph,) = graphs.graphs
    assert any(str(node.target) == "tag_activation_checkpoint" for node in graph.graph.nodes)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)


@pytest.mark.parametrize("also", ["autocast", "dynamic"])
@attentions
@pytest.mark.parametrize("name", ["llama", "bert", "whisper"])
def test_gradient_checkpointing_and(name: str, attention: str, also: str) -> None:
    """Masks and numbers come into the bodies from outside."""
    padding, autocast = "left", also == "autocast"
    model = checkpointed(optimized(name, attention, dynamic=True if also == "dynamic" else None))
    assert_right(model, name, attention, padding, autocast=autocast)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)


@attentions
@architectures
def test_autocast(name: str, attention: str) -> None:
    model = optimized(name, attention)
    assert_right(model, name, attention, autocast=True)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)


@attentions
@architectures
def test_dynamic_shapes(name: str, attention: str) -> None:
    padding = "left" if ARCHITECTURES[name].takes_padding else ""
    shapes = [{"batch": 5, "length": 13}, {"batch": 2, "length": 16}]  # 3 is an image's number of channels
    model = optimized(name, attention, dynamic=True)
    for shape in shapes:
        assert_right(model, name, attention, padding, **shape)
    assert breaks() == (1, 0)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)


@attentions
@pytest.mark.parametrize(("name", "rate"), [("gpt2", "attn_pdrop"), ("bert", "attention_probs_dropout_prob")])
def test_dropout(name: str, rate: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training it is part of what a site computes, in evaluation it is not."""
    monkeypatch.setitem(ARCHITECTURES[name].config, rate, 0.25)
    for training in (True, False):
        torch._dynamo.reset()
        model = optimized(name, attention).train(training)
        model(**inputs(name))
        assert_all_fused(model, ARCHITECTURES[name].n_sites)
        assert {site.spec.dropout_p for site in attn_rewriter.report_of(model).sites} == {0.25 * training}


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_returned_weights(name: str) -> None:
    """Someone wants to see the weights: then they are computed, bit by bit as before, and the report says why."""
    given = inputs(name, "left")
    model = build(name, "eager")
    expected = model(**given, output_attentions=True)
    outputs = attn_rewriter.optimize(model, compiler="eager", strict=True)(**given, output_attentions=True)
    report = attn_rewriter.report_of(model)
    assert (report.n_fused, report.n_sites) == (0, ARCHITECTURES[name].n_sites)
    for site in report.sites:
        assert any("weights are also returned" in refusal.reason for refusal in site.refusals)
    for key in expected.keys() & {"logits", "attentions", "encoder_attentions", "decoder_attentions"}:
        assert all(map(torch.equal, outputs[key], expected[key]))


# ---------------------------------------------------------------------------------------------------------------
# Generation


def generate(model: Any, name: str, cache: str) -> torch.Tensor:
    """Six tokens, greedily, for one whole prompt and others that are padded on the left."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    if cache != "dynamic":
        options["cache_implementation"] = cache
    return model.generate(**inputs(name, "left"), **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@attentions
@generating
def test_generate(name: str, attention: str, cache: str) -> None:
    """The same tokens; the first graph reads the prompts, the next go on from the cache. (`generate` calls an encoder
    by itself, not through the model's compiled call.)"""
    model = optimized(name, attention)
    tokens = generate(model, name, cache)
    n_graphs, n_breaks = breaks()
    assert n_graphs >= 2
    assert n_breaks == 0
    architecture = ARCHITECTURES[name]
    assert_all_fused(model, n_graphs * (architecture.n_sites - architecture.n_encoder_sites))
    assert torch.equal(tokens, generate(build(name, attention), name, cache))


@pytest.mark.parametrize(("name", "attention"), [("llama", "eager"), ("mistral", "sdpa"), ("whisper", "eager")])
def test_generate_recompiles_no_more_than_without(name: str, attention: str) -> None:
    """A rewritten graph asks no more of its sizes than Dynamo's own does."""
    plain = build(name, attention)
    plain.compile(backend="eager")
    generate(plain, name, "dynamic")
    expected = breaks()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generate(optimized(name, attention), name, "dynamic")
    assert breaks() == expected


# ---------------------------------------------------------------------------------------------------------------
# With Inductor


@pytest.mark.parametrize(
    ("name", "attention", "padding", "autocast"),
    [("llama", "eager", "left", False), ("bert", "sdpa", "", True)],
)
def test_inductor(name: str, attention: str, padding: str, autocast: bool) -> None:
    model = optimized(name, attention, compiler="inductor")
    assert_right(model, name, attention, padding, autocast=autocast)
    assert_all_fused(model, ARCHITECTURES[name].n_sites)
    assert breaks() == (1, 0)


def test_inductor_with_gradient_checkpointing() -> None:
    model = checkpointed(optimized("opt", "eager", compiler="inductor"))
    assert_right(model, "opt", "eager", "left")
    assert_all_fused(model, ARCHITECTURES["opt"].n_sites)
    assert breaks() == (1, 0)


def test_inductor_generates() -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    model = optimized("qwen2", "eager", compiler="inductor")
    tokens = model.generate(**inputs("qwen2", "left"), **options)
    assert_all_fused(model, 2 * 2)
    assert torch.equal(tokens, build("qwen2", "eager").generate(**inputs("qwen2", "left"), **options))


def test_rotary_positions_are_not_tried_as_two_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that is a sum is no sum of weights; a trial copies the graph."""
    tried: list[Any] = []
    monkeypatch.setattr(distribute, "_is_two_attentions", lambda *given: tried.append(given))
    model = optimized("llama", "eager")
    step(model, inputs("llama", "left"))
    assert_all_fused(model, ARCHITECTURES["llama"].n_sites)
    assert not tried
