"""`device_map`: models that accelerate puts on several devices, and whose weights may wait elsewhere."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import attn_rewriter
from attn_rewriter import Report
from tests import models
from tests.accuracy import assert_as_accurate, assert_as_accurate_over_draws
from tests.running import gradients, rewritten

big_modeling = pytest.importorskip("accelerate.big_modeling")
hooks = pytest.importorskip("accelerate.hooks")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FUSED = {(f"model.layers.{i}.self_attn", "scale 0.3536, causal", "sdpa") for i in range(2)}
BLOCKS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def dispatch(model: Any, where: dict[str, Any] | None = None, **options: Any) -> Any:
    """What `from_pretrained(device_map=where)` does with a model; by default all devices are the same."""
    where = where or dict.fromkeys([*model._modules, *model._buffers], "cpu")
    given = {"main_device": "cpu", "force_hooks": True, "skip_keys": model._skip_keys_device_placement}
    return big_modeling.dispatch_model(model, where, **{**given, **options})


def n_graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def fused(report: Report) -> set[tuple[str, str, str | None]]:
    return {(site.module, str(site.spec), site.kernel) for site in report.sites}


def hooks_first(model: Any) -> Callable[[], Report]:
    attn_rewriter.optimize(dispatch(model), compiler="eager")
    return lambda: attn_rewriter.report_of(model)


def hooks_last(model: Any) -> Callable[[], Report]:
    dispatch(attn_rewriter.optimize(model, compiler="eager"))
    return lambda: attn_rewriter.report_of(model)


def patched(model: Any) -> Callable[[], Report]:
    patch = attn_rewriter.patch(compiler="eager")
    dispatch(model)
    model.forward = torch.compile(model.forward)
    return lambda: patch.report


def compiled(model: Any) -> Callable[[], Report]:
    backend = attn_rewriter.Backend(attn_rewriter.Options(compiler="eager"))
    dispatch(model).compile(backend=backend)
    return lambda: backend.report


def undivided(name: str, dtype: torch.dtype, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of an eager model on the device of its inputs, and what they are in float64; under `patch()` too."""
    device = given["input_ids"].device
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        eager = models.build(name, "eager", dtype).to(device)(**given).logits
        with models.NothingNarrowed():
            return eager, models.build(name, "eager", torch.float64).to(device)(**given).logits


def assert_right(model: Any) -> None:
    """The logits of a Llama, on the CPU or put there when it is called."""
    given = models.inputs("llama")
    with torch.no_grad():
        assert_as_accurate(model(**given, use_cache=False).logits, *undivided("llama", torch.float32, given))


@pytest.mark.parametrize("way", [hooks_first, hooks_last, patched, compiled])
def test_hooks_that_only_move(way: Callable[[Any], Callable[[], Report]]) -> None:
    """They are compiled with the model: there is one graph, and attention is what it is without them."""
    model = models.build("llama", "eager")
    report = way(model)
    for _ in range(2):
        assert_right(model)
    assert fused(report()) == FUSED
    assert not n_graph_breaks()


@pytest.mark.parametrize("name", ["gpt2", "bert", "bart", "mistral"])
def test_architectures(name: str) -> None:
    """Tied weights, buffers, two stacks; with padding and the default cache, forward and backward."""
    eager, model = (models.build(name, "eager") for _ in range(2))
    attn_rewriter.optimize(dispatch(model), compiler="eager")
    with models.NothingNarrowed():
        exact = models.build(name, "eager", torch.float64)

    def draw(i: int) -> tuple[Any, Any, Any]:
        given = models.inputs(name, padding="right", draw=i)
        step = lambda model: gradients(model, [model(**given).logits])  # noqa: E731
        with models.NothingNarrowed():
            truth = step(exact)
        return step(model), step(eager), truth

    assert_as_accurate_over_draws(draw)
    report = attn_rewriter.report_of(model)
    assert report.n_fused == report.n_sites == models.ARCHITECTURES[name].n_sites, report


def test_offloaded(tmp_path: Path) -> None:
    """A hook that loads weights is not compiled. It breaks the graph at each projection, where the weights of the
    attention are still alive, as far as Dynamo can see."""
    model = attn_rewriter.optimize(models.build("llama", "eager"), compiler="eager")
    dispatch(model, dict.fromkeys(BLOCKS, "cpu") | {"model.layers.1": "disk"}, offload_dir=tmp_path)
    for _ in range(2):
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        assert_right(model)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    first, second = attn_rewriter.report_of(model).sites
    assert (str(first.spec), first.kernel) == ("scale 0.3536, causal", "sdpa")
    assert second.kernel is None
    (reason,) = second.reasons
    assert reason.startswith(f"the attention weights are also returned into a graph break at {hooks.__file__}:")


def test_hooks_come_and_go(tmp_path: Path) -> None:
    """Whatever becomes of a model's hooks after it was compiled is seen."""
    model = attn_rewriter.optimize(models.build("llama", "eager"), compiler="eager")
    assert_right(model)
    dispatch(model)
    assert_right(model)
    hooks.remove_hook_from_submodules(model.model.layers[1])
    assert_right(model)
    hooks.remove_hook_from_submodules(model)
    assert_right(model)
    assert attn_rewriter.report_of(model).n_fused == attn_rewriter.report_of(model).n_sites
    dispatch(model, dict.fromkeys(BLOCKS, "cpu") | {"model.layers.0": "disk"}, offload_dir=tmp_path)
    assert_right(model)
    hooks.remove_hook_from_submodules(model)
    assert_right(model)


class Watching(hooks.ModelHook):  # type: ignore[misc]
    """A hook of one's own, which Dynamo must not see where accelerate hides it."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(torch.compiler.is_compiling())
        return args, kwargs


def test_other_hooks_stay_hidden() -> None:
    model = attn_rewriter.optimize(dispatch(models.build("llama", "eager")), compiler="eager")
    hooks.add_hook_to_module(model.model.layers[1], watching := Watching(), append=True)
    for _ in range(3):
        assert_right(model)
    assert watching.seen == [False] * 3


def test_hooks_in_a_row() -> None:
    model = attn_rewriter.optimize(dispatch(models.build("llama", "eager")), compiler="eager")
    hooks.add_hook_to_module(model.model.layers[1], hooks.AlignDevicesHook("cpu", io_same_device=True), append=True)
    assert_right(model)
    assert fused(attn_rewriter.report_of(model)) == FUSED
    assert not n_graph_breaks()


def test_copies_and_files(tmp_path: Path) -> None:
    model = models.build("llama", "eager")
    names = [*model.state_dict()]
    attn_rewriter.optimize(dispatch(model), compiler="eager")
    assert_right(model)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    for p in model.parameters():
        p.data.zero_()
    for other in (copied, attn_rewriter.optimize(copied, compiler="eager"), loaded):
        assert_right(other)
    assert [*model.state_dict()] == [*copied.state_dict()] == names
    assert fused(attn_rewriter.report_of(copied)) == FUSED


def test_generate() -> None:
    given = {**models.inputs("llama", padding="left"), "max_new_tokens": 4, "do_sample": False}
    model = models.build("llama", "eager")
    expected = model.generate(**given)
    attn_rewriter.optimize(dispatch(model), compiler="eager")
    assert torch.equal(model.generate(**given), expected)
    report = attn_rewriter.report_of(model)
    assert report.n_fused == report.n_sites
    assert not n_graph_breaks()


@pytest.mark.parametrize("kernel", ["sdpa", "reference", "flex"])
def test_a_mask_from_another_device(kernel: str) -> None:
    """What a mask holds is read wherever it was made; what is then needed of it is moved to where attention is."""

    def padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        n = q.shape[-2]
        keep = torch.ones(n, n, dtype=torch.bool).tril() & padding[:, None, None, :]
        scores = q @ k.mT * 0.25
        return scores.masked_fill(~keep.to(q.device), float("-inf")).softmax(-1) @ v

    query, key, value = (torch.randn(2, 4, 8, 16, device="meta") for _ in range(3))
    devices: list[torch.device] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        (node,) = (node for node in gm.graph.nodes if "attn_rewriter" in node.meta)
        given = tree_leaves([x.meta.get("example_value") for x in node.all_input_nodes])
        devices.extend(x.device for x in given if isinstance(x, Tensor))
        return gm.forward

    function, report = rewritten(padded, kernel=kernel, compiler=compiler, device="cpu")
    function(query, key, value, torch.ones(2, 8, dtype=torch.bool))
    (site,) = report().sites
    assert str(site.spec) == "scale 0.25, causal and key padding"
    assert {device.type for device in devices} == {"meta"}


_SCRIPT = """
import sys
import attn_rewriter
assert "accelerate" not in sys.modules
import torch
import accelerate.hooks as hooks

plain = {name: vars(hooks.AlignDevicesHook)[name] for name in ("pre_forward", "post_forward")}
changed = lambda: any(vars(hooks.AlignDevicesHook)[name] is not plain[name] for name in plain)
x = torch.ones(2, 4)
without, model = torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4))
hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu", io_same_device=True))
backend = lambda: attn_rewriter.Backend(attn_rewriter.Options(compiler="eager"))
assert not changed()
attn_rewriter.optimize(without, compiler="eager")(x)
attn_rewriter.explain(without, x)
torch.compile(model, backend="eager")(x)
torch.compile(without, backend=backend())(x)
assert not changed()
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
# The way in to try:
{way}
assert changed()
assert not torch._dynamo.utils.counters["graph_break"]
"""
_WAYS = {
    "optimize": "attn_rewriter.optimize(model, compiler='eager')(x)",
    "explain": "attn_rewriter.explain(model, x)",
    "patch": "attn_rewriter.patch(compiler='eager'); torch.compile(model)(x)",
    "a method": "torch.compile(model.forward, backend=backend())(x)",
    "a function": "torch.compile(lambda x: model(x), backend=backend())(x)",
    "a function of a model": "torch.compile(lambda model, x: model(x), backend=backend())(model, x)",
    "a backend": "torch.compile(model, backend=backend())(x)",
    "a backend by name": "torch.compile(model, backend='attn_rewriter', options={'compiler': 'eager'})(x)",
}


@pytest.mark.parametrize("way", _WAYS)
def test_hooks_are_changed_where_a_model_has_them(way: str) -> None:
    """Not when this package is imported, nor for other models, nor for what others compile; then by every way in."""
    script = _SCRIPT.replace("{way}", _WAYS[way])
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not ran.returncode, ran.stderr


TWO = {**dict.fromkeys(BLOCKS[:3], 0), **dict.fromkeys(BLOCKS[3:], 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("devices", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)])
def test_gpus(devices: int, name: str, padding: str, dtype: torch.dtype) -> None:
    given = {key: x.cuda() for key, x in models.inputs(name, padding).items()}
    eager, truth = undivided(name, dtype, given)
    model = models.build(name, "eager", dtype)
    where = TWO if devices == 2 else dict.fromkeys(TWO, 0)
    attn_rewriter.optimize(dispatch(model, where, main_device=0))
    with torch.no_grad():
        found = [model(**given).logits for _ in range(2)]
    report = attn_rewriter.report_of(model)
    assert report.n_fused == report.n_sites == 2, report
    assert not n_graph_breaks()
    kept = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for logits in found:
        assert_as_accurate(logits[kept], eager[kept], truth[kept])
    tokens = {**given, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(**tokens).shape == (models.BATCH, models.LENGTH + 4)


@pytest.mark.gpu(2)
def test_auto(tmp_path: Path) -> None:
    """`from_pretrained(device_map="auto")`, where the first GPU has no room for all of the model."""
    given = {key: x.cuda() for key, x in models.inputs("llama", "left").items()}
    eager, truth = undivided("llama", torch.float32, given)
    saved = models.build("llama", "eager")
    saved.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in saved.parameters())
    room = {0: int(0.9 * size), 1: 10 * size}
    model = type(saved).from_pretrained(tmp_path, attn_implementation="eager", device_map="auto", max_memory=room)
    assert {str(p.device) for p in model.model.layers.parameters()} == {"cuda:0", "cuda:1"}
    attn_rewriter.optimize(model)
    with torch.no_grad():
        logits = model(**given).logits
    report = attn_rewriter.report_of(model)
    assert report.n_fused == report.n_sites == 2, report
    assert not n_graph_breaks()
    kept = given["attention_mask"].bool()
    assert_as_accurate(logits[kept], eager[kept], truth[kept])


@pytest.mark.gpu
def test_a_layer_in_main_memory() -> None:
    given = {key: x.cuda() for key, x in models.inputs("llama").items()}
    eager, truth = undivided("llama", torch.float32, given)
    model = models.build("llama", "eager")
    attn_rewriter.optimize(dispatch(model, dict.fromkeys(BLOCKS, 0) | {"model.layers.1": "cpu"}, main_device=0))
    with torch.no_grad():
        for _ in range(2):
            assert_as_accurate(model(**given).logits, eager, truth)
    first, *others = attn_rewriter.report_of(model).sites
    assert first.kernel is not None and {site.kernel for site in others} == {None}
