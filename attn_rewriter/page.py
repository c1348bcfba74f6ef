"""The sites as one HTML page that needs nothing else: no script, no other file, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import torch

from attn_rewriter.picture import CELLS, picture
from attn_rewriter.sites import SiteReport, folded, in_ms, short, summary
from attn_rewriter.spec import Bias, Shapes, Size, TensorMask, conjunction, same

_STYLE = Path(__file__).with_name("page.css")
_SIDE, _THIN, _CELL = 96, 12, 8
"""In CSS pixels: a picture's longer side and the least of its shorter one, and the largest cell."""


class Html(str):
    """Text that is HTML already; any other is escaped where it gets into an element."""


def element(name: str, *content: str, **attributes: str) -> Html:
    """An element. (The underscore of `class_` is for Python.)"""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    inner = "".join(part if isinstance(part, Html) else escape(part) for part in content)
    return Html(f"<{name}{given}>{inner}</{name}>")


def page(sites: Sequence[SiteReport], rewrite_seconds: float) -> str:
    """The page, in ASCII: it stays the same in whatever encoding it is written to a file."""
    head = (
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", summary(sites)),
        element("style", Html(_STYLE.read_text("ascii"))),
    )
    rows = [(f"site-{number}", name or "the model", site) for number, (name, site) in enumerate(folded(sites), 1)]
    content = (_about(sites, rewrite_seconds), _not_fused(rows), _legend(), _table(rows)) if sites else ()
    body = element("body", _PATTERNS, element("main", element("h1", summary(sites)), *content))
    html = element("html", element("head", *head), body, lang="en")
    return f"<!DOCTYPE html>\n{html}\n".encode("ascii", "xmlcharrefreplace").decode()


# ------------------------------------------------------------------------------------------------ above the table


def _about(sites: Sequence[SiteReport], rewrite_seconds: float) -> Html:
    """Which kernels, for which devices, and what it cost to find out."""
    devices = dict.fromkeys(str(site.device) for site in sites if site.device is not None)
    kernels = Counter(site.kernel or "eager" for site in sites)
    facts = {
        "device": ", ".join(devices),
        "kernels": ", ".join(f"{name} ×{count}" for name, count in kernels.most_common()),
        "rewriting": f"{rewrite_seconds:.2g} s",
        "torch": str(torch.__version__),
    }
    said = (element("div", element("dt", name), element("dd", fact)) for name, fact in facts.items() if fact)
    return element("dl", *said, class_="about")


def _not_fused(rows: Sequence[tuple[str, str, SiteReport]]) -> Html:
    """Where to find the sites that are left alone."""
    links = [
        element("a", _breakable(modules, "."), href=f"#{key}") for key, modules, site in rows if site.kernel is None
    ]
    items = (element("li", link) for link in links)
    return element("nav", element("span", "not fused"), element("ul", *items)) if links else Html()


def _legend() -> Html:
    """What the colours of the pictures mean."""
    meanings = {"attended": "attended, at least in part", "possible": "depends on the data", "hidden": "not attended"}
    keys = (element("span", _svg({kind: [[True] * 3] * 3}, 12, 12), " ", meaning) for kind, meaning in meanings.items())
    says = element("span", f"Masks: queries down, keys across, at most {CELLS} cells each way.")
    return element("p", says, *keys, class_="legend")


# ------------------------------------------------------------------------------------------------------ the table


def _table(rows: Sequence[tuple[str, str, SiteReport]]) -> Html:
    columns = (element("th", name, scope="col") for name in ("mask", "site", "what it computes", "kernel"))
    body = (_row(*row) for row in rows)
    return element("table", element("thead", element("tr", *columns)), element("tbody", *body))


def _row(key: str, modules: str, site: SiteReport) -> Html:
    place = (
        element("div", _breakable(modules, "."), class_="module"),
        element("div", _breakable(short(site.source), "/"), class_="minor"),
    )
    kernel = (element("div", site.kernel or "not fused", class_="kernel"), *_times(site), *_checked(site), *_why(site))
    cells = {"mask": _mask(site), "site": place, "computes": _computes(site), "choice": kernel}
    kind = "fused" if site.kernel else "eager"
    return element("tr", *(element("td", *cell, class_=name) for name, cell in cells.items()), id=key, class_=kind)


def _computes(site: SiteReport) -> list[Html]:
    if site.spec is None or site.shapes is None:
        return [element("div", "not read", class_="minor")]
    return [element("div", str(site.spec)), element("div", _in_words(site.shapes), class_="minor")]


def _in_words(shapes: Shapes) -> str:
    heads = _counted(shapes.num_heads, "head", "heads")
    heads += f" over {_counted(shapes.num_kv_heads, 'key head', 'key heads')}" if shapes.is_gqa else ""
    lengths = _counted(shapes.q_len, "query", "queries"), _counted(shapes.kv_len, "key", "keys")
    dims = f"{shapes.head_dim}" + ("" if same(shapes.head_dim, shapes.head_dim_v) else f" and {shapes.head_dim_v}")
    dtype, narrower = (str(t).removeprefix("torch.") for t in (shapes.dtype, shapes.product_dtype or shapes.dtype))
    words = [f"batch {shapes.batch}", heads, *lengths, f"head_dim {dims}"]
    words.append(dtype if dtype == narrower else f"{narrower}, biases {dtype}")
    return ", ".join([*words, "with backward"] if shapes.needs_backward else words)


def _counted(size: Size, one: str, many: str) -> str:
    return f"{size} {one if same(size, 1) else many}"


def _why(site: SiteReport) -> list[Html]:
    """Why the site is left alone; for those who ask, why a kernel that would come before does not run."""
    if not site.refusals:
        return []
    # Where no kernel can run, one refusal has the reasons of all.
    said = [reason for refusal in site.refusals for reason in refusal.reason.split("; ")]
    reasons = element("ul", *(element("li", reason) for reason in said), class_="why")
    if site.kernel is None:
        return [reasons]
    return [element("details", element("summary", f"why not another ({len(said)})"), reasons)]


def _checked(site: SiteReport) -> list[Html]:
    return [element("p", text) for text in site.verified]


def _times(site: SiteReport) -> list[Html]:
    """What the kernels were timed at, the one that runs marked."""

    def row(name: str, milliseconds: float) -> Html:
        kind = {"class": "chosen"} if name == site.kernel else {}
        return element("div", element("dt", name), element("dd", in_ms(milliseconds)), **kind)

    return [element("dl", *(row(*time) for time in site.times), class_="times")] if site.times else []


def _breakable(path: str, separator: str) -> Html:
    """A path that may be broken into lines after its separators."""
    return Html(f"{escape(separator)}<wbr>".join(map(escape, path.split(separator))))


# -------------------------------------------------------------------------------------------------------- pictures

_PATTERNS = Html(
    '<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>'
    '<pattern id="grid" width="1" height="1" patternUnits="userSpaceOnUse"><path d="M0 0h1M0 0v1"/></pattern>'
    '<pattern id="hatch" width="1.5" height="1.5" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">'
    '<rect width="1.5" height="1.5"/><path d="M0 .75h1.5"/></pattern>'
    "</defs></svg>"
)
"""What all pictures share, in units of their cells."""


def _mask(site: SiteReport) -> list[Html]:
    if site.spec is None or site.shapes is None:
        return []
    # A bias may be a mask that nobody can look into, such as `generate` hands in.
    biases = [m for m in site.spec.modifiers if isinstance(m, Bias) and "key" in m.axes]
    hidden = (TensorMask(bias.tensor, bias.axes, additive=True) for bias in biases)
    drawn = picture(conjunction((site.spec.keep, *hidden)), site.shapes.q_len, site.shapes.kv_len)
    cells = {
        "attended": drawn.attended,
        "possible": drawn.possible & ~drawn.attended,
        "hidden": ~(drawn.possible | drawn.attended),
    }
    n_rows, n_columns = drawn.attended.shape
    unit = min(_SIDE / max(n_rows, n_columns), _CELL)
    down, across = _counted(drawn.lengths[0], "query", "queries"), _counted(drawn.lengths[1], "key", "keys")
    title = f"{site.spec.keep}: {down} down, {across} across"
    kinds = {kind: held.tolist() for kind, held in cells.items() if held.any()}
    svg = _svg(kinds, max(unit * n_columns, _THIN), max(unit * n_rows, _THIN), title)
    notes = [f"at {symbol} = {number}" for symbol, number in drawn.example.items()]
    notes += ["the bias may hide keys"] if biases else []
    caption = [element("figcaption", *(element("div", note) for note in notes))] if notes else []
    return [element("figure", svg, *caption)]


def _svg(kinds: Mapping[str, Sequence[Sequence[bool]]], width: float, height: float, title: str | None = None) -> Html:
    """Rows of cells of each kind, one outline a kind, under a grid."""
    n_rows, n_columns = next((len(cells), len(cells[0])) for cells in kinds.values())
    shapes = [element("path", d=_outline(cells), class_=kind) for kind, cells in kinds.items()]
    grid = element("path", d=f"M0 0h{n_columns}v{n_rows}h-{n_columns}z", class_="grid")
    named = {"role": "img"} if title else {"aria-hidden": "true"}
    view = {"viewBox": f"0 0 {n_columns} {n_rows}", "width": f"{width:g}", "height": f"{height:g}"}
    content = [*([element("title", title)] if title else []), *shapes, grid]
    return element("svg", *content, preserveAspectRatio="none", **view, **named)


def _outline(cells: Sequence[Sequence[bool]]) -> str:
    """An SVG path around the cells that are true, run by run."""
    runs = []
    for y, row in enumerate(cells):
        x = 0
        for held, run in groupby(row):
            length = len([*run])
            if held:
                runs.append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    return "".join(runs)
