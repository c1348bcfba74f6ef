"""`python -m tests.zoo`: every architecture of transformers through the rewriter, and a table of it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import transformers

from attn_rewriter.progress import working
from tests.zoo import configs, run, table

HERE = Path(__file__).parent
Row = dict[str, Any]
Given = tuple[str, bool, bool, bool]  # the arguments of `run.check`


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types (all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, at least one (1)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one architecture (240)")
    parser.add_argument("--out", type=Path, default=HERE, help="where table.json and table.md go, and rows/")
    parser.add_argument("--fresh", action="store_true", help="run again what has a row from an earlier run")
    parser.add_argument("--base", action="store_true", help="the base models, not those with a head")
    parser.add_argument("--quick", action="store_true", help="only what is read, in float32")
    parser.add_argument("--train", action="store_true", help="gradients as well, for the families in configs.TRAINED")
    options = parser.parse_args(argv)
    options.jobs = max(1, options.jobs)
    unknown = set(options.names) - set(configs.all_types())
    if unknown:
        parser.error(f"unknown model types: {', '.join(sorted(unknown))}")
    names = options.names or configs.names()
    rows = Rows(options.out / "rows", base=options.base)
    waiting = [name for name in names if options.fresh or not rows.has(name, options.train)]
    if waiting:
        with working("making Inductor's patterns"):
            run.warm_up()
    with working("", total=len(waiting)) as line:
        work = [(name, options.base, options.train and name in configs.TRAINED, options.quick) for name in waiting]
        for row in in_processes(run.check, work, options.jobs, options.timeout):
            rows.write(row)
            line.advance(row["name"])
    done = [rows.read(name) for name in names]
    table.write(done, options.out, rows.versions)
    print(table.summary(done))
    return 0


class Rows:
    """Finished rows, each in a file of its own, by the versions that they were made with."""

    def __init__(self, directory: Path, base: bool = False) -> None:
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        which = "-".join(f"{k}{v}" for k, v in self.versions.items()) + ("-base" if base else "")
        self.directory = directory / which
        self.directory.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def has(self, name: str, trained: bool = False) -> bool:
        if not self._path(name).is_file():
            return False
        return not trained or name not in configs.TRAINED or "training" in self.read(name)

    def read(self, name: str) -> Row:
        return json.loads(self._path(name).read_text())

    def write(self, row: Row) -> None:
        path = self._path(row["name"])
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, ensure_ascii=False))
        partial.replace(path)


# ---------------------------------------------------------------------------------------------------------------
# Processes


def in_processes(check: Callable[..., Row], work: list[Given], jobs: int, timeout: float) -> Iterator[Row]:
    """The rows of all work, each made in a process of its own, which shares what is imported here: a crash or a hang
    costs one row."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(work))
    running: dict[Any, tuple[Any, str, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            given = waiting.pop()
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_alone, args=(check, given, sending))
            process.start()
            sending.close()
            running[receiving] = (process, given[0], time.monotonic() + timeout)
        ready = wait([*running], timeout=max(0.0, min(end for *_, end in running.values()) - time.monotonic()))
        late = [c for c, (*_, end) in running.items() if end < time.monotonic() and c not in ready]
        for connection in [*ready, *late]:
            process, name, _ = running.pop(connection)
            yield _row_of(connection, process, name, timeout if connection in late else None)


def _alone(check: Callable[..., Row], given: Given, sending: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        warnings.simplefilter("ignore")
        try:
            row = check(*given)
        except Exception as failure:
            row = {"name": given[0], "failed": run.said(failure)}
        sending.send(row)
        sending.close()
        os._exit(0)


def _row_of(connection: Any, process: Any, name: str, timed_out: float | None) -> Row:
    if timed_out is not None:
        process.kill()
        row = {"name": name, "failed": f"not finished in {timed_out:.0f} s"}
    else:
        try:
            row = connection.recv()
        except EOFError:
            row = {}
    process.join()
    connection.close()
    return row or {"name": name, "failed": f"the process died with {process.exitcode}"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    sys.exit(main())
