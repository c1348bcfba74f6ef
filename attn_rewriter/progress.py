"""What takes longer than a moment, shown while it does: on a terminal alone.

Everything that is under way is a line of one display, as things nest and run in several threads, and a terminal has one
cursor.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

AFTER_S = 0.5
"""What is done sooner is not shown."""


class Line:
    """Something that is under way."""

    def __init__(self, words: str, total: int | None) -> None:
        self.words, self.total, self.done, self.is_over = words, total, 0, False

    def say(self, words: str) -> None:
        """Say something else of it."""
        self.words = words
        _display.update(self)

    def advance(self, words: str | None = None) -> None:
        """One more of the total is done."""
        self.done += 1
        self.say(self.words if words is None else words)


@contextmanager
def working(words: str, total: int | None = None) -> Iterator[Line]:
    """Show a line on stderr, with the time, and with a bar where there is a total; nothing where stderr is not a
    terminal, in another process than the first of its kind, or if it is over at once."""
    line = Line(words, total)
    if not _is_shown():
        yield line
        return
    timer = threading.Timer(AFTER_S, _display.show, [line])
    timer.daemon = True
    with suppress(RuntimeError):  # no thread can be started when Python is about to end
        timer.start()
    try:
        yield line
    finally:
        timer.cancel()
        _display.hide(line)


def name_of(x: object) -> str:
    """What to call a function or an object."""
    return x if isinstance(x, str) else getattr(x, "__name__", type(x).__name__)


def _is_shown() -> bool:
    console = Console(stderr=True)
    with suppress(AttributeError, ValueError):  # no file, or a closed one
        is_terminal = console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
        is_first = os.environ.get("LOCAL_RANK", "0") == "0" and multiprocessing.parent_process() is None
        return is_terminal and is_first and not _display.is_forked
    return False


class _Bar(BarColumn):
    def render(self, task: Task) -> Text:  # type: ignore[override]
        return Text() if task.total is None else super().render(task)  # type: ignore[return-value]


class _Count(MofNCompleteColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Display:
    """The lines that are shown. It may fail to show them, and nothing else."""

    def __init__(self) -> None:
        self.is_forked = False
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._shown: dict[Line, int] = {}

    def show(self, line: Line) -> None:
        with self._lock, suppress(OSError, RuntimeError, ValueError):
            if line.is_over:
                return
            if self._progress is None:
                self._progress = _started()
            self._shown[line] = self._progress.add_task(line.words, total=line.total, completed=line.done)

    def update(self, line: Line) -> None:
        with self._lock, suppress(OSError, RuntimeError, ValueError):
            if self._progress is not None and line in self._shown:
                self._progress.update(self._shown[line], description=line.words, completed=line.done)  # type: ignore[arg-type]

    def hide(self, line: Line) -> None:
        with self._lock, suppress(OSError, RuntimeError, ValueError):
            line.is_over = True
            if self._progress is None or line not in self._shown:
                return
            self._progress.remove_task(self._shown.pop(line))  # type: ignore[arg-type]
            if not self._shown:
                progress, self._progress = self._progress, None
                progress.stop()

    def forget(self) -> None:
        """In a process that was forked: the display is the other one's, and so may be the lock."""
        self.__init__()  # type: ignore[misc]
        self.is_forked = True
        sys.stdout, sys.stderr = (getattr(file, "rich_proxied_file", file) for file in (sys.stdout, sys.stderr))


def _started() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), _Bar(), _Count(), TimeElapsedColumn()
    # What is printed meanwhile goes above the lines: to stderr, hence not what stdout has for a file or a pipe.
    redirect_stdout = sys.stdout is not None and sys.stdout.isatty()
    progress = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=redirect_stdout)
    progress.start()
    return progress


_display = _Display()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_display.forget)
