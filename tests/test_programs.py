"""Random programs compute what they did (`tests/programs`); and the tester is able to fail.

`ATTN_REWRITER_EXAMPLES` sets how many programs are drawn (200), `ATTN_REWRITER_SEED` which (those of the day, in UTC).
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from attn_rewriter import pipeline
from attn_rewriter.errors import Refusal
from attn_rewriter.kernels.sdpa import SDPA
from attn_rewriter.spec import Band, Mask
from tests.programs.grammar import program
from tests.programs.many import run
from tests.programs.run import Verdict, check
from tests.programs.shrink import shrink

ONCE = Path(__file__).parent / "programs" / "once"
PARTS = 4
EXAMPLES = int(os.environ.get("ATTN_REWRITER_EXAMPLES", 200))
SEED = os.environ.get("ATTN_REWRITER_SEED") or f"{datetime.now(timezone.utc):%Y-%m-%d}"


@pytest.mark.parametrize("part", range(PARTS))
def test_programs_compute_what_they_did(part: int) -> None:
    each = -(-EXAMPLES // PARTS)
    tally = run(SEED, part * each, each, small=30.0, at_most=1)
    failed = [x for x in tally.failures if x["kind"] in ("wrong", "raised")]
    assert not failed, (
        f"{len(failed)} of {tally.programs} programs fail, with ATTN_REWRITER_SEED={SEED}\n"
        + "\n".join(f"{x['program']} {x['kind']}: {x['said']}" for x in failed)
        + f"\n\n{failed[0].get('smallest', failed[0]['source'])}"
    )
    assert tally.sites > each / 2 and tally.fused > each / 4, "hardly anything is drawn, or fused"


@pytest.mark.parametrize("path", sorted(ONCE.glob("*.py")), ids=lambda path: path.stem)
def test_programs_that_once_failed(path: Path) -> None:
    verdict = check(path.read_text())
    assert verdict.kind in ("right", "fell back"), f"{verdict.kind}: {verdict.said}"


def test_programs_are_drawn_by_name() -> None:
    """The same name is the same program, and a choice that is made plain leaves the others as they are."""
    source, choices = program("a name")
    assert program("a name")[0] == source
    name = next(name for name, chosen in choices.made.items() if chosen)
    again = program("a name", {name})[1].made
    assert again[name] == 0
    assert all(again[other] == chosen for other, chosen in choices.made.items() if other in again and other != name)


SIMPLE = ("dtype", "sizes", "kind", "region", "operands", "attention 1 is there", "attention 2 is there", "two masks")
SIMPLE += ("rearranged", "written", "round trip", "calls", "another mask after it", "kernel", "rows have")


def found_out(judge: Callable[[str], Verdict], right: Callable[[str], Verdict]) -> str:
    """The smallest program that is wrong to one judge and right to the other."""
    for number in range(200):
        name = f"found out/{number}"
        source, _ = program(name, SIMPLE)
        verdict = judge(source)
        if verdict.kind == "wrong" and right(source).kind == "right":

            def both(text: str) -> Verdict:
                found = judge(text)
                return found if found.kind != "wrong" or right(text).kind == "right" else Verdict("invalid")

            return shrink(name, verdict, both, 30.0, SIMPLE)
    raise AssertionError("nothing was found out")


def body(source: str) -> str:
    """What a program does."""
    (function,) = (x for x in ast.walk(ast.parse(source)) if getattr(x, "name", "") in ("program", "forward"))
    return ast.unparse(function)


def alone(source: str) -> Verdict:
    """Judged by its results, without the library's own second opinion."""
    return check(source, {"verify": False})


def patched(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, by: Any) -> Callable[[str], Verdict]:
    def judge(source: str) -> Verdict:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, by)
            return alone(source)

    return judge


def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = SDPA.attend

    def off(self: SDPA, spec: Any, shapes: Any, device: Any, tensors: Any) -> Tensor:
        return attend(self, spec, shapes, device, tensors) * (1 + 1e-4)

    smallest = body(found_out(patched(monkeypatch, SDPA, "attend", off), alone))
    assert len(smallest.splitlines()) <= 4, smallest


def test_a_wrong_reading_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask that is read as one that sees a key more."""
    describe = pipeline.describe

    def wider(modifier: Any) -> Any:
        band = modifier.keep if isinstance(modifier, Mask) else None
        if isinstance(band, Band) and isinstance(band.upper, int):
            return replace(modifier, keep=Band(band.lower, band.upper + 1))
        return modifier

    def misread(*args: Any) -> Any:
        found = describe(*args)
        if isinstance(found, Refusal):
            return found
        return replace(found, spec=replace(found.spec, modifiers=tuple(map(wider, found.spec.modifiers))))

    smallest = body(found_out(patched(monkeypatch, pipeline, "describe", misread), alone))
    assert len(smallest.splitlines()) <= 5, smallest
    assert any(word in smallest for word in ("tri", "arange", "causal", "self.", "eye", "one_hot")), smallest
