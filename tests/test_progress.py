"""What takes long is shown while it does: on a terminal, in one place, and nowhere else."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_compiler
from rich.console import Console
from rich.file_proxy import FileProxy
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import attn_rewriter
from attn_rewriter import packages, progress
from attn_rewriter.progress import working
from tests.accuracy import assert_the_same
from tests.running import with_gradients

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Terminal(io.StringIO):
    """A terminal, and all that was ever written to it."""

    def isatty(self) -> bool:
        return not super().isatty()  # which raises where it is closed

    def wait_for(self, words: str) -> None:
        until = time.monotonic() + 60
        while words not in self.getvalue():
            assert time.monotonic() < until, (words, self.getvalue())
            time.sleep(0.01)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=made))
    yield made
    assert made.closed or made.getvalue().count(HIDDEN) == made.getvalue().count(SHOWN)
    assert not isinstance(sys.stderr, FileProxy) and not isinstance(sys.stdout, FileProxy)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    how = {"dtype": torch.float64, "requires_grad": True}
    return [torch.randn(2, 4, 8, 16, generator=generator, **how) for _ in range(3)]


def waiting(terminal: Terminal, words: str) -> Callable[..., Any]:
    """A compiler that takes until the terminal shows something."""

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        terminal.wait_for(words)
        return gm.forward

    return compiler


def test_nested(terminal: Terminal) -> None:
    """Lines of one display: the inner one takes nothing from the outer one."""
    with working("outer"):
        terminal.wait_for("outer")
        with working("inner", total=7) as line:
            terminal.wait_for("inner")
            line.advance()
            terminal.wait_for("1/7")
            line.say("further in")
            terminal.wait_for("further in")
        print("said meanwhile", file=sys.stderr)
        terminal.truncate(0)
        terminal.wait_for("outer")
        assert "further in" not in terminal.getvalue()
        terminal.write(HIDDEN)  # what was cut off


def test_threads(terminal: Terminal) -> None:
    """The display ends with the last of its lines, whichever that is."""
    first, last = threading.Event(), threading.Event()

    def work() -> None:
        with working("in a thread"):
            first.wait()
        last.set()

    thread = threading.Thread(target=work)
    with working("in the main thread"):
        thread.start()
        terminal.wait_for("in a thread")
        terminal.wait_for("in the main thread")
    first.set()
    thread.join()
    assert last.is_set() and terminal.getvalue().count(HIDDEN) == 1


def test_after_an_error(terminal: Terminal) -> None:
    def work() -> None:
        with working("dividing"):
            terminal.wait_for("dividing")
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        work()


def test_what_is_over_soon_is_not_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 60.0)
    with working("quick"):
        pass
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("why", ["no terminal", "a dumb terminal", "closed", "another rank", "another process"])
def test_quiet(why: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Also where something asks for colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress._display, "show", lambda line: pytest.fail("shown"))
    if why == "no terminal":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    elif why == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    elif why == "closed":
        terminal.close()
    elif why == "another rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    else:
        monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    before = {*threading.enumerate()}
    with working("nothing", total=2) as line:
        line.advance("still nothing")
        assert {*threading.enumerate()} <= before  # no timer
    assert terminal.closed or terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_stdout_stays_where_it_goes(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script prints into a file is not for the terminal."""
    monkeypatch.setattr(sys, "stdout", file := io.StringIO())
    with working("printing"):
        terminal.wait_for("printing")
        print("a result")
    assert file.getvalue() == "a result\n" and "a result" not in terminal.getvalue()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compilation(terminal: Terminal) -> None:
    """Forward and backward, and as right as ever."""
    words = "compiling with aot_autograd, 1 of 1 attention sites fused", "compiling the backward pass"
    forward, backward = (make_boxed_compiler(waiting(terminal, said)) for said in words)
    compiler = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    compiler.__name__ = "aot_autograd"
    function = attn_rewriter.optimize(attention, compiler=compiler)
    found, expected = (with_gradients(f, operands()) for f in (function, attention))
    assert_the_same(found, expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compilation_in_a_thread(terminal: Terminal) -> None:
    function = attn_rewriter.optimize(attention, compiler=waiting(terminal, "compiling with compiler"))
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(function(*operands())))
    thread.start()
    thread.join()
    assert_the_same(found, [attention(*operands())])


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain(terminal: Terminal) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        waits(q)
        return attention(q, k, v)

    @torch.compiler.disable
    def waits(q: Tensor) -> None:
        terminal.wait_for("explaining model")

    assert attn_rewriter.explain(model, *operands()).n_fused == 1


def test_imports(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_package.py").write_text("import builtins; builtins.slow_package_waits()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "builtins.slow_package_waits", lambda: terminal.wait_for("importing slow_package"), raising=False
    )
    assert packages.unimportable("slow_package") is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork(terminal: Terminal) -> None:
    """A process that is forked meanwhile writes where it wrote before, and shows nothing."""
    with working("forking"):
        terminal.wait_for("forking")
        child = os.fork()
        if not child:
            n_threads = threading.active_count()
            with working("in the child"):
                os._exit(isinstance(sys.stderr, FileProxy) or threading.active_count() > n_threads)
        assert os.waitpid(child, 0)[1] == 0
