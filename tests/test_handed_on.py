"""Masks that one graph makes and another one reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attn_rewriter
from attn_rewriter import buffers
from attn_rewriter.context_parallel import Ring
from tests.accuracy import assert_the_same

N, D = 7, 8


class Model(nn.Module):
    """A mask, something that Dynamo can't read, and two attentions."""

    def __init__(self, mask: Callable[[Tensor], Tensor], between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.mask, self.between = mask, between

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask(positions)
        torch._dynamo.graph_break()
        self.between(mask)
        for _ in range(2):
            x = attend(x, mask)
        return x


def attend(x: Tensor, mask: Tensor) -> Tensor:
    scores = x @ x.mT
    return (scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask).softmax(-1) @ x


def causal(positions: Tensor) -> Tensor:
    n = positions.size(-1)
    return torch.ones(n, n, dtype=torch.bool).tril()


def added(positions: Tensor) -> Tensor:
    return torch.zeros(2, 1, *causal(positions).shape).masked_fill(~causal(positions), torch.finfo().min)


def window(positions: Tensor) -> Tensor:
    steps = torch.arange(positions.size(-1))
    distance = steps - steps[:, None]
    return ((distance <= 0) & (distance > -3))[None, None]


def by_position(positions: Tensor) -> Tensor:
    """As transformers does it: where positions do not go on, another sequence begins."""
    document = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    return causal(positions) & (document[:, None, :, None] == document[:, None, None, :])


def of_positions(positions: Tensor) -> Tensor:
    return (positions[:, None] <= positions[:, :, None])[:, None]


def nothing(mask: Tensor) -> None:
    pass


@torch._dynamo.disable
def opened(mask: Tensor) -> None:
    mask.fill_(mask.new_ones(()) if mask.dtype == torch.bool else 0)


class Sometimes:
    """Opens a mask, or does something else to it, at some calls and not at others, which no graph sees."""

    def __init__(self, what: Callable[[Tensor], Any] = opened) -> None:
        self.what, self.now = what, False

    @torch._dynamo.disable
    def __call__(self, mask: Tensor) -> None:
        if self.now:
            self.what(mask)


TOGETHER, APART = torch.arange(N)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3]])


def optimized(*parts: Any) -> nn.Module:
    torch._dynamo.reset()
    return attn_rewriter.optimize(Model(*parts), compiler="eager", strict=True)


def assert_right(model: nn.Module, positions: Tensor = TOGETHER) -> None:
    x = torch.randn(2, 3, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_the_same(model(x, positions), model._call_impl(x, positions))


def said(model: nn.Module) -> list[str]:
    return [str(site.spec) for site in attn_rewriter.report_of(model).sites]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (causal, "causal"),
        (added, "causal"),
        (window, "causal, sliding window 3"),
        (by_position, "causal"),
        (of_positions, "causal"),
    ],
)
def test_known(mask: Any, words: str) -> None:
    model = optimized(mask, nothing)
    for _ in range(3):
        assert_right(model)
    assert said(model) == [words] * 2


@pytest.mark.parametrize("mask", [causal, added, by_position])
def test_written_into(mask: Any) -> None:
    """What was said of a mask holds for as long as nobody writes into it."""
    model = optimized(mask, opened)
    assert_right(model)
    assert not any("causal" in words for words in said(model))
    model = optimized(mask, sometimes := Sometimes())
    for sometimes.now in (False, True, False):
        assert_right(model)
    assert said(model)[:2] == ["causal"] * 2 and "causal" not in said(model)[2]


def _like(mask: Tensor) -> Tensor:
    """Another one, which hides the first key alone."""
    hidden = torch.arange(mask.size(-1)).expand(mask.shape) == 0
    return ~hidden if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill(hidden, torch.finfo().min)


def _data_replaced(mask: Tensor) -> None:
    mask.data = _like(mask)


def _set(mask: Tensor) -> None:
    mask.set_(_like(mask))


def _set_to_a_view(mask: Tensor) -> None:
    mask.set_(torch.cat([_like(mask), _like(mask)])[len(mask) :])


def _made_smaller_and_larger(mask: Tensor) -> None:
    shape, other = mask.shape, _like(mask)
    mask.resize_(1).resize_(4 * mask.numel()).resize_(shape).copy_(other)


def _turned(mask: Tensor) -> None:
    """The same memory and version, read along other strides."""
    mask.data = mask.data.mT


def _moved_within(mask: Tensor) -> None:
    mask.data = mask.data.roll(1, -1).mT.contiguous().mT


def _exchanged(mask: Tensor) -> None:
    torch.utils.swap_tensors(mask, _like(mask))


def _memory_let_go_and_filled(mask: Tensor) -> None:
    other, storage = _like(mask), mask.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    mask.copy_(other)


@pytest.mark.parametrize("mask", [causal, added, by_position])
@pytest.mark.parametrize(
    "what",
    [
        _data_replaced,
        _set,
        _set_to_a_view,
        _made_smaller_and_larger,
        _turned,
        _moved_within,
        _exchanged,
        _memory_let_go_and_filled,
    ],
)
def test_memory_exchanged(what: Callable[[Tensor], Any], mask: Any) -> None:
    """At every call, or at some: what was said was of the memory that the tensor had then."""
    hidden = torch._dynamo.disable(what)
    assert_right(optimized(mask, hidden))
    model = optimized(mask, sometimes := Sometimes(what))
    for sometimes.now in (False, True, False, True):
        assert_right(model)
    assert said(model)[:2] == ["causal"] * 2


def test_made_of_a_buffer() -> None:
    """What is said of a mask holds for as long as what it was read from does."""

    class Sliced(Model):
        def __init__(self) -> None:
            super().__init__(lambda positions: self.kept[: positions.size(-1), : positions.size(-1)], nothing)
            self.register_buffer("kept", torch.ones(2 * N, 2 * N, dtype=torch.bool).tril())

    torch._dynamo.reset()
    model = attn_rewriter.optimize(Sliced(), compiler="eager", strict=True)
    assert_right(model)
    assert said(model) == ["causal"] * 2
    model.kept.fill_(True)
    assert_right(model)
    model.kept = torch.ones(2 * N, 2 * N, dtype=torch.bool).triu()
    assert_right(model)


def test_another_mask() -> None:
    """Documents where there was one sequence, and one again; the other way round it stays a tensor."""
    model = optimized(by_position, nothing)
    for positions in (TOGETHER, APART, TOGETHER, APART):
        assert_right(model, positions)
    assert said(model)[:2] == ["causal"] * 2 and "causal" not in said(model)[2]
    model = optimized(by_position, nothing)
    for positions in (APART, TOGETHER):
        assert_right(model, positions)
    assert not any("causal" in words for words in said(model))


def test_here_and_there() -> None:
    """A tensor that is added and holds zero and one number that masks is a mask, wherever it holds which; one that
    holds anything else is added."""

    def by_position_added(positions: Tensor) -> Tensor:
        return torch.zeros(2, 1, N, N).masked_fill(~by_position(positions), torch.finfo().min)

    model = optimized(by_position_added, nothing)
    for positions in (APART, TOGETHER, APART):
        assert_right(model, positions)
    assert said(model) == ["mask tensor [batch, query, key]"] * 2
    model = optimized(by_position_added, nothing)
    for positions in (TOGETHER, APART, TOGETHER):
        assert_right(model, positions)
    assert said(model) == ["causal"] * 2 + ["mask tensor [batch, query, key]"] * 2
    for written, more in ((0.0, []), (-1.0, ["bias"] * 2)):
        sometimes = Sometimes(lambda mask, written=written: mask[..., 2, 0].fill_(written))
        model = optimized(by_position_added, sometimes)
        for sometimes.now in (False, True):
            assert_right(model, APART)
        assert said(model) == ["mask tensor [batch, query, key]"] * 2 + more


def test_masks_of_others_are_not_looked_at() -> None:
    """Only those that a graph of ours made: to look at a tensor is to wait for its device."""

    def function(x: Tensor, mask: Tensor) -> Tensor:
        return attend(x, mask)

    compiled = attn_rewriter.optimize(function, compiler="eager")
    compiled(torch.randn(2, 3, N, D), causal(TOGETHER))
    assert "causal" not in said(compiled)[0]


def test_a_graph_of_another_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was rewritten outside of `context_parallel` is compiled again within, and each is kept."""

    def function(x: Tensor) -> Tensor:
        return attend(x, causal(x[0, 0, :, 0][None]))

    compiled = attn_rewriter.optimize(function, compiler="eager")
    x = torch.randn(2, 3, N, D, dtype=torch.float64)
    rings = [None, Ring("a mesh", "options"), Ring("another mesh", "options")]
    for n in (1, 2, 3, 3, 3):
        monkeypatch.setattr(buffers, "ring", lambda around=rings[n - 1]: around)
        assert_the_same(compiled(x), function(x))
        assert len(said(compiled)) == n
    monkeypatch.setattr(buffers, "ring", lambda: None)
    compiled(x)
    assert len(said(compiled)) == 3
