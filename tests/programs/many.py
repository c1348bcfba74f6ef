"""Many programs, over several processes, and what came of them."""

from __future__ import annotations

import math
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.programs.grammar import program
from tests.programs.run import Verdict, check
from tests.programs.shrink import shrink

CHUNK = 100
"""A process runs at most so many programs: what a compiled one leaves behind in memory is given back."""

RETRIES = 20
KINDS = ("right", "fell back", "wrong", "raised", "doubted", "not ours", "invalid")


DISORDER = ("fell back", "raised", "not ours")
"""Where a compiler raised, PyTorch may leave a process so that other programs fail, as where AOTAutograd raises within
inference mode (2.13)."""


@dataclass
class Tally:
    """What came of the programs of a seed."""

    programs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sites: int = 0
    fused: int = 0
    empty: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    fully: Counter[str] = field(default_factory=Counter)
    """Of each feature: programs that have it, and those of them in which every site was fused."""
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            elif isinstance(mine, list):
                mine += value
            else:
                setattr(self, name, mine + value)


def run(
    seed: str,
    first: int,
    count: int,
    options: dict[str, Any] | None = None,
    plain: Collection[str] = (),
    small: float = 60.0,
    at_most: int | None = None,
) -> Tally:
    """Programs of a seed, by their numbers, in a process of their own, or in several: some leave theirs in disorder.
    One that PyTorch can't run is drawn again.

    A failing one is made small for `small` seconds; but not more than `at_most` of them."""
    tally, at = Tally(), (first, 0)
    while at[0] < first + count:
        part, at = _elsewhere(_run_here, seed, at, first + count, options, plain)
        tally.add(part)
    for failure in tally.failures[:at_most] if small else ():
        failure["smallest"] = _elsewhere(_shrink_here, failure, options, plain, small)
    return tally


def _elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def _run_here(
    seed: str, start: tuple[int, int], end: int, options: dict[str, Any] | None, plain: Collection[str]
) -> tuple[Tally, tuple[int, int]]:
    """Programs from a number and an attempt on, up to the end or while all is in order; and where to go on."""
    torch.set_num_threads(1)
    tally, (number, attempt) = Tally(), start
    kind = ""
    while number < end and kind not in DISORDER:
        name = f"{seed}/{number}" + (f"/{attempt}" if attempt else "")
        source, choices = program(name, plain)
        verdict = check(source, options)
        tally.kinds[kind := verdict.kind] += 1
        if kind in ("invalid", "not ours") and attempt + 1 < RETRIES:
            attempt += 1
            continue
        number, attempt = number + 1, 0
        tally.programs += 1
        tally.sites += verdict.sites
        tally.fused += verdict.fused
        tally.empty += verdict.empty
        tally.refusals.update(verdict.refusals)
        tally.drawn.update(choices.features)
        if verdict.sites and verdict.fused == verdict.sites:
            tally.fully.update(choices.features)
        if kind in ("wrong", "raised", "doubted"):
            tally.failures.append({"program": name, "kind": kind, "said": verdict.said, "source": source})
    return tally, (number, attempt)


def _shrink_here(
    failure: dict[str, str], options: dict[str, Any] | None, plain: Collection[str], seconds: float
) -> str:
    torch.set_num_threads(1)
    verdict = Verdict(failure["kind"], failure["said"])
    return shrink(failure["program"], verdict, lambda text: check(text, options), seconds, plain)


def sweep(
    options: dict[str, Any] | None = None, within: Collection[str] = (), only: str = ""
) -> Iterator[tuple[str, str, Verdict]]:
    """Every option of every choice, alone: what it is called, the program, and what came of it.

    `within` are choices that are made differently from the plainest, as `name=number`, in all of them. The names of the
    choices that are varied contain `only`, a regular expression."""
    settled = {name: int(number) for name, _, number in (x.rpartition("=") for x in within)}
    seen: set[str] = set()
    open_: list[tuple[dict[str, int], set[str]]] = [(settled, set())]
    while open_:
        forced, known = open_.pop(0)
        source, choices = program("", ("*",), forced)
        if source in seen:
            continue
        seen.add(source)
        yield ", ".join(f"{name}={n}" for name, n in forced.items()), source, check(source, options)
        new = [name for name in choices.options if name not in known | forced.keys() and re.search(only, name)]
        open_ += [
            ({**forced, name: number}, {*choices.options}) for name in new for number in range(1, choices.options[name])
        ]


def _job(job: tuple[str, int, int, dict[str, Any], tuple[str, ...], float], until: float) -> tuple[str, Tally]:
    return job[0], run(*job) if time.monotonic() < until else Tally()


def tallies(
    seeds: list[str],
    count: int,
    jobs: int,
    options: dict[str, Any],
    plain: tuple[str, ...],
    small: float,
    seconds: float = math.inf,
) -> Iterator[tuple[str, Tally]]:
    """Of each seed the same number of programs, some at a time; none are begun after so many seconds."""
    until = time.monotonic() + seconds
    each = -(-count // len(seeds))
    work = [
        (seed, first, min(CHUNK, each - first), options, plain, small)
        for first in range(0, each, CHUNK)
        for seed in seeds
    ]
    with ThreadPoolExecutor(jobs) as threads:  # each waits for a process
        for done in as_completed([threads.submit(_job, each, until) for each in work]):
            yield done.result()
