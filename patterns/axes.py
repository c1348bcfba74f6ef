"""Tracking axes through views, so that no rule has to know a chain of transposes and reshapes by heart.

Every dimension of a tensor is a tuple of *atoms*, as in einops: a folded `[batch * heads, seq, dim]` has the
dimensions `(b, h), (s,), (d,)`. Walking backwards through a view maps the dimensions of its output to those of its
input; a reshape that cuts an atom in two splits it for everyone who holds it. A dimension that is only repeated
(`expand`) has no atom in the input. Atoms of size 1 carry no information and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch.fx import Node

from attn_rewriter.graph import Call, shape, size
from attn_rewriter.spec import Size, same


class Atom:
    """One axis that no view has cut yet; after a cut, `parts` are its (outer, inner) atoms."""

    __slots__ = ("name", "parts", "size")

    def __init__(self, size: Size, name: str = "") -> None:
        self.name, self.size = name, size
        self.parts: tuple[Atom, Atom] | None = None

    def split(self, outer: Size, inner: Size) -> None:
        self.parts = (Atom(outer, f"{self.name}/outer"), Atom(inner, f"{self.name}/inner"))

    @property
    def axis(self) -> str:
        """The axis that an atom is, or is a part of."""
        return self.name.partition("/")[0]

    def leaves(self) -> tuple[Atom, ...]:
        if self.parts is None:
            return () if self.size == 1 else (self,)
        return self.parts[0].leaves() + self.parts[1].leaves()

    def __repr__(self) -> str:
        return f"{self.name or 'atom'}:{self.size}"


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def leaves(dim: Sequence[Atom]) -> Dim:
    """A dimension's atoms as they are cut now."""
    return tuple(leaf for atom in dim for leaf in atom.leaves())


def fresh(sizes: Sequence[Size], name: str = "") -> Dims:
    """New dimensions of one atom each."""
    return tuple(() if n == 1 else (Atom(n, name),) for n in sizes)


def extent(dim: Sequence[Atom]) -> Size:
    """The size of a dimension."""
    result: Any = 1
    for atom in dim:
        result = result * atom.size
    return result


def _divide(a: Size, b: Size) -> Size | None:
    """`a / b` where that is a whole number whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    if quotient.is_Integer:
        return int(quotient)
    numerator, denominator = quotient.as_numer_denom()
    return quotient if denominator == 1 and numerator.is_integer else None


def regroup(dims: Dims, sizes: Sequence[Size]) -> Dims | None:
    """The dimensions of a tensor of shape `sizes` with the same elements in the same order, or None."""
    atoms = [leaf for dim in dims for leaf in leaves(dim)]
    result: list[Dim] = []
    for wanted in sizes:
        dim: list[Atom] = []
        rest: Size = wanted
        while not same(rest, 1):
            if not atoms:
                return None
            atom = atoms.pop(0)
            quotient = _divide(rest, atom.size)
            if quotient is None:
                inner = _divide(atom.size, rest)
                if inner is None:
                    return None
                atom.split(rest, inner)
                atom, remainder = atom.parts  # type: ignore[misc]
                atoms.insert(0, remainder)
                quotient = 1
            dim.append(atom)
            rest = quotient
        result.append(tuple(dim))
    return None if atoms else tuple(result)


def backward(call: Call, node: Node, dims: Dims) -> Dims | None:
    """Map the dimensions of a view's output to those of its input; None where `call` is no view or can't be read."""
    if call.name == "copy":
        return dims
    if call.name == "permute":
        inverse: list[Dim] = [()] * len(dims)
        for out, into in enumerate(call["dims"]):
            inverse[into] = dims[out]
        return tuple(inverse)
    if call.name == "reshape":
        return regroup(dims, shape(call["input"]))
    if call.name == "expand":
        into = shape(call["input"])
        return tuple(() if n == 1 else dim for n, dim in zip(into, dims[len(dims) - len(into) :]))
    if call.name == "repeat_interleave":
        return _repeated(call, dims, {call["dim"]: call["repeats"]}, tiled=False)
    if call.name in ("repeat", "tile"):
        ndim = len(shape(call["input"]))
        counts = [size(n) for n in call["sizes" if call.name == "repeat" else "dims"]]
        counts = [1] * (ndim - len(counts)) + counts
        return _repeated(call, dims[len(dims) - ndim :], dict(enumerate(counts[-ndim:])), tiled=True)
    return None


def _repeated(call: Call, dims: Dims, counts: dict[Any, Any], *, tiled: bool) -> Dims | None:
    """Repeated elements: each next to its original (`repeat_interleave`), or the whole again (`repeat`)."""
    into = shape(call["input"])
    result = list(dims)
    for axis, count in counts.items():
        count = size(count)
        if not isinstance(axis, int) or not isinstance(count, (int, sympy.Expr)):
            return None
        if same(count, 1):
            continue
        n = into[axis]
        grouped = regroup((dims[axis],), (count, n) if tiled else (n, count))
        if grouped is None:
            return None
        result[axis] = grouped[1] if tiled else grouped[0]
    return tuple(result)


# ---------------------------------------------------------------------------------------------------------------
# Bringing a tensor into a layout

Step = tuple[str, tuple[Any, ...]]


def plan(dims: Dims, groups: Sequence[Sequence[Atom]], *, broadcast: bool = False) -> list[Step]:
    """The tensor methods, with their arguments, that bring a tensor with `dims` into the layout `groups`.

    Atoms that the tensor lacks are expanded to; with `broadcast`, a group of which it has none becomes a dimension
    of size 1 instead. Everything is a view, unless atoms that are not adjacent in memory must be folded.
    """
    have = [leaves(dim) for dim in dims]
    want = [leaves(group) for group in groups]
    held = {atom for dim in have for atom in dim}
    if broadcast:
        want = [group if held & set(group) else () for group in want]
    if have == want:
        return []
    steps: list[Step] = []
    for i in reversed(range(len(have))):
        if len(have[i]) > 1:
            steps.append(("unflatten", (i, tuple(atom.size for atom in have[i]))))
        elif not have[i]:
            steps.append(("squeeze", (i,)))
    flat = [atom for dim in have for atom in dim]
    order = [atom for group in want for atom in group]
    present = [atom for atom in order if atom in held]
    if present != flat:
        steps.append(("permute", tuple(flat.index(atom) for atom in present)))
    missing = [i for i, atom in enumerate(order) if atom not in held]
    steps += [("unsqueeze", (i,)) for i in missing]
    if missing:
        steps.append(("expand", tuple(atom.size if atom not in held else -1 for atom in order)))
    for i, group in enumerate(want):
        if not group:
            steps.append(("unsqueeze", (i,)))
        elif len(group) > 1:
            steps.append(("flatten", (i, i + len(group) - 1)))
    return steps
