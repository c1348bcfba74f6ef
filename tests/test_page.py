"""The page that a report makes of itself: what it says, what its pictures show, and how a browser renders it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import sympy
import torch
from torch import Tensor, nn

import attn_rewriter
from attn_rewriter import AttentionSpec, Device, Refusal, Report, SiteReport
from attn_rewriter.cli import main
from attn_rewriter.picture import CELLS, picture
from attn_rewriter.sites import folded
from attn_rewriter.spec import (
    EVERY_KEY,
    NO_KEY,
    Band,
    Bias,
    Compare,
    Index,
    Mask,
    Predicate,
    Quotient,
    Scale,
    Shapes,
    Size,
    TensorMask,
    Values,
)

# -- pages ----------------------------------------------------------------------------------------------------------

_VOID = {"meta", "wbr"}


@dataclass
class Element:
    """What the parser made of an element; `content` holds elements and text."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    content: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """The elements inside with a tag, and of a class."""
        return [e for e in self._inside() if e.tag == tag and kind in (None, e.attributes.get("class"))]

    def one(self, tag: str, kind: str | None = None) -> Element:
        (found,) = self.all(tag, kind)
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    def _inside(self) -> Iterator[Element]:
        for part in self.content:
            if isinstance(part, Element):
                yield part
                yield from part._inside()


class _Parser(HTMLParser):
    """Reads a page, and insists that its elements are closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len({*names}), f"<{tag}> has an attribute twice: {names}"
        self.open[-1].content.append(element := Element(tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parsed(page: str) -> Element:
    """The page as a tree, which must be whole, and must not ask for anything outside of itself."""
    assert page.startswith("<!DOCTYPE html>") and page.isascii()
    parser = _Parser()
    parser.feed(page)
    parser.close()
    (root,) = parser.open
    keys = [e.attributes["id"] for e in root._inside() if "id" in e.attributes]
    assert len(keys) == len({*keys})
    for e in root._inside():
        assert e.tag not in {"script", "link", "img", "iframe", "object"}
        for name, value in e.attributes.items():
            assert name not in {"src", "style"} and not name.startswith("on")
            assert name != "href" or (value or "").removeprefix("#") in keys
    assert re.findall(r"@import|url\((?!#)", page) == []
    return root


def rows(report: Report) -> list[Element]:
    return parsed(report.to_html()).one("tbody").all("tr")


def cells(svg: Element, kind: str) -> int:
    """How many cells are of a kind: what its outline encloses, each run of cells being one cell high."""
    return sum(
        int(length)
        for path in svg.all("path", kind)
        for length in re.findall(r"M\d+ \d+h(\d+)v1h-\1z", path.attributes["d"] or "")
    )


def site(keep: Predicate = EVERY_KEY, q_len: Size = 13, kv_len: Size = 13, **given: object) -> SiteReport:
    spec = AttentionSpec((Scale(0.25), Mask(None, keep, "keep")))
    shapes = Shapes(2, 4, 2, q_len, kv_len, 8, 8, torch.bfloat16)
    return SiteReport(
        **{"module": "attn", "source": "m.py:1", "spec": spec, "shapes": shapes, "kernel": "sdpa"} | given
    )


REFUSED = Refusal("describe", "the weights are also used by `mean` (m.py:7)")
EXAMPLES = Report(
    (
        *(site(Band(None, 0), module=f"layers.{i}.attn", device=Device.parse("sm_90")) for i in range(3)),
        site(
            Band(-3, 0), module="layers.3.attn", refusals=(Refusal("choose", "fa4: no"), Refusal("choose", "flex: no"))
        ),
        SiteReport("layers.4.attn", "m.py:5", refusals=(REFUSED,)),
        site(module="head", kernel="flex", times=(("flex", 0.8142), ("sdpa", 1.0), ("fa4/cudnn", 1234.5))),
        site(module="tail", kernel=None, refusals=(Refusal("choose", "sdpa: too wide; flex: too narrow"),)),
    ),
    0.0642,
)


def test_the_page_says_what_the_table_says() -> None:
    page, (causal, window, unread, timed, nobody) = parsed(EXAMPLES.to_html()), rows(EXAMPLES)
    assert page.one("h1").text == page.one("head").one("title").text == "5 of 7 attention sites fused"
    about = {div.one("dt").text: div.one("dd").text for div in page.one("dl", "about").all("div")}
    assert about["device"] == "sm_90" and about["kernels"] == "sdpa ×4, eager ×2, flex ×1"
    assert about["rewriting"] == "0.064 s"
    modules = [row.one("div", "module").text for row in (causal, window, unread, timed, nobody)]
    assert modules == [name for name, _ in folded(EXAMPLES.sites)]
    assert modules[0] == "layers.{0…2}.attn (×3)" and all(name in str(EXAMPLES) for name in modules)

    assert causal.one("div", "kernel").text == "sdpa" and "m.py:1" in causal.text
    assert "scale 0.25, causal" in causal.text
    assert "batch 2, 4 heads over 2 key heads, 13 queries, 13 keys, head_dim 8, bfloat16" in causal.text
    assert causal.all("details") == causal.all("dl") == []

    assert [item.text for item in window.one("details").all("li")] == ["fa4: no", "flex: no"]
    assert window.one("summary").text == "why not another (2)"

    assert unread.all("svg") == unread.all("details") == []
    assert unread.one("li").text == REFUSED.reason and "not read" in unread.text

    times = [(div.one("dt").text, div.one("dd").text, div.attributes) for div in timed.one("dl", "times").all("div")]
    assert times == [
        ("flex", "0.814 ms", {"class": "chosen"}),
        ("sdpa", "1 ms", {}),
        ("fa4/cudnn", "1230 ms", {}),
    ]
    assert [item.text for item in nobody.all("li")] == ["sdpa: too wide", "flex: too narrow"]


def test_what_is_not_fused_stands_out() -> None:
    page = parsed(EXAMPLES.to_html())
    eager = page.all("tr", "eager")
    assert [row.one("div", "kernel").text for row in eager] == ["not fused"] * 2
    links = page.one("nav").all("a")
    assert [(a.text, a.attributes["href"]) for a in links] == [
        (row.one("div", "module").text, f"#{row.attributes['id']}") for row in eager
    ]
    assert parsed(Report(EXAMPLES.sites[:4]).to_html()).all("nav") == []


def test_nothing_found() -> None:
    page = parsed(Report().to_html())
    assert page.one("main").text == "no attention site was found" and page.all("table") == []


def test_what_comes_from_the_model_is_escaped(tmp_path: Path) -> None:
    """And the file says the same whatever its encoding."""
    bad = "<script>alert(1)</script><img src=\"x\" onerror='y'>&amp;…"
    report = Report(
        (
            site(module=bad, source=f"{bad}.py:3", kernel=None, refusals=(Refusal("describe", bad),)),
            site(module=bad, kernel=bad, times=((bad, 1.0),), refusals=(Refusal("choose", bad),)),
        )
    )
    first, second = rows(report)
    assert first.one("div", "module").text == second.one("div", "kernel").text == bad
    assert first.one("li").text == second.one("li").text == second.one("dl").one("dt").text == bad
    path = tmp_path / "report.html"
    path.write_text(report.to_html(), encoding="cp1252")
    assert path.read_text(encoding="utf-8") == report.to_html()


# -- pictures -------------------------------------------------------------------------------------------------------

CAUSAL, PADDING = Band(None, 0), TensorMask("mask0", ("batch", "key"))
PREFIX = Compare(Index(0, (("key", 1),)), Index(4), "le")
CHUNKS = Compare(
    *(Index(0, ((Quotient(Index(0, ((axis, 1),)), 4), 1),)) for axis in ("query", "key")),
    "eq",
)
DOCUMENTS = Compare(*(Index(0, ((Values("ids", ("batch", axis)), 1),)) for axis in ("query", "key")), "eq")
EVEN_HEADS = Compare(Index(0, (("head", 1),)), Index(1), "le")

TRIANGLE = 13 * 14 // 2


@pytest.mark.parametrize(
    ("keep", "lengths", "attended", "possible"),
    [
        (EVERY_KEY, (13, 13), 13 * 13, 0),
        (NO_KEY, (13, 13), 0, 0),
        (CAUSAL, (13, 13), TRIANGLE, 0),
        (Band(None, 4), (4, 8), 5 + 6 + 7 + 8, 0),  # aligned at the bottom right
        (CAUSAL, (1024, 1024), CELLS * (CELLS + 1) // 2, 0),
        (CAUSAL, (1, 8192), 1, 0),
        (EVERY_KEY, (1, 8192), CELLS, 0),
        (Band(-2, 0), (13, 13), 1 + 2 + 11 * 3, 0),
        (Band(-2, 2), (13, 13), 3 + 4 + 9 * 5 + 4 + 3, 0),
        (~Band(-2, 2), (13, 13), 13 * 13 - (3 + 4 + 9 * 5 + 4 + 3), 0),
        (Band(-1024, 0), (4096, 4096), 7 * CELLS - 21, 0),  # six cells behind the query's own
        (Band(-7, 0), (1 << 17, 1 << 17), 2 * CELLS - 1, 0),
        (CAUSAL | PREFIX, (12, 12), 5 * 5 + sum(range(6, 13)), 0),
        (CAUSAL & CHUNKS, (12, 12), 3 * 10, 0),
        (CHUNKS, (12, 12), 3 * 16, 0),
        (PADDING, (13, 13), 0, 13 * 13),
        (~PADDING, (13, 13), 0, 13 * 13),
        (CAUSAL & PADDING, (13, 13), 0, TRIANGLE),
        (CAUSAL | ~DOCUMENTS, (13, 13), TRIANGLE, 13 * 13 - TRIANGLE),
        (~(CAUSAL & DOCUMENTS), (13, 13), 13 * 13 - TRIANGLE, TRIANGLE),
        (CAUSAL & EVEN_HEADS, (13, 13), 0, TRIANGLE),
    ],
    ids=str,
)
def test_cells_of_a_mask(keep: Predicate, lengths: tuple[int, int], attended: int, possible: int) -> None:
    svg = rows(Report((site(keep, *lengths),)))[0].one("svg")
    assert cells(svg, "attended") == attended and cells(svg, "possible") == possible
    n_rows, n_columns = (min(length, CELLS) for length in lengths)
    assert cells(svg, "hidden") == n_rows * n_columns - attended - possible
    assert svg.attributes["viewbox"] == f"0 0 {n_columns} {n_rows}" and svg.attributes["role"] == "img"
    down = "1 query" if lengths[0] == 1 else f"{lengths[0]} queries"
    assert svg.one("title").text == f"{keep}: {down} down, {lengths[1]} keys across"


@pytest.mark.parametrize("lengths", [(5, 9), (24, 24), (25, 31), (100, 48), (7, 700)], ids=str)
@pytest.mark.parametrize(
    ("keep", "attends"),
    [
        (Band(-6, 2), lambda q, k: -6 <= k - q <= 2),
        (CAUSAL & CHUNKS, lambda q, k: k <= q and k // 4 == q // 4),
        (CAUSAL | PREFIX, lambda q, k: k <= q or k < 5),
        (~Band(0, 0), lambda q, k: k != q),
    ],
    ids=lambda given: str(given) if isinstance(given, Predicate) else "",
)
def test_a_cell_stands_for_its_neighbours(
    keep: Predicate, attends: Callable[[int, int], bool], lengths: tuple[int, int]
) -> None:
    def neighbours(length: int) -> list[range]:
        n = min(length, CELLS)
        return [range(i * length // n, (i + 1) * length // n) for i in range(n)]

    expected = [
        [any(attends(q, k) for q in queries for k in keys) for keys in neighbours(lengths[1])]
        for queries in neighbours(lengths[0])
    ]
    drawn = picture(keep, *lengths)
    assert drawn.attended.tolist() == drawn.possible.tolist() == expected


S, T = sympy.symbols("s0 s1", integer=True, positive=True)


@pytest.mark.parametrize(
    ("keep", "lengths", "example", "known"),
    [
        (CAUSAL, (S, S), "s0 = 24", (24, 24)),
        (Band(None, T), (S, S + T), "s0 = 24", (24, 48)),
        (Band(None, T - S), (S, T), "s1 = 24", (24, 24)),
        (Band(-511, 0), (S, S), "s0 = 1533", (1533, 1533)),  # so that the window is seen
        (Compare(Index(0, (("key", 1),)), Index(T - 200), "lt"), (16, T), "s1 = 600", (16, 600)),
    ],
    ids=str,
)
def test_sizes_that_only_the_run_knows(
    keep: Predicate, lengths: tuple[Size, Size], example: str, known: tuple[int, int]
) -> None:
    row = rows(Report((site(keep, *lengths),)))[0]
    assert f"at {example}" in row.one("figcaption").text
    assert f"{known[0]} queries down, {known[1]} keys across" in row.one("svg").text
    svg = row.one("svg")
    assert cells(svg, "attended") > 0 and cells(svg, "hidden") > 0 and cells(svg, "possible") == 0


@pytest.mark.parametrize(
    ("axes", "kind", "says"),
    [(("head", "query", "key"), "possible", ["the bias may hide keys"]), (("head", "query"), "attended", [])],
    ids=str,
)
def test_a_bias_may_hide_keys(axes: tuple[str, ...], kind: str, says: list[str]) -> None:
    spec = AttentionSpec((Bias("bias0", axes=axes), Mask(None, CAUSAL, "keep")))
    row = rows(Report((site(spec=spec),)))[0]
    assert [caption.text for caption in row.all("figcaption")] == says
    assert cells(row.one("svg"), kind) == TRIANGLE and cells(row.one("svg"), "hidden") == 13 * 13 - TRIANGLE


# -- from models ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention under a window or a padded causal mask, or one whose weights are used twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(8, 24)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores, ones = q @ k.mT / 2, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        kept = ones.tril() & (ones.triu(-3) if self.kind == "window" else padding[:, None, None])
        weights = scores.masked_fill(~kept, float("-inf")).softmax(-1)
        output = (weights @ v).transpose(1, 2).flatten(2)
        return output + weights.mean() if self.kind == "twice" else output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kinds = ("window", "padded", "window", "padded", "twice")
        self.layers = nn.ModuleList(Attention(kind) for kind in kinds)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, padding)
        return x


@pytest.fixture(scope="module")
def report() -> Report:
    return attn_rewriter.explain(Model(), torch.randn(2, 12, 8), torch.ones(2, 12, dtype=torch.bool))


def test_a_model(report: Report) -> None:
    window, padded, twice = rows(report)
    assert window.one("div", "module").text == "layers.{0,2} (×2)"
    assert cells(window.one("svg"), "attended") == 1 + 2 + 3 + 9 * 4
    assert cells(padded.one("svg"), "possible") == 12 * 13 // 2
    assert "tests/test_page.py:" in padded.text and "causal and key padding" in padded.text
    assert twice.attributes["class"] == "eager" and "weights are also used" in twice.one("ul").text
    assert [site.to_dict()["device"] for site in report.sites] == ["cpu"] * 4 + [None]


SCRIPT = """
import os, torch
os.chdir("/")
torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q)(torch.ones(1, 2, 3, 4))
"""


def test_run_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it was asked for, though the script goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("script.py").write_text(SCRIPT)
    assert main(["run", "--compiler", "eager", "--html", "nowhere/page.html", "script.py"]) == 2
    assert "no folder 'nowhere'" in capsys.readouterr().err
    assert main(["run", "--compiler", "eager", "--quiet", "--html", "page.html", "script.py"]) == 0
    page = parsed((tmp_path / "page.html").read_text())
    assert page.one("h1").text == "1 of 1 attention sites fused"
    assert "1 of 1" not in capsys.readouterr().err


# -- in a browser ---------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--no-proxy-server",
)
MEASURE = """
const contrast = (document) => {
  const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number)
  const luminance = (colour) => rgb(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const paper = (e) => {
    const colour = getComputedStyle(e).backgroundColor
    return rgb(colour)[3] === 0 && e.parentElement ? paper(e.parentElement) : luminance(colour)
  }
  const written = [...document.body.querySelectorAll("*")].filter(e =>
    e.getClientRects().length && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .filter(e => !e.closest("svg"))
  return Math.min(...written.map(e => {
    const [dark, light] = [luminance(getComputedStyle(e).color), paper(e)].sort((a, b) => a - b)
    return (light + 0.05) / (dark + 0.05)
  }))
}
const measured = (frame) => {
  const document = frame.contentDocument, root = document.documentElement
  document.querySelectorAll("details").forEach(details => { details.open = true })
  const seen = (selector) => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect())
    .filter(box => box.width >= 8 && box.height >= 8 && box.right <= root.clientWidth && box.left >= 0).length
  return {
    width: frame.contentWindow.innerWidth, content: root.scrollWidth,
    rows: seen("tbody tr"), pictures: seen("tbody svg"), reasons: seen("li"),
    light: getComputedStyle(document.body).backgroundColor === "rgb(255, 255, 255)", contrast: contrast(document),
  }
}
onload = () => {
  const frames = [...document.querySelectorAll("iframe")]
  document.querySelector("pre").textContent = JSON.stringify(frames.map(measured))
}
"""


@contextmanager
def served(pages: dict[str, str]) -> Iterator[tuple[int, list[str]]]:
    """A server of pages by path, at a port, and the list of what pages asked it for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "Referer" in self.headers:
                asked.append(self.path)
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(pages.get(self.path, "").encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()


def rendered(
    pages: dict[str, tuple[str, int]], folder: Path, *flags: str
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """What a browser measures of pages, each in a window of a width; and what they fetch, from anywhere."""
    assert BROWSER is not None
    frames = "".join(
        f'<iframe src="{path}" style="border:0;width:{width}px;height:800px"></iframe>'
        for path, (_, width) in pages.items()
    )
    frames = f'<!DOCTYPE html><link rel="icon" href="data:,"><body><pre></pre>{frames}<script>{MEASURE}</script>'
    with served({"/frames": frames} | {path: page for path, (page, _) in pages.items()}) as (port, asked):
        here = (f"--host-resolver-rules=MAP * 127.0.0.1:{port}", f"--user-data-dir={folder / 'profile'}")
        command = [BROWSER, *FLAGS, *flags, *here, "--dump-dom", f"http://pages.test:{port}/frames"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(\[.*?\])</pre>", done.stdout)
    assert found, done.stderr
    return dict(zip(pages, json.loads(html.unescape(found[1])))), asked


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme: str, report: Report, tmp_path: Path) -> None:
    """At the width of a phone and of a desk, nothing sticks out, everything is seen, and nothing is fetched; and the
    measurement would notice."""
    long = site(module="a" * 300, source="b" * 300 + ".py:1", refusals=(Refusal("choose", "c" * 300),))
    shown = Report((*report.sites, *EXAMPLES.sites, long, site(q_len=1, kv_len=4096)))
    page = shown.to_html()
    image = '<img src="http://elsewhere.test/image.png">'
    broken = page.replace("<main>", f'<main>{image}<div style="width:5000px;color:#777">wide</div>')
    pages = {"/phone": (page, 400), "/desk": (page, 1400), "/broken": (broken, 400)}
    seen, asked = rendered(pages, tmp_path, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    tree = parsed(page)
    for path in ("/phone", "/desk"):
        found, width = seen[path], pages[path][1]
        assert found["width"] == width and found["content"] <= width
        assert found["rows"] == len(tree.one("tbody").all("tr")) and found["reasons"] == len(tree.all("li"))
        assert found["pictures"] == len(tree.one("tbody").all("svg"))
        assert found["light"] == (scheme == "light") and found["contrast"] >= 4.5
    assert seen["/broken"]["content"] > 400 and seen["/broken"]["contrast"] < 4.5
    assert sorted(asked) == sorted([*pages, "/image.png"])
