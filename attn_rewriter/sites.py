"""What is said of one site, and how equal sites of many layers are said once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attn_rewriter.device import Device
from attn_rewriter.errors import Refusal
from attn_rewriter.spec import AttentionSpec, Shapes


@dataclass(frozen=True)
class Check:
    """How a site's kernel did on a graph's own inputs: `errors` are root mean squares of the differences from float64,
    as (of what, the kernel's, eager code's); `verdict` says what is wrong, or why nothing is known."""

    errors: tuple[tuple[str, float, float], ...] = ()
    verdict: str = ""

    @property
    def worst(self) -> float:
        """The largest error over eager's own."""
        return max((fused / max(eager, 1e-300) for _, fused, eager in self.errors), default=0.0)

    def __str__(self) -> str:
        return ", ".join(f"{what} off by {fused:.1e} (eager {eager:.1e})" for what, fused, eager in self.errors)


@dataclass(frozen=True)
class SiteReport:
    """One attention site. `kernel` is None where the model's own code stays; `refusals` say why, or why the kernels
    that would have been preferred can't run; `times` are the milliseconds that kernels were timed at here; `device` is
    what the kernel was chosen for; `check` is how it did where it was verified."""

    module: str
    source: str
    spec: AttentionSpec | None = None
    shapes: Shapes | None = None
    kernel: str | None = None
    refusals: tuple[Refusal, ...] = ()
    times: tuple[tuple[str, float], ...] = ()
    device: Device | None = None
    check: Check | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this kernel, or none."""
        timed = ", ".join(f"{name} {in_ms(milliseconds)}" for name, milliseconds in self.times)
        return (*(refusal.reason for refusal in self.refusals), *([f"timed: {timed}"] if timed else []))

    @property
    def verified(self) -> tuple[str, ...]:
        """How it did where it was checked."""
        return (f"verified: {self.check}",) if self.check is not None and self.check.errors else ()

    @property
    def place(self) -> str:
        """Module and line."""
        return (self.module or "the model") + (f" ({self.source})" if self.source else "")

    def __str__(self) -> str:
        what = f"{self.spec} [{self.shapes}]" if self.spec is not None else "not read"
        why = "; ".join(map(str, self.refusals))
        return f"{self.place}: {what} -> {self.kernel or 'eager'}" + (f" ({why})" if why else "")

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "module": self.module,
            "source": self.source,
            "computes": str(self.spec) if self.spec is not None else None,
            "shapes": str(self.shapes) if self.shapes is not None else None,
            "kernel": self.kernel,
            "refusals": [str(refusal) for refusal in self.refusals],
            "times": dict(self.times),
            "device": str(self.device) if self.device is not None else None,
            "check": asdict(self.check) if self.check is not None else None,
        }


def in_ms(milliseconds: float) -> str:
    """A time as it is shown, to three digits."""
    return f"{float(f'{milliseconds:.3g}'):g} ms"


def summary(sites: Sequence[SiteReport]) -> str:
    """How many there are, and how many of them are fused."""
    fused = sum(site.kernel is not None for site in sites)
    return f"{fused} of {len(sites)} attention sites fused" if sites else "no attention site was found"


def folded(sites: Iterable[SiteReport]) -> list[tuple[str, SiteReport]]:
    """Sites that differ in their module alone share a row: "layers.{0…31}.self_attn"; their checks the worst of all."""
    rows: dict[Any, list[SiteReport]] = {}
    for site in sites:
        rows.setdefault((site.source, site.spec, site.shapes, site.kernel, site.reasons), []).append(site)
    worst = [max(group, key=lambda site: site.check.worst if site.check else 0.0) for group in rows.values()]
    return [(_merged([site.module for site in group]), site) for group, site in zip(rows.values(), worst)]


def _merged(modules: list[str]) -> str:
    paths = [module.split(".") for module in modules]
    if len({len(path) for path in paths}) != 1:
        return ", ".join(dict.fromkeys(modules))
    parts = []
    for column in zip(*paths):
        names = list(dict.fromkeys(column))
        parts.append(names[0] if len(names) == 1 else "{" + _range(names) + "}")
    times = f" (×{len(modules)})" if len(modules) > 1 else ""
    return ".".join(parts) + times


def _range(names: list[str]) -> str:
    if all(name.isdigit() for name in names) and [int(n) for n in names] == list(
        range(int(names[0]), int(names[-1]) + 1)
    ):
        return f"{names[0]}…{names[-1]}"
    return ",".join(names)


def short(source: str) -> str:
    """A path as people know it: from site-packages or the working directory on."""
    path, _, line = source.rpartition(":")
    for root in (os.sep + "site-packages" + os.sep, os.getcwd() + os.sep):
        path = path.rpartition(root)[2]
    return f"{path}:{line}" if path else source
