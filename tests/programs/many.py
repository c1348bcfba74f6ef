"""Many programs, over several processes, and what came of them."""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.programs.grammar import program
from tests.programs.run import Verdict, check
from tests.programs.shrink import shrink

CHUNK = 100
"""A process runs so many programs: what a compiled one leaves behind in memory is given back."""

RETRIES = 20
KINDS = ("right", "fell back", "wrong", "raised", "doubted", "not ours", "invalid")


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
    """Programs of a seed, by their numbers. One that PyTorch can't run is drawn again.

    A failing one is made small for `small` seconds; but not more than `at_most` of them."""
    torch.set_num_threads(1)
    tally = Tally()
    failed: list[tuple[Verdict, dict[str, str]]] = []
    for number in range(first, first + count):
        for attempt in range(RETRIES):
            name = f"{seed}/{number}" + (f"/{attempt}" if attempt else "")
            source, choices = program(name, plain)
            verdict = check(source, options)
            tally.kinds[verdict.kind] += 1
            if verdict.kind not in ("invalid", "not ours"):
                break
        tally.programs += 1
        tally.sites += verdict.sites
        tally.fused += verdict.fused
        tally.empty += verdict.empty
        tally.refusals.update(verdict.refusals)
        tally.drawn.update(choices.features)
        if verdict.sites and verdict.fused == verdict.sites:
            tally.fully.update(choices.features)
        if verdict.kind in ("wrong", "raised", "doubted"):
            failed.append((verdict, {"program": name, "kind": verdict.kind, "said": verdict.said, "source": source}))
    tally.failures = [failure for _, failure in failed]
    for verdict, failure in failed[:at_most] if small else ():  # last: among what is tried is what PyTorch chokes on
        name = failure["program"]
        failure["smallest"] = shrink(name, verdict, lambda text: check(text, options), small, plain)
    return tally


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


def _job(job: tuple[str, int, int, dict[str, Any], tuple[str, ...], float]) -> tuple[str, Tally]:
    return job[0], run(*job)


def tallies(
    seeds: list[str], count: int, jobs: int, options: dict[str, Any], plain: tuple[str, ...], small: float
) -> Iterator[tuple[str, Tally]]:
    each = -(-count // len(seeds))
    work = [
        (seed, first, min(CHUNK, each - first), options, plain, small)
        for first in range(0, each, CHUNK)
        for seed in seeds
    ]
    if jobs == 1 and len(work) == 1:
        yield _job(work[0])
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_job, work)
