"""Private names of PyTorch: those that `attn_rewriter/torch_private.py` lists exist, and no other file spells one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_rewriter import alone, inductor, torch_private

ROOT = Path(__file__).parents[1]
DOOR = ROOT / "attn_rewriter" / "torch_private.py"
OTHERS = sorted({*ROOT.glob("attn_rewriter/**/*.py"), *ROOT.glob("patterns/*.py")} - {DOOR})

NOT_PRIVATE = {
    "torch.ops.": "an operator's name is what graphs and schemas call it, such as `torch.ops.aten._softmax`",
}
"""What begins like this is no private name, and why. (The table of operations in `graph.py` is a string of what models
spell; here only strings are looked at that are a single name.)"""


def is_private(name: str) -> bool:
    parts = [part for part in name.split(".") if not re.fullmatch(r"__\w+__", part)]
    experimental = parts[:3] == ["torch", "fx", "experimental"]
    private = parts[0] == "torch" and (experimental or any(part.startswith("_") for part in parts))
    return private and not name.startswith(tuple(NOT_PRIVATE))


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a file imports: each name that it is bound to, and the full one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def spelled(tree: ast.AST) -> set[str]:
    """The full names that a file spells: in imports, in attributes of what it imports, and in strings that are one."""
    bound = dict(imported(tree))
    bound |= {name.split(".")[0]: name.split(".")[0] for name in bound if "." in name}  # of `import a.b`
    found = {name for _, name in imported(tree)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                found.add(_chain(node, bound))
            case ast.Call(func=ast.Name("getattr"), args=[of, ast.Constant(str(name)), *_]):
                found.add(f"{_chain(of, bound)}.{name}")
            case ast.Constant(str(text)) if re.fullmatch(r"torch(\.\w+)+", text):
                found.add(text)
    return found


def _chain(node: ast.expr, bound: dict[str, str]) -> str:
    """As in "torch.nn.functional.relu" for `F.relu`; what begins with anything but an import is of no interest."""
    match node:
        case ast.Attribute(of, name):
            return f"{_chain(of, bound)}.{name}"
        case ast.Name(name):
            return bound.get(name, "?")
    return "?"


def private_names(source: str) -> list[str]:
    return sorted(filter(is_private, spelled(ast.parse(source))))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_spells_one(path: Path) -> None:
    assert not private_names(path.read_text())


def test_all_files_are_looked_at() -> None:
    folders = {path.parent.name for path in OTHERS}
    assert len(OTHERS) > 60 and folders == {"attn_rewriter", "bench", "kernels", "patterns"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._inductor.config as settings", "torch._inductor.config"),
        ("from torch._guards import tracing", "torch._guards.tracing"),
        ("from torch import _guards", "torch._guards"),
        ("def f():\n    from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("if TYPE_CHECKING:\n    from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch.fx.experimental import proxy_tensor", "torch.fx.experimental.proxy_tensor"),
        ("import torch\ntorch._dynamo.reset()", "torch._dynamo.reset"),
        ("import torch.nn as nn\nnn.functional._pad", "torch.nn.functional._pad"),
        ("import torch.nn\ntorch.cuda._sleep(1)", "torch.cuda._sleep"),
        ("from torch import cuda as c\ngetattr(c, '_sleep')", "torch.cuda._sleep"),
        ("name = 'torch._dynamo.convert_frame'", "torch._dynamo.convert_frame"),
    ],
)
def test_one_that_is_spelled_is_found(source: str, name: str) -> None:
    assert name in private_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.__version__, torch.ops.aten._softmax.default, torch.nn.functional.relu",
        "from attn_rewriter.torch_private import FakeTensor",
        "from attn_rewriter import torch_private\ntorch_private.dynamo_config.patch",
        "'call `torch._dynamo.reset()` first'",
        "node._erased",
    ],
)
def test_what_is_not_private(source: str) -> None:
    assert not private_names(source)


@pytest.mark.parametrize("name", torch_private.NAMES)
def test_it_exists(name: str) -> None:
    getattr(torch_private, name)


def test_types_are_those_of_the_names() -> None:
    """What a type checker reads is what is looked up."""
    types = {name: path for name, path in imported(ast.parse(DOOR.read_text())) if is_private(path)}
    assert types == {name: private.path for name, private in torch_private.NAMES.items()}


def test_each_is_needed() -> None:
    door = torch_private.__name__
    used = set[str]().union(*(spelled(ast.parse(path.read_text())) for path in OTHERS))
    assert {name for name in torch_private.NAMES if f"{door}.{name}" not in used} == set()


SAID = (
    r"attn_rewriter needs torch\._guards\.TracingContext to compile a kernel by itself, and PyTorch "
    rf"{re.escape(torch.__version__)} does not give it \(.*TracingContext.*\): install PyTorch 2\.11 to 2\.15, "
    r"which have it, or a newer attn_rewriter"
)


def test_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._guards.TracingContext")
    with pytest.raises(torch_private.PrivateNameGone, match=SAID):
        torch_private.TracingContext  # noqa: B018
    with pytest.raises(ImportError, match=SAID):
        from attn_rewriter.torch_private import TracingContext  # noqa: F401


def test_a_module_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = torch_private.NAMES["compile_fx"]._replace(path="torch._inductor.no_such_module.compile_fx")
    monkeypatch.setitem(torch_private.NAMES, "compile_fx", gone)
    with pytest.raises(ImportError, match=r"needs torch\._inductor\.no_such_module\.compile_fx .*No module named"):
        alone._compiled(lambda x: x, [torch.ones(1)])


def test_where_it_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor's settings its patterns are not kept out, with a warning that says why."""
    gone = torch_private.NAMES["inductor_config"]._replace(path="torch._inductor.no_such_config")
    monkeypatch.setitem(torch_private.NAMES, "inductor_config", gone)
    inductor._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"can't keep .* needs torch\._inductor\.no_such_config to keep out"):
        context: Any = inductor.without_attention_patterns()
    with context:
        pass
    inductor._warn.cache_clear()


def test_a_name_that_is_not_listed() -> None:
    assert not hasattr(torch_private, "no_such_name")
