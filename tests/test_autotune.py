"""Choosing by timing: what is taken, what is kept, and what goes wrong without taking the run down."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_rewriter
from attn_rewriter import Report, autotune
from attn_rewriter.device import Device
from tests.accuracy import assert_as_accurate
from tests.running import double, with_gradients
from tests.standins import installed


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ATTN_REWRITER_CACHE", str(tmp_path / "cache"))
    autotune._known.clear()
    torch._dynamo.reset()
    yield tmp_path / "cache"
    autotune._known.clear()


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def inputs(length: int = 40, requires_grad: bool = False) -> list[Tensor]:
    shapes = (*[(2, 3, length, 16)] * 3, (3, length, length))
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def tuned(given: list[Tensor], **options: Any) -> Report:
    """The report of a tuned attention, which computed what it should."""
    torch._dynamo.reset()
    options = {"autotune": True, **options}
    function = attn_rewriter.optimize(attention, dynamic=False, **options)
    with torch.set_grad_enabled(given[0].requires_grad):
        assert_as_accurate(function(*given), attention(*given), attention(*double(given)))
    return attn_rewriter.report_of(function)


def timing(**milliseconds: float) -> Callable[..., tuple[float, ...]]:
    """A clock that shows these times, and fails for other kernels."""

    def time(found: Any, device: Any, name: str) -> tuple[float, ...]:
        return (milliseconds[name],)

    return time


def never(*args: Any) -> float:
    raise AssertionError("timed again")


def test_kernels_are_timed_and_the_fastest_runs() -> None:
    (site,) = tuned(inputs()).sites
    times = dict(site.times)
    assert times.keys() == {"sdpa", "flex"} and min(times.values()) > 0
    assert site.kernel == min(times, key=lambda name: times[name]) == site.times[0][0]
    assert "timed: " in str(Report((site,)))


@pytest.mark.parametrize("fastest", ["sdpa", "flex"])
@pytest.mark.parametrize("how", [{"autotune": True}, {"autotune": False, "mode": "max-autotune-no-cudagraphs"}])
def test_what_is_fastest_is_taken_and_kept(
    fastest: str, how: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = timing(**{"sdpa": 2.0, "flex": 3.0, fastest: 1.0})
    monkeypatch.setattr(autotune, "_time", clock)
    (site,) = tuned(inputs(), **how).sites
    assert site.kernel == fastest and site.to_dict()["times"][fastest] == 1.0
    monkeypatch.setattr(autotune, "_time", never)
    for forget in (False, True):  # from memory, then from the file
        if forget:
            autotune._known.clear()
        assert [site.kernel for site in tuned(inputs(), **how).sites] == [fastest]
    assert [site.kernel for site in tuned(inputs(50), **how).sites] == [fastest]  # of the same bucket, 33 to 64
    assert len([*folder.iterdir()]) == 1
    monkeypatch.setattr(autotune, "_time", clock)
    tuned(inputs(70), **how)
    assert len([*folder.iterdir()]) == 2


def test_masks_of_samples_hide_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(autotune, "_time", lambda found, device, name: seen.append(found) or (1.0,))

    def padded(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, document: Tensor) -> Tensor:
        at = torch.arange(k.size(-2))
        keep = (at >= start[:, None]) & (at < length[:, None])
        keep = keep[:, None, None] & (document[:, None, :, None] == document[:, None, None])
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    numbers = torch.tensor([3, 5]), torch.tensor([20, 40]), torch.zeros(2, 40, dtype=torch.long)
    torch._dynamo.reset()
    with torch.no_grad():
        attn_rewriter.optimize(padded, dynamic=False, autotune=True)(*inputs()[:3], *numbers)
    samples = autotune.Samples(seen[0])
    held = {x.unique().item() for x in (samples(o.node) for o in seen[0].operands.values()) if x.dtype == torch.long}
    assert held == {0, 40}  # where keys begin, and which document they are of; where they end


def test_training_is_timed_with_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: seen.append(args) or grad(*args, **kwargs))
    monkeypatch.setattr(autotune, "usable", lambda *args, **kwargs: ("sdpa", "reference"))
    given = inputs(requires_grad=True)
    function = attn_rewriter.optimize(attention, autotune=True, compiler="aot_eager", dynamic=False)
    fused, eager = with_gradients(function, given), with_gradients(attention, given)
    exact = with_gradients(attention, [x.detach().double().requires_grad_() for x in given])
    assert_as_accurate(fused, eager, exact)
    assert len(seen) > 4
    (site,) = attn_rewriter.report_of(function).sites
    assert dict(site.times).keys() == {"sdpa", "reference"}


def test_the_fastest_passes_are_paired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is imagined to be the CPU."""
    clock = {"cudnn": (1.0, 4.0), "fa4": (2.0, 2.0), "sdpa": (1.0, 3.5)}
    monkeypatch.setattr(autotune, "_time", lambda found, device, name: clock[name])
    monkeypatch.setattr(Device, "of", lambda device: Device("cuda", (9, 0)))
    given = [x.bfloat16().requires_grad_() for x in inputs()[:3]]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).softmax(-1) @ v

    with installed():
        for _ in range(2):  # from the clock, then from the file
            torch._dynamo.reset()
            function = attn_rewriter.optimize(plain, compiler="aot_eager", autotune=True, dynamic=False)
            torch.autograd.grad(function(*given).sum(), given)
            (site,) = attn_rewriter.report_of(function).sites
            assert site.kernel == "cudnn/fa4"
            assert site.times == (("cudnn/fa4", 3.0), ("fa4", 4.0), ("sdpa", 4.5), ("cudnn", 5.0))
            autotune._known.clear()
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["milliseconds"]["cudnn/fa4"] == 3.0


def test_random_numbers_are_as_without() -> None:
    given, state = inputs(), torch.random.get_rng_state()
    function = attn_rewriter.optimize(attention, autotune=True, dynamic=False)
    function(*given)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_kernel_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time", timing(flex=9.0))  # sdpa: KeyError, as if out of memory
    (site,) = tuned(inputs()).sites
    assert site.times == (("flex", 9.0),) and site.kernel == "flex"


def test_a_kernel_that_is_asked_for_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time", never)
    (site,) = tuned(inputs(), kernel="sdpa").sites
    assert site.kernel == "sdpa" and not site.times


def test_sizes_that_only_the_run_knows_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time", never)
    function = attn_rewriter.optimize(attention, autotune=True, compiler="aot_eager", dynamic=True, strict=True)
    function(*inputs())
    assert attn_rewriter.report_of(function).sites[0].kernel == "sdpa"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"milliseconds": {"sdpa": "fast"}}'])
def test_a_corrupt_file_is_measured_again(content: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time", timing(sdpa=2.0, flex=1.0))
    tuned(inputs())
    (path,) = folder.iterdir()
    path.write_text(content)
    autotune._known.clear()
    with pytest.warns(UserWarning, match=f"attn_rewriter ignores {path}"):
        tuned(inputs())
    assert json.loads(path.read_text())["milliseconds"] == {"sdpa": 2.0, "flex": 1.0}


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time", timing(sdpa=2.0, flex=1.0))
    folder.write_text("a file is in the way")
    with pytest.warns(UserWarning, match="can't keep what it timed"):
        (site,) = tuned(inputs()).sites
    assert site.kernel == "flex"


def test_another_version_is_timed_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_time", timing(sdpa=2.0, flex=1.0))
    tuned(inputs())
    monkeypatch.setattr(autotune, "version", lambda package: "another")
    tuned(inputs())
    assert len([*folder.iterdir()]) == 2


def _write_until(done: Any) -> None:
    while not done.is_set():
        autotune._write("key", {"milliseconds": {"sdpa": 2.0, "flex": 1.0}, "padding": "x" * 5000})


def test_processes_that_write_at_the_same_time_leave_a_whole_file(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    done, seen = context.Event(), 0
    writers = [context.Process(target=_write_until, args=(done,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as a torn file would warn
            while seen < 200 and all(writer.is_alive() for writer in writers):
                seen += len(autotune._read("key", ("sdpa", "flex"))) == 2
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen == 200 and [path.name for path in folder.iterdir()] == ["key.json"]


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options for a choice that no Inductor is needed for."""
    monkeypatch.setattr(autotune, "usable", lambda *args, **kwargs: ("sdpa", "reference"))
    return {"compiler": "eager"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("InductorError: OutOfMemoryError: CUDA out of memory."),
    ],
    ids=repr,
)
@pytest.mark.parametrize("failing", [["sdpa"], ["sdpa", "reference"]], ids=" and ".join)
def test_out_of_memory_is_not_kept(
    error: Exception, failing: list[str], folder: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model fills the memory now, but may not do so the next time."""

    def time(found: Any, device: Any, name: str) -> tuple[float, ...]:
        if name in failing:
            raise error
        return (2.0,)

    monkeypatch.setattr(autotune, "_time", time)
    (site,) = tuned(inputs(), **quick).sites
    assert site.kernel == ("reference" if failing == ["sdpa"] else "sdpa")  # without times, as if not tuned
    assert not folder.exists()
    autotune._known.clear()
    monkeypatch.setattr(autotune, "_time", timing(sdpa=1.0, reference=2.0))
    assert tuned(inputs(), **quick).sites[0].kernel == "sdpa" and len([*folder.iterdir()]) == 1


def _nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even root can make a folder there."""
    monkeypatch.setenv("ATTN_REWRITER_CACHE", "/proc/attn_rewriter/cache" if os.path.exists("/proc") else "/dev/null/x")


def _full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dump(held: Any, file: Any, **options: Any) -> None:
        file.write("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    monkeypatch.setattr(json, "dump", dump)


def _not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows while another process reads the file."""

    def replace(source: str, target: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)

    monkeypatch.setattr(os, "replace", replace)


def _no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTN_REWRITER_CACHE")
    monkeypatch.setitem(sys.modules, "platformdirs", None)


@pytest.mark.parametrize("fault", [_nowhere, _full, _not_replaced, _no_home])
def test_what_can_not_be_kept(
    fault: Callable[..., None], folder: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is timed and taken all the same, and nothing is left behind."""
    monkeypatch.setattr(autotune, "_time", timing(sdpa=2.0, reference=1.0))
    fault(folder, monkeypatch)
    with pytest.warns(UserWarning, match="attn_rewriter can't keep what it timed in ") as caught:
        (site,) = tuned(inputs(), **quick).sites
    assert site.kernel == "reference"
    assert len([w for w in caught if "can't keep" in str(w.message)]) == 1
    assert not folder.exists() or not [*folder.iterdir()]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such users")
def test_a_folder_that_may_only_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is read; what is new is not kept."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setenv("ATTN_REWRITER_CACHE", name)
        autotune._write("old", {"milliseconds": {"sdpa": 1.0}})
        (Path(name) / "old.json").chmod(0o444)
        Path(name).chmod(0o555)
        try:
            if user == 0:  # who may write anywhere
                os.seteuid(65534)
            assert autotune._read("old", ["sdpa"]) == {"sdpa": 1.0}
            with pytest.warns(UserWarning, match=f"can't keep what it timed in {name}: Permission denied"):
                autotune._write("new", {"milliseconds": {"sdpa": 1.0}})
        finally:
            os.seteuid(user)
            Path(name).chmod(0o755)
        assert os.listdir(name) == ["old.json"]


@pytest.mark.parametrize("before", [{}, {"sdpa": 5.0}], ids=["nothing there", "an older file there"])
def test_a_process_that_is_killed_while_it_writes(
    before: dict[str, float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves is never read, and in nobody's way."""
    if before:
        autotune._write("key", {"milliseconds": before})

    def write_and_die() -> None:
        def dump(held: Any, file: Any, **options: Any) -> None:
            file.write('{"milliseconds": {"sdpa"')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        json.dump = dump
        autotune._write("key", {"milliseconds": {"sdpa": 1.0}})

    writer = multiprocessing.get_context("fork").Process(target=write_and_die)
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    (left,) = folder.glob("*.partial")
    assert left.read_text() == '{"milliseconds": {"sdpa"'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert autotune._read("key", ["sdpa"]) == before
        autotune._write("key", {"milliseconds": {"sdpa": 2.0}})
        assert autotune._read("key", ["sdpa"]) == {"sdpa": 2.0}


TUNE = """
import sys, torch, attn_rewriter
from attn_rewriter import autotune

def attention(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v

autotune.usable = lambda *args, **kwargs: ("sdpa", "reference")
print("ready", flush=True)
sys.stdin.readline()
for length in map(int, sys.argv[1:]):
    shapes = [(2, 3, length, 16)] * 3 + [(3, length, length)]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    function = attn_rewriter.optimize(attention, autotune=True, compiler="aot_eager", dynamic=False)
    torch.testing.assert_close(function(*given), attention(*given))
    (site,) = attn_rewriter.report_of(function).sites
    assert dict(site.times).keys() == {"sdpa", "reference"} and site.kernel == site.times[0][0], site
"""


def test_processes_that_tune_at_the_same_time(folder: Path) -> None:
    """One site is in both of them, the others in one."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-W", "error:attn_rewriter", "-c", TUNE]
    tuning = [subprocess.Popen([*command, "40", n], text=True, **pipes) for n in ("70", "140")]
    for process in tuning:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in tuning:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in tuning:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    held = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert sorted(entry["shapes"].partition("q_len=")[2].partition(",")[0] for entry in held) == ["128", "256", "64"]
    assert all(entry["milliseconds"].keys() == {"sdpa", "reference"} for entry in held)
