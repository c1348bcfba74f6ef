"""Makes a failing program small: first its choices, then its text."""

from __future__ import annotations

import ast
import copy
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tests.programs.grammar import program
from tests.programs.run import Verdict, check

Judge = Callable[[str], Verdict]


def shrink(
    seed: str, verdict: Verdict, judge: Judge = check, seconds: float = 60.0, always: Collection[str] = ()
) -> str:
    """The source of the smallest program that fails as the program of this seed does."""
    until = time.monotonic() + seconds
    return smaller_text(plainer(seed, verdict, judge, until, always), verdict, judge, until)


def alike(verdict: Verdict, other: Verdict) -> bool:
    """Whether two failures may be one. Rows without keys, and what is NaN there, are not to be mistaken for others."""
    return _class(verdict) == _class(other)


def _class(verdict: Verdict) -> tuple[str, bool, str]:
    raised = verdict.said.partition(":")[0] if verdict.kind == "raised" else ""
    return verdict.kind, verdict.empty, raised or "NaN" * ("not NaN" in verdict.said)


def plainer(seed: str, verdict: Verdict, judge: Judge, until: float, always: Collection[str] = ()) -> str:
    """The program with as many of its choices as possible made plain. Those that are `always` plain are so already."""
    plain = {*always}
    needed: set[str] = set()
    source, choices = program(seed, plain)
    while time.monotonic() < until:
        open_ = (name for name, chosen in choices.made.items() if chosen and name not in needed)
        if (name := next(open_, None)) is None:
            break
        tried, made = program(seed, plain | {name})
        if alike(judge(tried), verdict):
            source, choices = tried, made
            plain.add(name)
        else:
            needed.add(name)
    return source


def smaller_text(source: str, verdict: Verdict, judge: Judge, until: float) -> str:
    """The program with all that it fails without taken out."""
    source = ast.unparse(ast.parse(source)) if "# drops" not in source else source
    if not alike(judge(source), verdict):
        return source
    again = "# drops" not in source  # a comment that would be lost
    while again:
        again = False
        start = 0
        while time.monotonic() < until:
            for number, tried in edited(source, start):
                if time.monotonic() > until:
                    return source
                if tried != source and _loads(tried) and alike(judge(tried), verdict):
                    source, start, again = _cleaned(tried, verdict, judge), number, True
                    break
            else:
                break
    return source


def _cleaned(source: str, verdict: Verdict, judge: Judge) -> str:
    tree = ast.parse(source)
    _without_unused(tree)
    tried = ast.unparse(tree)
    return tried if tried != source and alike(judge(tried), verdict) else source


def _loads(source: str) -> bool:
    try:
        warnings.simplefilter("ignore", SyntaxWarning)
        compile(source, "program", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def edited(source: str, start: int) -> Iterator[tuple[int, str]]:
    """The program with one edit each, from the edit number `start` on."""
    n = len([*_edits(ast.parse(source))])
    for number in range(start, n):
        tree = ast.parse(source)
        edit = [*_edits(tree)][number]
        edit()
        try:
            yield number, ast.unparse(ast.fix_missing_locations(tree))
        except (AttributeError, TypeError, ValueError):
            continue


def _edits(tree: ast.Module) -> Iterator[Callable[[], None]]:
    """What can be done to a tree, the most first: outputs taken out, statements taken out, what is in a block put in
    its place, arguments left out, expressions replaced by their parts."""
    nodes = [x for part in tree.body if _is_open(part) for x in ast.walk(part)]
    for node in nodes:
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            for x in node.value.elts:
                yield lambda n=node, x=x: setattr(n, "value", x)
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name not in NEEDED:
            yield lambda s=statement: tree.body.remove(s)
    for node in nodes:
        body = getattr(node, "body", None)
        if isinstance(body, list) and not isinstance(node, ast.ClassDef):
            for statement in reversed(body):
                if isinstance(statement, (ast.With, ast.If)):
                    yield lambda b=body, s=statement: _replace(b, s, s.body)
                yield lambda b=body, s=statement: _replace(b, s, [] if len(b) > 1 else [ast.Pass()])
    for node in nodes:
        if isinstance(node, (ast.Tuple, ast.List)) and not _are_numbers(node):
            for x in node.elts if len(node.elts) > 1 else ():
                yield lambda n=node.elts, x=x: n.remove(x)
        elif isinstance(node, ast.Dict):
            for i in range(len(node.keys)):
                yield lambda n=node, i=i: (n.keys.pop(i), n.values.pop(i))
        elif isinstance(node, ast.Call):
            for x in node.keywords:
                yield lambda n=node.keywords, x=x: n.remove(x)
    for node in nodes:
        for name, value in ast.iter_fields(node):
            for i, x in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(x, ast.expr) and not isinstance(getattr(x, "ctx", None), ast.Store):
                    for part in _parts(x):
                        yield lambda n=node, f=name, v=value, i=i, p=part: _put(n, f, v, i, p)
    yield lambda: _inlined(tree)


NEEDED = ("rand", "inputs", "program", "Program", "change")


def _is_open(statement: ast.stmt) -> bool:
    """Whether a part of a program may be edited: not how its inputs are drawn."""
    if isinstance(statement, ast.Assign):
        return getattr(statement.targets[0], "id", "") in ("CALLS", "OPTIONS")
    return isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name not in ("rand", "inputs")


def _parts(x: ast.expr) -> Iterator[ast.expr]:
    if isinstance(x, ast.BinOp):
        yield from (x.left, x.right)
    elif isinstance(x, ast.BoolOp):
        yield from x.values
    elif isinstance(x, ast.UnaryOp) and not isinstance(x.operand, ast.Constant):
        yield x.operand
    elif isinstance(x, ast.Call):
        if isinstance(x.func, ast.Attribute) and not _is_module(x.func.value):
            yield x.func.value
        yield from x.args
    elif isinstance(x, ast.Subscript):
        yield x.value
    elif isinstance(x, ast.IfExp):
        yield from (x.body, x.orelse)
    elif isinstance(x, ast.Attribute) and x.attr in ("mT", "T", "data"):
        yield x.value


def _are_numbers(node: ast.Tuple | ast.List) -> bool:
    return all(isinstance(x, ast.Constant) for x in node.elts)


def _is_module(x: ast.expr) -> bool:
    return isinstance(x, ast.Name) and x.id in ("torch", "F", "nn")


def _replace(body: list[Any], statement: Any, by: list[Any]) -> None:
    i = body.index(statement)
    body[i : i + 1] = by


def _put(node: ast.AST, name: str, value: Any, i: int, part: ast.expr) -> None:
    if isinstance(value, list):
        value[i] = part
    else:
        setattr(node, name, part)


def _without_unused(tree: ast.Module) -> None:
    """Take out names that are given and never used, arguments too, and inputs that no program takes."""
    for _ in range(20):
        used = {x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
        found = False
        for function in [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]:
            for statement in [*function.body]:
                target = statement.targets[0] if isinstance(statement, ast.Assign) else None
                if isinstance(target, ast.Name) and target.id not in used and len(function.body) > 1:
                    function.body.remove(statement)
                    found = True
        if not found:
            break
    parameters: set[str] = set()
    for function in [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]:
        if function.name in ("program", "forward"):
            read = {x.id for x in ast.walk(function) if isinstance(x, ast.Name)}
            function.args.args = [a for a in function.args.args if a.arg in read or a.arg == "self"]
            parameters |= {a.arg for a in function.args.args}
    for function in [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "inputs"]:
        for d in [x for x in ast.walk(function) if isinstance(x, ast.Dict)]:
            kept = [(k, v) for k, v in zip(d.keys, d.values) if isinstance(k, ast.Constant) and k.value in parameters]
            d.keys, d.values = [k for k, _ in kept], [v for _, v in kept]


def _inlined(tree: ast.Module) -> None:
    """Put the value of each name that is used once, in the next statement, where it is used."""
    for function in [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name != "inputs"]:
        for i in reversed(range(len(function.body) - 1)):
            first, second = function.body[i : i + 2]
            if not (isinstance(first, ast.Assign) and isinstance(first.targets[0], ast.Name)):
                continue
            name = first.targets[0].id
            uses = [x for x in ast.walk(function) if isinstance(x, ast.Name) and x.id == name]
            there = [x for x in ast.walk(second) if isinstance(x, ast.Name) and x.id == name]
            simple = isinstance(second, (ast.Assign, ast.Return, ast.Expr))
            if len(uses) == 2 and len(there) == 1 and simple and isinstance(there[0].ctx, ast.Load):
                _Put(name, copy.deepcopy(first.value)).visit(second)
                function.body.remove(first)


class _Put(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.value if node.id == self.name else node
