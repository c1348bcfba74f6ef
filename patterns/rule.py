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
class Rule:
    """Peels one step off a chain. `apply(**variables)` gives the next tensor to look at and what was peeled off
    (modifiers, nearest to the softmax first), or None where the pattern matched but does not apply."""

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
