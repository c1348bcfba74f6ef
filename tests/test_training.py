"""Training as people do it: transformers' Trainer, mixed precision with scaled gradients, adapters, dropout. Every site
is fused, the weights move as right as eager's, and nothing is compiled or broken off that would not be without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import attn_rewriter
from attn_rewriter import Backend, Options, Report
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.models import ARCHITECTURES, NothingNarrowed, inputs
from tests.models import build as build_any

transformers.logging.set_verbosity_error()

STEPS, BATCH = 3, 2
COMPILER = "eager"


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = build_any(name, "eager", dtype)
    model.config.problem_type = "single_label_classification"  # an image's: noted in the first step, if it is not known
    return model


def sample(name: str, i: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One of a model's inputs, with something to learn."""
    given = {key: x[0] for key, x in inputs(name, draw=i, batch=1).items()}
    learned = given.get("decoder_input_ids", given.get("input_ids", torch.tensor(i % 2)))
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    return {**given, "labels": learned}


Result = dict[str, Any]


def updates(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """How the weights of each module have moved."""
    model = getattr(model, "_orig_mod", model)
    moved: dict[str, list[Tensor]] = {}
    for name, x in model.named_parameters():
        if x.requires_grad:
            moved.setdefault(name.rpartition(".")[0], []).append((x.detach() - before[name]).flatten())
    return {name: torch.cat(parts) for name, parts in moved.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    model = getattr(model, "_orig_mod", model)
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def trained(model: Any, name: str, folder: Path, **arguments: Any) -> Result:
    """The losses of a few steps of Trainer, and what they did to the weights. (By plain gradient descent: Adam's first
    step is as large for a gradient that is nothing but rounding as for any other.)"""
    pytest.importorskip("accelerate")  # which Trainer needs
    losses: list[Tensor] = []

    class Noting(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    dtype, before = next(model.parameters()).dtype, weights(model)
    fixed = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "optim": "sgd", "learning_rate": 0.1}
    count = STEPS * BATCH * arguments.get("gradient_accumulation_steps", 1)
    samples = [sample(name, i, dtype) for i in range(count)]
    args = TrainingArguments(str(folder), **fixed, **{**settings, **arguments})
    Noting(model=model, args=args, train_dataset=samples).train()
    return {"losses": torch.stack(losses), "updates": updates(model, before)}


# -- Trainer --------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "smoothing": {"label_smoothing_factor": 0.1},
}
UNNOTICED = {"bf16": {}, "checkpoints": {}, "reentrant": {}}  # what changes nothing in exact arithmetic


@functools.cache
def truth(name: str, case: str) -> Result:
    with NothingNarrowed():
        model = build(name, torch.float64)
        return trained(model, name, Path("unused"), **UNNOTICED.get(case, ARGUMENTS[case]))


def optimized(model: Any) -> tuple[Any, dict[str, Any], Callable[[], Report]]:
    """`optimize(model)` before Trainer gets it."""
    attn_rewriter.optimize(model, compiler=COMPILER, strict=True)
    return model, {}, lambda: attn_rewriter.report_of(model)


def patched(model: Any) -> tuple[Any, dict[str, Any], Callable[[], Report]]:
    """Trainer's own argument, under `patch()`."""
    patch = attn_rewriter.patch(compiler=COMPILER, strict=True)
    return model, {"torch_compile": True}, lambda: patch.report


def compiled(model: Any) -> tuple[Any, dict[str, Any], Callable[[], Report]]:
    """`torch.compile` before Trainer gets it, which then can't see which columns the model takes."""
    backend = Backend(Options(compiler=COMPILER, strict=True))
    return torch.compile(model, backend=backend), {"remove_unused_columns": False}, lambda: backend.report


def assert_all_fused(report: Report, n_sites: int) -> None:
    """In one graph, which serves all steps."""
    assert (report.n_fused, report.n_sites) == (n_sites, n_sites), report
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # will be "activation_checkpointing"
@pytest.mark.parametrize(
    ("name", "way", "case"),
    [
        ("llama", optimized, "as it is"),
        ("llama", patched, "checkpoints"),
        ("llama", optimized, "smoothing"),
        ("bert", patched, "as it is"),
        ("bert", optimized, "bf16"),
        ("bert", patched, "reentrant"),
        ("bart", compiled, "as it is"),
        ("bart", optimized, "checkpoints"),
        ("vit", optimized, "accumulation"),
        ("vit", patched, "bf16"),
    ],
)
def test_trainer(name: str, way: Callable[[Any], Any], case: str, tmp_path: Path) -> None:
    eager = trained(build(name), name, tmp_path, **ARGUMENTS[case])
    model, arguments, report = way(build(name))
    fused = trained(model, name, tmp_path, **arguments, **ARGUMENTS[case])
    assert_all_fused(report(), ARCHITECTURES[name].n_sites)
    assert_as_accurate(fused, eager, truth(name, case))


def test_trainer_knows_only_some_backends(tmp_path: Path) -> None:
    """accelerate keeps a list of them. What the README says about it is no longer needed when this fails."""
    with pytest.raises(ValueError, match="ATTN_REWRITER"):
        trained(build("vit"), "vit", tmp_path, torch_compile_backend="attn_rewriter")


@pytest.mark.parametrize("way", ["optimize", "patch"])
def test_accelerator(way: str) -> None:
    """What the README says to do instead."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    given = inputs("llama")
    eager, exact = build("llama")(**given).logits, build("llama", torch.float64)(**given).logits
    if way == "optimize":
        prepared = accelerate.Accelerator(cpu=True).prepare(attn_rewriter.optimize(build("llama"), compiler=COMPILER))
        fused, report = prepared(**given).logits, attn_rewriter.report_of(prepared)
    else:
        model = build("llama")
        with attn_rewriter.patch(compiler=COMPILER) as patch:
            fused = accelerate.Accelerator(cpu=True, dynamo_backend="inductor").prepare(model)(**given).logits
        report = patch.report
    assert_all_fused(report, ARCHITECTURES["llama"].n_sites)
    assert_as_accurate(fused, eager, exact)


# -- adapters -------------------------------------------------------------------------------------------------------


def with_adapters(model: Any, how: str) -> Any:
    """Low-rank adapters beside query and value, with random weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    if how == "get_peft_model":
        return peft.get_peft_model(model, config)
    model.add_adapter(config)
    return model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("how", "when"), [("get_peft_model", "before"), ("get_peft_model", "after"), ("add_adapter", "after")]
)
def test_adapters(how: str, when: str, tmp_path: Path) -> None:
    """Added before `optimize`, or to a model that has run compiled."""

    def run(model: Any) -> Result:
        return trained(model, "llama", tmp_path, label_names=["labels"])

    with NothingNarrowed():
        exact = run(with_adapters(build("llama"), how).double())
    eager = run(with_adapters(build("llama"), how))
    model = build("llama")
    if when == "before":
        model = with_adapters(model, how)
    optimal = attn_rewriter.optimize(model, compiler=COMPILER, strict=True)
    if when == "after":
        optimal(**inputs("llama"))
        model = with_adapters(model, how)
        torch._dynamo.utils.counters.clear()
    fused = run(model)
    assert all("lora" in name for name in fused["updates"])
    assert_all_fused(attn_rewriter.report_of(optimal), 2 if when == "before" else 4)
    assert_as_accurate(fused, eager, exact)


# -- scaled gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_float16_with_scaled_gradients(name: str) -> None:
    """Autocast and GradScaler in a loop of one's own. (On CPU Trainer takes `fp16=True` for nothing.)"""

    def run(model: Any, half: bool = True) -> Result:
        before, losses = weights(model), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=half)
        for i in range(STEPS):
            batch = inputs(name, draw=i)
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = model(**batch, labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        assert scaler.get_scale() == (2.0**10 if half else 1)  # no step was left out
        return {"losses": torch.stack(losses), "updates": updates(model, before)}

    model = attn_rewriter.optimize(build(name), compiler=COMPILER, strict=True)
    fused = run(model)
    assert_all_fused(attn_rewriter.report_of(model), ARCHITECTURES[name].n_sites)
    with NothingNarrowed():
        exact = run(build(name, torch.float64), half=False)
    assert_as_accurate(fused, run(build(name)), exact)


# -- dropout --------------------------------------------------------------------------------------------------------

P, HEADS, LENGTH = 0.3, 8, 64


def dropping(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.dropout((query @ key.mT).softmax(-1), P, training=True) @ value


@pytest.mark.parametrize("around", ["nothing", "checkpoints", "reentrant"])
def test_dropout(around: str) -> None:
    """Its rate, its mean, its spread over heads and rows; another draw every time; and one draw for a forward and its
    backward pass, also where a checkpoint computes the forward pass again. (With "eager" as the compiler PyTorch itself
    draws anew there.)"""

    def attend(*inputs: Tensor) -> Tensor:
        if around == "nothing":
            return dropping(*inputs)
        return checkpoint(dropping, *inputs, use_reentrant=around == "reentrant")

    backend = Backend(Options(compiler="aot_eager", strict=True))
    compiled = torch.compile(attend, backend=backend)
    query, key = (torch.zeros(2, HEADS, LENGTH, 16).double().requires_grad_() for _ in range(2))
    value = torch.eye(LENGTH).expand(2, HEADS, -1, -1).double().clone().requires_grad_()
    draws = [compiled(query, key, value) for _ in range(2)]  # the weights themselves, which are all alike
    assert backend.report.n_fused == 1 and backend.report.sites[0].spec.dropout_p == P  # type: ignore[union-attr]
    assert not torch.equal(*draws)
    for draw in draws:
        way = torch.randn_like(draw)
        (gradient,) = torch.autograd.grad(draw, value, way)
        assert_the_same((gradient * value).sum(), (draw * way).sum())  # as the result is linear in the value
        kept = draw.detach() != 0
        assert_the_same(draw[kept], torch.full_like(draw[kept], 1 / LENGTH / (1 - P)))
        for axes in ((0, 1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # all; of a head, a row, a column
            rate = 1 - kept.double().mean(axes)
            assert ((rate - P).abs() < 5 * (P * (1 - P) * rate.numel() / kept.numel()) ** 0.5).all()
