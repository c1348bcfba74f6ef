"""Bodies of higher-order operators: under which autocast they run, with gradients or without, and which stay closed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, map, scan, while_loop
from torch._higher_order_ops.base_hop import BaseHOP
from torch.fx import Graph, GraphModule

from attn_rewriter.graph import HIGHER_ORDER, Facts, inputs_of
from tests.accuracy import assert_as_accurate_over_draws, assert_the_same
from tests.running import rewritten, with_gradients

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.35).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.35 + b).softmax(-1) @ v


def half(enabled: bool = True, dtype: Any = torch.bfloat16, device: str = "cpu") -> Any:
    return torch.autocast(device, dtype, enabled=enabled)


# -- autocast -------------------------------------------------------------------------------------------------------


def on(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half():
        return biased(q, k, v, b)


def off(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half(False):
        return biased(q, k, v, b)


def off_within_on(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half():
        scale = (q @ k.transpose(-1, -2)).float().mean()
        with half(False):
            return biased(q, k, v, b) * scale


def on_within_off(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half(False):
        scale = (q @ k.transpose(-1, -2)).mean()
        with half():
            return biased(q, k, v, b) * scale


def elsewhere(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """For another device, which changes nothing here."""
    with half(device="cuda"):
        return biased(q, k, v, b)


def elsewhere_within_on(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half(), half(False, device="cuda"):
        return biased(q, k, v, b)


def of_the_default_type(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half(dtype=None):
        return biased(q, k, v, b)


def of_another_type(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half(dtype=torch.float16):
        return biased(q, k, v, b)


def scores_outside(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) * 0.35 + b).softmax(-1)
    with half():
        return weights @ v


def scores_inside(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half():
        weights = (q @ k.transpose(-1, -2) * 0.35 + b).softmax(-1)
    return weights @ v


def plain_attention(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half():
        return attend(q, k, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half():
        return nn.functional.scaled_dot_product_attention(q, k, v)


def checkpointed(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    with half():
        return torch.utils.checkpoint.checkpoint(biased, q, k, v, b, use_reentrant=False)


EXPORTED = (
    on,
    off,
    off_within_on,
    on_within_off,
    elsewhere,
    elsewhere_within_on,
    of_the_default_type,
    of_another_type,
    scores_outside,
    scores_inside,
    plain_attention,
    sdpa,
)


def draws(function: Callable[..., Any], plain: Callable[..., Any], exact: Callable[..., Any]) -> None:
    """A bias so large that in half precision it would be rounded away."""

    def draw(i: int) -> tuple[Any, Any, Any]:
        generator = torch.Generator().manual_seed(i)
        q, k, v = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
        b = 333.3 + torch.randn(6, 6, generator=generator)
        truth = exact(*(x.double() for x in (q, k, v, b)))
        return function(q, k, v, b), plain(q, k, v, b), truth

    assert_as_accurate_over_draws(draw)


def module(function: Callable[..., Any]) -> nn.Module:
    return type("Module", (nn.Module,), {"forward": lambda self, *args: function(*args)})()


def exported(function: Callable[..., Any]) -> Any:
    """A program from `torch.export`, whose regions are higher-order operators."""
    q = torch.ones(2, 4, 6, 8)
    return torch.export.export(module(function), (q, q, q, torch.ones(6, 6))).module()


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("function", EXPORTED, ids=lambda function: function.__name__)
def test_autocast_of_exported_programs(function: Callable[..., Any], verify: bool, within: bool) -> None:
    """Also where the program is called within autocast; `verify` sees what the program computes."""
    program = exported(function)

    def called(*args: Tensor) -> Tensor:
        with half() if within else nullcontext():
            return program(*args)

    compiled, report = rewritten(called, verify=verify)
    with torch.no_grad():
        draws(compiled, called, function)
    assert report().n_sites or function.__name__.startswith("scores_")  # which are in another body than the values


def test_autocast_is_fused_where_it_can_be() -> None:
    compiled, report = rewritten(exported(plain_attention))
    assert compiled(*(torch.ones(2, 4, 6, 8),) * 3, torch.ones(6, 6)).dtype == torch.bfloat16
    assert report().n_fused == 1


@pytest.mark.parametrize("outer", [on, off, off_within_on, on_within_off, checkpointed])
def test_autocast_around_checkpoints(outer: Callable[..., Any]) -> None:
    def called(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(outer, *args, use_reentrant=False)

    draws(rewritten(called)[0], called, outer)


def test_one_body_in_two_regions() -> None:
    """Dynamo takes the second call for the same as the first: nothing is known of what it runs under."""

    @torch.compiler.nested_compile_region
    def nested(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return biased(q, k, v, b)

    def function(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        with half():
            first = nested(q, k, v, b)
        return first.float() + nested(q, k, v, b)

    compiled, report = rewritten(function, compiler="aot_eager")
    given = [torch.randn(2, 4, 6, 8) for _ in range(3)] + [torch.randn(6, 6)]
    plain = torch.compile(function, backend="aot_eager")
    assert torch.equal(compiled(*given), plain(*given))
    for site in report().sites:
        assert site.kernel is not None or "under several autocast regions" in site.reasons[0]


# -- gradients ------------------------------------------------------------------------------------------------------


def without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        a = attend(q, k, v)
    return a * q


def with_gradients_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        a = attend(q, k, v)
        with torch.enable_grad():
            b = attend(q * 2, k, v)
    return a * b


def scores_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


def key_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.transpose(-1, -2)
    return (q @ k).softmax(-1) @ v


def value_product_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    with torch.no_grad():
        detached = weights @ v
    return detached * q


@pytest.mark.parametrize("as_program", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        without_gradients,
        with_gradients_again,
        scores_without_gradients,
        key_without_gradients,
        value_product_without_gradients,
    ],
)
def test_gradients_of_regions(function: Callable[..., Any], as_program: bool) -> None:
    given = [torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    program = torch.export.export(module(function), tuple(given)).module() if as_program else function
    compiled, _ = rewritten(program)
    for plain, fused in zip(with_gradients(program, given)[1], with_gradients(compiled, given)[1]):
        assert_the_same(fused, plain)


# -- what is looked into --------------------------------------------------------------------------------------------


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        return gradient + attend(q, k, v), gradient * v, gradient


def branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cond(q.sum() > 0, attend, lambda q, k, v: attend(q * 2, k, v), (q, k, v))


def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, attend(x, k, v)), (torch.tensor(0), q))[1]


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return map(lambda x: attend(x, k, v), torch.stack([q, q * 2]))


def scanned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scan(lambda c, x: (attend(c, k, x), attend(c, k, x) * 2), q, torch.stack([v, v * 2]))[1]


def scanned_in_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return associative_scan(lambda a, b: attend(a, b, b), torch.stack([q, k, v]), 0, combine_mode="generic")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("function", [Custom.apply, branches, loop, mapped, scanned, scanned_in_pairs])
def test_bodies(function: Callable[..., Any], grad: bool) -> None:
    """With and without gradients, as plain `torch.compile` computes it (or as it does not)."""
    if function is loop and grad:
        pytest.skip("PyTorch's own backward pass of `while_loop` needs Inductor")
    given = [torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=grad) for _ in range(3)]
    plain = with_gradients(torch.compile(lambda *args: function(*args), backend="aot_eager"), given)
    compiled, report = rewritten(lambda *args: function(*args), compiler="aot_eager", verify=True)
    found = with_gradients(compiled, given)
    assert_the_same(found[0], plain[0])
    assert_the_same(found[1], plain[1])
    assert report().n_sites


class Unknown(BaseHOP):
    """An operator of someone else's, which may do anything with its body."""

    def __init__(self) -> None:
        super().__init__("someone_elses")

    def __call__(self, body: Any, *operands: Any) -> Any:
        return super().__call__(body, *operands)


unknown = Unknown()


def test_an_unknown_operator_is_opaque() -> None:
    """Its body stays as it is, with the reason in words."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return unknown(attend, q, k, v) + attend(q * 2, k, v)

    given = [torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3)]
    compiled, report = rewritten(function, compiler="aot_eager")
    plain = torch.compile(function, backend="aot_eager")(*given)
    assert_the_same(compiled(*given), plain)
    inside = [site for site in report().sites if site.kernel is None]
    assert report().n_fused == 1 or len(inside) == 2
    assert any("a body of `someone_elses`" in reason for site in inside for reason in site.reasons)


def graph_of(operator: Any, *before: Any) -> tuple[Facts, list[Any]]:
    """A graph that calls a body, which returns its input, and its facts."""
    body = Graph()
    body.output((body.placeholder("x"),))
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2)
    node = graph.call_function(operator, (*before, graph.get_attr("body"), x))
    graph.output(node)
    modules = {"body": GraphModule({}, body)}
    return Facts(graph, modules), [x, node]


def test_an_unknown_operator_may_write() -> None:
    facts, (x, node) = graph_of(unknown)
    assert facts.writes(x) == [node]
    facts, (x, node) = graph_of(torch.ops.higher_order.wrap)
    assert facts.writes(x) == []


def test_inputs_are_bound_by_place() -> None:
    """Constants count: they have a placeholder, too."""
    body = Graph()
    inputs = [body.placeholder(name) for name in "xyz"]
    body.output(inputs[0])
    graph = Graph()
    x, y, condition = (graph.placeholder(name) for name in ("x", "y", "condition"))
    where = graph.get_attr("body")
    higher = torch.ops.higher_order
    calls = {
        "wrap": graph.call_function(higher.wrap, (where, x, 3, y)),
        "autocast": graph.call_function(higher.wrap_with_autocast, ("cpu", None, True, True, where, x, 3, y)),
        "grad": graph.call_function(higher.wrap_with_set_grad_enabled, (False, where, x, 3, y)),
        "subgraph": graph.call_function(higher.invoke_subgraph, (where, "name", x, 3, y)),
        "cond": graph.call_function(higher.cond, (condition, where, where, (x, 3, y))),
    }
    assert all(inputs_of(call, body) == [x, 3, y] for call in calls.values())
    assert inputs_of(graph.call_function(higher.wrap, (where, x, y)), body) is None
    assert inputs_of(graph.call_function(higher.scan, (where, [x], [y], [])), body) is None


def test_the_table_names_operators() -> None:
    """A name that this PyTorch does not have would never be looked into."""
    known = {operator.__name__ for operator in torch._ops._higher_order_ops.values()}
    import torch._functorch.autograd_function as functions

    assert HIGHER_ORDER.keys() <= known | {functions.autograd_function_apply.__name__}


def test_inference_mode_that_a_graph_enters() -> None:
    """AOTAutograd raises for a view of an input there, which plain code may not have: the attention stays as it is."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = (q @ k.mT).softmax(-1) @ v
        with torch.inference_mode():
            return before, F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 9, 9)]
    fused, report = rewritten(function, compiler="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = fused(*inputs)
    assert_the_same(found, function(*inputs))
    assert [site.kernel for site in report().sites] == ["sdpa", None]
    assert "enters inference mode" in str(report().sites[1].reasons)


def _doubled(x: Tensor) -> Tensor:
    x.mul_(2.0)
    return x.sum()


def _detached(x: Tensor) -> Tensor:
    x.detach().mul_(2.0)
    return x.sum()


TRANSFORMED: dict[str, Callable[[Tensor], Any]] = {
    "vmap": torch.vmap(_doubled),
    "jvp": lambda x: torch.func.jvp(_doubled, (x,), (torch.zeros_like(x),)),
    "grad": torch.func.grad(_detached),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.parametrize("operand", ["a key", "an input", "a mask"])
def test_what_a_transform_writes_into(operand: str, transform: str) -> None:
    """Nobody knows whose memory it writes into."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k * 1 if operand == "a key" else k
        mask = torch.ones(6, 6, dtype=q.dtype).tril()
        scores = q @ k.mT
        TRANSFORMED[transform](mask if operand == "a mask" else k)
        return scores.masked_fill(mask < 1.5, -1e9).softmax(-1) @ (v if operand == "a mask" else v + k)

    inputs = [torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3)]
    fused, _ = rewritten(function, verify=False)
    torch.testing.assert_close(fused(*(x.clone() for x in inputs)), function(*(x.clone() for x in inputs)))
