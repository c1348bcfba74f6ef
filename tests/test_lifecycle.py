"""What happens to an optimised model afterwards: it is changed, moved, copied, saved, exported."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import AutoModelForCausalLM

import attn_rewriter
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.models import NothingNarrowed, build, inputs
from tests.test_ways_in import Attention, Model


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    attn_rewriter.unpatch()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 16, 32).bfloat16().float()  # exact in most types


def eager(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


def optimized(model: nn.Module) -> nn.Module:
    return attn_rewriter.optimize(model, compiler="eager", strict=True)


def right(model: nn.Module, exact: nn.Module, draws: Tensor, call: Callable[..., Tensor] = nn.Module.__call__) -> None:
    """Assert that a compiled model computes what its own code does with the weights that it has now; `exact` is an
    eager model with the same weights."""
    exact = exact.double()
    dtype = next(iter(model.parameters())).dtype
    with torch.no_grad():
        ways = partial(call, model), partial(eager, call, model)
        fused, plain = ([way(x.to(dtype)) for x in draws] for way in ways)
        assert_as_accurate(fused, plain, [call(exact, x.double()) for x in draws])


# -- changes --------------------------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Doubled(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def twice(model: nn.Module, *_: Any) -> Tensor:
    return _[-1] * 2


def doubled(model: nn.Module) -> dict[str, Tensor]:
    return {name: x * 2 for name, x in model.state_dict().items()}


def instead_of(module: nn.Module) -> None:
    """What libraries do that wrap a forward."""
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def set_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls


def hooks_replaced(model: nn.Module) -> None:
    """What libraries do that put hooks aside for a while."""
    model._forward_hooks = OrderedDict()
    model.register_forward_hook(twice)


def normed(model: nn.Module) -> None:
    parametrizations.weight_norm(model.layers[0].qkv)
    model.layers[0].qkv.parametrizations.weight.original0.data.mul_(2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "a forward hook": lambda model: model.register_forward_hook(twice),
    "all forward hooks replaced": hooks_replaced,
    "a forward pre-hook": lambda model: model.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "a weight written": lambda model: model.layers[0].qkv.weight.data.mul_(2),
    "a weight replaced": lambda model: setattr(model.layers[0].qkv, "weight", nn.Parameter(torch.randn(96, 32))),
    "weights loaded": lambda model: model.load_state_dict(doubled(model)),
    "weights assigned": lambda model: model.load_state_dict(doubled(model), assign=True),
    "weights tied": lambda model: setattr(model.layers[0], "qkv", model.layers[1].qkv),
    "a parametrization": lambda model: parametrize.register_parametrization(model.layers[0].qkv, "weight", Double()),
    "a weight norm": normed,
    "a layer's forward replaced": lambda model: instead_of(model.layers[0]),
    "the forward replaced": instead_of,
    "a layer's class": lambda model: set_class(model.layers[0], Doubled),
    "a number": lambda model: setattr(model.layers[0], "heads", 2),
    "a layer swapped": lambda model: model.layers.__setitem__(0, Attention(heads=2)),
    "a layer added": lambda model: model.layers.append(Attention()),
    "a layer removed": lambda model: model.layers.__delitem__(0),
    "frozen": lambda model: model.requires_grad_(False),
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_is_seen(change: str, x: Tensor) -> None:
    model, exact = optimized(Model()), Model()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():  # as below: what is compiled anew sees everything
        before = model(x[0])
    for each in (model, exact):
        torch.manual_seed(1)
        CHANGES[change](each)
    right(model, exact, x)
    if change not in ("nothing", "frozen"):  # else this could not fail
        now = eager(model, x[0].to(next(iter(model.parameters())).dtype))
        assert now.dtype != before.dtype or not torch.allclose(now, before, atol=1e-3)
    report = attn_rewriter.report_of(model)
    assert report.n_fused == report.n_sites in (2, 2 + len(model.layers))  # compiled once, or once more


def test_hooks_come_and_go(x: Tensor) -> None:
    """Of the model itself, also for gradients."""
    model = optimized(Model().double())

    def gradient(call: Callable[..., Any]) -> Tensor:
        leaf = x[0].double().requires_grad_()
        return torch.autograd.grad(call(model, leaf).sum(), leaf)[0]

    registers = (
        (model.register_full_backward_hook, lambda _, given, wanted: (given[0] * 5,)),
        (model.register_full_backward_pre_hook, lambda _, given: (given[0] * 7,)),
        (model.register_forward_hook, twice),
    )
    without = gradient(lambda model, x: model(x))
    for register, hook in registers:
        with register(hook):
            assert_the_same(gradient(lambda model, x: model(x)), gradient(eager))
            assert not torch.allclose(gradient(eager), without)
        assert_the_same(gradient(lambda model, x: model(x)), without)


def test_functional_call(x: Tensor) -> None:
    """Other weights for one call."""
    model = optimized(Model())
    exact = copy.deepcopy(model)
    right(model, exact, x)
    right(model, exact, x, lambda model, x: torch.func.functional_call(model, doubled(model), (x,)))
    right(model, exact, x)


def test_another_device(x: Tensor) -> None:
    model = optimized(Model())
    model(x[0])
    assert model.to("meta")(x[0].to("meta")).device.type == "meta"
    assert attn_rewriter.report_of(model).n_fused == 4


def test_inside_another_compiled_function(x: Tensor) -> None:
    """One graph: the outer compilation reads through the inner one."""
    model, x = optimized(Model().double()), x.double()
    outer = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
    assert_the_same(outer(x[0]), eager(model, x[0]) * 2)


# -- copies ---------------------------------------------------------------------------------------------------------


class Showing(Model):
    """Returns weights besides, so that this site is refused."""

    def forward(self, x: Tensor) -> Any:
        weights = (x @ x.mT).softmax(-1)
        return super().forward(weights @ x), weights


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


def patched(model: nn.Module) -> nn.Module:
    attn_rewriter.patch(compiler="eager")
    return torch.compile(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="attn_rewriter", options={"compiler": "eager"})


@pytest.mark.parametrize("way", [optimized, patched, compiled])
@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_has_its_own_weights(how: str, way: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    model = way(Showing())
    expected = model(x[0])[0]
    another = COPIES[how](model)
    assert another.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for parameter in another.parameters():
            parameter.mul_(2)
    exact = copy.deepcopy(getattr(another, "_orig_mod", another))
    right(another, exact, x, lambda model, x: model(x)[0])
    assert not torch.allclose(another(x[0])[0], expected, atol=1e-3)
    assert torch.equal(model(x[0])[0], expected)


def test_a_copy_is_as_before(x: Tensor) -> None:
    """It runs its own code, as a copy after `Module.compile` does, until it is optimised itself."""
    model = optimized(Model())
    model(x[0])
    another = copy.deepcopy(model)
    assert torch.equal(another(x[0]), eager(model, x[0]))
    with pytest.raises(ValueError, match="optimize"):
        attn_rewriter.report_of(another)
    optimized(another)(x[0])
    assert attn_rewriter.report_of(another).n_fused == attn_rewriter.report_of(model).n_fused == 2


def test_a_report_can_be_pickled(x: Tensor) -> None:
    """It holds no graph, also where a site was refused."""
    model = optimized(Showing())
    model(x[0])
    report = attn_rewriter.report_of(model)
    assert (report.n_fused, report.n_sites) == (2, 3)
    assert pickle.loads(pickle.dumps(report)) == report


# -- files and formats ----------------------------------------------------------------------------------------------


def test_save_pretrained(tmp_path: Path) -> None:
    given, plain = inputs("llama"), build("llama", "eager")
    model = optimized(build("llama", "eager"))
    model(**given)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    weights = plain.state_dict()
    for each in (model, again):
        assert each.state_dict().keys() == weights.keys()
        assert all(torch.equal(x, weights[name]) for name, x in each.state_dict().items())
    with NothingNarrowed():
        exact = build("llama", "eager", torch.float64)(**given).logits
    assert_as_accurate(optimized(again)(**given).logits, plain(**given).logits, exact)
    model.load_state_dict(OrderedDict((name, x * 0) for name, x in plain.state_dict().items()))
    assert not model(**given).logits.any()


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_of_the_model_itself(strict: bool, x: Tensor) -> None:
    """A file for other places keeps the model's own operations, as from a model that is not optimised."""
    model = Model()
    expected = torch.export.export(model, (x[0],), strict=strict)
    optimized(model)(x[0])
    exported = torch.export.export(model, (x[0],), strict=strict)
    assert exported.graph_module.code == expected.graph_module.code
    assert torch.equal(exported.module()(x[0]), eager(model, x[0]))
