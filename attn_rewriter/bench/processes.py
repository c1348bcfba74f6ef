"""Cells that are measured in processes of their own: one that crashes or hangs costs a cell, which then says so."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from attn_rewriter.bench.measure import Cell, attempt

LIMIT = 300.0  # seconds for a cell, its compilation included
GRACE = 15.0  # for the others of a group, when one of them has failed

Measure = Callable[..., Cell]


class Worker:
    """A process that measures one cell after another. It begins with its imports, before there is anything to do."""

    def __init__(self, measure: Measure) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, measure))
        self.process.start()
        theirs.close()

    def measure(self, *task: object) -> Cell:
        """The cell, or why there is none."""
        return together([self], *task)[0]

    def receive(self) -> Cell:
        """What has arrived."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return {"failed": f"the process ended with exit code {self.process.exitcode}"}

    def close(self) -> None:
        """End the process, busy or not, and free its memory."""
        self.connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def together(workers: Sequence[Worker], *task: object) -> list[Cell]:
    """A cell that several processes measure, which wait for each other, as each of them saw it."""
    for worker in workers:
        with suppress(OSError):  # receive() says what happened
            worker.connection.send(task)
    cells: dict[Worker, Cell] = {}
    until = time.monotonic() + LIMIT
    busy: dict[Any, Worker] = {worker.connection: worker for worker in workers}
    while busy and (ready := wait([*busy], max(0.0, until - time.monotonic()))):
        for connection in ready:
            worker = busy.pop(connection)
            cells[worker] = worker.receive()
            if "failed" in cells[worker]:
                until = min(until, time.monotonic() + GRACE)
    late = {"failed": f"no answer within {LIMIT:.0f} s"}
    return [cells.get(worker, late) for worker in workers]


def serve(connection: Any, measure: Measure) -> None:
    """A worker's side: answer tasks until the other end is closed."""
    import transformers  # noqa: F401

    try:
        while True:
            connection.send(attempt(measure, *connection.recv()))
    except (EOFError, OSError):
        pass
