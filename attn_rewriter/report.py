"""What was found, what runs instead, and why not something else: site by site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from attn_rewriter.errors import Refusal
from attn_rewriter.page import page
from attn_rewriter.sites import SiteReport, folded, short, summary


@dataclass(frozen=True)
class Report:
    """All sites of the graphs that were looked at. `print(report)` shows a table, `to_html` makes a page of it."""

    sites: tuple[SiteReport, ...] = ()
    rewrite_seconds: float = 0.0

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """Several graphs' reports as one."""
        reports = list(reports)
        sites = tuple(site for report in reports for site in report.sites)
        return cls(sites, sum(report.rewrite_seconds for report in reports))

    def eager(self, reason: str) -> Report:
        """The same, but all sites were left as they are after all."""
        refusal = Refusal("compile", reason)
        left = (
            replace(site, kernel=None, refusals=(*site.refusals, refusal)) if site.kernel else site
            for site in self.sites
        )
        return replace(self, sites=tuple(left))

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

    def to_html(self) -> str:
        """As one page that needs nothing else: `Path("report.html").write_text(report.to_html())`."""
        return page(self.sites, self.rewrite_seconds)

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

        if not self.sites:
            return summary(self.sites)
        table = Table(title=summary(self.sites), title_justify="left", title_style="bold")
        for column in ("site", "line", "what it computes", "shapes", "kernel", "why"):
            table.add_column(column, overflow="fold")
        for modules, site in folded(self.sites):
            cells = (
                modules,
                short(site.source),
                str(site.spec) if site.spec is not None else "–",
                str(site.shapes) if site.shapes is not None else "–",
                site.kernel or "eager",
                "\n".join((*site.reasons, *site.verified)),
            )
            table.add_row(*map(Text, cells))
        return Group(table)
