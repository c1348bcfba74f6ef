"""Draws programs, runs them, and says what came of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.programs.grammar import program
from tests.programs.many import KINDS, Tally, sweep, tallies
from tests.programs.run import check


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
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after so many")
    parser.add_argument("--options", type=json.loads, default={}, help='for attn_rewriter.Options: {"verify": false}')
    parser.add_argument("--plain", nargs="*", default=[], help="choices that are always the plainest, by their names")
    parser.add_argument(
        "--sweep", metavar="NAMES", help="every option alone of the choices that this expression matches"
    )
    parser.add_argument("--within", nargs="*", default=[], help="for a sweep: choices made otherwise, as masked=1")
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
    if given.sweep is not None:
        kinds: Counter[str] = Counter()
        for name, source, verdict in sweep(given.options, given.within, given.sweep):
            kinds[verdict.kind] += 1
            if verdict.kind in ("wrong", "raised", "doubted"):
                print(f"# {name} {verdict.kind}: {verdict.said}\n{source}", flush=True)
        print(", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        return int(bool(kinds["wrong"] or kinds["raised"]))
    started = time.monotonic()
    of = {seed: Tally() for seed in given.seeds}
    whole = Tally()
    how = given.options, tuple(given.plain), given.shrink, given.seconds
    for seed, tally in tallies(given.seeds, given.count, given.jobs, *how):
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
