"""A mask as a small picture: which keys a query attends to, where that is known before the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch

from attn_rewriter.kernels.masking import holds
from attn_rewriter.spec import Always, And, Not, Predicate, Size, conjunction, parts

CELLS = 24
"""At most, in each direction."""

_LOOKED_AT = 32
"""Queries, and keys, of a cell: more are not distinguished in a picture of this size."""

_LONGEST = 1 << 20


@dataclass(frozen=True)
class Picture:
    """Cells `[query, key]`, each for one or several neighbours. In `attended` ones, some query attends to some key
    whatever the tensors hold; in `possible` ones, and not in others, it may. `lengths` are those of the queries and the
    keys, `example` the numbers that were put in for sizes that only the run knows."""

    attended: torch.Tensor
    possible: torch.Tensor
    lengths: tuple[int, int]
    example: Mapping[sympy.Symbol, int]


def picture(keep: Predicate, q_len: Size, kv_len: Size) -> Picture:
    """The picture of a mask on `q_len` queries and `kv_len` keys."""
    example = _example(keep, q_len, kv_len)

    def known(size: Size) -> int:
        return size if isinstance(size, int) else int(size.subs(example))

    lengths = max(known(q_len), 1), max(known(kv_len), 1)
    sizes = {size: torch.tensor(known(size)) for size in keep.sizes()}
    queries, keys = map(_neighbours, lengths)
    first = torch.tensor(0)

    def cells(predicate: Predicate) -> torch.Tensor:
        held = holds(predicate, sizes, first, first, queries.view(-1, 1), keys.view(1, -1))
        split = held.expand(queries.numel(), keys.numel()).view(*queries.shape, *keys.shape)
        return split.any(3).any(1)

    return Picture(cells(_bound(keep, False)), cells(_bound(keep, True)), lengths, example)


def _bound(predicate: Predicate, wanted: bool) -> Predicate:
    """The predicate where all that is not known of query and key alone is such that it holds, or does not, as often as
    it can."""
    match predicate:
        case Not(term):
            return ~_bound(term, not wanted)
        case And(terms):
            return conjunction(_bound(term, wanted) for term in terms)
    known = not [*predicate.tensors()] and predicate.varies_over() <= {"query", "key"}
    return predicate if known else Always(wanted)


def _neighbours(length: int) -> torch.Tensor:
    """The coordinates that each cell stands for, or as many of them as are looked at, its first and last included."""
    cells = torch.arange(min(length, CELLS) + 1) * length // min(length, CELLS)
    many = min(-(-length // CELLS), _LOOKED_AT)
    return cells[:-1, None] + torch.arange(many) * (cells.diff()[:, None] - 1) // max(many - 1, 1)


def _example(keep: Predicate, q_len: Size, kv_len: Size) -> dict[sympy.Symbol, int]:
    """A number for every symbol, large enough for what the mask says to be seen."""
    sizes = [size for size in (q_len, kv_len, *keep.sizes()) if isinstance(size, sympy.Expr)]
    numbers = [part for part in parts(keep) if isinstance(part, int)]
    numbers += [int(number) for size in sizes for number in size.atoms(sympy.Integer)]
    large = min(max((3 * abs(number) for number in numbers), default=0), _LONGEST)
    symbols = sorted({symbol for size in sizes for symbol in size.free_symbols}, key=str)
    return dict.fromkeys(symbols, max(CELLS, large))
