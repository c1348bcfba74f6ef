"""Masks that a model registers are read by value, and the answer stays right whatever becomes of the buffer."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import attn_rewriter
from attn_rewriter.buffers import Memory, State, contents
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.models import NothingNarrowed
from tests.running import run_as_is, with_gradients

SCALE, N = "scale 0.3536", 16


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _tril() -> Tensor:
    return torch.ones(N, N).tril()


def _low(drop: Tensor) -> Tensor:
    return torch.zeros(N, N).masked_fill(drop, torch.finfo(torch.float32).min)


# What is registered, and how it is used: the scores, the buffer and a number in a buffer -> the masked scores.
Use = Callable[[Tensor, Tensor, Tensor], Tensor]
BUFFERS: dict[str, tuple[Tensor, Use, str]] = {
    "nanoGPT": (
        _tril().view(1, 1, N, N),
        lambda s, b, low: s.masked_fill(b[:, :, : s.shape[2], : s.shape[3]] == 0, float("-inf")),
        "causal",
    ),
    "GPT-J": (
        _tril().bool().view(1, 1, N, N),
        lambda s, b, low: torch.where(b[:, :, : s.shape[2], : s.shape[3]], s, torch.full([], -1e9)),
        "causal",
    ),
    "old GPT-2": (
        _tril().to(torch.uint8).view(1, 1, N, N),
        lambda s, b, low: torch.where(b[:, :, s.shape[3] - s.shape[2] : s.shape[3], : s.shape[3]].bool(), s, low),
        "causal",
    ),
    "GPT-Neo, local": (
        (_tril().bool() ^ _tril().tril(-3).bool()).view(1, 1, N, N),
        lambda s, b, low: s.masked_fill(~b[:, :, : s.shape[2], : s.shape[3]], float("-inf")),
        "causal, sliding window 3",
    ),
    "OpenAI-GPT": (
        _tril().view(1, 1, N, N),
        lambda s, b, low: s * b[:, :, : s.shape[2], : s.shape[3]] + -1e9 * (1 - b[:, :, : s.shape[2], : s.shape[3]]),
        "",
    ),
    "added": (_low(_tril() == 0), lambda s, b, low: s + b[: s.shape[2], : s.shape[3]], "causal"),
    "infinite": (
        torch.full((N, N), float("-inf")).triu(1),
        lambda s, b, low: s + b[None, None, : s.shape[2], : s.shape[3]],
        "causal",
    ),
    "a row further down": (
        _tril().bool(),
        lambda s, b, low: s.masked_fill(~b[2 : 2 + s.shape[2], : s.shape[3]], float("-inf")),
        "causal, offset 2",
    ),
    "no band": (
        (torch.arange(N)[:, None] * 5 % 7 >= torch.arange(N) * 3 % 5) | torch.eye(N).bool(),
        lambda s, b, low: s.masked_fill(~b[: s.shape[2], : s.shape[3]], float("-inf")),
        "mask tensor [query, key]",
    ),
}


class Attention(nn.Module):
    def __init__(self, name: str = "nanoGPT", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        buffer, self.use, self.says = BUFFERS[name]
        self.qkv = nn.Linear(16, 48, dtype=torch.float64)
        self.register_buffer("bias", buffer.clone(), **options)
        self.register_buffer("masked_bias", torch.tensor(-1e9), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).split(16, -1))
        scores = self.use(q @ k.mT / 8**0.5, self.bias, self.masked_bias)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def given(length: int = 9) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_right(model: nn.Module, compiled: Any, x: Tensor | None = None) -> None:
    """The answer, and the gradients, are those of the model as it is now."""
    x = (given() if x is None else x).requires_grad_()
    ways = []
    for run in (compiled, model._call_impl if hasattr(model, "_call_impl") else model):
        y = run(x)
        ways.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    assert_the_same(*ways)


def said(model: Any) -> list[str]:
    return [str(site.spec) for site in attn_rewriter.report_of(model).sites]


def optimized(model: nn.Module, **options: Any) -> Any:
    return attn_rewriter.optimize(model, **{"compiler": "eager", "strict": True, **options})


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BUFFERS)
def test_read(name: str, dynamic: bool | None) -> None:
    model = optimized(Attention(name), dynamic=dynamic)
    for length in (9, 12):
        assert_right(model, model, given(length))
    assert said(model)[0] == f"{SCALE}, {model.says}" or not model.says


def test_explained() -> None:
    (site,) = attn_rewriter.explain(Attention(), given()).sites
    assert str(site.spec) == f"{SCALE}, causal"


def test_last_queries() -> None:
    """With a cache: the rows of the queries in the middle of the buffer."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", _tril().bool().view(1, 1, N, N))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n, m = q.shape[2], k.shape[2]
            keep = self.bias[:, :, m - n : m, :m]
            return (q @ k.mT / 8**0.5).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    for dynamic in (None, True):
        torch._dynamo.reset()
        model = Cached()
        compiled = optimized(Cached(), dynamic=dynamic)
        for n, m in ((3, 7), (4, 9), (5, 6)):
            q, k, v = (torch.randn(2, 2, length, 8, dtype=torch.float64) for length in (n, m, m))
            assert_the_same(compiled(q, k, v), model(q, k, v))
        assert all("causal, offset" in words for words in said(compiled)), said(compiled)


# ---------------------------------------------------------------------------------------------------------------
# What becomes of a buffer


def _in_place(model: Any) -> None:
    model.bias[..., 0] = 1.0
    model.bias[..., 3, 5:7] = 1.0


def _replaced(model: Any) -> None:
    model.bias = (_tril() + _tril().T).view(1, 1, N, N)


def _registered_again(model: Any) -> None:
    model.register_buffer("bias", torch.ones(1, 1, N, N))


def _loaded(model: Any) -> None:
    model.load_state_dict({**model.state_dict(), "bias": torch.ones(1, 1, N, N)})


def _assigned(model: Any) -> None:
    model.load_state_dict({**model.state_dict(), "bias": torch.ones(1, 1, N, N)}, assign=True)


def _through_a_view(model: Any) -> None:
    model.bias.view(N, N)[2:4].fill_(1.0)


def _through_detach(model: Any) -> None:
    model.bias.detach().zero_().add_(torch.ones(N, N).tril(1))


def _data_assigned(model: Any) -> None:
    model.bias.data = torch.ones(1, 1, N, N)


def _without_gradients(model: Any) -> None:
    with torch.no_grad():
        model.bias.copy_(torch.ones(1, 1, N, N))


def _in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.bias.copy_(torch.ones(1, 1, N, N))


def _set(model: Any) -> None:
    model.bias.set_(torch.ones(1, 1, N, N))


def _set_to_a_view(model: Any) -> None:
    model.bias.set_(torch.ones(3, 1, N, N)[2:])


def _resized(model: Any) -> None:
    model.bias.resize_(1).resize_(1, 1, 4 * N, N).resize_(1, 1, N, N).fill_(1.0)


def _turned(model: Any) -> None:
    """The same memory at the same version, read along other strides."""
    model.bias.data = model.bias.data.mT
    model.bias.data[..., 0] = 1.0


def _exchanged(model: Any) -> None:
    torch.utils.swap_tensors(model.bias, torch.ones(1, 1, N, N))


def _loaded_by_exchange(model: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict({**model.state_dict(), "bias": torch.ones(1, 1, N, N)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


EDITS = (
    _set,
    _set_to_a_view,
    _resized,
    _turned,
    _exchanged,
    _loaded_by_exchange,
    _in_place,
    _replaced,
    _registered_again,
    _loaded,
    _assigned,
    _through_a_view,
    _through_detach,
    _data_assigned,
    _without_gradients,
    _in_inference_mode,
)


@pytest.mark.parametrize("around", ["nothing", "checkpoint", "dynamic"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edited(edit: Callable[[Any], None], around: str) -> None:
    """Right after it, and also when it is as it was again."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if around == "checkpoint" else self.inner(x)

    model = Around()
    optimized(model, dynamic=True if around == "dynamic" else None)
    assert_right(model, model)
    assert said(model) == [f"{SCALE}, causal"]
    before = model._call_impl(given())
    edit(model.inner)
    assert not torch.allclose(model._call_impl(given()), before)
    for length in (9, 9, 11):
        assert_right(model, model, given(length))
    model.inner.register_buffer("bias", _tril().view(1, 1, N, N))
    assert_right(model, model)


def test_same_contents_again() -> None:
    """A checkpoint that is loaded, a copy, a move: what is read once more says the same, and nothing is compiled."""
    model = optimized(Attention())
    assert_right(model, model)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_right(model, model)
    model.bias = model.bias.clone()
    assert_right(model, model)
    twin = copy.deepcopy(model)
    assert_right(twin, twin)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    twin.bias.fill_(1.0)
    assert_right(twin, twin)
    assert_right(model, model)


@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
def test_graphs_of_many_models_are_compiled_again() -> None:
    """Dynamo's limit is for the compilations of one piece of code: each graph has its own."""
    for length in range(4, 9):
        model = optimized(Attention())
        assert_right(model, model, given(length))
        model.bias[..., 0, 2] = 1.0
        assert_right(model, model, given(length))


def test_other_type() -> None:
    model = optimized(Attention().float())
    model(given().float())
    model.double()
    assert_right(model, model)


def test_changed_at_every_call() -> None:
    """A buffer that changes again and again is no longer looked at."""
    model = optimized(Attention())
    assert_right(model, model)
    for i in range(20):
        model.bias[..., i % N, :] = 1.0 - model.bias[..., i % N, :] * (i % 2)
        model.bias[..., 0] = 1.0
        assert_right(model, model)
    model.bias.copy_(_tril())
    assert_right(model, model)


def test_mutated_by_the_model() -> None:
    """What the graph itself writes is never trusted."""

    class Mutating(Attention):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.bias[..., 1, :] = 1.0
            return y

    eager, model = Mutating(), optimized(Mutating())
    for _ in range(3):
        assert_the_same(model(given()), eager(given()))
    assert "causal" not in said(model)[0]


def test_inference_tensors_are_not_read() -> None:
    """They have no versions."""
    with torch.inference_mode():
        buffer = _tril().view(1, 1, N, N)
    model = Attention()
    model.bias = buffer
    optimized(model)
    with torch.no_grad():
        assert_the_same(model(given()), model._call_impl(given()))
        with torch.inference_mode():
            model.bias.fill_(1.0)
        assert_the_same(model(given()), model._call_impl(given()))
    assert "causal" not in said(model)[0]


def test_inputs_and_parameters_are_not_read() -> None:
    def function(x: Tensor, bias: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(bias == 0, float("-inf")).softmax(-1) @ x

    compiled = optimized(function)
    compiled(given(N), _tril())
    assert "causal" not in said(compiled)[0]

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.full((N, N), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT + self.bias).softmax(-1) @ x

    model = optimized(Learned())
    model(given(N))
    assert said(model) == ["bias"]


def test_layers_share_a_graph() -> None:
    """Compiled one by one, each has a buffer of its own."""
    layers = [optimized(Attention()) for _ in range(3)]
    for layer in layers:
        assert_right(layer, layer)
    layers[1].bias.fill_(1.0)
    for layer in layers:
        assert_right(layer, layer)


def test_buffers_are_not_kept_alive() -> None:
    model = Attention()
    compiled = torch.compile(model, backend="attn_rewriter", options={"compiler": "eager"})
    compiled(given())
    old, model.bias = weakref.ref(model.bias), torch.ones(1, 1, N, N)
    compiled(given())
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("verify", [False, "always"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", run_as_is])
def test_nobody_refers_to_a_tensor(compiler: Any, verify: Any) -> None:
    """Not weakly either, before and after a graph was compiled again: PyTorch exchanges no such tensor."""
    model, x = optimized(Attention(), compiler=compiler, verify=verify), given()
    tensors = [x, *model.parameters(), *model.buffers()]
    for edit in (lambda model: None, _in_place):
        edit(model)
        model(x)
        assert [weakref.getweakrefs(tensor) for tensor in tensors] == [[]] * len(tensors)
    exchanged = copy.deepcopy(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(exchanged.state_dict())
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_right(model, model)


def test_nothing_is_written_on_a_tensor() -> None:
    """It would be pickled with a model."""
    model = optimized(Attention())
    model(given())
    assert all(name.startswith("_dynamo") for name in vars(model.bias))  # which is PyTorch's own
    torch.save([*model.buffers()], saved := io.BytesIO())
    assert b"attn_rewriter" not in saved.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# What is remembered of tensors


def said_of(memory: Memory, tensor: Tensor) -> Any:
    state = State.of(tensor)
    return None if state is None else memory.said(tensor, state)


def remember(memory: Memory, tensor: Tensor, what: str = "causal") -> None:
    state = State.of(tensor)
    assert state is not None
    memory.keep(tensor, state, what)


def test_views_are_other_tensors() -> None:
    memory, x = Memory(), torch.ones(4, 4)
    remember(memory, x)
    assert said_of(memory, x) == "causal"
    for other in (x.view(4, 4), x.detach(), x.data, x[1:], x.mT, x.clone(), copy.deepcopy(x), nn.Parameter(x)):
        assert said_of(memory, other) is None
    x.view(16)[3] = 0
    assert said_of(memory, x) is None


def test_addresses_are_used_again() -> None:
    """A tensor at the address of another one, in memory and as an object, has another storage."""
    memory = Memory()
    for i in range(200):
        x = torch.full((4, 4), float(i))
        assert said_of(memory, x) is None
        remember(memory, x)
        assert said_of(memory, x) == "causal"
        del x
    base = torch.zeros(4, 4)
    for _ in range(200):  # the same storage all the time, and objects come and go
        view = base[:]
        assert said_of(memory, view) in (None, "causal")
        remember(memory, view)
        base.add_(1)
        assert said_of(memory, view) is None
        del view


def test_the_dead_are_forgotten() -> None:
    memory = Memory()
    alive = [torch.ones(2, 2) for _ in range(10)]
    for x in alive:
        remember(memory, x)
    for _ in range(3):
        several = [torch.ones(2, 2) for _ in range(1000)]
        for x in several:
            remember(memory, x)
        assert len(memory) >= 1010
        several.clear()
    for x in (more := [torch.ones(2, 2) for _ in range(3000)]):
        remember(memory, x)
    assert len(memory) < 3020 and more
    assert all(said_of(memory, x) == "causal" for x in alive)


def test_memory_is_not_kept() -> None:
    memory, x = Memory(), torch.ones(4, 4)
    remember(memory, x)
    object_, storage = weakref.ref(x), StorageWeakRef(x.untyped_storage())
    del x
    assert object_() is None and storage.expired()


@pytest.mark.parametrize(
    "tensor",
    [
        nn.Parameter(torch.ones(2, 2)),
        torch.ones(2, 2).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        3.0,
        None,
    ],
    ids=str,
)
def test_what_has_no_state(tensor: Any) -> None:
    assert State.of(tensor) is None
    with torch.inference_mode():
        assert State.of(torch.ones(2)) is None


def test_negated() -> None:
    x = torch.ones(2)
    state = State.of(x)
    x.data = torch._neg_view(x)
    assert State.of(x) != state


def test_inductor() -> None:
    model = optimized(Attention(), compiler="inductor")
    assert_right(model, model)
    model.bias.fill_(1.0)
    assert_right(model, model)


def test_a_table_of_small_numbers_is_no_mask() -> None:
    """Beside a mask that fills, which in training no kernel takes where both may be masks; until it holds a low one."""

    class Alibi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            distances = torch.arange(N)[:, None] - torch.arange(N)
            slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
            self.register_buffer("table", -distances.abs() * slopes[:, None, None])

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            drop = torch.ones(N, N, dtype=torch.bool).triu(1)
            return ((q @ k.mT * 0.3 + self.table).masked_fill(drop, -1e30)).softmax(-1) @ v

    model = Alibi()
    inputs = [torch.randn(2, 2, N, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    compiled = attn_rewriter.optimize(copy.deepcopy(model), compiler="eager", strict=True)
    assert_the_same(with_gradients(compiled, inputs), with_gradients(model, inputs))
    assert attn_rewriter.report_of(compiled).n_fused == 1
    for changed in (model, compiled):
        changed.table[:, 1:, :5] = -1e30
    assert_the_same(with_gradients(compiled, inputs), with_gradients(model, inputs))
    assert "in training" in str(attn_rewriter.report_of(compiled).sites[-1].reasons)


@pytest.mark.parametrize(
    ("matrix", "inside", "outside", "lower", "upper"),
    [
        (torch.ones(3, 4), 1.0, None, None, None),
        (torch.tensor(-1e9), -1e9, None, None, None),
        (torch.ones(3, 5).tril(1), 1.0, 0.0, None, 1),
        (torch.ones(5, 3).triu(-2), 0.0, 1.0, None, -3),
        (torch.ones(2, 3, 3).tril(), 1.0, 0.0, None, 0),
        (torch.ones(4, 4, dtype=torch.bool).tril(1).triu(-1)[None, None], True, False, -1, 1),
    ],
)
def test_contents(matrix: Tensor, inside: Any, outside: Any, lower: int | None, upper: int | None) -> None:
    found = contents(matrix)
    assert found is not None
    assert (found.inside, found.outside, found.lower, found.upper) == (inside, outside, lower, upper)
    if outside is not None:
        assert torch.equal(found.tensor(matrix.shape, matrix), matrix)
        lowest = replace(found, outside=torch.finfo(torch.float64).min)
        assert lowest.tensor(matrix.shape, matrix.double()).min() == lowest.outside


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(3) + torch.ones(3, 3).tril(),
        torch.stack([torch.ones(3, 3).tril(), torch.ones(3, 3)]),
        torch.full((3, 3), float("nan")),
        torch.tensor(float("nan")),
        torch.ones(3, 3).tril().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(0.0)),
        torch.empty(0, 3),
        torch.arange(5),
        torch.ones(3, 3).tril().requires_grad_(),  # what is read gets no gradient
        torch.tensor([[0.0, -1e9], [-1e9, 0.0], [0.0, 0.0]]).requires_grad_(),
    ],
)
def test_contents_that_say_nothing(matrix: Tensor) -> None:
    assert contents(matrix) is None


_TINY = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt_neo": (
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        ["causal", "causal, sliding window 4"],
    ),
    "gptj": ({**_TINY, **_NO_DROPOUT, "rotary_dim": 8}, ["causal", "causal"]),
    "codegen": ({**_TINY, **_NO_DROPOUT, "rotary_dim": 8}, ["causal", "causal"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    config, says = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **config), attn_implementation="eager"
    ).eval()
    ids = torch.randint(3, 99, (2, 13))
    expected = model(ids).logits
    with NothingNarrowed():
        exact = copy.deepcopy(model).double()(ids).logits
    optimized(model)
    assert_as_accurate(model(ids).logits, expected, exact)
    for words, found in zip(says, said(model)):
        assert words in found
