"""The flash-attention packages, through stand-ins: what each is asked to compute, and why one is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attn_rewriter import AttentionSpec, Device, measured
from attn_rewriter.choose import Choice, choose, usable
from attn_rewriter.kernels import KERNELS, fa4
from attn_rewriter.kernels.flash import Flash, FlashForm, How, flash_attention, flash_form
from attn_rewriter.spec import Band, Bias, Mask, Scale, Shapes, Softcap
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, joined, rewritten, truth, with_gradients
from tests.spellings import SPELLINGS, Spelling
from tests.standins import PACKAGES, installed


@pytest.fixture(autouse=True)
def _packages() -> Iterator[None]:
    with installed():
        yield


def band(lower: int | None, upper: int | None) -> AttentionSpec:
    return AttentionSpec((Scale(0.125), Mask(None, Band(lower, upper), "keep")))


def shapes(q_len: int = 256, kv_len: int = 256, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Shapes:
    return Shapes(2, 8, 2, q_len, kv_len, head_dim, head_dim, dtype, True)


# One spelling of each form: that all spellings are read as it, `test_spellings.py` shows.
FORMS = [*{s.computes: s for s in SPELLINGS[::-1] if not s.random and s.computes and s.n_sites == 1}.values()]


NOT_COMPUTED = ("bias", "clamp")


@pytest.mark.parametrize("spelling", FORMS, ids=lambda s: s.computes)
def test_result_and_gradients(spelling: Spelling) -> None:
    """In a graph, where one operator serves all versions; each by itself is for `test_kernels.py`."""
    draws = [spelling.inputs(torch.bfloat16, seed) for seed in range(DRAWS)]
    try:
        eager = joined(with_gradients(spelling.function, inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, report = rewritten(spelling.function, kernel=["fa4", "reference"], device="sm_90")
    fused = joined(with_gradients(function, inputs) for inputs in draws)
    (site,) = report().sites
    assert (site.kernel == "fa4") != any(word in str(spelling.computes) for word in NOT_COMPUTED), site
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs) for inputs in draws))


@pytest.mark.parametrize("kernel", PACKAGES)
@pytest.mark.parametrize(("q_len", "kv_len"), [(256, 256), (64, 256), (1, 256)])
@pytest.mark.parametrize("window", [None, 16])
def test_every_version_is_taken_for_windows(kernel: str, q_len: int, kv_len: int, window: int | None) -> None:
    """Causal from the last query and key on, as decoding with a cache has it."""
    last = kv_len - q_len
    spec = band(None if window is None else last - window, last)
    assert not KERNELS[kernel].refusals(spec, shapes(q_len, kv_len), Device.parse("sm_90"))


@pytest.mark.parametrize(
    ("spec", "at", "device", "reason"),
    [
        (band(None, 0), shapes(64, 256), "sm_100", "aligns its windows with the last query and key"),
        (band(3, None), shapes(), "sm_100", "aligns its windows"),
        (band(-5, 0), shapes(100, 10), "sm_100", "aligns its windows"),
        (band(-100, -50), shapes(100, 10), "sm_100", "takes windows over at least as many keys as queries"),
        (band(None, 0), shapes(head_dim=512), "sm_90", "head_dim is at most 256"),
        (band(None, 0), shapes(head_dim=36), "sm_90", "a multiple of 8"),
        (band(None, 0), shapes(dtype=torch.float32), "sm_90", "bfloat16, float16, not in float32"),
        (band(None, 0), shapes(), "sm_75", "or newer, this is sm_75"),
        (band(None, 0), shapes(), "cpu", "not on cpu"),
        (AttentionSpec((Softcap(5.0), Scale(2.0))), shapes(), "sm_90", "after a softcap"),
    ],
)
@pytest.mark.parametrize("kernel", PACKAGES)
def test_reasons(kernel: str, spec: AttentionSpec, at: Shapes, device: str, reason: str) -> None:
    assert reason in "; ".join(KERNELS[kernel].refusals(spec, at, Device.parse(device)))


@pytest.mark.parametrize(
    ("kernel", "device", "head_dim", "reason"),
    [
        ("fa3", "sm_100", 64, "is for sm_90"),
        ("fa3", "sm_80", 64, "needs sm_90"),
        ("fa4", "sm_80", 64, "has a backward pass from sm_90 on"),
        ("fa4", "sm_100", 192, "head_dim is at most 128 on sm_100"),
        ("fa4", "sm_100", 256, ""),
        ("fa4", "sm_90", 192, ""),
        ("fa2", "gfx942", 128, ""),
        ("fa2", "gfx1100", 128, "runs on gfx90a, gfx942, gfx950"),
        ("fa4", "gfx942", 128, "runs on cuda, not on rocm"),
        ("fa3", "gfx942", 128, "runs on cuda, not on rocm"),
    ],
)
def test_generations(kernel: str, device: str, head_dim: int, reason: str) -> None:
    reasons = KERNELS[kernel].refusals(band(None, 0), shapes(head_dim=head_dim), Device.parse(device))
    assert reason in "; ".join(reasons) and bool(reason) == bool(reasons)


@pytest.mark.parametrize(
    ("distribution", "version", "reason"),
    [
        ("flash_attn", None, "flash-attn is not installed"),
        ("flash_attn", "2.0.4", "needs flash-attn 2.7 or newer, this is 2.0.4"),
    ],
)
def test_packages_that_do_not_do(distribution: str, version: str | None, reason: str) -> None:
    with installed(**{distribution: version}):
        assert KERNELS["fa2"].refusals(band(None, 0), shapes(), Device.parse("sm_90")) == [reason]


def test_a_broken_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn.flash_attn_interface", None)
    (reason,) = KERNELS["fa2"].refusals(band(None, 0), shapes(), Device.parse("sm_90"))
    assert reason.startswith("flash-attn 2.8.3.post2 can't be imported: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("absent", "kernel"),
    [([], "fa4"), (["flash_attn_4"], "fa3"), (["flash_attn_4", "flash_attn_3"], "fa2")],
)
def test_without_inductor_a_window_goes_to_the_newest_version(absent: list[str], kernel: str) -> None:
    with installed(**dict.fromkeys(absent)):
        choice = choose(band(-100, 0), shapes(1024, 1024), Device.parse("sm_90"), inductor=False)
        assert isinstance(choice, Choice) and choice.kernel.name == kernel


@pytest.mark.parametrize(
    ("device", "length", "head_dim", "training", "kernel"),
    [
        ("sm_90", 8192, 128, False, "fa4"),
        ("sm_90", 100_000, 96, True, "fa4"),
        ("sm_90", 512, 128, False, "sdpa"),
        ("sm_90", 8192, 256, False, "fa4"),
        ("sm_90", 8192, 256, True, "fa4/cudnn"),
        ("sm_100", 8192, 128, False, "sdpa"),
        ("sm_75", 8192, 128, False, "sdpa"),
    ],
)
def test_causal_goes_to_what_was_measured(device: str, length: int, head_dim: int, training: bool, kernel: str) -> None:
    at = replace(shapes(length, length, head_dim), needs_backward=training)
    choice = choose(band(None, 0), at, Device.parse(device))
    assert isinstance(choice, Choice) and choice.kernel.name == kernel


def test_tables_name_kernels_and_where_they_are_from() -> None:
    paths = [*measured.FOLDER.glob("*.json")]
    assert paths
    for path in paths:
        held = json.loads(path.read_text())
        assert held["setup"]["device"] and held["commands"]
        for cell in held["cells"]:
            assert {*cell["forward"], *cell["backward"]} <= KERNELS.keys()


def test_dropout_is_for_version_2() -> None:
    call = replace(band(-100, 0), dropout_p=0.1), shapes(1024, 1024), Device.parse("sm_90")
    choice = choose(*call, inductor=False)
    assert isinstance(choice, Choice) and choice.kernel.name == "fa2" and not choice.refused
    for name in ("flex", "fa4", "fa3"):
        assert "has no dropout" in KERNELS[name].refusals(*call)
    capped = AttentionSpec((Scale(0.125), Softcap(30.0)), dropout_p=0.1)
    assert KERNELS["fa2"].refusals(capped, shapes(), Device.parse("sm_90")) == ["has no dropout with a softcap"]


def dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout((q @ k.mT * 0.25).softmax(-1), 0.5) @ v


def around_dropout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """What the output and the gradient of `v` are multiplied by for what was dropped, head by head."""
    plain = (q @ k.mT * 0.25).softmax(-1) @ v
    (expected,) = torch.autograd.grad(plain.sum(), v)
    function, report = rewritten(
        lambda *inputs: checkpoint(dropping, *inputs, use_reentrant=False), kernel="fa2", device="sm_90", compiler=AOT
    )
    output = function(q, k, v)
    assert [site.kernel for site in report().sites] == ["fa2"]
    (found,) = torch.autograd.grad(output.sum(), v)
    pairs = ((output.double(), plain.double()), (found.double(), expected.double()))
    return [(x * y).sum((2, 3)) / y.square().sum((2, 3)) for x, y in pairs]


AOT = "aot_eager"


def drawn() -> list[torch.Tensor]:
    return [torch.randn(4, 8, 16, 16, dtype=torch.float16).requires_grad_() for _ in range(3)]


def test_the_backward_pass_drops_what_the_forward_pass_did() -> None:
    """Also where a checkpoint computes the forward pass again."""
    forward, backward = around_dropout(*drawn())
    assert {0, 2} == {*forward.round().int().flatten().tolist()}
    assert torch.equal(backward.round(), forward.round())


def test_two_dropouts_are_two() -> None:
    """AOTAutograd takes equal calls for one."""
    function, report = rewritten(
        lambda *inputs: (dropping(*inputs), dropping(*inputs)), kernel="fa2", device="sm_90", compiler=AOT
    )
    one, other = function(*drawn())
    assert report().n_fused == 2 and not torch.equal(one, other)
    assert [str(site.spec) for site in report().sites] == ["scale 0.25, dropout 0.5"] * 2


@pytest.mark.parametrize("layout", ["heads first", "positions first"])
@pytest.mark.parametrize("kernel", PACKAGES)
def test_outputs_lie_in_memory_as_promised(kernel: str, layout: str) -> None:
    """Inductor takes the fake implementation at its word; flash-attention 2 lays its output out as its query."""
    q, k, v = (x.transpose(1, 2).contiguous() if layout == "positions first" else x.detach() for x in drawn())
    options = (None, [], [], [], kernel, kernel, 0.25, 0.0, -1, 0, 0.0, "None", False)
    utilities = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(flash_attention, (q, k, v, *options), test_utils=utilities)
    output, logsumexp, _ = flash_attention(q, k, v, *options)
    assert output.is_contiguous() and logsumexp.is_contiguous()


@pytest.mark.parametrize("kernel", PACKAGES)
def test_no_package_sees_a_stride_of_0(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    version = Flash.versions[kernel]
    forward, backward = version.forward, version.backward
    monkeypatch.setattr(version, "forward", lambda *args: seen.extend(args[:3]) or forward(*args))
    monkeypatch.setattr(version, "backward", lambda *args: seen.extend([args[0], *args[1][:3]]) or backward(*args))
    query, key, value = drawn()
    key, value = (x[:1].expand(4, -1, -1, -1) for x in (key, value))
    flash_attention(query, key, value, None, [], [], [], kernel, kernel, 0.25, 0.0, -1, -1, 0.0, "None", False)[
        0
    ].sum().backward()
    assert len(seen) == 7 and not any(0 in x.stride() for x in seen)


def test_the_newer_form_of_version_3() -> None:
    draws = [x.requires_grad_() for x in drawn()]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(16) - torch.arange(16)[:, None]
        keep = (distance <= 0) & (distance > -5)
        return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    with installed(newer=True):
        function, _ = rewritten(attention, kernel="fa3", device="sm_90")
        found = with_gradients(function, draws)
    assert_as_accurate(found, with_gradients(attention, draws), truth(attention, draws))


def test_blackwell_has_no_backward_pass_with_a_softcap_at_head_dim_256() -> None:
    spec = AttentionSpec((Scale(0.0625), Softcap(50.0)))
    assert "with a softcap" in "; ".join(KERNELS["fa4"].refusals(spec, shapes(head_dim=256), Device.parse("sm_100")))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_masks_of_integers_of_any_type(dtype: torch.dtype) -> None:
    """Booleans are handed over as bytes, and bytes as themselves."""

    def attention(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(document[:, None, :, None] != document[:, None, None], float("-inf"))
        return scores.softmax(-1) @ v

    inputs = [torch.randn(2, 2, 40, 32, dtype=torch.bfloat16) for _ in range(3)]
    inputs.append((torch.arange(40) // 10 + 1).to(dtype).expand(2, 40))
    function, report = rewritten(attention, kernel="fa4", device="sm_90")
    fused = function(*inputs)
    assert report().n_fused == 1
    assert_as_accurate(fused, attention(*inputs), truth(attention, inputs)[0])


def _heard(scores: Tensor) -> Tensor:
    n = scores.size(-1)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))


BIASES = {
    "ALiBi, causal": (lambda s, bias: _heard(s + bias), (2, 1, 300), torch.bfloat16),
    "wider than the query": (lambda s, bias: _heard(s + bias), (2, 300, 300), torch.float32),
    "several, scaled": (lambda s, bias: _heard((s + bias) * 0.5 + bias[:1]), (2, 300, 300), torch.bfloat16),
    "an additive mask": (lambda s, bias: s + bias, (2, 1, 300, 300), torch.bfloat16),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases(name: str) -> None:
    """Those that want no gradient, over several blocks, some of which an additive mask hides."""
    score, shape, dtype = BIASES[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = score(q @ k.mT * 0.25, bias)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    trained = "mask" not in name  # whose rows without keys have gradients that it can't give
    inputs = [torch.randn(2, 2, 300, 16, dtype=torch.bfloat16).requires_grad_(trained) for _ in range(3)]
    bias = torch.randn(shape, dtype=dtype)
    if "mask" in name:
        bias[0, ..., 128:256], bias[1, ..., :140, 270:] = float("-inf"), torch.finfo(dtype).min
    else:
        bias = torch.nn.Parameter(bias, requires_grad=False)
    function, report = rewritten(attention, kernel="fa4", device="sm_90")
    found = with_gradients(function, [*inputs, bias])
    (site,) = report().sites
    assert site.kernel == "fa4" and "bias" in str(site.spec)
    chosen = usable(site.spec, site.shapes, Device.parse("sm_90"))
    assert ("fa4" in chosen) == (name == "ALiBi, causal")  # others when they are asked for
    shapes = replace(site.shapes, needs_backward=True)
    grouped = replace(shapes, num_heads=4)
    assert "bias of another head" in "; ".join(KERNELS["fa4"].refusals(site.spec, grouped, Device.parse("sm_90")))
    assert_as_accurate(found, with_gradients(attention, [*inputs, bias]), truth(attention, [*inputs, bias]))
    learned = replace(shapes, learned=site.spec.numeric)
    assert "no gradient of a bias" in "; ".join(KERNELS["fa4"].refusals(site.spec, learned, Device.parse("sm_90")))
    assert "on sm_90 alone" in "; ".join(KERNELS["fa4"].refusals(site.spec, shapes, Device.parse("sm_100")))


def test_a_mask_beside_a_bias_that_may_be_one() -> None:
    """Together they may hide all keys of a row, which neither does alone."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return _heard(q @ k.mT * 0.25 + bias).softmax(-1) @ v

    inputs = [torch.randn(2, 2, 300, 16, dtype=torch.bfloat16) for _ in range(3)]
    function, _ = rewritten(attention, kernel="fa4", device="sm_90")
    with pytest.raises(Exception, match="fa4: takes no mask beside a bias that may be one, too"):
        function(*inputs, torch.randn(2, 1, 300, 300, dtype=torch.bfloat16))


def test_biases_that_would_be_read_where_they_are_not() -> None:
    """Before the first key, or beyond 31 bits, which only the run knows where sizes are dynamic."""
    spec = AttentionSpec((Scale(0.125), Bias("bias0", axes=("head", "key")), Mask(None, Band(None, -100), "keep")))
    at = replace(shapes(400, 300), needs_backward=False)
    reasons = KERNELS["fa4"].refusals(spec, at, Device.parse("sm_90"))
    assert reasons == ["takes causal biases over at least as many keys as queries"]
    query, bias = (torch.empty(*sizes, device="meta") for sizes in ((1, 2**16, 1, 64), (1, 1, 2**16, 2**15)))
    with pytest.raises(ValueError, match="less than 2\\*\\*31 elements"):
        fa4._common(How(1.0, 0.0, -1, -1, 0.0, biases=[bias]), query, "kv")


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float = 0.0) -> Tensor:
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], float("-inf"))
    return F.dropout(scores.softmax(-1), p) @ v


def with_padding(kv_heads: int = 4, q_len: int = 20) -> list[Tensor]:
    """Padded on the right, on the left, with holes, and not at all."""
    q, k, v = (torch.randn(4, n, m, 16, dtype=torch.bfloat16) for n, m in ((4, q_len), (kv_heads, 30), (kv_heads, 30)))
    at = torch.arange(30)
    keep = torch.stack([at < 7, at >= 11, at % 3 > 0, at >= 0])
    return [*(x.requires_grad_() for x in (q, k, v)), keep]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("q_len", [1, 20, 40])
@pytest.mark.parametrize("dynamic", [False, True])
def test_padding_is_left_out(dynamic: bool, q_len: int, kv_heads: int) -> None:
    draws = []
    for _ in range(DRAWS):
        draws.append(with_padding(kv_heads, q_len))
        for x, dims in zip(draws[-1], ([0], [0, 2], [0, 2], [0, 1]) if dynamic else ()):
            for dim in dims:
                torch._dynamo.mark_dynamic(x, dim)
    function, report = rewritten(padded, kernel="fa2", device="sm_90")
    found = joined(with_gradients(function, inputs) for inputs in draws)
    assert [(site.kernel, str(site.spec)) for site in report().sites] == [("fa2", "scale 0.25, key padding")]
    assert_as_accurate(
        found,
        joined(with_gradients(padded, inputs) for inputs in draws),
        joined(truth(padded, inputs) for inputs in draws),
    )


def test_padding_of_all_layers_is_looked_at_once() -> None:
    inputs, seen = with_padding(), []

    def layers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return padded(padded(q, k, v, keep), k, v, keep)

    def compiler(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(node for node in gm.graph.nodes if getattr(node.target, "__name__", "") == "shown_keys")
        return gm

    function, report = rewritten(layers, kernel="fa2", device="sm_90", compiler=compiler)
    found = with_gradients(function, inputs)
    assert report().n_fused == 2 and len(seen) == 1
    assert_as_accurate(found, with_gradients(layers, inputs), truth(layers, inputs))


def test_padding_with_dropout() -> None:
    """Each head is dropped as a whole by the stand-in, in both passes."""
    inputs = with_padding()
    function, report = rewritten(lambda *given: padded(*given, 0.5), kernel="fa2", device="sm_90")
    output, plain = function(*inputs), padded(*inputs)
    assert [site.kernel for site in report().sites] == ["fa2"]
    of_value = [torch.autograd.grad(x.sum(), inputs[2])[0] for x in (output, plain)]
    forward, backward = (
        ((x.double() * y.double()).sum((2, 3)) / y.double().square().sum((2, 3))).round()
        for x, y in ((output, plain), of_value)
    )
    assert torch.equal(forward, backward) and {*forward.flatten().tolist()} == {0.0, 2.0}


@pytest.mark.parametrize("sinks", [False, True])
def test_a_sequence_of_padding_alone(sinks: bool) -> None:
    """It is no number, as in eager code, or zero beside a sink; other sequences know nothing of that."""
    inputs = with_padding()
    inputs[3][1] = False

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], float("-inf"))
        if not sinks:
            return scores.softmax(-1) @ v
        return torch.cat([scores, sink.expand(4, 4, 20, 1)], -1).softmax(-1)[..., :-1] @ v

    inputs.append(torch.randn(4, 1, 1, dtype=torch.bfloat16).requires_grad_(sinks))
    function, report = rewritten(attention, kernel="fa2", device="sm_90")
    output, gradients = with_gradients(function, inputs)
    assert report().n_fused == 1 and (not output[1].any() if sinks else output[1].isnan().all())
    others = [i for i in range(len(output)) if i != 1]
    assert all(x[others].isfinite().all() for x in (output, *gradients[:3]))
    if sinks:
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("kernel", PACKAGES)
def test_rows_of_a_sink_alone_are_zero(kernel: str) -> None:
    """As in eager code; where the sink is minus infinity, there is nothing in the row, and it is finite."""

    def attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        hidden = torch.ones(40, 30, dtype=torch.bool).triu(30 - 40 + 1)
        scores = (q @ k.mT * 0.25).masked_fill(hidden, float("-inf"))
        return torch.cat([scores, sink.expand(4, 4, 40, 1)], -1).softmax(-1)[..., :-1] @ v

    inputs = with_padding(q_len=40)[:3]
    inputs.append(torch.randn(4, 1, 1, dtype=torch.bfloat16).requires_grad_())
    function, report = rewritten(attention, kernel=kernel, device="sm_90")
    found = with_gradients(function, inputs)
    assert [site.kernel for site in report().sites] == [kernel] and not found[0][:, :, :10].any()
    assert_as_accurate(found, with_gradients(attention, inputs), truth(attention, inputs))
    output, gradients = with_gradients(function, [*inputs[:3], torch.full_like(inputs[3], -torch.inf).requires_grad_()])
    assert all(x.isfinite().all() for x in (output, *gradients))


@pytest.mark.parametrize("mask", ["causal", "of a query"])
def test_what_hides_keys_from_some_queries_is_not_padding(mask: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~keep[:, None, None], float("-inf"))
        hidden = torch.ones(20, 30, dtype=torch.bool).triu(11) if mask == "causal" else keep[:, None, :20, None]
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v

    function, report = rewritten(attention, kernel=["fa2", "reference"], device="sm_90")
    function(*with_padding())
    (site,) = report().sites
    assert site.kernel == "reference" and "fa2: takes a window, not" in str(site)


def test_a_mask_whose_symbols_cancel_out() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        n = q.size(-2)
        i = torch.arange(n)
        keep = (i + n <= (i + n)[:, None]) & padding[:, None, None]
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    function, report = rewritten(attention, kernel="fa4", device="sm_90")
    for length in (40, 50):
        inputs = [torch.randn(2, 2, length, 32, dtype=torch.bfloat16) for _ in range(3)]
        inputs.append((torch.arange(length) != 5).expand(2, length).contiguous())
        for x, dim in zip(inputs, (2, 2, 2, 1)):
            torch._dynamo.mark_dynamic(x, dim)
        assert_as_accurate(function(*inputs), attention(*inputs), truth(attention, inputs)[0])
    assert {site.kernel for site in report().sites} == {"fa4"}


@pytest.mark.parametrize("keep", [Band(None, -1), Band(1, 5)], ids=str)
def test_form_of_a_negative_side(keep: Band) -> None:
    """A window that ends before its query has no counterpart, -1 means no bound there: it is a mask."""
    form = flash_form(band(keep.lower, keep.upper), shapes())
    assert isinstance(form, FlashForm)
    assert form.mask == keep and form.left is form.right is None
