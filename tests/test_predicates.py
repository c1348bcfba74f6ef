"""Predicates as text: what goes through an operator, and into a graph that another process loads, comes back."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

import attn_rewriter
from attn_rewriter import patterns
from attn_rewriter.spec import (
    EVERY_KEY,
    NO_KEY,
    And,
    Band,
    Compare,
    Index,
    Not,
    Predicate,
    Quotient,
    TensorMask,
    Values,
    predicate_from_text,
    predicate_to_text,
)

names, numbers = st.text(), st.integers()
axes = st.lists(st.sampled_from(("batch", "head", "query", "key")), unique=True).map(tuple)
values = st.builds(Values, names, axes)


def _indices(terms: st.SearchStrategy[Any]) -> st.SearchStrategy[Index]:
    return st.builds(Index, numbers, st.lists(st.tuples(terms, numbers), max_size=3).map(tuple))


positions = _indices(st.sampled_from(("query", "key")) | values)
indices = positions | _indices(st.builds(Quotient, positions, numbers))
leaf = (
    st.sampled_from((EVERY_KEY, NO_KEY))
    | st.builds(Band, st.none() | numbers, st.none() | numbers)
    | st.builds(Compare, indices, indices, st.sampled_from(("le", "lt", "eq", "ne")))
    | st.builds(TensorMask, names, axes, st.booleans())
)
predicates = st.recursive(leaf, lambda of: st.builds(Not, of) | st.builds(And, st.lists(of).map(tuple)))


@given(st.none() | predicates)
def test_there_and_back(predicate: Predicate | None) -> None:
    back = predicate_from_text(predicate_to_text(predicate))
    assert back == predicate
    assert repr(back) == repr(predicate)  # True is not 1


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (Band(None, sympy.Symbol("n")), "no text says what n is, a Symbol"),
        (Compare(Index(0.5), Index(), "le"), "no text says what 0.5 is, a float"),
        (TensorMask(object(), ("key",)), "a object in a predicate"),
        (And([EVERY_KEY]), "a list in a predicate"),  # type: ignore[arg-type]
    ],
)
def test_what_no_text_says(predicate: Predicate, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        predicate_to_text(predicate)


@pytest.mark.parametrize(
    "text",
    [
        "('Band', None)",
        "('Band', None, 0, 0)",
        "('Softcap', 1)",
        "('print', 'x')",
        "('Band', None, 0.5)",
        "('Index', 0, [])",
        "()",
        "((),)",
        "[]",
        "3",
        "{'Band': 0}",
        "Band(None, 0)",
        "__import__('os')",
    ],
)
def test_what_is_no_predicate(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (part of a )?predicate|malformed"):
        predicate_from_text(text)


def test_nothing_is_evaluated() -> None:
    """No module of the package runs text as code."""
    folders = [Path(module.__file__).resolve().parent for module in (attn_rewriter, patterns)]  # type: ignore[arg-type]
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        calls = (node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        assert not {f.id for f in calls if isinstance(f, ast.Name)} & {"eval", "exec", "compile"}, file
