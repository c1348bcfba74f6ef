"""The ways in, what bad input gets, and what stays visible."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, CompileConfig, LlamaConfig, StaticCache

import attn_rewriter
from attn_rewriter import Backend, Device, Options, RewriteError, packages
from attn_rewriter.kernels import KERNELS, Kernel
from tests.accuracy import assert_as_accurate, assert_the_same

BERT = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)


class Attention(nn.Module):
    """Causal self-attention as in a hundred repositories."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    attn_rewriter.unpatch()


@pytest.fixture
def model() -> nn.Module:
    return Model()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 16, 32)


def python(code: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)


def test_torch_compile_finds_the_backend_with_nothing_imported() -> None:
    done = python("""
        import sys, torch, torch.nn.functional as F, logging
        def attention(q, k, v): return (q @ k.mT).softmax(-1) @ v
        assert "attn_rewriter" not in sys.modules
        f = torch.compile(attention, backend="attn_rewriter", options={"compiler": "eager"}, fullgraph=True)
        logging.basicConfig(level=logging.INFO)
        q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(f(q, q, q), attention(q, q, q))
    """)
    assert done.returncode == 0, done.stderr
    assert "INFO:attn_rewriter:" in done.stderr and "-> sdpa" in done.stderr


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"options": {"kernel": "sdpa", "epilogue_fusion": True}},
        {"options": {"kernel": "sdpa", "mode": "reduce-overhead"}},
    ],
    ids=str,
)
def test_inductor_takes_mode_and_options(given: dict[str, Any], model: nn.Module, x: torch.Tensor) -> None:
    model, x = model.double(), x.double()
    compiled = torch.compile(model, backend="attn_rewriter", dynamic=True, **given)
    assert_the_same(compiled(x), model(x))


def test_optimize_works_in_place(model: nn.Module, x: torch.Tensor) -> None:
    model, x = model.double(), x.double()
    expected, names = model(x), list(model.state_dict())
    optimised = attn_rewriter.optimize(model)
    assert optimised is model
    assert_the_same(model(x), expected)
    assert list(model.state_dict()) == names
    report = attn_rewriter.report_of(model)
    assert (report.n_fused, report.n_sites) == (2, 2)
    assert [site.module for site in report.sites] == ["layers.0", "layers.1"]
    assert report.rewrite_seconds > 0


def test_optimize_takes_a_function(x: torch.Tensor) -> None:
    def attention(q: torch.Tensor) -> torch.Tensor:
        return (q @ q.mT).softmax(-1) @ q

    compiled, x = attn_rewriter.optimize(attention, compiler="eager"), x.double()
    assert_the_same(compiled(x), attention(x))
    assert attn_rewriter.report_of(compiled).n_fused == 1


def test_compiler_may_be_a_callable(model: nn.Module, x: torch.Tensor) -> None:
    seen = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    attn_rewriter.optimize(model, compiler=compiler)(x)
    (gm,) = seen
    fused = [node for node in gm.graph.nodes if node.meta.get("attn_rewriter") == "sdpa"]
    assert [node.target for node in fused] == [F.scaled_dot_product_attention] * 2
    for node in fused:  # where people look for them
        assert "tests/test_ways_in.py" in node.meta["stack_trace"]
        assert node.meta["nn_module_stack"]
        assert node.kwargs["is_causal"] is True
    assert not any(node.target == "softmax" for node in gm.graph.nodes)


def test_explain_leaves_the_model_alone(model: nn.Module, x: torch.Tensor) -> None:
    report = attn_rewriter.explain(model, x)
    assert (report.n_fused, report.n_sites) == (2, 2)
    assert model._compiled_call_impl is None
    site = report.sites[0]
    assert str(site.spec) == "scale 0.3536, causal"
    path, _, line = site.source.rpartition(":")
    assert path == __file__ and "weights @ v" in Path(path).read_text().splitlines()[int(line)] + "weights @ v"
    text = str(report)
    assert "2 of 2 attention sites fused" in text and "causal" in text and "sdpa" in text
    assert json.loads(json.dumps(report.to_dict()))["n_fused"] == 2


def test_explain_can_be_asked_often(model: nn.Module, x: torch.Tensor) -> None:
    """Dynamo stops after a number of compilations of the same code; a report must not run into that."""
    for _ in range(12):
        assert attn_rewriter.explain(model, x).n_sites == 2


def test_explain_imagines_a_device(model: nn.Module, x: torch.Tensor) -> None:
    for device in ("sm_80", "sm_90", "cpu", "mps", Device("cuda", (10, 0))):
        assert attn_rewriter.explain(model, x, device=device).n_fused == 2


def test_explain_on_the_meta_device(model: nn.Module, x: torch.Tensor) -> None:
    assert attn_rewriter.explain(model.to("meta"), x.to("meta"), device="sm_90").n_fused == 2


def test_patch_reaches_other_peoples_compile(model: nn.Module, x: torch.Tensor) -> None:
    original, model, x = torch.compile, model.double(), x.double()
    with attn_rewriter.patch(compiler="eager") as patched:
        assert_the_same(torch.compile(model)(x), model(x))
        assert patched.report.n_fused == 2
        model.compile()
        model(x)
        assert patched.report.n_fused == 4
    assert torch.compile is original
    attn_rewriter.patch()
    assert torch.compile is not original
    attn_rewriter.unpatch()
    attn_rewriter.unpatch()
    assert torch.compile is original


def noted(seen: list[str], name: str, gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """A compiler that says that it was called."""
    seen.append(name)
    return gm.forward


def test_explain_chooses_as_for_inductor_and_runs_the_model_as_it_is() -> None:
    """A softcap goes to FlexAttention, which takes Inductor; here nothing is compiled."""

    def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (5 * torch.tanh(q @ k.mT / 5)).softmax(-1) @ v

    given = [torch.randn(1, 2, 9, 16) for _ in range(3)]
    outputs = []
    with torch.no_grad():
        here = attn_rewriter.explain(lambda *args: outputs.append(capped(*args)), *given)
    assert torch.equal(outputs[0], capped(*given))
    given = [x.bfloat16().requires_grad_() for x in given]
    imagined = attn_rewriter.explain(capped, *given, device="sm_80")
    assert [site.kernel for site in (*here.sites, *imagined.sites)] == ["flex", "flex"]


def test_patch_compiles_a_call_as_it_is_asked_to() -> None:
    """As `generate` does it: a model from transformers, compiled in place for prompts, is compiled again for tokens."""
    seen: list[str] = []

    ids = torch.randint(0, 99, (2, 9))
    with attn_rewriter.patch(compiler=partial(noted, seen, "in place")):
        model = AutoModel.from_config(BERT, attn_implementation="eager").eval().double()
        expected = model(ids)[0]
        with attn_rewriter.patch(compiler=partial(noted, seen, "again")) as patched:
            again = torch.compile(model.__call__)
            assert_the_same(again(ids)[0], expected)
    assert seen == ["in place", "again"] and patched.report.n_fused == 2


LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, eos_token_id=None
)


def test_the_cache_of_a_compiled_prompt_stays_where_it_is() -> None:
    """Or there would be no CUDA graphs of the new tokens that go into it."""
    written: list[list[bool]] = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        caches = [node for node in gm.graph.find_nodes(op="placeholder") if _copied_into(node)]
        written.append(["_dynamo_static_input_type" in node.meta["tensor_dict"] for node in caches])
        return gm.forward

    with attn_rewriter.patch(compiler=compiler):
        model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval()
        compiling: Any = CompileConfig(backend="inductor")
        compiling._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compiling}
        model.generate(torch.randint(99, (2, 9)), max_new_tokens=4, pad_token_id=0, **options)
    assert written == [[True] * 4] * 2  # keys and values of two layers, in the graphs of the prompt and of a token


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_of_prompts_are_looked_at(mode: Any) -> None:
    """For a static cache `generate` makes them outside of what is compiled, as tensors that are added: what they say is
    seen, and prompts attend to no more of the cache than they fill."""
    ids = torch.randint(3, 99, (2, 9))
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, :4] = 0
    compiling: Any = CompileConfig(backend="inductor")
    compiling._compile_all_devices = True
    options = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    eager = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval()
    with attn_rewriter.patch(compiler="eager", strict=True) as patched:
        model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval()
        model.load_state_dict(eager.state_dict())
        for mask in (whole, padded, whole, padded):
            with mode():
                tokens = model.generate(ids, attention_mask=mask, compile_config=compiling, **options)
            assert torch.equal(tokens, eager.generate(ids, attention_mask=mask, **options))
    found = [(str(site.spec), site.shapes.q_len, site.shapes.kv_len) for site in patched.report.sites]
    scale, room = "scale 0.3536", 12
    assert (
        found[::2]
        == found[1::2]
        == [  # of two layers
            (f"{scale}, causal", 9, 9),
            (f"{scale}, mask tensor [batch, query, key]", 9, room),
            (f"{scale}, bias", 1, room),
        ]
    )


def test_making_masks_is_compiled_as_ever() -> None:
    """Also where nothing but a whole graph will do."""
    ids = torch.randint(3, 99, (2, 5))

    def prepared(model: Any) -> Any:
        cache = StaticCache(config=LLAMA, max_cache_len=8)
        given = {"past_key_values": cache, "attention_mask": torch.ones_like(ids), "cache_position": torch.arange(5)}
        return model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)["attention_mask"]

    with attn_rewriter.patch(compiler="eager"):
        model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager")
        assert prepared(model).ndim == 4
        assert torch.equal(torch.compile(prepared, backend="eager", fullgraph=True)(model), prepared(model))


def _copied_into(node: torch.fx.Node) -> bool:
    return any(user.target == "index_copy_" for user in node.users)


@pytest.mark.gpu
def test_new_tokens_after_a_compiled_prompt_are_cuda_graphs() -> None:
    ids = torch.randint(99, (2, 9), device="cuda")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eager = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval().cuda()
    expected = eager.generate(ids, **options)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    with attn_rewriter.patch() as patched:
        model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager").eval().cuda()
        model.load_state_dict(eager.state_dict())
        for _ in range(2):  # another cache
            assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert patched.report.n_fused == 4
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


@pytest.mark.parametrize("what", ["module", "forward"])
def test_patch_leaves_it_to_those_who_compile_themselves(what: str) -> None:
    """How a model from transformers is compiled is for them to say."""
    seen: list[str] = []

    ids = torch.randint(0, 99, (2, 9))
    with attn_rewriter.patch(compiler=partial(noted, seen, "in place")):
        model = AutoModel.from_config(BERT, attn_implementation="eager").eval()
        with attn_rewriter.patch(compiler=partial(noted, seen, "asked for")):
            if what == "module":
                torch.compile(model)(ids)
            else:
                model.forward = torch.compile(model.forward)
                model(ids)
    assert seen == ["asked for"]


def test_models_do_not_count_as_compilations_of_each_other() -> None:
    """Dynamo gives up on what was compiled 8 times, and takes a size that changed for one that will change."""
    n_models = torch._dynamo.config.recompile_limit + 2
    reports = []
    for length in range(5, 5 + n_models):
        model = attn_rewriter.optimize(Attention(), compiler="eager")
        model(torch.randn(2, length, 32))
        reports.append(attn_rewriter.report_of(model))
    assert [report.n_fused for report in reports] == [1] * n_models
    assert not any(site.shapes.is_dynamic for report in reports for site in report.sites if site.shapes)


def test_patch_leaves_other_backends_alone(model: nn.Module, x: torch.Tensor) -> None:
    with attn_rewriter.patch() as patched:
        torch.compile(model, backend="eager")(x)
    assert patched.report.n_sites == 0


@pytest.mark.parametrize("imported", ["before", "after"])
def test_patch_reaches_models_of_transformers(imported: str, tmp_path: Path) -> None:
    done = python(
        """
        import sys, torch, attn_rewriter
        if sys.argv[1] == "before": from transformers import modeling_utils
        patched = attn_rewriter.patch(compiler="eager")
        import transformers
        config = transformers.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, vocab_size=99)
        ids = torch.randint(0, 99, (2, 9))
        kind = {"attn_implementation": "eager", "dtype": torch.float64}
        model = transformers.AutoModel.from_config(config, **kind).eval()
        model(ids)
        assert patched.report.n_fused == 2, patched.report
        model.save_pretrained(sys.argv[2])
        again = transformers.AutoModel.from_pretrained(sys.argv[2], **kind)
        torch.testing.assert_close(again(ids)[0], model(ids)[0])
        assert patched.report.n_fused == 4, patched.report
        attn_rewriter.unpatch()
        model = transformers.AutoModel.from_config(config)
        assert model._compiled_call_impl is None
        """,
        imported,
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_run_runs_an_unmodified_script(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import sys, torch
        from helper import WIDTH

        @torch.compile
        def attention(q):
            return (q @ q.mT).softmax(-1) @ q

        if __name__ == "__main__":
            print(attention(torch.ones(1, 2, 3, WIDTH)).shape, sys.argv[1:])
            sys.exit(3)
        """)
    )
    command = [
        sys.executable,
        "-m",
        "attn_rewriter",
        "run",
        "--compiler",
        "eager",
        str(tmp_path / "script.py"),
        "-x",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3
    assert "torch.Size([1, 2, 3, 4]) ['-x', '1']" in done.stdout
    assert "1 of 1 attention sites fused" in done.stderr


def test_run_trains_a_script_as_nanogpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reports the graphs of training and of evaluation, and learns and writes what it does without."""
    from attn_rewriter.cli import main

    script = str(Path(__file__).with_name("nanogpt.py"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def result(dtype: str) -> Any:
        return torch.load(tmp_path / dtype)

    for dtype in ("float32", "float64"):
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path / dtype), "--dtype", dtype])
        runpy.run_path(script, run_name="__main__")
    assert main(["run", "--compiler", "aot_eager", script, str(tmp_path / "rewritten"), "--compile"]) == 0
    assert "4 of 4 attention sites fused" in capsys.readouterr().err
    assert_as_accurate(result("rewritten"), result("float32"), result("float64"))


def test_run_says_that_there_is_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    from attn_rewriter.cli import main

    assert main(["run", "nowhere.py"]) == 2
    assert "no script 'nowhere.py'" in capsys.readouterr().err


@pytest.mark.parametrize("device", [[], ["--device", "sm_90"], ["--device", "sm_75"]])
def test_doctor(device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from attn_rewriter.cli import main

    assert main(["doctor", *device]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in said and "sdpa" in said
    assert device == [] or device[1] in said


def test_doctor_says_what_would_be_faster(capsys: pytest.CaptureFixture[str]) -> None:
    from attn_rewriter.cli import main
    from attn_rewriter.packages import version

    for device, extra, package in (("sm_90", "flash4", "flash-attn-4"), ("sm_80", "flash", "flash-attn")):
        assert main(["doctor", "--device", device]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (f"'attn-rewriter[{extra}]' would be faster for: " in said) == (version(package) is None)
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "would be faster" not in capsys.readouterr().out


def test_an_untested_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works, with one warning."""
    for installed, is_tested in (("2.13.1", True), ("2.11.0+cu130", True), ("2.99.0a0+git1", False), ("3.0", False)):
        packages.warn_if_untested.cache_clear()
        monkeypatch.setattr(torch, "__version__", installed)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(2):
                Backend(Options(compiler="eager"))
        assert len(warned) == (not is_tested)
        assert is_tested or f"to {packages.TESTED[1]}, and this is {installed}" in str(warned[0].message)
    packages.warn_if_untested.cache_clear()


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kernel": "flash9"}, "'sdpa'"),
        ({"kernel": ["sdpa", "flash9"]}, "unknown kernel 'flash9'"),
        ({"kernel": []}, "no kernel is named"),
        ({"compiler": "gcc"}, "inductor"),
        ({"compiler": "attn_rewriter"}, "inductor"),
        ({"mode": "fastest"}, "reduce-overhead"),
        ({"options": {"kernle": "sdpa"}}, "kernel, compiler, strict, autotune, verify, keep_weights, mode"),
    ],
)
def test_unknown_names_raise_with_the_valid_ones(options: dict[str, Any], named: str, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"unknown|no kernel") as error:
        attn_rewriter.optimize(model, **options)
    assert named in str(error.value)


def test_unknown_options_raise_from_torch_compile_too(model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(Exception, match="unknown option 'kernle'"):
        torch.compile(model, backend="attn_rewriter", options={"kernle": "sdpa"})(x)


@pytest.mark.parametrize("entry", [attn_rewriter.optimize, attn_rewriter.explain])
@pytest.mark.parametrize("what", ["gpt2", None, 3])
def test_what_is_no_model_raises(entry: Any, what: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module or a function"):
        entry(what)


def test_unknown_device_raises(model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"unknown device 'h200'.*'sm_90'"):
        attn_rewriter.explain(model, x, device="h200")


def test_report_of_a_stranger_raises(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="optimize"):
        attn_rewriter.report_of(model)


class Picky(Kernel):
    """A stand-in for a kernel with limits."""

    name = "picky"
    limits = attn_rewriter.kernels.Limits(
        platforms=frozenset({"cuda"}), min_capability=(9, 0), dtypes=frozenset({torch.bfloat16}), max_head_dim=4
    )


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "picky", Picky())


def test_a_kernel_asked_for_by_name_never_falls_back(model: nn.Module, x: torch.Tensor, picky: None) -> None:
    attn_rewriter.optimize(model, kernel="picky")
    with pytest.raises(Exception, match="no requested kernel") as error:
        model(x)
    said = str(error.value)
    assert "KernelUnavailable" in said and __file__ in said
    for reason in ("runs on cuda, not on cpu", "computes in bfloat16, not in float32", "head_dim is at most 4, here 8"):
        assert reason in said


def test_a_list_of_kernels_is_an_order(model: nn.Module, x: torch.Tensor, picky: None) -> None:
    attn_rewriter.optimize(model, kernel=["picky", "sdpa"], compiler="eager")(x)
    site = attn_rewriter.report_of(model).sites[0]
    assert site.kernel == "sdpa"
    assert site.refusals[0].reason == "picky: runs on cuda, not on cpu"


def test_limits_by_capability() -> None:
    from attn_rewriter.spec import Shapes

    shapes = Shapes(1, 1, 1, 8, 8, 4, 4, torch.bfloat16)
    assert Picky.limits.refusals(shapes, Device.parse("sm_90")) == []
    assert Picky.limits.refusals(shapes, Device.parse("sm_80")) == ["needs sm_90 or newer, this is sm_80"]


# -- when something goes wrong inside -------------------------------------------------------------------------------


class Broken(Kernel):
    """Fails after it has put operations into the graph."""

    name = "broken"

    def __call__(self, spec: Any, shapes: Any, device: Any, tensors: Any) -> Any:
        tensors["query"].mul(2).exp()
        raise RuntimeError("out of luck")


def test_an_internal_error_leaves_the_site_as_it_is(model: nn.Module, x: torch.Tensor, monkeypatch: Any) -> None:
    monkeypatch.setitem(KERNELS, "broken", Broken())
    expected = model(x)
    attn_rewriter.optimize(model, kernel=["broken"], compiler="eager")
    with pytest.warns(UserWarning, match="out of luck") as caught:
        result = model(x)
    assert torch.equal(result, expected)
    assert len([w for w in caught if "attn_rewriter" in str(w.message)]) == 2
    assert all(f"{__file__}:" in str(w.message) for w in caught if "attn_rewriter" in str(w.message))
    site = attn_rewriter.report_of(model).sites[0]
    assert site.kernel is None and "out of luck" in site.refusals[0].reason


def test_strict_raises_instead(model: nn.Module, x: torch.Tensor, monkeypatch: Any) -> None:
    monkeypatch.setitem(KERNELS, "broken", Broken())
    attn_rewriter.optimize(model, kernel=["broken"], compiler="eager", strict=True)
    with pytest.raises(Exception, match=r"could not rewrite the attention at .*out of luck") as error:
        model(x)
    assert "RewriteError" in str(error.value) or isinstance(error.value, RewriteError)


def test_what_is_not_attention_is_bit_identical(x: torch.Tensor) -> None:
    def router(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).softmax(-1).topk(2).values

    backend = Backend(Options(compiler="eager"))
    assert torch.equal(torch.compile(router, backend=backend)(x), router(x))
    assert backend.report.n_sites == 0
    assert str(backend.report) == "no attention site was found"


# -- caches ---------------------------------------------------------------------------------------------------------


def test_caches_are_used_and_never_mix_options(tmp_path: Path) -> None:
    """A second process takes the compiled graph from the caches; one with another kernel does not."""
    code = """
        import os, sys, torch
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[2]
        from torch._dynamo.utils import counters
        def attention(q, k, v): return ((q @ k.mT) * 0.5).softmax(-1) @ v
        options = {"kernel": sys.argv[1]} if sys.argv[1] != "none" else {}
        backend = "inductor" if sys.argv[1] == "none" else "attn_rewriter"
        torch.manual_seed(0)
        q = torch.randn(1, 2, 16, 8, dtype=torch.float64, requires_grad=True)
        compiled = torch.compile(attention, backend=backend, options=options)
        out = compiled(q, q, q)
        out.sum().backward()
        torch.testing.assert_close(out, attention(q, q, q))
        print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
    """
    runs = [python(code, kernel, str(tmp_path)) for kernel in ("sdpa", "sdpa", "reference", "none", "sdpa")]
    assert all(run.returncode == 0 for run in runs), runs
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"], ["0", "1"], ["0", "1"], ["1", "0"]]


def test_another_option_in_the_same_process_compiles_anew(model: nn.Module, x: torch.Tensor) -> None:
    kernels = []
    for kernel in ("sdpa", "reference", "sdpa"):
        attn_rewriter.optimize(model, kernel=kernel, compiler="eager")(x)
        kernels.append(attn_rewriter.report_of(model).sites[0].kernel)
    assert kernels == ["sdpa", "reference", "sdpa"]


def test_logging_names_site_and_kernel(model: nn.Module, x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="attn_rewriter"):
        attn_rewriter.optimize(model, compiler="eager")(x)
    said = [record.getMessage() for record in caplog.records if record.name == "attn_rewriter"]
    assert len(said) == 2
    assert said[0].startswith("layers.0 (") and __file__ in said[0] and said[0].endswith("-> sdpa")


def test_nothing_is_said_when_all_goes_well(model: nn.Module, x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attn_rewriter.*")
        attn_rewriter.optimize(model, compiler="eager")(x)
