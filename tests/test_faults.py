"""What breaks while models run: no fault gives a wrong answer, and none but `strict=True` takes the run down."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.lowering import lowerings
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

import attn_rewriter
from attn_rewriter import AttentionSpec, Device, choose, pipeline
from attn_rewriter.errors import is_out_of_memory
from attn_rewriter.kernels import decode, flash, stepwise
from attn_rewriter.spec import Scale, Shapes, Softcap
from tests.accuracy import assert_as_accurate, assert_the_same
from tests.models import NothingNarrowed
from tests.running import DRAWS, joined, rewritten, truth, with_gradients
from tests.spellings import Spelling
from tests.standins import PACKAGES, installed, raising
from tests.test_flash import FORMS, NOT_COMPUTED


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    def forget() -> None:
        flash._raised.clear()
        flash._failed.clear()
        torch._dynamo.reset()

    forget()
    yield
    forget()


# -- packages that can't be imported --------------------------------------------------------------------------------


class Panic(BaseException):
    """As Rust's, in Python."""


IMPORTS = {
    "ImportError": "raise ImportError('libcudart.so.12: cannot open shared object file')",
    "OSError": "raise OSError('undefined symbol: _ZN3c10')",
    "RuntimeError": "raise RuntimeError('no GPU found')",
    "AttributeError": "import torch; torch.no_such_function()",
    "SyntaxError": "def (",
    "SystemExit": "import sys; sys.exit('not for this machine')",
    "Panic": "from tests.test_faults import Panic; raise Panic('unwrap on None')",
}


@pytest.mark.parametrize("kind", IMPORTS)
@pytest.mark.parametrize("kernel", ["fa4", "decode"])
def test_a_package_that_raises_on_import_is_a_reason(kernel: str, kind: str, tmp_path: Path) -> None:
    """And another kernel is taken."""
    module = "flash_attn.cute.interface" if kernel == "fa4" else "triton"
    spec = AttentionSpec((Scale(0.125), Softcap(5.0)))
    at = Shapes(2, 4, 4, 2048 if kernel == "fa4" else 1, 2048, 64, 64, torch.bfloat16)
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(IMPORTS[kind])
    decode._broken.cache_clear()
    with installed(flash_attn_3=None), pytest.MonkeyPatch.context() as patch:
        for name in [*sys.modules]:
            if name.partition(".")[0] == module.partition(".")[0] or name == "attn_rewriter.kernels.split_keys":
                patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(tmp_path))
        choice = choose.choose(spec, at, Device.parse("sm_90"))
    decode._broken.cache_clear()
    assert isinstance(choice, choose.Choice) and choice.kernel.name == "flex"
    (reason,) = (refused.reason for refused in choice.refused if refused.reason.startswith(f"{kernel}: "))
    assert kind in reason and ("can't be imported" in reason or "can't be used" in reason)


def test_an_interrupt_is_none_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_rewriter.packages import unimportable

    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        unimportable("interrupted")


# -- kernels that raise while the model runs ------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installed, and taken where they can compute something."""
    monkeypatch.setattr(choose, "order", lambda *about: (TAKEN[-1], "sdpa", "reference"))
    with installed():
        yield
    TAKEN[1:] = []


TAKEN = ["fa4"]

ERROR = RuntimeError("no kernel image is available")


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(k.size(-2)) - torch.arange(q.size(-2))[:, None]
    keep = (distance <= 0) & (distance > -5)
    return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def drawn(length: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, length, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


def assert_right(function: Any, inputs: list[Tensor], eager: Any = window) -> None:
    found = with_gradients(function, inputs)
    assert_as_accurate(found, with_gradients(eager, inputs), truth(eager, inputs))


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "attn_rewriter" in str(w.message)]


@pytest.mark.parametrize("at_once", [1, stepwise._SCORES], ids=["row by row", "at once"])
@pytest.mark.parametrize("spelling", FORMS, ids=lambda s: s.computes)
def test_every_form_is_computed_step_by_step(
    spelling: Spelling, at_once: int, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepwise, "_SCORES", at_once)
    draws = [spelling.inputs(torch.bfloat16, seed) for seed in range(DRAWS)]
    try:
        eager = joined(with_gradients(spelling.function, inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, report = rewritten(spelling.function, device="sm_90", strict=False)
    with raising("fa4", "forward", ERROR), raising("fa4", "backward", ERROR), warnings.catch_warnings(record=True) as w:
        fused = joined(with_gradients(function, inputs) for inputs in draws)
    (site,) = report().sites
    computed = not any(word in str(spelling.computes) for word in NOT_COMPUTED)
    assert (site.kernel == "fa4") == computed == (len(ours(w)) == 1), site
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs) for inputs in draws))


@pytest.mark.parametrize(
    ("kernel", "failing", "way"),
    [
        *((name, name, way) for name in PACKAGES for way in ("forward", "backward")),
        ("fa2/fa4", "fa4", "backward"),
        ("cudnn/fa4", "fa4", "backward"),
        ("fa4/flash", "fa4", "forward"),
        ("fa2", "fa2", "forward, padding"),
        ("fa2", "fa2", "backward, padding"),
    ],
)
def test_a_kernel_that_raises_in_the_middle_of_a_run(kernel: str, failing: str, way: str, packages: None) -> None:
    attention = plain if {"cudnn", "flash"} & {*kernel.split("/")} else without_first if "padding" in way else window
    TAKEN.append(kernel)
    function, report = rewritten(attention, device="sm_90", strict=False, compiler="aot_eager", dynamic=False)
    with raising(failing, way, ERROR, from_call=3) as calls, warnings.catch_warnings(record=True) as caught:
        for length, n in ((20, 1), (16, 2), (16, 3), (16, 3), (20, 4)):
            assert_right(function, drawn(length), attention)
            assert len(calls) == n  # what failed is not tried again, but another kind of call is
        (said,) = ours(caught)  # once
        direction, _, _ = way.partition(",")
        assert f"{failing} raised in its {direction} pass, given torch.bfloat16 of (2, 16, 4, 16)" in said
        assert f"RuntimeError: {ERROR}" in said
    assert {site.kernel for site in report().sites} == {kernel}
    again, report = rewritten(attention, device="sm_90", strict=False, compiler="aot_eager")
    assert_right(again, drawn(), attention)
    (site,) = report().sites
    assert site.kernel == "sdpa"
    assert f"{kernel}: raised in this process: RuntimeError: {ERROR}" in [r.reason for r in site.refusals]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def without_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.arange(k.size(-2)) < 3
    return (q @ k.mT * 0.25).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("options", [{"strict": True}, {"kernel": "fa4"}, {"kernel": ["fa4", "sdpa"]}], ids=str)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_is_asked_for_raises(way: str, options: dict[str, Any], packages: None) -> None:
    """A kernel that is asked for by name never falls back."""
    function, _ = rewritten(window, device="sm_90", **{"strict": False, **options})
    with raising("fa4", way, ERROR), pytest.raises(RuntimeError, match=str(ERROR)):
        with_gradients(function, drawn())
    assert not flash._raised


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_passes(way: str, error: BaseException, packages: None) -> None:
    """No other way needs less memory, and the kernel is not to blame: the next call takes it again."""
    function, _ = rewritten(window, device="sm_90", strict=False)
    with raising("fa4", way, error, to_call=1) as calls:
        with pytest.raises(type(error)):
            with_gradients(function, drawn())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*attn_rewriter.*")
            assert_right(function, drawn())
        assert len(calls) == 2


def test_dropout_passes(packages: None) -> None:
    """What was dropped is known to the package alone: a checkpoint may compute it again by another, and be wrong."""
    TAKEN.append("fa2")
    function, report = rewritten(
        lambda q, k, v: F.dropout((q @ k.mT * 0.25).softmax(-1), 0.5) @ v, device="sm_90", strict=False
    )
    with raising("fa2", "forward", ERROR), pytest.raises(RuntimeError, match=str(ERROR)):
        function(*drawn())
    assert report().sites[0].kernel == "fa2"


def test_what_the_steps_raise_too_passes(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all does when it is CUDA that is out of order: no kernel is blamed for it."""

    def out_of_order(*args: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(stepwise.Stepwise, "forward", out_of_order)
    function, _ = rewritten(window, device="sm_90", strict=False)
    with raising("fa4", "forward", ERROR), pytest.raises(RuntimeError, match="illegal") as caught:
        function(*drawn())
    assert caught.value.__context__ is ERROR and not flash._raised


AROUND = {
    "checkpoint": (lambda q, k, v: checkpoint(window, q, k, v, use_reentrant=False), nullcontext),
    "autocast": (window, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize("around", AROUND)
def test_around_it(around: str, packages: None) -> None:
    attention, context = AROUND[around]
    function, report = rewritten(attention, device="sm_90", strict=False)
    with raising("fa4", "forward", ERROR, from_call=2), raising("fa4", "backward", ERROR), context():
        with pytest.warns(UserWarning, match="fa4 raised in its"):
            assert_right(function, drawn())
        assert_right(function, drawn(seed=1))
    assert report().sites[0].kernel == "fa4"


def test_under_inductor(packages: None) -> None:
    function, report = rewritten(window, device="sm_90", strict=False, compiler="inductor", dynamic=False)
    with raising("fa4", "forward", ERROR, from_call=2), raising("fa4", "backward", ERROR, from_call=3):
        assert_right(function, drawn())
        with pytest.warns(UserWarning, match="fa4 raised in its forward pass"):
            assert_right(function, drawn())
        assert_right(function, drawn())
    assert report().sites[0].kernel == "fa4"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(ERROR)


# -- compilers that raise for what was put in -----------------------------------------------------------------------


def compiler_that_raises(error: BaseException) -> Any:
    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if any("attn_rewriter" in node.meta for node in gm.graph.nodes):
            raise error
        return gm.forward

    return compiler


@pytest.mark.parametrize("buffer", [False, True], ids=["", "a buffer is read"])
def test_a_compiler_that_raises_gets_the_graph_as_it_was(buffer: bool) -> None:
    function: Any = Attention().double().eval() if buffer else window
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    given = [x] if buffer else drawn()
    compiled = attn_rewriter.optimize(function, compiler=compiler_that_raises(ERROR))
    expected = function._call_impl(*given) if buffer else function(*given)
    with pytest.warns(
        UserWarning, match=f"leaves a graph with 1 rewritten sites as it was, .*RuntimeError: {ERROR}"
    ) as caught:
        assert torch.equal(compiled(*given), expected)
    assert torch.equal(compiled(*given), expected) and len(ours([*caught])) == 1
    (site,) = attn_rewriter.report_of(compiled).sites
    assert site.kernel is None and str(ERROR) in site.refusals[-1].reason
    if buffer:
        function.mask[:, 5] = True
        assert_the_same(compiled(x), function._call_impl(x))
        assert not torch.allclose(compiled(x), expected)


def test_an_error_outside_of_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is compiled as it was; `strict` raises."""

    def lower(facts: Any) -> bool:
        facts.graph.erase_node(next(iter(facts.graph.find_nodes(op="output"))))
        raise ERROR

    monkeypatch.setattr(pipeline, "lower", lower)
    given = drawn()
    compiled = attn_rewriter.optimize(window, compiler="eager")
    with pytest.warns(UserWarning, match=f"leaves a graph as it is, after an error: RuntimeError: {ERROR}"):
        assert torch.equal(compiled(*given), window(*given))
    assert attn_rewriter.report_of(compiled).n_sites == 0
    with pytest.raises(Exception, match=f"could not rewrite a graph: RuntimeError: {ERROR}"):
        attn_rewriter.optimize(window, strict=True)(*given)


@pytest.mark.parametrize("options", [{"strict": True}, {"kernel": "sdpa"}], ids=str)
def test_what_is_asked_for_raises_from_the_compiler(options: dict[str, Any]) -> None:
    function = attn_rewriter.optimize(window, compiler=compiler_that_raises(ERROR), **options)
    with pytest.raises(Exception, match=str(ERROR)):
        function(*drawn())


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt()], ids=repr)
def test_what_passes_from_the_compiler(error: BaseException) -> None:
    function = attn_rewriter.optimize(window, compiler=compiler_that_raises(error))
    with warnings.catch_warnings(record=True) as caught, pytest.raises((type(error), BackendCompilerFailed)):
        function(*drawn())
    assert not ours(caught)


def test_a_lowering_of_inductor_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward pass. (The backward pass is compiled when it first runs, or raises then.)"""

    def unlucky(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no such template")

    capped = lambda q, k, v: (torch.tanh(q @ k.mT * 0.25 / 5.0) * 5.0).softmax(-1) @ v  # noqa: E731
    monkeypatch.setitem(lowerings, torch.ops.higher_order.flex_attention, unlucky)
    function = attn_rewriter.optimize(capped)
    given = [x.detach().float() for x in drawn()]
    with pytest.warns(UserWarning, match="leaves a graph with 1 rewritten sites as it was, .*no such template"):
        assert_as_accurate(function(*given), capped(*given), truth(capped, given)[0])
    (site,) = attn_rewriter.report_of(function).sites
    assert site.kernel is None and "no such template" in site.refusals[-1].reason


# -- processes and resets -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_compiling() -> None:
    """In a process of its own, with one thread: those of others do not survive a fork. (Inductor's own compilation
    hangs in a forked process, also without us.)"""
    code = """
        import os, torch, attn_rewriter
        from torch import nn

        torch.set_num_threads(1)

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mask", torch.ones(32, 32).tril())

            def forward(self, x):
                n = x.shape[-2]
                scores = (x @ x.mT).masked_fill(self.mask[:n, :n] == 0, float("-inf"))
                return scores.softmax(-1) @ x

        def check(model, n):
            x = torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True)
            found, expected = (torch.autograd.grad(f(x).sum(), x) for f in (model, model._call_impl))
            torch.testing.assert_close(found, expected)
            assert attn_rewriter.report_of(model).n_fused == attn_rewriter.report_of(model).n_sites > 0

        model, other = (attn_rewriter.optimize(Attention(), compiler="aot_eager", dynamic=False) for _ in range(2))
        check(model, 16)
        child = os.fork()
        check(model, 16)
        if not child:
            check(model, 20)  # compiles anew
            model.mask[..., 5] = 1.0
            check(model, 16)  # compiles what it was before
            check(other, 16)  # compiles for the first time
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        check(model, 16)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Attention(nn.Module):
    """With a mask that is registered, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mask", torch.ones(32, 32).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        n = x.shape[1]
        scores = (q @ k.mT / 8**0.5).masked_fill(~self.mask[:n, :n], float("-inf"))
        return self.out((self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()]).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def assert_right_now(model: nn.Module) -> None:
    """The answer, and the gradients, are those of the model as it is now."""
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    ways = []
    for run in (model, model._call_impl):
        y = run(x)
        ways.append([y, *torch.autograd.grad(y.square().mean(), [x, *model.parameters()], allow_unused=True)])
    assert_the_same(*ways)


def _swap_layers(model: Any) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def _another_layer(model: Any) -> None:
    model.layers[1] = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).double()


def _fewer_layers(model: Any) -> None:
    del model.layers[0]


def _another_submodule(model: Any) -> None:
    model.layers[0].qkv = nn.Linear(16, 48, bias=False).double()


def _forward_of_an_instance(model: Any) -> None:
    layer = model.layers[0]
    layer.forward = lambda x: layer.out(layer.qkv(x)[..., :16].cos())


def _forward_of_the_whole(model: Any) -> None:
    model.forward = lambda x: model.layers[1](x) * 2


def _forward_of_the_class(model: Any) -> None:
    class Uncausal(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.mT).softmax(-1) @ v)

    for layer in model.layers:
        layer.__class__ = Uncausal


def _weights(model: Any) -> None:
    model.load_state_dict({name: x * 2 if x.is_floating_point() else x for name, x in model.state_dict().items()})


def _no_dropout_in_training(model: Any) -> None:
    for layer in model.layers:
        layer.dropout.p = 0.0
    model.train()


def _buffer_in_place(model: Any) -> None:
    model.layers[0].mask[:, 5] = True
    model.layers[0].mask[2, 4:6] = True


def _buffer_replaced(model: Any) -> None:
    model.layers[1].mask = torch.ones(32, 32, dtype=torch.bool).tril(3)


def _buffer_gone(model: Any) -> None:
    del model.layers[1].mask
    model.layers[1].mask = torch.ones(32, 32, dtype=torch.bool)  # not registered


CHANGES = (
    _swap_layers,
    _another_layer,
    _fewer_layers,
    _another_submodule,
    _forward_of_an_instance,
    _forward_of_the_whole,
    _forward_of_the_class,
    _weights,
    _no_dropout_in_training,
    _buffer_in_place,
    _buffer_replaced,
    _buffer_gone,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_changed(change: Callable[[Any], None]) -> None:
    model = attn_rewriter.optimize(Layers().eval(), compiler="aot_eager", strict=True)
    assert_right_now(model)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    before = model(x)
    change(model)
    if change is not _no_dropout_in_training:
        assert not torch.allclose(model(x), before)
    assert_right_now(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_model_of_another_type(dtype: torch.dtype) -> None:
    model = attn_rewriter.optimize(Layers().eval(), compiler="aot_eager", strict=True)
    assert_right_now(model)
    model.to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype)
    eager, found = model._call_impl(x), model(x)
    exact = copy.deepcopy(model).double()._call_impl(x.double())
    assert_as_accurate(found, eager, exact)
    model.double()
    assert_right_now(model)


def test_training_and_evaluation_take_turns() -> None:
    """Dropout is there in training alone."""
    model = attn_rewriter.optimize(Layers(), compiler="aot_eager", strict=True)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for _ in range(2):
        model.train()
        assert not torch.allclose(model(x), model(x))
        model.eval()
        assert_right_now(model)
    said = [str(site.spec) for site in attn_rewriter.report_of(model).sites]
    assert said == ["scale 0.3536, causal, dropout 0.5"] * 2 + ["scale 0.3536, causal"] * 2


def test_attn_implementation_is_changed() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    attn_rewriter.optimize(model, compiler="aot_eager", strict=True)
    exact = copy.deepcopy(model).double()
    ids, keep = torch.randint(3, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    keep[0, :3] = 0
    for implementation in ("eager", "sdpa", "eager"):
        for each in (model, exact):
            each.set_attn_implementation(implementation)
        for mask in (None, keep):
            rows = keep.bool() if mask is not None else slice(None)
            found, eager = (run(ids, attention_mask=mask).logits[rows] for run in (model, model._call_impl))
            with NothingNarrowed():
                assert_as_accurate(found, eager, exact(ids, attention_mask=mask).logits[rows])
    report = attn_rewriter.report_of(model)
    assert report.n_fused == report.n_sites >= 4


def test_dynamo_is_reset_between_calls() -> None:
    model = attn_rewriter.optimize(Layers().eval(), compiler="aot_eager", strict=True)
    for n in range(1, 4):
        assert_right_now(model)
        assert attn_rewriter.report_of(model).n_fused == 2 * n
        torch._dynamo.reset()
    model.layers[0].mask[:, 5] = True
    assert_right_now(model)
    torch.compiler.reset()
    assert_right_now(model)


UNSEEN: dict[str, Callable[[Any], Any]] = {
    "data": lambda layer: layer.mask.data.fill_(True),
    "NumPy": lambda layer: layer.mask.numpy().fill(True),
    "hook": lambda layer: layer.register_forward_hook(lambda module, args, output: output * 3),
}


@pytest.mark.parametrize("change", UNSEEN)
def test_what_only_a_reset_sees(change: str) -> None:
    """What is written in these ways moves no version; of hooks, Dynamo says that it does not look for new ones."""
    model = attn_rewriter.optimize(Layers().eval(), compiler="aot_eager", strict=True)
    assert_right_now(model)
    UNSEEN[change](model.layers[0])
    torch.compiler.reset()
    assert_right_now(model)
