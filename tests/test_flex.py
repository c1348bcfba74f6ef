"""What FlexAttention is handed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_rewriter
from attn_rewriter import AttentionSpec
from attn_rewriter.kernels.blocks import BLOCK, TENSORS, block_mask, shown_blocks
from attn_rewriter.kernels.flex import _RowMajor
from attn_rewriter.spec import Shapes, TensorMask
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.running import rewritten, truth


@pytest.mark.parametrize("dynamic", [False, True])
def test_biases_are_computed_and_laid_out_before_they_are_read(dynamic: bool) -> None:
    """As Inductor compiles T5's: `[1, heads, q_len, kv_len]` by lookups that leave the heads next to each other."""

    def looked_up(table: Tensor, buckets: Tensor) -> Tensor:
        return table[buckets].permute(2, 0, 1).unsqueeze(0)

    @torch.compile(dynamic=dynamic)
    def laid_out(table: Tensor, buckets: Tensor) -> Tensor:
        return _RowMajor.apply(looked_up(table, buckets))

    table = torch.randn(32, 4, dtype=torch.float64, requires_grad=True)
    for length in (16, 24):
        buckets = torch.randint(32, (length, length))
        bias, plain = laid_out(table, buckets), looked_up(table, buckets)
        assert bias.is_contiguous() and not plain.is_contiguous()
        assert torch.equal(bias, plain)
        gradient = torch.randn_like(bias)
        found, expected = (torch.autograd.grad(x, table, gradient)[0] for x in (bias, plain))
        assert_the_same(found, expected)


LENGTH = 3 * BLOCK


def left_padded(lowest: float) -> Tensor:
    """An additive mask `[2, 1, LENGTH, LENGTH]` as `generate` hands it in: causal, the second sequence padded by more
    than a block, where no key is left."""
    i = torch.arange(LENGTH)
    keep = (i <= i[:, None]) & (i >= torch.tensor([0, BLOCK + 5])[:, None, None])
    return torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~keep[:, None], lowest)


def test_blocks_that_an_additive_mask_hides_are_left_out() -> None:
    mask = TensorMask("mask", ("batch", "query", "key"))
    shapes = Shapes(2, 4, 4, LENGTH, LENGTH, 16, 16, torch.float32)
    tensors = {
        "query": torch.empty(2, 4, LENGTH, 16),
        "mask": shown_blocks(left_padded(torch.finfo(torch.float32).min)),
    }
    blocks = dict(zip(TENSORS, block_mask(mask, shapes, tensors)))
    # Of the padded sequence, rows without any key keep them all: that is what adding the same to all of them means.
    assert blocks["full_kv_num_blocks"].flatten(1).tolist() == [[1, 2, 3], [3, 3, 2]]
    assert not blocks["kv_num_blocks"].any()  # what is taken needs no mask besides


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, float("-inf"), -1e9, -10.0], ids=str)
def test_an_additive_mask_that_nobody_can_look_into(lowest: float) -> None:
    """It is added, hidden keys or not; rows that it hides as a whole have equal weights, as in eager code."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v

    inputs = [*(torch.randn(2, 4, LENGTH, 16) for _ in range(3)), left_padded(lowest)]
    if lowest == float("-inf"):
        inputs[3][1, :, : BLOCK + 5] = 0.0
    function, report = rewritten(attention, kernel="flex")
    with torch.no_grad():
        fused = function(*inputs)
    (site,) = report().sites
    assert site.kernel == "flex" and str(site.spec) == "scale 0.25, bias"
    assert_as_accurate(fused, attention(*inputs), truth(attention, inputs)[0])


@pytest.mark.parametrize("form", ["clamp", "mask", "gate"])
def test_cpu(form: str) -> None:
    """Compiled: the C++ template holds scores in float32 whatever `score_mod` returns, and what part of a block
    an additive mask hides is found in C++ too, and a gate is not put into its loop."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25
        scores = scores.clamp(-0.5, 0.5) if form == "clamp" else scores + mask
        output = scores.softmax(-1) @ v
        return output * q if form == "gate" else output

    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 40, 16, dtype=torch.bfloat16) for _ in range(3)]
    inputs.append(torch.full((40, 40), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1))
    function, report = rewritten(attention, kernel="flex", compiler="inductor")
    with torch.no_grad():
        fused, eager, exact = function(*inputs), attention(*inputs), truth(attention, inputs)[0]
    assert report().n_fused == 1
    assert_as_accurate(fused, eager, exact)


@pytest.mark.parametrize("kv_len", [8, 12])
def test_layers_share_a_block_mask(kv_len: int) -> None:
    """Also where they see as many of the keys as there are queries."""

    def layers(x: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        keep = (torch.arange(kv_len) <= torch.arange(8)[:, None]) & padding[:, None, None]
        for _ in range(3):
            x = (x @ keys.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ keys
        return x

    graphs: list[torch.fx.GraphModule] = []

    def compiler(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(gm)
        return gm.forward

    function, _ = rewritten(layers, kernel="flex", compiler=compiler)
    with torch.no_grad():
        function(torch.randn(2, 4, 8, 16), torch.randn(2, 4, kv_len, 16), torch.ones(2, kv_len, dtype=torch.bool))
    names = [getattr(node.target, "__name__", "") for node in graphs[0].graph.nodes]
    assert (names.count("block_mask"), names.count("flex_attention")) == (1, 3)


def test_a_bias_of_each_head_is_no_mask() -> None:
    def axes(bias: Tensor) -> tuple[str, ...]:
        q = torch.randn(2, 4, 8, 16)
        report = attn_rewriter.explain(lambda q, bias: (q @ q.mT + bias).softmax(-1) @ q, q, bias)
        spec = report.sites[0].spec
        assert isinstance(spec, AttentionSpec)
        return spec.modifiers[-1].axes  # type: ignore[union-attr]

    assert axes(torch.randn(4, 8, 8)) == ("head", "query", "key")
    assert axes(torch.randn(2, 1, 1, 8)) == ("batch", "key")


@pytest.mark.parametrize("sizes", [(2, 1, LENGTH + 9, LENGTH - 5), (1, 1, 1, LENGTH), (2, 1, 1, 70)], ids=str)
def test_only_what_is_hidden_is_left_out(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(sizes, generator=generator)
    keys = torch.arange(sizes[-1])
    for low, rows in ((float("-inf"), sizes[-2]), (-1e9, sizes[-2]), (-2e9, 1)):
        first, many = torch.randint(sizes[-1], (2, sizes[0], 1, rows, 1), generator=generator)
        bias = torch.where((keys >= first) & (keys < first + many), low, bias)
    taken = shown_blocks(bias)
    weights = (torch.randn(sizes, generator=generator) + bias).softmax(-1)
    assert not weights.masked_fill(taken, 0.0).any()
    assert not taken.all() or sizes[-1] < BLOCK
