"""Masks are read as what they say: bit by bit the tensor that the model builds.

Attention with the unit matrix for its values gives its weights, so a kernel that returns what `holds` says about the
mask that was read can be compared with the mask itself.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_rewriter
from attn_rewriter import Device, second_opinion
from attn_rewriter.kernels import KERNELS, Kernel, Tensors
from attn_rewriter.kernels.masking import coordinates, holds, keep
from attn_rewriter.kernels.reference import Reference
from attn_rewriter.spec import AttentionSpec, Mask, Shapes, conjunction
from tests.running import rewritten
from tests.spellings import SCALE, SPELLINGS, Spelling

EXAMPLES = int(os.environ.get("ATTN_REWRITER_EXAMPLES", 50))
LOW = float("-inf")


class Held(Kernel):
    """Not attention, but its mask: what a predicate says at every coordinate, times the values."""

    name = "held"

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> Tensor:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        sizes = [query.size(0), query.size(1), query.size(2), key.size(2)]
        read = conjunction(m.keep for m in spec.modifiers if isinstance(m, Mask))
        kept = holds(read, tensors, *coordinates(*sizes))
        return kept.to(value.dtype).expand(*sizes) @ value


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "held", Held())
    # Its answers are no attention: the second opinion compares what was read, and not what this kernel gives.
    monkeypatch.setattr(second_opinion._Site, "_kernel_differs", lambda self, values: "")


class Inputs(NamedTuple):
    """Integers as models have them, and where that may matter, as they do not."""

    i: Tensor  # [q_len], positions of the queries
    j: Tensor  # [kv_len], and of the keys
    length: Tensor  # [batch]
    offset: Tensor  # []
    places: Tensor  # [q_len]
    ids: Tensor  # [batch, n], of documents; n is the larger of q_len and kv_len
    wild: Tensor  # [batch, n], anything
    narrow: Tensor  # [batch, n], in 32 bits
    flags: Tensor  # [batch, n], booleans


class Sizes(NamedTuple):
    batch: int
    q_len: int
    kv_len: int


SIZES = (Sizes(2, 6, 6), Sizes(3, 5, 8), Sizes(2, 8, 3), Sizes(2, 4, 4), Sizes(1, 1, 7))


def inputs(sizes: Sizes, seed: int = 0) -> list[Tensor]:
    batch, q_len, kv_len = sizes
    n = max(q_len, kv_len)
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    extremes = torch.tensor([0, 1, 3, -1, 2**63 - 1, -(2**63), 2**31, -(2**31)])
    return [
        torch.zeros(batch, 2, q_len, 4),
        torch.zeros(batch, 2, kv_len, 4),
        torch.eye(kv_len).expand(batch, 2, kv_len, kv_len).contiguous(),
        integers(1, kv_len + 1, batch),
        integers(0, 4, 1)[0],
        integers(0, kv_len, q_len),
        (integers(0, 3, batch, n) == 0).cumsum(-1) - integers(0, 2, batch, 1),
        extremes[integers(0, len(extremes), batch, n)],
        integers(-3, 3, batch, n).int(),
        integers(0, 2, batch, n).bool(),
    ]


Masking = Callable[[Inputs], Tensor]


def attention(mask: Masking, apply: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        return apply(q @ k.mT, mask(Inputs(i, j, *rest))).softmax(-1) @ v

    return function


def assert_read(mask: Masking, apply: Any, draws: list[list[Tensor]], dynamic: bool | None = None) -> list[Any]:
    """What was read of a mask is the mask, for every draw of its inputs; returns what was read."""
    compiled, report = rewritten(attention(mask, apply), dynamic, kernel="held")
    with torch.no_grad():
        for given in draws:
            i, j = torch.arange(given[0].shape[2]), torch.arange(given[1].shape[2])
            kept = mask(Inputs(i, j, *given[3:])).expand(given[0].shape[0], 2, len(i), len(j))
            assert torch.equal(compiled(*given).bool(), kept)
    assert all(site.kernel == "held" for site in report().sites), report()
    return [conjunction(m.keep for m in s.spec.modifiers if isinstance(m, Mask)) for s in report().sites]


def filled(scores: Tensor, keep: Tensor) -> Tensor:
    return scores.masked_fill(~keep, LOW)


APPLIED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": filled,
    "where": lambda s, keep: torch.where(keep, s, LOW),
    "added": lambda s, keep: s + torch.where(keep, 0.0, torch.finfo(s.dtype).min),
    "added, one minus": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * -1e9,
    "added, filled": lambda s, keep: s + torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, LOW),
}

# ---------------------------------------------------------------------------------------------------------------
# Masks by name


@dataclass
class Named:
    says: str
    mask: Masking


NAMED: dict[str, Named] = {}


def says(words: str) -> Callable[[Masking], Masking]:
    def register(mask: Masking) -> Masking:
        NAMED[mask.__name__] = Named(words, mask)  # type: ignore[attr-defined]
        return mask

    return register


@says("prefix 3")
def prefix(x: Inputs) -> Tensor:
    return (x.j < 3)[None, :].expand(len(x.i), -1)


@says("causal or prefix 3")
def prefix_lm(x: Inputs) -> Tensor:
    return (x.j <= x.i[:, None]) | (x.j < 3)


@says("causal or queries from 4")
def late_queries(x: Inputs) -> Tensor:
    return (x.j <= x.i[:, None]) | (x.i >= 4)[:, None]


@says("key lengths")
def lengths(x: Inputs) -> Tensor:
    return (x.j < x.length[:, None])[:, None, None]


@says("causal and key lengths")
def causal_lengths(x: Inputs) -> Tensor:
    return (x.j <= x.i[:, None]) & (x.j < x.length[:, None])[:, None, None]


@says("causal or key lengths")
def prefix_lengths(x: Inputs) -> Tensor:
    """PaliGemma, T5 as a prefix language model."""
    return (x.j <= x.i[:, None]) | (x.j < x.length[:, None])[:, None, None]


@says("causal, offset tensor")
def offset(x: Inputs) -> Tensor:
    return x.j <= (x.i + x.offset)[:, None]


@says("causal, positions tensor")
def cache_position(x: Inputs) -> Tensor:
    return x.j <= x.places[:, None]


@says("documents")
def documents(x: Inputs) -> Tensor:
    ids = x.wild
    return (ids[:, : len(x.i), None] == ids[:, None, : len(x.j)])[:, None]


@says("causal and documents")
def causal_documents(x: Inputs) -> Tensor:
    return (x.j <= x.i[:, None]) & (x.ids[:, None, : len(x.i), None] == x.ids[:, None, None, : len(x.j)])


@says("causal or documents and mask tensor [batch, query]")
def blocks(x: Inputs) -> Tensor:
    """Gemma-3's images."""
    groups = torch.where(x.flags, x.ids, -1)
    b = torch.arange(len(groups))[:, None, None, None]
    of_query, of_key = groups[b, x.i[:, None]], groups[b, x.j]
    return (x.j <= x.i[:, None]) | ((of_query == of_key) & (of_query >= 0))


@says("causal or documents and mask tensor [batch, query]")
def images(x: Inputs) -> Tensor:
    """PaliGemma's and its image."""
    groups = torch.where(x.narrow == 0, 0, -1)
    b = torch.arange(len(groups))[:, None, None, None]
    of_query, of_key = groups[b, x.i[:, None]], groups[b, x.j]
    return (x.j <= x.i[:, None]) | ((of_query == of_key) & (of_query >= 0))


@says("documents and sliding window 4, positions tensor and causal, positions tensor")
def packed_window(x: Inputs) -> Tensor:
    """Mistral's, packed."""
    b = torch.arange(len(x.wild))[:, None, None, None]
    of_query, of_key = x.wild[b, x.i[:, None]], x.wild[b, x.j]
    return (x.ids[b, x.i[:, None]] == x.ids[b, x.j]) & (of_key > of_query - 4) & (of_key <= of_query)


@says("chunks of 4")
def chunks(x: Inputs) -> Tensor:
    return x.i[:, None] // 4 == torch.div(x.j, 4, rounding_mode="floor")


@says("causal and chunks of 3, offset tensor")
def chunks_of_padded(x: Inputs) -> Tensor:
    """Llama-4."""
    b, i, j = torch.arange(len(x.length))[:, None, None, None], x.i[:, None], x.j
    return ((j - x.length[b]) // 3 == (i - x.length[b]) // 3) & (j <= i)


@says("query // 2 <= key // 2 + 1")
def local_blocks(x: Inputs) -> Tensor:
    return (x.i[:, None] // 2) - (x.j // 2) <= 1


@says("key + 3 * ((-key + query) // 3) == query")
def strided(x: Inputs) -> Tensor:
    return (x.i[:, None] - x.j) % 3 == 0


@says("sliding window 5, keys to query+2")
def near(x: Inputs) -> Tensor:
    return (x.i[:, None] - x.j).abs() <= 2


@says("sliding window 5, keys to query+2")
def near_as_python_says_it(x: Inputs) -> Tensor:
    return abs(x.i[:, None] - x.j) < 3


@says("causal, sliding window 3")
def window(x: Inputs) -> Tensor:
    return (x.j <= x.i[:, None]) & (x.j > x.i[:, None] - 3)


@says("causal and documents")
def packed(x: Inputs) -> Tensor:
    """transformers, from position ids."""
    steps = torch.diff(x.ids, prepend=x.ids[:, :1] - 1, dim=-1)
    ids = (steps != 1).cumsum(-1)
    return ((x.j <= x.i[:, None]) & (ids[:, : len(x.i), None] == ids[:, None, : len(x.j)]))[:, None].expand(
        -1, 1, -1, -1
    )


@says("causal, positions tensor")
def packed_positions(x: Inputs) -> Tensor:
    return (x.wild[:, None, : len(x.j)] <= x.wild[:, : len(x.i), None])[:, None]


@says("key padding")
def flags(x: Inputs) -> Tensor:
    return x.flags[:, None, None, : len(x.j)]


@says("key padding")
def flags_as_numbers(x: Inputs) -> Tensor:
    return x.narrow[:, None, None, : len(x.j)] != 0


def mapped(keep: Callable[..., Tensor], x: Inputs) -> Tensor:
    """As transformers 4.57 makes its masks, of a function of four integers."""
    for axis in reversed(range(4)):
        keep = torch.vmap(keep, in_dims=tuple(0 if i == axis else None for i in range(4)), out_dims=0)
    return keep(torch.arange(len(x.length)), torch.arange(1), x.i, x.j)


@says("causal and key padding")
def mapped_padding(x: Inputs) -> Tensor:
    at = torch.ops.aten.index
    return mapped(lambda b, h, q, k: (k <= q) & at(x.flags, [b, k]) & q.new_ones((), dtype=torch.bool), x)


@says("causal and documents")
def mapped_documents(x: Inputs) -> Tensor:
    at = torch.ops.aten.index
    of_query, of_key = x.ids[:, : len(x.i)], x.ids[:, : len(x.j)]
    return mapped(lambda b, h, q, k: (at(of_query, [b, q]) == at(of_key, [b, k])) & (k <= q), x)


@says("causal, sliding window 3")
def mapped_from_the_last(x: Inputs) -> Tensor:
    """The keys by columns, and the result the other way round."""
    keys = x.j[:, None].expand(-1, 2)
    of_key = torch.vmap(lambda q, k: (k[0] <= q) & (k[1] > q - 3), in_dims=(None, -2), out_dims=-1)
    return torch.vmap(of_key, in_dims=(0, None), out_dims=1)(x.i, keys).mT


def _padding_in_a_slice(x: Inputs, values: Tensor, dtype: torch.dtype) -> Tensor:
    low, n = torch.finfo(dtype).min, len(x.j)
    mask = torch.full((len(x.i), n), low, dtype=dtype).triu(1)
    mask *= x.j > x.i[:, None]
    mask = mask[None, None].expand(len(values), 1, -1, -1).clone()
    padding = mask[:, :, :, :n] + values[:, None, None, :n]
    mask[:, :, :, :n] = mask[:, :, :, :n].masked_fill(padding == 0, low)
    return mask == 0


@says("causal and key padding")
def padding_in_a_slice(x: Inputs) -> Tensor:
    """transformers 4.44 to 4.51."""
    return _padding_in_a_slice(x, x.narrow, torch.float32)


@says("causal and key padding")
def padding_in_a_slice_of_half(x: Inputs) -> Tensor:
    return _padding_in_a_slice(x, x.wild, torch.bfloat16)


def test_a_write_within_vmap_through_another_name() -> None:
    """Whose memory is whose, nobody knows there."""

    def keep(q: Tensor, k: Tensor) -> Tensor:
        after = k > q
        after.view(()).logical_not_()
        return after

    def mask(x: Inputs) -> Tensor:
        return torch.vmap(torch.vmap(keep, in_dims=(None, 0)), in_dims=(0, None))(x.i, x.j)

    given = inputs(SIZES[0])
    compiled, _ = rewritten(attention(mask, filled), verify=False)
    assert torch.equal(compiled(*given), attention(mask, filled)(*given))


def test_what_vmap_expands() -> None:
    """What does not depend on the level gets its dimension at the front, wherever that was wanted."""

    def mask(x: Inputs) -> Tensor:
        return torch.vmap(lambda i: x.j <= 3, out_dims=1)(x.i)

    sizes = SIZES[0]
    assert sizes.q_len == sizes.kv_len
    (read,) = assert_read(mask, filled, [inputs(sizes)])
    assert str(read) == "prefix 4"


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMED)
def test_named(name: str, dynamic: bool | None) -> None:
    sizes = [s for s in SIZES if s.q_len > 1]
    read = assert_read(NAMED[name].mask, filled, [inputs(s, seed) for seed in (0, 1) for s in sizes], dynamic)
    assert NAMED[name].says in map(str, read)


@pytest.mark.parametrize("applied", APPLIED)
@pytest.mark.parametrize("name", NAMED)
def test_applied(name: str, applied: str) -> None:
    """However a mask is applied, it is the same one."""
    for sizes in SIZES[:2]:
        draws = [inputs(sizes)]
        (read,) = assert_read(NAMED[name].mask, APPLIED[applied], draws)
        assert str(read) == str(assert_read(NAMED[name].mask, filled, draws)[0])


# ---------------------------------------------------------------------------------------------------------------
# What is known of a tensor, and when


def _documents(ids: Tensor, scores: Tensor) -> Tensor:
    return ids[:, None, : scores.shape[2], None] == ids[:, None, None, : scores.shape[3]]


def _written_later(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    ids, scores = ids.cumsum(-1), q @ k.mT
    weights = scores.masked_fill(~_documents(ids, scores), LOW).softmax(-1)
    ids.zero_()
    return weights @ v


def _written_before(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    ids = ids * 0
    ids[:, 2:] += 1
    scores = q @ k.mT
    return scores.masked_fill(~_documents(ids, scores), LOW).softmax(-1) @ v


def _written_between(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    ids, scores = ids.cumsum(-1), q @ k.mT
    of_queries = ids[:, None, : scores.shape[2], None] * 1
    ids.add_(1)
    keep = of_queries == ids[:, None, None, : scores.shape[3]]
    return scores.masked_fill(~keep, LOW).softmax(-1) @ v


def _read_in_a_body(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def body(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        scores = q @ k.mT
        keep = _documents(ids, scores) & (torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None])
        return scores.masked_fill(~keep, LOW).softmax(-1) @ v

    return checkpoint(body, q, k, v, ids + 1, use_reentrant=False)


def _made_outside_of_a_body(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def body(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep, LOW).softmax(-1) @ v

    keep = _documents(ids, q @ k.mT) & (torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None])
    return checkpoint(body, q, k, v, keep, use_reentrant=False)


def _added_outside_of_a_body(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    def body(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        return (q @ k.mT + added).softmax(-1) @ v

    keep = _documents(ids, q @ k.mT) | (torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None])
    return checkpoint(body, q, k, v, torch.where(keep, 0.0, LOW), use_reentrant=False)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_written_later, "mask tensor [batch, query, key]"),
        (_written_before, "documents"),
        (_written_between, "documents"),  # of two tensors
        (_read_in_a_body, "causal and documents"),
        (_made_outside_of_a_body, "causal and mask tensor [batch, query, key]"),
        (_added_outside_of_a_body, "causal or mask tensor [batch, query, key]"),
    ],
)
def test_time_and_place(function: Callable[..., Tensor], says: str, dynamic: bool | None) -> None:
    compiled, report = rewritten(function, dynamic, kernel="held")
    for sizes in SIZES[:2]:
        q, k, v, *_, ids, _, _, _ = inputs(sizes)
        q.requires_grad_()  # else nothing is left of a checkpoint
        kept = function(q, k, v, ids.clone()) > 0  # the scores are zero: each key of a query has the same weight
        assert torch.equal(compiled(q, k, v, ids.clone()) > 0, kept)
    assert str(report().sites[0].spec) == says


# ---------------------------------------------------------------------------------------------------------------
# Masks by chance


def _by_query(x: Tensor, like: Inputs) -> Tensor:
    return x[:, None, : len(like.i), None]


def _by_key(x: Tensor, like: Inputs) -> Tensor:
    return x[:, None, None, : len(like.j)]


INTEGERS: dict[str, Callable[[Inputs], Any]] = {
    "query": lambda x: x.i[:, None],
    "key": lambda x: x.j,
    "query, from the end": lambda x: x.i[:, None] + (len(x.j) - len(x.i)),
    "query, in 32 bits": lambda x: x.i.int()[:, None],
    "key, as floats": lambda x: x.j.float(),
    "batch": lambda x: torch.arange(len(x.length))[:, None, None, None],
    "zero": lambda x: 0,
    "two": lambda x: 2,
    "minus three": lambda x: torch.full((), -3),
    "lengths": lambda x: x.length[:, None, None, None],
    "offset": lambda x: x.offset,
    "places": lambda x: x.places[:, None],
    "ids of queries": lambda x: _by_query(x.ids, x),
    "ids of keys": lambda x: _by_key(x.ids, x),
    "anything of queries": lambda x: _by_query(x.wild, x),
    "anything of keys": lambda x: _by_key(x.wild, x),
    "narrow, of queries": lambda x: _by_query(x.narrow, x),
    "narrow, of keys": lambda x: _by_key(x.narrow, x),
    "flags, as numbers": lambda x: _by_key(x.flags, x).long(),
}
OF_INTEGERS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: abs(a),
    "// 3": lambda a, b: a // 3,
    "% 2": lambda a, b: a % 2,
    "* 2": lambda a, b: a * 2,
    "max": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "min": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "long": lambda a, b: torch.as_tensor(a).long(),
    "select": lambda a, b: torch.where(torch.as_tensor(a) > 1, a, b),
}
COMPARED = {name: getattr(operator, name) for name in ("le", "lt", "ge", "gt", "eq", "ne")}
BOOLEANS: dict[str, Callable[..., Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": lambda a, b: ~a,
    "where": lambda a, b: torch.where(a, b, ~b),
    "ne": operator.ne,
    "tril": lambda a, b: (a | b.new_zeros(2, 1, 1)[:1]).tril(1),
    "as numbers": lambda a, b: (a.long() + b.long()) > 1,
}
TENSORS: dict[str, Callable[[Inputs], Tensor]] = {
    "flags of keys": lambda x: _by_key(x.flags, x),
    "flags of queries": lambda x: _by_query(x.flags, x),
    "causal": lambda x: torch.ones(len(x.i), len(x.j), dtype=torch.bool).tril(),
    "a slice": lambda x: torch.ones(20, 20).triu(-2)[3 : 3 + len(x.i), 4 : 4 + len(x.j)] > 0,
}

integers = st.recursive(
    st.sampled_from([*INTEGERS]), lambda of: st.tuples(st.sampled_from([*OF_INTEGERS]), of, of), max_leaves=3
)
compared = st.tuples(st.sampled_from([*COMPARED]), integers, integers)
masks = st.recursive(
    st.sampled_from([*TENSORS]) | compared, lambda of: st.tuples(st.sampled_from([*BOOLEANS]), of, of), max_leaves=4
)


def built(program: Any, x: Inputs) -> Any:
    """What a program computes."""
    if isinstance(program, str):
        return INTEGERS[program](x) if program in INTEGERS else TENSORS[program](x)
    name, a, b = program
    if name in COMPARED:
        return torch.as_tensor(COMPARED[name](built(a, x), built(b, x)))
    boolean = (not isinstance(a, str) and a[0] in (*COMPARED, *BOOLEANS)) or a in TENSORS
    return (BOOLEANS if boolean else OF_INTEGERS)[name](built(a, x), built(b, x))


def _whole(program: Any) -> Masking:
    def mask(x: Inputs) -> Tensor:
        return built(program, x) & torch.ones(len(x.length), 1, len(x.i), len(x.j), dtype=torch.bool)

    return mask


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(masks, st.sampled_from(SIZES), st.sampled_from([*APPLIED]), st.sampled_from([None, None, True]))
def test_any_mask(program: Any, sizes: Sizes, applied: str, dynamic: bool | None) -> None:
    assert_read(_whole(program), APPLIED[applied], [inputs(sizes, seed) for seed in range(3)], dynamic)


# ---------------------------------------------------------------------------------------------------------------
# Masks of everything else in these tests


class Checked(Reference):
    """The reference, all NaN where a mask that was read is not the tensor that the model built."""

    name = "checked"

    def __call__(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> Tensor:
        output = super().__call__(spec, shapes, device, tensors)
        query, key = tensors["query"], tensors["key"]
        at = coordinates(query.size(0), query.size(1), query.size(2), key.size(2))
        for modifier in spec.modifiers:
            if isinstance(modifier, Mask):
                agree = (holds(modifier.keep, tensors, *at) == keep(modifier, tensors)).all()
                output = torch.where(agree, output, torch.nan)
        return output


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.refused is None and not s.random], ids=lambda s: s.name)
def test_spellings(spelling: Spelling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "checked", Checked())
    function, report = rewritten(spelling.function, kernel="checked")
    given = spelling.inputs()
    assert bool(torch.as_tensor(function(*given)).isfinite().all())
    assert {site.kernel for site in report().sites} == {"checked"}


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 99, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_CHUNKED = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4, "no_rope_layers": [1, 0]}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def _ids() -> Tensor:
    return torch.randint(3, 99, (2, 13), generator=torch.Generator().manual_seed(0))


def _packed() -> dict[str, Any]:
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None].expand(2, -1)
    return {"position_ids": positions, "use_cache": False}


def _padded() -> dict[str, Any]:
    return {"attention_mask": (torch.arange(13) >= torch.tensor([[4], [0]])).long()}


def _with_image() -> dict[str, Any]:
    return {"token_type_ids": ((torch.arange(13) > 2) & (torch.arange(13) < 7)).long().expand(2, -1)}


# A model, what it is given, and what its first layers compute.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]], list[str]]] = {
    "packed": ("LlamaForCausalLM", _TEXT, _packed, ["documents and causal, positions tensor"] * 2),
    "packed, sliding window": (
        "MistralForCausalLM",
        {**_TEXT, "sliding_window": 5},
        _packed,
        ["documents and sliding window 5, positions tensor and causal, positions tensor"] * 2,
    ),
    "chunked": ("Llama4ForCausalLM", {**_TEXT, **_CHUNKED}, dict, ["causal and chunks of 4", "causal"]),
    "chunked, padded": (
        "Llama4ForCausalLM",
        {**_TEXT, **_CHUNKED},
        _padded,
        ["causal and chunks of 4, offset tensor and key padding", "causal and key padding"],
    ),
    "images": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**_TEXT, **_LOCAL}, "vision_config": _IMAGE, "mm_tokens_per_image": 4},
        _with_image,
        ["mask tensor [batch, query, key]", "causal or documents and mask tensor [batch, query]"],  # the first by vmap
    ),
    "image": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "gemma"},
            "vision_config": {**_IMAGE, "model_type": "siglip_vision_model", "projection_dim": 32},
            "projection_dim": 32,
        },
        _with_image,
        ["causal or documents and mask tensor [batch, query]"] * 2,
    ),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "checked", Checked())
    kind, config, more, says = TRANSFORMERS[name]
    cls = getattr(transformers, kind)
    model = cls._from_config(cls.config_class(**config), attn_implementation=attention).eval()
    torch._dynamo.reset()
    report, given = _run(model, {"input_ids": _ids(), **more()})
    assert given.isfinite().all()
    for words, site in zip(says, report.sites):
        keep = str(site.spec.keep)
        assert str(site.spec).endswith(f", {keep}")
        # In whichever order: transformers 5.24 looks at documents last, 5.23 looks at them first.
        assert sorted(keep.split(" and ")) == sorted(words.split(" and "))


def _run(model: Any, given: dict[str, Any]) -> tuple[Any, Tensor]:
    with torch.no_grad():
        attn_rewriter.optimize(model, compiler="eager", strict=True, kernel="checked")
        logits = model(**given).logits
    return attn_rewriter.report_of(model), logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_cache(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offset is a tensor, which the cache counts up in place."""
    monkeypatch.setitem(KERNELS, "checked", Checked())
    config = transformers.LlamaConfig(**_TEXT)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    torch._dynamo.reset()
    attn_rewriter.optimize(model, compiler="eager", strict=True, kernel="checked")
    cache = transformers.StaticCache(config=config, max_cache_len=32)
    with torch.no_grad():
        for length in (13, 3, 1):
            assert model(input_ids=_ids()[:, :length], past_key_values=cache).logits.isfinite().all()
    said = {str(site.spec) for site in attn_rewriter.report_of(model).sites}
    assert f"{SCALE}, causal, positions tensor" in said
