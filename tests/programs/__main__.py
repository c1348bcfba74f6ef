"""Draws programs, runs them, and says what came of them."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.programs.grammar import program
from tests.programs.run import check
from tests.programs.shrink import shrink

CHUNK = 200
"""A process runs so many programs: what a compiled one leaves behind in memory is given back."""

RETRIES = 20
KINDS = ("right", "wrong", "raised", "doubted", "invalid")


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


def run(seed: str, first: int, count: int, options: dict[str, Any], plain: tuple[str, ...], small: float) -> Tally:
    """Programs of a seed, by their numbers. One that PyTorch can't run is drawn again."""
    torch.set_num_threads(1)
    tally = Tally()
    for number in range(first, first + count):
        for attempt in range(RETRIES):
            name = f"{seed}/{number}" + (f"/{attempt}" if attempt else "")
            source, choices = program(name, plain)
            verdict = check(source, options)
            tally.kinds[verdict.kind] += 1
            if verdict.kind != "invalid":
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
            failure = {"program": name, "kind": verdict.kind, "said": verdict.said, "source": source}
            if small:
                failure["smallest"] = shrink(name, verdict, lambda text: check(text, options), small, plain)
            tally.failures.append(failure)
    return tally


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


def table(of: dict[str, Tally], whole: Tally) -> str:
    heads = ("seed", "programs", "sites", "fused", "left", *KINDS, "rows without keys")
    lines = ["  ".join(f"{head:>8}" for head in heads)]
    for name, t in [*of.items(), ("all", whole)]:
        row = (name, t.programs, t.sites, t.fused, t.sites - t.fused, *(t.kinds[kind] for kind in KINDS), t.empty)
        lines.append("  ".join(f"{x!s:>{max(8, len(head))}}" for x, head in zip(row, heads)))
    lines += ["", "why sites were left as they are:"]
    lines += [f"{n:8d}  {reason[:140]}" for reason, n in whole.refusals.most_common(40)]
    lines += ["", "programs with each choice, and those of them in which every site was fused:"]
    lines += [f"{n:8d}  {whole.fully[name]:8d}  {name}" for name, n in sorted(whole.drawn.items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many programs, over all seeds")
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for all results, as JSON")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds to make a failing program small; 0: never")
    parser.add_argument("--options", type=json.loads, default={}, help='for attn_rewriter.Options: {"verify": false}')
    parser.add_argument("--plain", nargs="*", default=[], help="choices that are always the plainest, by their names")
    parser.add_argument("--run", type=Path, nargs="+", help="run the programs in these files instead")
    parser.add_argument("--show", nargs="+", help="print the programs of these names, as 1/17, instead")
    given = parser.parse_args()
    if given.show:
        print("\n\n".join(program(name, given.plain)[0] for name in given.show))
        return 0
    if given.run:
        verdicts = [(path, check(path.read_text(), given.options)) for path in given.run]
        for path, verdict in verdicts:
            print(f"{path}: {verdict.kind} ({verdict.fused} of {verdict.sites} sites fused) {verdict.said}")
        return int(any(verdict.fails for _, verdict in verdicts))
    started = time.monotonic()
    of = {seed: Tally() for seed in given.seeds}
    whole = Tally()
    for seed, tally in tallies(
        given.seeds, given.count, given.jobs, given.options, tuple(given.plain), given.shrink
    ):
        of[seed].add(tally)
        whole.add(tally)
        for failure in tally.failures:
            print(f"# {failure['program']} {failure['kind']}: {failure['said']}")
            print(failure.get("smallest", failure["source"]), flush=True)
        print(f"{whole.programs} programs, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(table(of, whole))
    print(f"\n{whole.programs} programs in {time.monotonic() - started:.0f} s")
    if given.out:
        given.out.write_text(json.dumps({"all": vars(whole), "seeds": {k: vars(v) for k, v in of.items()}}, indent=1))
    return int(bool(whole.kinds["wrong"] or whole.kinds["raised"]))


if __name__ == "__main__":
    sys.exit(main())
