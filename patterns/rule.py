"""How a rule is written down: a pattern, and a function of what its variables stood for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from attn_rewriter.patterns.match import Pattern


@dataclass(frozen=True)
class Fill:
    """Scores replaced by `value` where the boolean tensor `condition` is true (or, with `keep`, false)."""

    condition: Node
    value: float
    keep: bool = False


@dataclass(frozen=True)
class Dropout:
    """Weights dropped with probability `p`, the others scaled up."""

    p: float


@dataclass(frozen=True)
class Shift:
    """Scores less one number for each row, a node or the same for all, which changes no weight."""

    by: Node | float


@dataclass(frozen=True)
class Column:
    """A key that is no key: before the softmax a column with the scores `sinks` (a node or a number) is put at the
    end of each row (`side` -1) or at its start (0); after it (`sinks` None) the column is taken away again."""

    side: int
    sinks: Node | float | None = None


@dataclass(frozen=True)
class Zeroed:
    """Weights set to zero where the boolean tensor `condition` is true, or (None) where they are not a number, because
    every key of their row is masked."""

    condition: Node | None = None
    keep: bool = False


@dataclass(frozen=True)
class Rule:
    """Peels one step off a chain. `apply(**variables)` gives the next tensor to look at and what was peeled off
    (steps, in the order in which they are computed), or None where the pattern matched but does not apply."""

    name: str
    pattern: Pattern
    apply: Callable[..., Any]


class Rules(list[Rule]):
    """The rules of one chain; longer patterns are tried first, otherwise their order does not matter."""

    def __call__(self, *patterns: Pattern) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.extend(Rule(function.__name__, pattern, function) for pattern in patterns)
            self.sort(key=lambda rule: -rule.pattern.weight)
            return function

        return register
