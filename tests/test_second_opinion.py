"""A second opinion finds out what was misread: each mending is undone in turn, and the site stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_rewriter.describe
import attn_rewriter.graph
import attn_rewriter.patterns.masks
import attn_rewriter.pipeline
from attn_rewriter import Backend, Options, RewriteError
from attn_rewriter.graph import Call, Facts
from attn_rewriter.kernels import KERNELS
from attn_rewriter.kernels.sdpa import SDPA
from attn_rewriter.patterns.masks import _RULES, MaskReader
from attn_rewriter.second_opinion import Opinions
from attn_rewriter.spec import Index
from tests.accuracy import assert_the_same
from tests.running import run_as_is, with_gradients
from tests.spellings import SPELLINGS, Spelling

INF = float("-inf")
Undo = Callable[[pytest.MonkeyPatch], None]


def draw(n: int = 3, dtype: torch.dtype = torch.float64, **how: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64).to(dtype, **how) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------
# Programs, and the mending that each of them needs


def arguments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(1, end=7), torch.arange(6)
    return (q @ k.mT * 0.35).masked_fill(j >= i[:, None], INF).softmax(-1) @ v


def named_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.arange(6).expand(7, 6)
    drop = (torch.diff(p, axis=0) == 1) & torch.ones(6, 6, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.35).masked_fill(drop, INF).softmax(-1) @ v


def types(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    edge = torch.ones(6, 7, dtype=torch.uint8).tril().diff(dim=-1)
    return (q @ k.mT * 0.35).masked_fill(edge.float() > 0, INF).softmax(-1) @ v


def written(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    keep = keep * 1
    s = (q @ k.mT * 0.35).masked_fill((keep == 0)[:, None, None, :], INF)
    keep.copy_(keep.flip(-1))
    return s.softmax(-1).masked_fill((keep == 0)[:, None, None, :], 0.0) @ v


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return ((q @ k.mT).masked_fill(m, torch.finfo(torch.float16).min) * 1e-5).softmax(-1) @ v


class Autocast(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (q @ k.transpose(-1, -2) * 0.35 + b).softmax(-1) @ v


def region(*inputs: Tensor) -> Tensor:
    return torch.export.export(Autocast(), inputs).module()(*inputs)


def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.35).softmax(-1).to(torch.float8_e4m3fn).to(v.dtype) @ v


def empty_rows(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.35).masked_fill((keep == 0)[:, None, None, :], -1e9).softmax(-1) @ v


def _arange_of_one(patch: pytest.MonkeyPatch) -> None:
    right = attn_rewriter.patterns.masks._RULES["arange"]

    def wrong(reader: MaskReader, facts: Facts, node: Any, call: Call, at: Any) -> Any:
        return right(reader, facts, node, Call(call.name, {**call.args, "start": 0}), at)

    patch.setitem(_RULES, "arange", wrong)


def _difference(axis: int | None) -> Undo:
    def undo(patch: pytest.MonkeyPatch) -> None:
        """In the type of Python's numbers, along this axis."""

        def wrong(reader: MaskReader, facts: Facts, node: Any, call: Call, at: Any) -> Any:
            along = (call["dim"] if axis is None else axis) % len(at)
            later = (*at[:along], at[along] + Index(1), *at[along + 1 :])
            one, other = (reader.read(facts, call["input"], where, node) for where in (later, at))
            return attn_rewriter.patterns.masks.apply(lambda a, b: a + -b, one, other)

        patch.setitem(_RULES, "diff", wrong)
        patch.setattr(attn_rewriter.patterns.masks, "as_dtype", lambda value, dtype: value)

    return undo


def _text_alone(patch: pytest.MonkeyPatch) -> None:
    """What is spelled alike is alike."""

    def meaning(self: Any, node: Any, dims: Any) -> str:
        def spelled(x: Any) -> str:
            return f"{x.target}{torch.fx.map_arg((x.args, x.kwargs), spelled)}"

        return f"{spelled(node)} {dims}"

    patch.setattr(attn_rewriter.describe._Reading, "_meaning", meaning)


def _nothing_comes_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attn_rewriter.describe, "levels", lambda steps: ())
    patch.setattr(attn_rewriter.describe, "fully_masked_rows", lambda *given: "impossible")


def _no_autocast_is_asked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attn_rewriter.pipeline, "narrowed", lambda *given: None)


def _casts_are_rounding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attn_rewriter.describe._Reading, "_check_precision", lambda *given: None)


def _every_row_sees_a_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attn_rewriter.describe, "every_row_sees_a_key", lambda *given: True)


LARGE = 333.3 + draw(1, torch.float32)[0][0, 0, :, :6]  # numbers that bfloat16 rounds by 1
KEEP = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
MENDINGS: dict[str, tuple[Callable[..., Tensor], Undo, list[Tensor]]] = {
    "arguments": (arguments, _arange_of_one, draw()),
    "arguments by another name": (named_axis, _difference(-1), draw()),
    "types": (types, _difference(None), draw()),
    "a write between": (written, _text_alone, [*draw(), KEEP]),
    "a scale after a mask": (scaled, _nothing_comes_back, draw(dtype=torch.float16)),
    "regions": (region, _no_autocast_is_asked_for, [*draw(dtype=torch.float32), LARGE]),
    "casts": (cast, _casts_are_rounding, draw(dtype=torch.float32)),
    "rows without keys": (empty_rows, _every_row_sees_a_key, [*draw(), KEEP]),
}


@pytest.mark.parametrize("mending", MENDINGS)
def test_it_finds_out_what_was_misread(mending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, undo, inputs = MENDINGS[mending]
    torch._dynamo.reset()
    backend = Backend(Options(compiler="aot_eager"))
    undo(monkeypatch)
    with pytest.warns(UserWarning, match="because it misread it: .* Please report this"):
        found = torch.compile(program, backend=backend)(*inputs)
    (site,) = backend.report.sites
    assert site.kernel is None and "misread" in str(site.refusals[-1])
    assert torch.allclose(found, program(*inputs), rtol=1e-3)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="misread") as raised:
        torch.compile(program, backend=Backend(Options(compiler="aot_eager", strict=True)))(*inputs)
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), RewriteError)


@pytest.mark.parametrize("mending", MENDINGS)
def test_with_the_mending_there_is_nothing_to_find(mending: str) -> None:
    program, _, inputs = MENDINGS[mending]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = torch.compile(program, backend=Backend(Options(compiler="aot_eager", strict=True)))(*inputs)
    assert torch.allclose(found, program(*inputs), rtol=1e-3)


def test_nobody_is_asked_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    program, undo, inputs = MENDINGS["types"]
    undo(monkeypatch)
    torch._dynamo.reset()
    backend = Backend(Options(compiler="aot_eager", verify=False))
    found = torch.compile(program, backend=backend)(*inputs)
    assert backend.report.n_fused == 1 and not torch.allclose(found, program(*inputs))


# ---------------------------------------------------------------------------------------------------------------
# What it must not do


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.computes], ids=lambda s: s.name)
def test_no_false_alarm(spelling: Spelling, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each type that eager code takes; and that nothing went wrong on the way."""
    said: list[str] = []
    ask = Opinions._ask

    def asked(self: Opinions, site: Any) -> str:
        said.append(ask(self, site))
        return said[-1]

    monkeypatch.setattr(Opinions, "_ask", asked)
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        backend = Backend(Options(compiler=run_as_is, strict=True))
        try:
            spelling.function(*spelling.inputs(dtype, 0))
        except RuntimeError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            torch.compile(spelling.function, backend=backend)(*spelling.inputs(dtype, 0))
    assert not any(said)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "through its data": lambda keep: keep.data.zero_(),
    "as an output": lambda keep: torch.logical_not(keep, out=keep),
    "scattered": lambda keep: keep.scatter_(-1, torch.zeros_like(keep, dtype=torch.long), True),
    "by chance": lambda keep: keep.bernoulli_(1.0),
    "through a view": lambda keep: keep.unfold(-1, 2, 2)[..., 0].fill_(False),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_a_mask(write: str) -> None:
    """Whatever writes: it is run, or makes up what it writes, where that is dear."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.arange(k.size(2)) <= torch.arange(q.size(2))[:, None]
        WRITES[write](keep)
        return (q @ k.mT).masked_fill(~keep, -1e30).softmax(-1) @ v

    assert _fused(function, draw(dtype=torch.float32)) == 1


def test_gradients_that_are_zero() -> None:
    """Of a row that sees one key."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.arange(k.size(2)) == torch.arange(q.size(2))[:, None]
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert _fused(function, [x.requires_grad_() for x in draw(dtype=dtype)]) == 1


def test_inputs_and_random_numbers_stay_as_they_are() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, cache: Tensor) -> Tensor:
        cache.add_(1.0)
        keep = keep.clone()
        keep[:, 0] = 1
        return (q @ (k + cache).mT).masked_fill((keep == 0)[:, None, None], -1e9).softmax(-1) @ v + torch.rand(())

    outputs, caches = [], []
    for verify in (False, "auto"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        keep, cache = KEEP.clone(), torch.zeros(2, 4, 6, 8, dtype=torch.float64)
        compiled = torch.compile(function, backend=Backend(Options(compiler="aot_eager", verify=verify)))
        outputs.append(compiled(*draw(), keep, cache))
        caches.append(cache)
        assert torch.equal(keep, KEEP)
    assert torch.equal(*outputs) and torch.equal(*caches) and (caches[0] == 1).all()


def test_a_large_mask_is_compared_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """At some queries, and all of their keys."""

    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(600)
        distance = i[:, None] - i
        return (q @ k.mT).masked_fill((distance < 0) | (distance >= 100), INF).softmax(-1) @ v

    monkeypatch.setattr(attn_rewriter.second_opinion, "COORDINATES", 2**12)
    monkeypatch.setattr(attn_rewriter.second_opinion, "SCORES", {"cpu": 1})
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 600, 8, generator=generator) for _ in range(3)]
    assert _fused(windowed, inputs) == 1
    right = attn_rewriter.patterns.masks.compare

    def by_one(left: Index, index: Index, *rest: Any) -> Any:
        return right(left, index + Index(1) if index.offset == 100 else index, *rest)

    monkeypatch.setattr(attn_rewriter.patterns.masks, "compare", by_one)
    with pytest.warns(UserWarning, match="a mask is read as"):
        assert _fused(windowed, inputs) == 0


def _fused(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    torch._dynamo.reset()
    backend = Backend(Options(compiler="aot_eager"))
    assert_close = torch.testing.assert_close
    assert_close(torch.compile(function, backend=backend)(*inputs), function(*inputs))
    return backend.report.n_fused


def test_one_of_many_equal_layers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = Opinions._ask
    monkeypatch.setattr(Opinions, "_ask", lambda self, site: asked.append(site) or ask(self, site))

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(6, 6, dtype=torch.bool).tril()
        for _ in range(6):
            q = (q @ k.mT * 0.35).masked_fill(~keep, INF).softmax(-1) @ v
        return q

    assert _fused(layers, draw()) == 6
    assert len(asked) == 1


class Off(SDPA):
    """SDPA that is wrong on some inputs alone."""

    def attend(self, *given: Any) -> Any:
        return super().attend(*given) * 1.01


def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it needs no compiling."""
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    with pytest.warns(UserWarning, match="sdpa is off by .* in its output"):
        assert _fused(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, draw(dtype=torch.float32)) == 0


def test_gradients_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that the model detaches gets none."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.35).softmax(-1) @ v

    inputs = [x.requires_grad_() for x in draw()]
    torch._dynamo.reset()
    backend = Backend(Options(compiler="aot_eager", strict=True))
    assert_the_same(with_gradients(torch.compile(function, backend=backend), inputs), with_gradients(function, inputs))

    class Detached(type(KERNELS["reference"])):  # type: ignore[misc]
        def attend(self, spec: Any, shapes: Any, device: Any, tensors: Any) -> Any:
            return super().attend(spec, shapes, device, _Detached(tensors))

    monkeypatch.setitem(KERNELS, "reference", Detached())
    torch._dynamo.reset()
    backend = Backend(Options(compiler="aot_eager"))
    with pytest.warns(UserWarning, match="its gradients differ"):
        torch.compile(function, backend=backend)(*inputs)
    assert backend.report.n_fused == 0


class _Detached(dict[Any, Any]):
    def __init__(self, tensors: Any) -> None:
        super().__init__({name: x.detach() if name == "key" else x for name, x in tensors.items()})


def value_of_the_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = k * 2
    return (q @ x.mT * 0.35).softmax(-1) @ x


def value_of_the_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q * 0.5
    return (x @ k.mT).softmax(-1) @ x


def bias_of_the_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + q[..., :1]).softmax(-1) @ v


def bias_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.5
    return (s + s).softmax(-1) @ v


@pytest.mark.parametrize("verify", ["auto", True])
@pytest.mark.parametrize("function", [value_of_the_key, value_of_the_query, bias_of_the_query, bias_of_the_scores])
def test_operands_that_are_made_of_others(function: Callable[..., Tensor], verify: Any) -> None:
    """Their gradients are added up once, in the model as in the spec."""
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in draw(dtype=torch.float32)]
    backend = Backend(Options(compiler="aot_eager", strict=True, verify=verify))
    torch.compile(function, backend=backend)(*inputs)
    assert backend.report.n_fused == 1
