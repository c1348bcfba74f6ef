"""Verification: right sites pass, wrong kernels are found out, and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attn_rewriter
from attn_rewriter import Backend, Options, RewriteError
from attn_rewriter.kernels import KERNELS
from attn_rewriter.kernels.sdpa import SDPA
from attn_rewriter.verify import _random_numbers_kept
from tests.accuracy import assert_as_accurate
from tests.models import ARCHITECTURES, build, inputs
from tests.running import double, rewritten, run_as_is
from tests.spellings import SPELLINGS, Spelling

LENGTH = 24


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def verified(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function returns under the rewriter, and the report."""
    backend = Backend(Options(compiler=run_as_is, **{"verify": True, **options}))
    return torch.compile(function, backend=backend)(*args), backend.report


class Off(SDPA):
    """SDPA with an error of its own: in its output, in its gradients, or by raising."""

    error: Any = staticmethod(lambda output: output)

    def attend(self, *given: Any) -> Tensor:
        return self.error(super().attend(*given))


class Backward(torch.autograd.Function):
    """The identity, but for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.change(gradient), None


class WrongGradient(SDPA):
    """SDPA whose gradients for one operand are changed."""

    def __init__(self, operand: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operand, self.change = operand, change

    def attend(self, spec: Any, shapes: Any, device: Any, tensors: Any) -> Tensor:
        return super().attend(spec, shapes, device, _Changed(tensors, self.operand, self.change))


class _Changed(dict[Any, Any]):
    def __init__(self, tensors: Any, operand: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__({**tensors, operand: Backward.apply(tensors[operand], change)})
        self._tensors = tensors

    def __missing__(self, name: Any) -> Any:
        return self._tensors[name]


def _raise(output: Tensor) -> Tensor:
    if isinstance(output, Tensor) and not isinstance(output, torch._subclasses.FakeTensor):
        raise RuntimeError("no such luck")
    return output


WRONG = {
    "output": (lambda output: output * 1.001, "off by .* in its output"),
    "gradients": (
        lambda output: Backward.apply(output, lambda gradient: gradient * 1.01),
        "off by .* in its gradients",
    ),
    "no number": (lambda output: output * float("nan"), "off by nan in its output"),
    "no gradients": (lambda output: output.detach(), "off by .* in its gradients"),
    "an exception": (_raise, "could not be verified: RuntimeError: no such luck"),
}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(LENGTH, LENGTH, device=q.device).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v


def draw(**how: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, LENGTH, 16, **how) for _ in range(3)]


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_put_back(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    off, reason = WRONG[what]
    monkeypatch.setattr(Off, "error", staticmethod(off))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    given = draw(requires_grad=True)
    with pytest.warns(UserWarning, match=f"leaves the attention at .* as it is: sdpa .*{reason}"):
        output, report = verified(attention, *given)
    (site,) = report.sites
    assert site.kernel is None and "sdpa" in site.refusals[-1].reason
    assert torch.equal(output, attention(*given))
    with pytest.raises(Exception, match=reason) as raised:
        verified(attention, *given, strict=True)
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), RewriteError)


def test_without_verification_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests find out is the verification's doing."""
    monkeypatch.setattr(Off, "error", staticmethod(WRONG["output"][0]))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    given = draw()
    output, report = verified(attention, *given, verify=False)
    assert report.n_fused == 1 and not torch.allclose(output, attention(*given), rtol=1e-4)


@pytest.mark.parametrize(
    "spelling", [s for s in SPELLINGS if s.computes and "sdpa" not in s.impossible], ids=lambda s: s.name
)
def test_right_sites_pass(spelling: Spelling) -> None:
    """Whatever is read, in-place operations, sinks and gates included; with dropout as well."""
    given = spelling.inputs(torch.float32, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, report = verified(spelling.function, *given, kernel="sdpa")
    for site in report.sites:
        assert site.kernel == "sdpa"
        assert site.check is not None and not site.check.verdict
        names = [what for what, *_ in site.check.errors]
        wants = any(isinstance(x, Tensor) and x.requires_grad for x in given)
        assert names == (["output", "gradients"] if wants else ["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_models(name: str, dtype: torch.dtype) -> None:
    """Every site of a padded batch, rows without a key among them."""
    backend = Backend(Options(compiler=run_as_is, verify=True, strict=True))
    model = build(name, "eager").to(dtype)
    torch.compile(model, backend=backend)(**inputs(name, "left"))
    assert backend.report.n_fused == ARCHITECTURES[name].n_sites
    assert all(site.check and site.check.errors for site in backend.report.sites)
    assert "verified:" in str(backend.report) and "verified: output off by" in backend.report.to_html()


def test_inputs_and_random_numbers_stay_as_they_are() -> None:
    def with_a_cache(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, :LENGTH] += k
        return F.dropout(attention(q, cache[:, :, :LENGTH], v), 0.5)

    caches, outputs = [], []
    for verify in (False, True):
        caches.append(torch.zeros(2, 4, 2 * LENGTH, 16))
        given = draw()
        torch.manual_seed(1)
        output, report = verified(with_a_cache, *given, caches[-1], verify=verify)
        outputs.append(output)
        assert report.n_fused == 1
    assert torch.equal(*caches) and torch.equal(*outputs) and caches[0].any()


def test_random_numbers_of_other_devices_stay_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers:
        state = torch.zeros(1)
        device_count = staticmethod(lambda: 2)
        get_rng_state = staticmethod(lambda device: Numbers.state)

        @staticmethod
        def set_rng_state(state: Tensor, device: Any) -> None:
            restored.append(device)

    class Elsewhere(Tensor):
        device = property(lambda self: torch.device("xpu"))

    restored: list[Any] = []
    monkeypatch.setattr(torch, "xpu", Numbers)
    with _random_numbers_kept([torch.zeros(1).as_subclass(Elsewhere), torch.zeros(1), 3]):
        assert not restored
    assert restored == [0, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_regions(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attention, attention(q, k, v), k, v, use_reentrant=reentrant)

    given = draw(requires_grad=True)
    _, report = verified(twice, *given)
    assert [bool(site.check and site.check.errors) for site in report.sites] == [True, True]
    monkeypatch.setattr(Off, "error", staticmethod(WRONG["output"][0]))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="leaves the attention"):
        _, report = verified(twice, *given)
    assert [site.kernel for site in report.sites] == [None, None]


@pytest.mark.parametrize("taken", [True, False])
def test_the_branch_that_is_taken(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def branches(which: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(which, attention, lambda q, k, v: attention(q * 2, k, v), (q, k, v))

    monkeypatch.setattr(Off, "error", staticmethod(WRONG["output"][0]))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    q, k, v = draw()
    with pytest.warns(UserWarning, match="leaves the attention"):
        output, report = verified(branches, torch.tensor(taken), q, k, v)
    assert report.n_fused == 1 and torch.equal(output, attention(q if taken else q * 2, k, v))


def test_a_region_that_is_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.compiler.nested_compile_region
    def region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return region(region(q, k, v), k, v)

    _, report = verified(twice, *draw())
    assert [site.verified != () for site in report.sites] == [True]
    monkeypatch.setattr(Off, "error", staticmethod(WRONG["output"][0]))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="leaves the attention"):
        output, _ = verified(twice, *draw())
    assert torch.equal(output, twice(*draw()))


def test_running_statistics_are_updated_once() -> None:
    """`F.batch_norm` writes into its buffers, though its name does not say so."""
    found = []
    for verify in (False, True):
        norm = nn.BatchNorm1d(16)
        _, report = verified(lambda q, k, v, norm=norm: norm(attention(q, k, v).flatten(0, 2)), *draw(), verify=verify)
        assert report.n_fused == 1
        found.append(norm.state_dict())
        torch._dynamo.reset()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_always_checks_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a buffer was read by value, and after it holds something else."""

    class Registered(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).masked_fill(~self.mask, float("-inf")).softmax(-1) @ v

    class WrongIfCausal(Off):
        is_wrong = False

        def attend(self, spec: Any, *given: Any) -> Tensor:
            output = super().attend(spec, *given)
            return output * 1.001 if self.is_wrong and "causal" in str(spec) else output

    kernel = WrongIfCausal()
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    model, given = Registered(), draw()
    compiled = torch.compile(model, backend=Backend(Options(compiler=run_as_is, verify="always")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for upper in (True, False, True):
            model.mask.copy_(torch.ones(LENGTH, LENGTH).tril(0 if upper else 3))
            assert_as_accurate(compiled(*given), model(*given), model(*double(given)))
    kernel.is_wrong = True
    with pytest.warns(UserWarning, match="leaves the attention"):
        assert torch.equal(compiled(*given), model(*given))
    assert torch.equal(compiled(*given), model(*given))


def test_symbolic_sizes() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        keep = torch.arange(n)[:, None] >= torch.arange(n)[None, :]
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    backend = Backend(Options(compiler=run_as_is, verify=True, strict=True))
    torch.compile(causal, backend=backend, dynamic=True)(*draw())
    assert backend.report.sites[0].check and backend.report.sites[0].check.errors


@pytest.mark.parametrize("verify", [True, "always"])
def test_a_kernel_that_goes_wrong_later(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only "always" looks again."""
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    given = draw()
    backend = Backend(Options(compiler=run_as_is, verify=verify))
    compiled = torch.compile(attention, backend=backend)
    assert_as_accurate(compiled(*given), attention(*given), attention(*double(given)))
    monkeypatch.setattr(Off, "error", staticmethod(WRONG["output"][0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [compiled(*given) for _ in range(3)]
    assert sum("leaves the attention" in str(warning.message) for warning in caught) == (verify == "always")
    assert all(torch.equal(x, attention(*given)) for x in found) == (verify == "always")


def test_no_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("attn_rewriter.verify._Trial.with_gradients", full)
    with pytest.warns(UserWarning, match="can't verify the attention at .*: out of memory"):
        _, report = verified(attention, *draw())
    assert report.n_fused == 1 and not report.sites[0].verified


def test_a_graph_that_runs_only_once() -> None:
    """It is compiled all the same; what was checked until there, was checked."""
    n_runs = 0

    def once(x: Tensor) -> Tensor:
        nonlocal n_runs
        n_runs += not isinstance(x, torch._subclasses.FakeTensor)
        if n_runs == 1:
            raise torch.OutOfMemoryError("full")
        return x

    torch._dynamo.allow_in_graph(once)
    with pytest.warns(UserWarning, match="can't verify a graph, .*: OutOfMemoryError: full"):
        _, report = verified(lambda q, k, v: once(attention(q, k, v)), *draw())
    assert report.n_fused == 1 and report.sites[0].verified


def test_a_kernel_that_inductor_compiles_is_checked_in_training() -> None:
    """Its backward pass as well, while Dynamo compiles the model."""
    function, report = rewritten(attention, kernel="chunked", device="sm_90", compiler="inductor", verify=True)
    function(*(x.requires_grad_() for x in draw(dtype=torch.bfloat16))).sum().backward()
    (site,) = report().sites
    assert site.kernel == "chunked" and site.check and not site.check.verdict
    assert [what for what, *_ in site.check.errors] == ["output", "gradients"]


def test_optimize_verifies() -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    attn_rewriter.optimize(model, compiler="eager", verify=True)
    x = torch.randn(2, 9, 32)
    model(x, x, x, need_weights=False)
    (site,) = attn_rewriter.report_of(model).sites
    assert site.check and site.check.errors
    with pytest.raises(ValueError, match=r"verify is .*, not 'sometimes'"):
        attn_rewriter.optimize(model, verify="sometimes")


def test_rows_that_a_bias_hides_do_not_hide_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager code in float32 gives such a row equal weights, which float64 does not."""
    monkeypatch.setattr(Off, "error", staticmethod(lambda output: output * 1.01))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    bias = torch.zeros(2, 1, LENGTH, LENGTH)
    bias[0, :, :6] = -1e9

    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    with pytest.warns(UserWarning, match="leaves the attention at .* as it is: sdpa is off by"):
        _, report = verified(biased, *draw())
    assert report.n_fused == 0


def test_float64_is_the_truth_itself() -> None:
    _, report = verified(attention, *(100 * x for x in draw(dtype=torch.float64, requires_grad=True)))
    assert report.n_fused == 1 and not report.sites[0].verified


def without_late_rows(x: Tensor) -> Tensor:
    return x * (torch.arange(x.size(-2)) < x.size(-2) * 15 // 16).unsqueeze(-1)


@pytest.mark.parametrize("lost", ["output", "query", "key", "value"])
def test_late_rows_count(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They average many values, and are small beside the first ones."""
    kernel = Off() if lost == "output" else WrongGradient(lost, without_late_rows)
    monkeypatch.setattr(Off, "error", staticmethod(without_late_rows))
    given = [torch.randn(1, 1, 1024, 16).bfloat16().requires_grad_(lost != "output") for _ in range(3)]

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).masked_fill(torch.ones(1024, 1024).triu(1).bool(), float("-inf")).softmax(-1) @ v

    assert verified(causal, *given)[1].n_fused == 1
    torch._dynamo.reset()
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    with pytest.warns(UserWarning, match="leaves the attention"):
        _, report = verified(causal, *given)
    assert report.n_fused == 0


def test_each_operand_has_gradients_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small queries with large keys, whose gradients are small."""
    factors = torch.tensor([1 / 64, 64, 1]).bfloat16()
    q, k, v = ((x.bfloat16() * factor).requires_grad_() for x, factor in zip(draw(), factors))
    assert verified(attention, q, k, v)[1].n_fused == 1
    torch._dynamo.reset()
    monkeypatch.setitem(KERNELS, "sdpa", WrongGradient("key", torch.zeros_like))
    with pytest.warns(UserWarning, match="off by .* in its gradients"):
        _, report = verified(attention, q, k, v)
    assert report.n_fused == 0


def test_wrong_once_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a kernel does well when it is looked at again forgives luck alone."""
    n_calls = 0

    def at_first(output: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        return output * 1.1 if n_calls == 1 else output

    given = draw()
    monkeypatch.setattr(Off, "error", staticmethod(at_first))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    with pytest.warns(UserWarning, match="off by .* in its output"):
        _, report = verified(attention, *given)
    assert report.n_fused == 0 and n_calls > 1


def test_rows_without_a_key_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing that is known of them."""

    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v

    keep = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    keep[0, :, :6] = False
    assert verified(padded, *draw(), keep)[1].n_fused == 1
    torch._dynamo.reset()
    some = keep.any(-1, keepdim=True)
    monkeypatch.setattr(Off, "error", staticmethod(lambda output: output.where(some, float("nan"))))
    monkeypatch.setitem(KERNELS, "sdpa", Off())
    with pytest.warns(UserWarning, match="off by nan in its output"):
        _, report = verified(padded, *draw(), keep)
    assert report.n_fused == 0


def test_luck_is_no_fault() -> None:
    """Where there are few elements, and weights near 1, whose gradients cancel."""

    def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    backend = Backend(Options(compiler=run_as_is, verify="always", strict=True))
    compiled = torch.compile(unscaled, backend=backend)
    for _ in range(50):
        compiled(*(torch.randn(1, 1, 8, 64, requires_grad=True) for _ in range(3)))
    given = [torch.randn(1, 1, 64, 64, requires_grad=True) for _ in range(3)]
    compiled(100 * given[0], *given[1:])
    assert backend.report.n_fused == backend.report.n_sites > 0
