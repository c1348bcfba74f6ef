"""The benchmarks run at tiny sizes, resume, and show what there is."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attn_rewriter import Device
from attn_rewriter import measured as measured_tables
from attn_rewriter.bench import attention, decode, families, generate, llama, masks, models, parallel, run
from attn_rewriter.bench.measure import OUT_OF_MEMORY, Results, attempt, rich_table
from attn_rewriter.cli import main
from attn_rewriter.errors import KernelUnavailable
from attn_rewriter.spec import Shapes
from tests.accuracy import assert_the_same

TINY = ("--tiny", "--device", "cpu", "--dtype", "float32", "--repeat", "3")
ATTENTION = ("bench", "attention", *TINY, "--head-dims", "32", "--lengths", "64", "--kernels", "sdpa", "auto")
MASKS = ("bench", "masks", *TINY, "--compiler", "aot_eager", "--kernels", "eager", "auto")


def cells(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["cells"]


def never(*args: object) -> Any:
    raise AssertionError("measured again")


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "attention.json", tmp_path / "attention.png"
    assert main([*ATTENTION, "--json", str(file), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "TFLOP/s, forward" in said and "TFLOP/s, backward" in said
    assert "forward: auto / best is at least" in said
    assert picture.stat().st_size > 10_000
    measured = cells(file)
    assert measured.pop(attention.CEILING)["matmul"]["tflops"] > 0
    assert len(measured) == 2 * 2 * 2  # causal or not, one or four heads for each key head, forward and backward
    for column in measured.values():
        for cell in column.values():
            assert cell["kernel"] == "sdpa"
            assert max(attention.to_eager(cell)) < 3
    monkeypatch.setattr(run, "attempt", never)
    assert main([*ATTENTION, "--json", str(file), "--markdown"]) == 0
    assert "| head_dim 32, causal, 4:1, 64 | **" in capsys.readouterr().out
    table = tmp_path / "sm_12.json"
    assert main([*ATTENTION, "--json", str(file), "--ship", str(table)]) == 0
    monkeypatch.setattr(measured_tables, "FOLDER", tmp_path)
    shapes = Shapes(1, 8, 2, 100, 100, 64, 64, torch.float32, needs_backward=True)
    ((name, times),) = measured_tables.passes(shapes, causal=True, device=Device.parse("sm_12")).items()
    assert name == "sdpa" and len(times) == 2
    other = {"head_dim": 64, "length": 100, "causal": True, "groups": 4, "products": 2 * 8 * 100**2 * 64}
    times = {"forward": {"fa4": 1}, "backward": {"fa4": 2}}
    (tmp_path / "sm_12_other.json").write_text(json.dumps({"cells": [other | times]}))
    measured_tables.table.cache_clear()
    half = {"fa4": (0.5, 1.0)}  # of as many tokens
    assert measured_tables.passes(shapes, causal=True, device=Device.parse("sm_12")) == half
    assert measured_tables.passes(shapes, causal=True, device=Device.parse("sm_34")) == {}


def test_attention_without_a_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flex has no backward pass on CPU."""
    file = tmp_path / "attention.json"
    case = attention.Case(1, 4, 32, 32, True, 1)
    cell = attempt(attention.measure, case, "backward", "flex", "cpu", torch.float32, 3)
    assert "flex: has no backward pass on CPU" in cell["refused"]
    results = Results(file)
    results.put(attention.column(case, "backward"), "flex", cell)
    [row] = attention.rows(results, [case], "backward", ["flex", "auto"])
    assert row == [str(case), "–", "", "–", "–"]


def test_cases() -> None:
    """The order in which they are measured, and what does not fit."""
    cases = attention.grid(attention.FULL, None, None)
    assert len(cases) == 48 and {case.batch * case.length for case in cases} == {16384}
    assert [(case.length, case.head_dim) for case in cases[::4]][:4] == [
        (8192, 128),
        (8192, 64),
        (8192, 256),
        (512, 128),
    ]
    assert str(cases[1]) == "head_dim 128, causal, 4:1, 8192"
    assert cases[0].flops("backward") == 2.5 * cases[0].flops("forward") == 5 * 2 * 2 * 16 * 8192**2 * 128 / 2
    assert {case.heads for case in attention.grid(attention.FULL, [80], None)} == {24}
    with pytest.raises(SystemExit, match="--head-dims: 1024 is more than 512"):
        attention.grid(attention.FULL, [1024], None)
    with pytest.raises(SystemExit, match="--lengths: 3000 does not divide 16384"):
        attention.grid(attention.FULL, None, [3000])


def test_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "masks.json"
    forms = ("--forms", "causal, left padding", "T5 bias", "softcap, causal")
    assert main([*MASKS, *forms, "--json", str(file), "--limit-s", "0"]) == 0
    assert "12 cells are left" in capsys.readouterr().out and not file.exists()
    assert main([*MASKS, *forms[:3], "--json", str(file)]) == 0
    for form in ("causal, left padding", "T5 bias"):
        for direction in masks.DIRECTIONS:
            column = cells(file)[masks.column(form, direction)]
            assert {row: cell["kernel"] for row, cell in column.items()} == {
                "eager": "eager",
                "auto": "sdpa",
            }
    monkeypatch.setattr(run, "attempt", never)
    capsys.readouterr()
    assert main([*MASKS, *forms[:3], "--json", str(file), "--markdown"]) == 0
    assert "| T5 bias, 2×4×32×16 | " in capsys.readouterr().out


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.run, "rewritten", partial(_as_is, run.rewritten))
    file, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    command = ["bench", "decode", *TINY, "--kernels", "eager", "auto", "--json", str(file)]
    assert main([*command, "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "8 filled, mask a tensor" in said and "one copy: " in said
    assert picture.stat().st_size > 10_000
    measured = cells(file)
    assert measured.pop(decode.CEILING)["clone"]["gb_s"] > 0
    assert len(measured) == 2 * 2 and all(column["auto"]["kernel"] == "sdpa" for column in measured.values())


def _as_is(rewritten: Any, function: Any, kernel: str, compiler: str) -> Any:
    return rewritten(function, kernel, "aot_eager")


@pytest.mark.parametrize("mask", decode.MASKS)
def test_decode_attends_to_what_is_filled(mask: str) -> None:
    query, key, value, hides = decode.inputs(decode.TINY, 8, mask, "cpu", torch.float64)
    step = decode.decode if mask == decode.MASKS[0] else decode.decode_with_mask
    expected = F.scaled_dot_product_attention(query, key[:, :, :8], value[:, :, :8], enable_gqa=True)
    assert_the_same(step(query, key, value, hides), expected)


def test_masks_without_a_kernel() -> None:
    how = ("cpu", torch.float32, "aot_eager", 3)
    for kernel, reason in (("sdpa", "softcap"), ("auto", "not fused")):
        assert (
            reason in attempt(masks.measure, masks.FORMS["softcap, causal"].tiny(), "forward", kernel, *how)["refused"]
        )


def test_the_file_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """`--limit-s 0` shows a file on a machine without its GPU."""
    file = Path(__file__).parent.parent / "examples" / "forms_h200.json"
    before = file.read_text()
    show = ("--kernels", "eager", "sdpa", "flex", "--limit-s", "0", "--markdown")
    assert main(["bench", "masks", "--json", str(file), *show]) == 0
    assert (
        "| causal, 4×32/8×4096×128 | 8.37, 19.93, 16.55 | **1.02**, **4.14**, 1.19 | 1.60, 6.05, 0.57 |"
        in capsys.readouterr().out
    )
    assert file.read_text() == before


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "generate.json", tmp_path / "generate.png"
    command = ["bench", "generate", *TINY, "--compiler", "aot_eager", "--json", str(file)]
    command += ["--columns", "batch 8, padded", "--rows", "sdpa", "sdpa, prompt too", "rewritten"]
    assert main([*command, "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    measured = cells(file)["batch 8, padded"]
    assert measured["rewritten"]["kernels"] == {"sdpa": 4}  # two layers, for the prompt and for a new token
    assert all(generate.same(measured[row], measured["sdpa"]) == "100%" for row in ("sdpa, prompt too", "rewritten"))
    monkeypatch.setattr(run, "attempt", never)
    capsys.readouterr()
    assert main([*command, "--markdown"]) == 0
    assert "| 4/4: sdpa 4 | 100% |" in capsys.readouterr().out


def test_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "llama.json", tmp_path / "llama.png"
    command = ["bench", "llama", *TINY, "--compiler", "aot_eager", "--json", str(file)]
    command += ["--columns", "padded-4x64", "train-2x32", "decode-2x64"]
    rows = "--rows", "sdpa", "flash_attention_2", "hand", "rewritten"
    monkeypatch.setattr(llama, "version", lambda distribution: None)
    assert main([*command, *rows, "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    for name, column in cells(file).items():
        assert column["flash_attention_2"] == {"refused": "flash-attn is not installed"}
        assert column["rewritten"]["fused"] == column["rewritten"]["sites"] == 2
        assert float(llama.difference(column["rewritten"], column["sdpa"])) < 1e-5
        assert column["hand"].get("refused") == ("takes no padding" if "padded" in name else None)
    assert re.search(r"rewritten +│ +[1-9]\d* +│ +0 ", capsys.readouterr().out)  # tokens, and TFLOP, in a second
    monkeypatch.setattr(llama, "measure", never)
    capsys.readouterr()
    assert main([*command, "--rows", "rewritten", "--markdown"]) == 0
    assert "| padded-4x64 | 2/2: sdpa 2 |" in capsys.readouterr().out


def test_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "families.json"
    command = ["bench", "families", *TINY, "--compiler", "aot_eager", "--json", str(file), "--markdown"]
    assert main([*command, "--families", "t5", "pixart", "--columns", "forward"]) == 0
    t5, pixart = (cells(file)[f"{name} forward"] for name in ("t5", "pixart"))
    assert t5["rewritten"]["fused"] == t5["rewritten"]["sites"] == 6 and "sdpa" not in t5
    assert pixart["rewritten"]["fused"] == pixart["rewritten"]["sites"] == 4 and "sites" not in pixart["sdpa"]
    assert max(cell["off_by"] for cell in [*t5.values(), *pixart.values()]) < 1e-5
    assert "| 6/6: sdpa 6 |" in capsys.readouterr().out


def test_a_family_that_is_further_off_is_named() -> None:
    """The first column has nothing to compare with."""
    results = Results(None)
    for column, row, off_by in [("a", "rewritten", 1.0), ("b", "eager", 2.0), ("b", "rewritten", 6.0)]:
        results.put(column, row, {"off_by": off_by})
    (said,) = families.remarks(results)
    assert "at most 3.00 times as much as eager ones, compiled (b)" in said


def test_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "parallel.json"
    command = ["bench", "parallel", *TINY, "--compiler", "eager", "--json", str(file), "--markdown"]
    command += ["--columns", "fsdp-train-2x32", "cp-train-2x32"]
    assert main(command) == 0
    measured = cells(file)
    eager, rewritten = (measured["fsdp-train-2x32"][row] for row in ("eager", "rewritten"))
    assert rewritten["fused"] == rewritten["sites"] > 0 and abs(rewritten["answer"] / eager["answer"] - 1) < 1e-5
    refused = {row: cell["refused"] for row, cell in measured["cp-train-2x32"].items()}
    assert "own process alone" in refused["eager"] and "CUDA" in refused["rewritten"]
    monkeypatch.setattr(run, "attempt", never)
    capsys.readouterr()
    assert main(command[:-1]) == 0
    assert "fsdp-train-2x32: rewritten" in capsys.readouterr().out


def test_longest(tmp_path: Path) -> None:
    """What is longer than what ran out of memory is not tried."""
    column = parallel.Column.parse("cp-train-1x1024")
    assert [str(c) for c in parallel.doubled([column], 4096)] == [f"cp-train-1x{n}" for n in (1024, 2048, 4096)]
    results = Results(tmp_path / "results.json")
    results.put(str(column), "rewritten", {"ms": 1.0})
    results.put("cp-train-1x2048", "rewritten", {"failed": OUT_OF_MEMORY})
    group = parallel.Group(2, results)
    assert group.measure(replace(column, tokens=4096), "rewritten", None) == {"failed": OUT_OF_MEMORY}  # type: ignore[arg-type]
    assert [*parallel.longest(results)] == [["cp-train, batch 1", "rewritten", "1024"]]
    with pytest.raises(argparse.ArgumentTypeError, match="is not like"):
        parallel.Column.parse("pp-train-1x8")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("llama_h200", "| rewritten / by hand | 0.986 ×, 1.000 × | 0.978 ×, 1.000 × |"),
        ("llama_h100", "| HF eager, rewritten | 13.61 ms, 0.04 GiB |"),
        ("families_h200", "| rewritten | 17.96 (2.93×) | 0.66 | 3.2e-02 |"),
        (
            "families_h100",
            "| rewritten | 9.31 (2.81×) | 0.32 | 8.5e-03 | 34.98 (1.81×) | 3.38 | 2.9e-03 | 8/8: fa4 4, sdpa 4",
        ),
        (
            "parallel_h100",
            "| tp-train-1x8192: rewritten | 76506 | 107.1 (1.62×) | 6.13 | 33.0 | 8/8: fa4 8 | 10.508823 |",
        ),
    ],
)
def test_the_models_of_the_readme(
    name: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown also where there is no transformers, which is only missed when something is measured."""
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda package: None)
    file, (bench, _) = Path(__file__).parent.parent / "examples" / f"{name}.json", name.split("_")
    assert main(["bench", bench, "--json", str(file), "--limit-s", "0", "--markdown"]) == 0
    assert line in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"a model needs transformers: pip install 'attn-rewriter\[bench\]'"):
        main(["bench", bench, *TINY, "--json", str(tmp_path / "file.json")])


def test_operations_of_a_training_step() -> None:
    """As counted one by one, where eager attention computes twice as much as half of a mask keeps."""
    sizes = models.Llama(2, 64, 96, 4, 2, vocab_size=32)
    model, ids = models.build(sizes, "cpu", torch.float32), torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    attention = 6 * sizes.num_hidden_layers * sizes.hidden_size * 16
    assert sizes.training_flops(16) == counter.get_total_flops() / 16 - attention


def test_equal_tokens() -> None:
    base = {"tokens": [[1, 2, 3, 4], [1, 2, 3, 4]]}
    assert generate.same({"tokens": [[1, 2, 3, 4], [1, 0, 3, 4]]}, base) == "62%"
    assert generate.same(base, base) == "–"


def test_results(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results = Results(file)
    results.begin({"device": "one"})
    results.put("column", "row", {"ms": 1.0})
    results.put("column", "full", {"failed": OUT_OF_MEMORY})
    results.put("column", "broken", {"failed": "ValueError: no"})
    again = Results(file)
    assert again.get("column", "row") == {"ms": 1.0} and again.get("column", "other") == {}
    assert [again.has("column", row) for row in ("row", "full", "broken", "other")] == [True, True, False, False]
    assert again.failures() == 1
    again.begin({"device": "one"})
    with pytest.raises(SystemExit, match=r"another setup: \{'device': 'one'\}, this is \{'device': 'two'\}"):
        again.begin({"device": "two"})


def test_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> Any:
        raise error

    assert attempt(fail, KernelUnavailable("not here")) == {"refused": "not here"}
    assert attempt(fail, RuntimeError("CUDA out of memory. Tried")) == {"failed": OUT_OF_MEMORY}
    assert attempt(fail, ValueError("no")) == {"failed": "ValueError: no"}
    assert "Traceback" in capsys.readouterr().err


def test_bold_in_the_terminal() -> None:
    assert rich_table("", ["", "x"], [["row", "**1**, 2"]]).columns[1]._cells == ["[bold]1[/bold], 2"]


def test_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no folder '.*nowhere'"):
        main([*ATTENTION, "--json", str(tmp_path / "nowhere" / "file.json")])
    with pytest.raises(SystemExit):
        main(["bench", "attention", "--kernels", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "required: benchmark" in capsys.readouterr().err
