"""Attention weights on demand: those of the modules that were named, while all others are fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attn_rewriter
from attn_rewriter.withhold import is_kept
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.models import NothingNarrowed, build, inputs

LAYERS = {"bert": "layer.{}.attention.self", "llama": "layers.{}.self_attn"}


def outputs(model: nn.Module, name: str) -> Any:
    given = inputs(name, "right")
    return model(**{key: x for key, x in given.items() if key != "labels"}, output_attentions=True)


@pytest.mark.parametrize("keep", [[], [0], [1], [0, 1], None], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_some_layers(name: str, keep: list[int] | None) -> None:
    torch._dynamo.reset()
    eager = outputs(build(name, "eager").eval(), name)
    with NothingNarrowed():
        exact = outputs(build(name, "eager").eval().double(), name)
    patterns = None if keep is None else ["*." + LAYERS[name].format(i) for i in keep]
    model = attn_rewriter.optimize(build(name, "eager").eval(), compiler="aot_eager", keep_weights=patterns)
    found = outputs(model, name)
    kept = [0, 1] if keep is None else keep
    assert attn_rewriter.report_of(model).n_fused == 2 - len(kept)
    for i in range(2):
        if i in kept:
            assert_as_accurate(found.attentions[i], eager.attentions[i], exact.attentions[i])
        else:
            assert found.attentions[i].shape == (0,) and found.attentions[i].is_meta  # no number comes of it
    assert_as_accurate(found[0], eager[0], exact[0])


def test_weights_that_are_used_stay() -> None:
    """What is computed from weights is wanted, whoever asks."""

    def entropy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights, weights.square().sum()

    given = [torch.randn(1, 2, 9, 16) for _ in range(3)]
    function = attn_rewriter.optimize(entropy, compiler="eager", keep_weights=[])
    output, _, squares = function(*given)
    expected = entropy(*given)
    assert torch.equal(output, expected[0]) and torch.equal(squares, expected[2])
    assert attn_rewriter.report_of(function).n_fused == 0


@pytest.mark.parametrize(
    "uses",
    [
        lambda weights, v: weights.amax(-1),
        lambda weights, v: weights * v.sum(),
        lambda weights, v: weights[:, :, 0],
        lambda weights, v: (torch._dynamo.graph_break(), weights.sum())[1],
    ],
    ids=["largest", "product", "row", "after a graph break"],
)
def test_what_is_computed_from_weights_is_right(uses: Any) -> None:
    torch._dynamo.reset()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        output = weights @ v
        return output, uses(weights, v)

    given = [torch.randn(1, 2, 9, 16, dtype=torch.float64) for _ in range(3)]
    function = attn_rewriter.optimize(attention, compiler="eager", keep_weights=[])
    assert_the_same(function(*given), attention(*given))


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return used(self.inner, x)


@torch._dynamo.disable(recursive=False)
def used(inner: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Runs as it is, while what it calls is compiled by itself."""
    output, weights = inner(x)
    return output * weights.sum()


class Hooked(nn.Module):
    """Dynamo does not trace its hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.inner.register_forward_hook(torch._dynamo.disable(lambda module, given, found: found[0] * found[1].sum()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("made", [Outer, Hooked])
def test_what_is_compiled_by_itself_keeps_its_weights(made: type[nn.Module]) -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 2, 9, 16, dtype=torch.float64)
    model = attn_rewriter.optimize(made(), compiler="eager", keep_weights=[])
    assert_the_same(model(x), made()(x))
    assert [site.kernel for site in attn_rewriter.report_of(model).sites] == [None]


@pytest.mark.parametrize("what", [Attention(), Attention().forward], ids=["module", "function"])
def test_what_is_handed_to_the_compiler_does_not(what: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(what, backend="attn_rewriter", options={"compiler": "eager", "keep_weights": []})
    assert compiled(torch.randn(1, 2, 9, 16))[1].is_meta


class Layers(nn.Module):
    """Someone's model, which compiles its layers one by one, and adds up what their weights say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": Attention()}) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        every = []
        for layer in self.layers:
            x, weights = torch.compile(layer["attention"])(x)
            every.append(weights)
        return x + sum(weights.sum() for weights in every), every


@pytest.mark.parametrize("keep", [[], ["layers.1"]], ids=str)
def test_layers_that_are_compiled_under_a_patch_keep_their_weights(keep: list[str]) -> None:
    torch._dynamo.reset()
    model, x = Layers(), torch.randn(1, 2, 9, 16, dtype=torch.float64)
    with attn_rewriter.patch(compiler="eager", keep_weights=keep) as patched:
        found = model(x)
    torch._dynamo.reset()
    assert_the_same(found, model(x))
    assert {site.kernel for site in patched.report.sites} == {None}


@pytest.mark.parametrize("again", [False, True], ids=["compiled in place", "compiled once more"])
def test_models_from_transformers_under_a_patch(again: bool) -> None:
    torch._dynamo.reset()
    with attn_rewriter.patch(compiler="eager", keep_weights=["*.layer.1.*"]):
        model = build("bert", "eager").eval()
        found = outputs(torch.compile(model) if again else model, "bert").attentions
    assert [weights.is_meta for weights in found] == [True, False]


def test_training_with_weights_withheld() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    given = [torch.randn(1, 2, 9, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    function = attn_rewriter.optimize(attention, compiler="aot_eager", keep_weights=[], strict=True)
    output, weights = function(*given)
    assert attn_rewriter.report_of(function).n_fused == 1 and weights.numel() == 0
    found = torch.autograd.grad(output.sum(), given)
    assert_the_same(found, torch.autograd.grad(attention(*given)[0].sum(), given))


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("model.layers.3.self_attn", "model.layers.3.self_attn", True),
        ("layers.3.self_attn", "model.layers.3.self_attn", True),
        ("layers.3.self_attn", "model.layers.3.*", True),
        ("layers.4.self_attn", "model.layers.3.*", False),
        ("layers.13.self_attn", "*.3.self_attn", False),
        ("layers.3.self_attn.softmax", "model.layers.3.self_attn", True),
        ("model.layers.3.self_attn", "model.layers.3", True),
        ("model.layers.31.self_attn", "model.layers.3", False),
        ("anything", "*", True),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert is_kept(path, [pattern]) == expected


def test_patterns_that_match_nothing() -> None:
    model = build("bert", "eager")
    with pytest.raises(ValueError, match=r"no module's path matches 'encoder.layers.\*' \(keep_weights\)"):
        attn_rewriter.optimize(model, keep_weights=["encoder.layers.*"])
    with pytest.raises(TypeError, match="keep_weights is a list of patterns of module paths, not 'encoder'"):
        attn_rewriter.optimize(model, keep_weights="encoder")
