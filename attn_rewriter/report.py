"""What was found, what runs instead, and why not something else: site by site."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attn_rewriter.errors import Refusal
from attn_rewriter.spec import AttentionSpec, Shapes


@dataclass(frozen=True)
class SiteReport:
    """One attention site. `kernel` is None where the model's own code stays; `refusals` say why, or why the kernels
    that would have been preferred can't run; `times` are the milliseconds that kernels were timed at here."""

    module: str
    source: str
    spec: AttentionSpec | None = None
    shapes: Shapes | None = None
    kernel: str | None = None
    refusals: tuple[Refusal, ...] = ()
    times: tuple[tuple[str, float], ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this kernel, or none."""
        timed = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in self.times)
        return (*(refusal.reason for refusal in self.refusals), *([f"timed: {timed}"] if timed else []))

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
        }


@dataclass(frozen=True)
class Report:
    """All sites of the graphs that were looked at. `print(report)` shows a table."""

    sites: tuple[SiteReport, ...] = ()
    rewrite_seconds: float = 0.0

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """Several graphs' reports as one."""
        reports = list(reports)
        sites = tuple(site for report in reports for site in report.sites)
        return cls(sites, sum(report.rewrite_seconds for report in reports))

    @property
    def n_sites(self) -> int:
        return len(self.sites)

    @property
    def n_fused(self) -> int:
        return sum(site.kernel is not None for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "n_sites": self.n_sites,
            "n_fused": self.n_fused,
            "rewrite_seconds": self.rewrite_seconds,
            "sites": [site.to_dict() for site in self.sites],
        }

    def __str__(self) -> str:
        from rich.console import Console

        width = max(100, Console().width) if Console().is_terminal else 120
        console = Console(width=width, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        summary = f"{self.n_fused} of {self.n_sites} attention sites fused"
        if not self.sites:
            return "no attention site was found"
        table = Table(title=summary, title_justify="left", title_style="bold")
        for column in ("site", "line", "what it computes", "shapes", "kernel", "why"):
            table.add_column(column, overflow="fold")
        for modules, site in _grouped(self.sites):
            cells = (
                modules,
                _short(site.source),
                str(site.spec) if site.spec is not None else "–",
                str(site.shapes) if site.shapes is not None else "–",
                site.kernel or "eager",
                "\n".join(site.reasons),
            )
            table.add_row(*map(Text, cells))
        return Group(table)


def _grouped(sites: Iterable[SiteReport]) -> list[tuple[str, SiteReport]]:
    """Sites that differ in their module alone share a row: "layers.{0…31}.self_attn"."""
    rows: dict[Any, list[SiteReport]] = {}
    for site in sites:
        rows.setdefault((site.source, site.spec, site.shapes, site.kernel, site.reasons), []).append(site)
    return [(_merged([site.module for site in group]), group[0]) for group in rows.values()]


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


def _short(source: str) -> str:
    """A path as people know it: from site-packages or the working directory on."""
    path, _, line = source.rpartition(":")
    for root in (os.sep + "site-packages" + os.sep, os.getcwd() + os.sep):
        path = path.rpartition(root)[2]
    return f"{path}:{line}" if path else source
