"""Other derivatives than first ones going back: forward-mode AD, second derivatives, and none at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from attn_rewriter import Backend, Options
from attn_rewriter.forward_ad import forward_gradients
from tests.accuracy import assert_the_same
from tests.running import run_as_is, with_gradients
from tests.standins import installed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
INF = float("-inf")


def given(*shape: int, n: int = 3, grad: bool = False) -> list[Tensor]:
    shape = shape or (2, 4, 6, 8)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for _ in range(n)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.35).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    drop = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.35).masked_fill(drop, INF).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.arange(6) < torch.tensor([4, 6])[:, None, None, None]
    return (q @ k.mT * 0.35).masked_fill(~keep, INF).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The bias is learned, and computed from an input."""
    return (q @ k.mT * 0.35 + (q * v).mean((0, 1))[:, :6].tanh()).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT * 0.35).softmax(-1) @ v


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v).transpose(1, 2).flatten(2)


def written_into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = plain(q, k, v)
    o += q
    return o.mul_(2)


def one_of_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(plain(q, q, q), k, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v * F.silu(q)


def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    of = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1]])
    keep = (of[:, None, :, None] == of[:, None, None, :]) & torch.ones(6, 6, dtype=torch.bool).tril()
    return (q @ k.mT * 0.35).masked_fill(~keep, INF).softmax(-1) @ v


FUNCTIONS = (documents, plain, causal, padded, biased, grouped, merged, written_into, one_of_itself, sdpa)
EAGER: tuple[Any, ...] = ("eager", "eager_noexcept", run_as_is)


def compiled(function: Any, compiler: Any, **options: Any) -> tuple[Any, Backend]:
    backend = Backend(Options(compiler=compiler, **options))
    return torch.compile(function, backend=backend), backend


# -- second derivatives ---------------------------------------------------------------------------------------------


def second(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a gradient, by all inputs."""
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


@pytest.mark.parametrize("compiler", EAGER)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives(function: Callable[..., Any], compiler: Any) -> None:
    """As PyTorch has them, and still fused."""
    inputs = given(grad=True)
    fused, backend = compiled(function, compiler)
    assert_the_same(second(fused, inputs), second(function, inputs))
    assert backend.report.n_fused == backend.report.n_sites > 0
    assert_the_same(with_gradients(fused, inputs), with_gradients(function, inputs))


def test_third_derivatives() -> None:
    inputs = given(grad=True)
    fused, _ = compiled(plain, "eager")

    def third(function: Callable[..., Any]) -> Any:
        value = function(*inputs).square().sum()
        for _ in range(3):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, inputs, create_graph=True))
        return value

    assert_the_same(third(fused), third(plain))


def test_hessians_and_penalties() -> None:
    """As they are written: a double backward in the loss, and `torch.autograd.functional`."""
    q, k, v = given(1, 1, 3, 2)
    fused, _ = compiled(plain, "eager")

    def hessian(function: Callable[..., Any]) -> Any:
        return torch.autograd.functional.hessian(lambda q: function(q, k, v).square().sum(), q)

    assert_the_same(hessian(fused), hessian(plain))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(8, 24, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return plain(*self.qkv(x).split(8, -1))

    model = Model()
    other = copy.deepcopy(model)
    model.compile(backend=Backend(Options(compiler="eager")))
    x = given(2, 5, 8, n=1)[0]
    for each in (model, other):
        inputs = x.clone().requires_grad_()
        output = each(inputs).square().sum()
        (gradient,) = torch.autograd.grad(output, inputs, create_graph=True)
        (output + (gradient.norm() - 1).square()).backward()
    assert_the_same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


def test_the_kernel_goes_back_where_nobody_differentiates_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the forward pass is computed once."""
    from attn_rewriter.kernels.twice import _Twice

    calls: list[str] = []
    computed = _Twice.computed
    monkeypatch.setattr(_Twice, "computed", lambda *args: calls.append("computed") or computed(*args))
    inputs = given(grad=True)
    fused, _ = compiled(causal, "eager")
    fused(*inputs).sum().backward()
    output = fused(*inputs).sum()
    torch.autograd.grad(output, inputs, retain_graph=True)
    torch.autograd.grad(output, inputs)
    assert not calls
    second(fused, inputs)
    assert calls == ["computed"]


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
def test_of_some_inputs(wanted: list[int]) -> None:
    inputs = [x.requires_grad_(i in wanted) for i, x in enumerate(given())]
    wrt = [x for x in inputs if x.requires_grad]

    def found(function: Callable[..., Any]) -> Any:
        first = torch.autograd.grad(function(*inputs).square().sum(), wrt, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wrt)

    assert_the_same(found(compiled(plain, "eager")[0]), found(plain))


@pytest.mark.parametrize("kernel", ["fa2", "fa4", "flash"])
def test_kernels_of_packages(kernel: str) -> None:
    """In half precision; their operator is not asked for gradients that are computed in another way."""
    inputs = [x.half().requires_grad_() for x in given()]
    exact = second(plain, [x.detach().double().requires_grad_() for x in inputs])
    with installed():
        backend = Backend(Options(compiler="eager", kernel=kernel), device=_hopper())
        fused = torch.compile(plain, backend=backend)
        for x, y in zip(second(fused, inputs), exact):
            torch.testing.assert_close(x.double(), y, rtol=0.05, atol=0.05)
    assert backend.report.n_fused == 1


def _hopper() -> Any:
    from attn_rewriter import Device

    return Device.parse("sm_90")


def test_with_dropout_it_says_so() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * 0.35).softmax(-1), 0.5) @ v

    inputs = given(grad=True)
    fused, backend = compiled(function, "eager")
    with pytest.raises(RuntimeError, match="with dropout has no second derivative"):
        second(fused, inputs)
    assert backend.report.n_fused == 1
    fused(*inputs).sum().backward()


def test_compilers_with_aotautograd_see_no_change() -> None:
    graphs = []

    def seen(gm: Any, inputs: Any) -> Any:
        graphs.append([node.name for node in gm.graph.nodes])
        return gm

    from torch._dynamo.backends.common import aot_autograd

    inputs = given(grad=True)
    fused, _ = compiled(plain, aot_autograd(fw_compiler=seen))
    assert_the_same(with_gradients(fused, inputs), with_gradients(plain, inputs))
    assert not any("twice" in name for graph in graphs for name in graph)
    aot, backend = compiled(plain, "aot_eager")
    aot(*inputs)
    assert not backend.settings.twice


# -- forward mode ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_level() -> Iterator[None]:
    yield
    assert forward_ad._current_level == -1 and not forward_gradients()


def tangents(function: Callable[..., Any], inputs: list[Tensor], wanted: int = 1) -> Any:
    """By the first inputs."""
    with forward_ad.dual_level():
        assert forward_gradients()
        duals = [forward_ad.make_dual(x, x.detach().cos()) if i < wanted else x for i, x in enumerate(inputs)]
        return tuple(forward_ad.unpack_dual(function(*duals)))


@pytest.mark.parametrize("compiler", [*EAGER, "aot_eager"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_level_when_it_is_compiled(function: Callable[..., Any], compiler: Any) -> None:
    inputs = given()
    fused, backend = compiled(function, compiler)
    for wanted in (1, 3):
        assert_the_same(tangents(fused, inputs, wanted), tangents(function, inputs, wanted))
    assert not backend.report.n_fused
    assert all("forward-mode AD" in site.reasons[0] for site in backend.report.sites)
    assert_the_same(fused(*inputs), function(*inputs))
    assert backend.report.n_fused  # outside of it


@pytest.mark.parametrize("compiler", [*EAGER, "aot_eager"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_level_afterwards(function: Callable[..., Any], compiler: Any) -> None:
    """Dynamo does not see it; the graph as it was is compiled then."""
    inputs = given()
    fused, backend = compiled(function, compiler)
    assert_the_same(fused(*inputs), function(*inputs))
    n = backend.report.n_fused
    assert n
    for _ in range(2):
        assert_the_same(tangents(fused, inputs), tangents(function, inputs))
        assert_the_same(fused(*inputs), function(*inputs))
    assert backend.report.n_fused == n


@pytest.mark.parametrize("compiler", EAGER)
def test_transforms_around_a_compiled_function(compiler: Any) -> None:
    q, k, v = given()
    fused, _ = compiled(causal, compiler)
    fused(q, k, v)
    for transform in (torch.func.jvp, torch.autograd.functional.jvp):
        found, expected = (transform(lambda q, f=f: f(q, k, v), (q,), (q.cos(),)) for f in (fused, causal))
        assert_the_same(found, expected)
    found, expected = (torch.func.grad(lambda q, f=f: f(q, k, v).sum())(q) for f in (fused, causal))
    assert_the_same(found, expected)


def test_forward_over_reverse() -> None:
    """A Hessian times a vector."""
    q, k, v = given()

    def product(function: Callable[..., Any]) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q.clone().requires_grad_(), q.cos())
            (gradient,) = torch.autograd.grad(function(dual, k, v).square().sum(), dual)
            return tuple(forward_ad.unpack_dual(gradient))

    fused, _ = compiled(plain, "eager")
    fused(q.clone().requires_grad_(), k, v)
    assert_the_same(product(fused), product(plain))


# -- none -----------------------------------------------------------------------------------------------------------


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(plain, q, k, v, use_reentrant=False)


def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpointed(q, k, v) + q

    return checkpoint(inner, q, k, v, use_reentrant=False)


def several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def layer(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
        return plain(q, k, k), k * 2, 3

    for _ in range(3):
        q, k, n = checkpoint(layer, q, k, use_reentrant=False)
        q = q * n
    return q + v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def layer(q: Tensor, k: Tensor) -> Tensor:
        q.mul_(2)
        return plain(q, k, k)

    q = q.clone()
    return checkpoint(layer, q, k, use_reentrant=False) + q


def branch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.35).softmax(-1) @ v


def with_branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(q.sum() > 0, branch, lambda q, k, v: branch(q * 2, k, v), (q, k, v))

    return checkpoint(layer, q, k, v, use_reentrant=False)


def partly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        a = checkpointed(q, k, v)
    return a * checkpointed(q, k, v)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("function", [checkpointed, nested, several, in_place, with_branches, partly])
def test_checkpoints(function: Callable[..., Any], compiler: str, grad: bool) -> None:
    """Fused, without a warning, whether anything is computed again or not."""
    if function in (with_branches, in_place) and grad:
        pytest.skip("PyTorch can't compute this again")
    inputs = given(grad=grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        fused, backend = compiled(function, compiler)
        assert_the_same(with_gradients(fused, inputs), with_gradients(function, inputs))
        if grad:
            with torch.no_grad():
                assert_the_same(fused(*inputs), function(*inputs))
    assert backend.report.n_fused == backend.report.n_sites > 0, backend.report


def test_a_checkpoint_with_contexts_stays() -> None:
    """Which may do anything."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(plain, q, k, v, use_reentrant=False, context_fn=contexts)

    inputs = given(grad=True)
    fused, backend = compiled(function, "aot_eager")
    assert_the_same(with_gradients(fused, inputs), with_gradients(function, inputs))
    assert backend.report.n_fused == 1


# -- what several sites share ---------------------------------------------------------------------------------------


def _outputs(order: list[int], *weights: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    found = {i: weights[i] @ v for i in order}
    return tuple(found[i] for i in range(len(weights)))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]])
@pytest.mark.parametrize("what", ["bias", "mask", "padding", "documents"])
def test_shared_whatever_comes_first(what: str, order: list[int]) -> None:
    """The scores are in one order, the outputs in another one."""
    shared: dict[str, Tensor] = {
        "bias": torch.randn(6, 6, dtype=torch.float64),
        "mask": torch.eye(6, dtype=torch.bool) | (torch.arange(6)[:, None] * 5 % 7 > torch.arange(6)),
        "padding": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool),
        "documents": torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1]]),
    }

    def masked(scores: Tensor, x: Tensor) -> Tensor:
        if what == "bias":
            return scores + x
        if what == "documents":
            x = x[:, None, :, None] == x[:, None, None, :]
        return scores.masked_fill(~(x if what != "padding" else x[:, None, None, :]), INF)

    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        pairs = ((q, k), (k, q), (q * 2, k))
        return _outputs(order, *(masked(a @ b.mT * 0.35, x).softmax(-1) for a, b in pairs), v=v)

    inputs = [*given(grad=True), shared[what].requires_grad_(what == "bias")]
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        fused, backend = compiled(function, compiler, strict=True)
        assert_the_same(with_gradients(fused, inputs), with_gradients(function, inputs))
        assert backend.report.n_fused == 3
