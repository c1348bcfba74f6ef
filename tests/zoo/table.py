"""The rows as Markdown."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BAD = ("WRONG", "CRASH")


def write(rows: list[Row], directory: Path, versions: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": versions, "rows": rows}, ensure_ascii=False, indent=1)
    (directory / "table.json").write_text(text + "\n")
    (directory / "table.md").write_text(markdown(rows, versions))


def sites_of(row: Row) -> list[Row]:
    """The sites in the denominator: those whose weights nobody else uses, whole in one graph."""
    return [site for site in row.get("sites", ()) if not site["why_not"]]


def total(sites: Iterable[Row], holds: Any = lambda site: True) -> int:
    return sum(site["times"] for site in sites if holds(site))


def is_read(site: Row) -> bool:
    return site["computes"] is not None


def percent(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "0"


def summary(rows: list[Row]) -> str:
    """What it comes to, one number a line."""
    ran = [row for row in rows if row.get("runs")]
    sites = [site for row in ran for site in sites_of(row)]
    n = total(sites)
    written_out = total(sites, lambda s: s["kind"] == "softmax")
    excluded = Counter(s["why_not"] for row in ran for s in row["sites"] for _ in range(s["times"]) if s["why_not"])
    verdicts = Counter(run["verdict"] for row in ran for run in row["runs"].values())
    times = sorted(row["seconds"] for row in ran)
    lines = [
        f"- architectures: {len(rows)}, of which {len(ran)} ran",
        f"- attention sites: {n}, of which {written_out} are written out and the others calls of PyTorch's own",
        f"- recognised: {percent(total(sites, is_read), n)}",
        f"- fused on this device: {percent(total(sites, lambda s: s.get('kernel')), n)}",
        *(f"- fused on {d}: {percent(total(sites, lambda s: s.get(d)), n)}" for d in ("sm_80", "sm_90", "sm_100")),  # noqa: B023
        f"- Inductor's own patterns replace: {percent(sum(row.get('inductor', 0) for row in ran), written_out)}",
        f"- runs: {', '.join(f'{k} {v}' for k, v in verdicts.most_common())}",
        f"- wrong: {sum(verdicts[v] for v in BAD)}",
        f"- graph breaks added: {sum(bool(row.get('adds_breaks')) for row in ran)}",
        f"- not counted: {', '.join(f'{why} {n}' for why, n in excluded.most_common()) or 'none'}",
    ]
    trained = Counter(row["training"]["verdict"] for row in ran if "training" in row)
    if trained:
        lines.append(f"- training: {', '.join(f'{k} {v}' for k, v in trained.most_common())}")
    if times:
        lines.append(f"- seconds an architecture: median {times[len(times) // 2]}, at most {times[-1]}")
    return "\n".join(lines)


def markdown(rows: list[Row], versions: dict[str, str]) -> str:
    parts = [
        "# Every architecture of transformers",
        f"Written by `python -m tests.zoo --train` with transformers {versions['transformers']} and {_torch(rows)}.",
        summary(rows),
        "## Architectures",
        "\n".join(
            [
                "| architecture | sites | read | sm_90 | Inductor | results | forms |",
                "|---|--:|--:|--:|--:|---|---|",
                *map(_line, rows),
            ]
        ),
        "## What is not read",
        unread(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _torch(rows: list[Row]) -> str:
    """The versions of torch that the rows were made with."""
    counted = Counter(row["torch"] for row in rows if "torch" in row).most_common()
    return " and ".join(f"torch {version}" + (f" ({n} of them)" if len(counted) > 1 else "") for version, n in counted)


def _line(row: Row) -> str:
    name = row["name"] + (f" ({row['class']})" if "class" in row else "")
    if not row.get("runs"):
        why = row.get("not_built") or row.get("plain_failure") or row.get("failed")
        return f"| {name} | | | | | not built: {_cell(why)} | |"
    sites = sites_of(row)
    cells = [
        name,
        total(sites),
        total(sites, is_read),
        total(sites, lambda s: s.get("sm_90")),
        row.get("inductor", 0),
        _cell(_results(row)),
        _cell("; ".join(f"{s['computes']} ×{s['times']}" for s in sites if is_read(s))),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _results(row: Row) -> str:
    runs = row["runs"]
    if all(run["verdict"] == "right" for run in runs.values()):
        return "right"
    return "; ".join(
        f"{k}: {r['verdict']}" + (f" ({r['detail']})" if r.get("detail") else "")
        for k, r in runs.items()
        if r["verdict"] != "right"
    )


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def unread(rows: list[Row]) -> str:
    """The sites that are not read, by reason, the most frequent first, with who writes them and where."""
    groups: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    for row in rows:
        for site in sites_of(row):
            if not is_read(site):
                groups[_general(site["why"])].append((row, site))
    lines = []
    for why, found in sorted(groups.items(), key=lambda item: -total(s for _, s in item[1])):
        lines.append(f"- **{why}**: {total(s for _, s in found)} sites of {len({r['name'] for r, _ in found})}")
        for row, site in found:
            lines.append(f"  - {row['name']} ×{site['times']} `{site['source']}` ({site['kind']}): {site['why']}")
    return "\n".join(lines)


def _general(why: str) -> str:
    """A reason without the names of nodes and the lines."""
    import re

    return re.sub(r"\s*\([^()]*:\d+\)", "", re.sub(r"\b([a-z_]+)_\d+\b", r"\1", why))
