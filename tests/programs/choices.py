"""Random choices, each by its own name."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Settles every choice of a program. The first of the options is always the plainest.

    A choice depends on the seed and on its own name only. So one choice can be made plain, and all others stay as they
    were: this is how programs shrink. `plain` holds the names of choices that must be plain, or "*" for all; `forced`
    those that are settled, by the numbers of their options.
    """

    def __init__(self, seed: str, plain: Collection[str] = (), forced: Mapping[str, int] | None = None) -> None:
        self.seed, self.plain, self.forced = seed, frozenset(plain), forced or {}
        self.made: dict[str, int] = {}
        self.options: dict[str, int] = {}
        self.features: set[str] = set()
        self._scope: list[str] = []

    def __call__(self, name: str, options: Sequence[T] | Mapping[str, T], often: float | None = None) -> T:
        """One of the options; with `often`, that is how often it is not the first.

        Of a mapping, the keys are what the options are called, and a value is returned."""
        named = [*options.items()] if isinstance(options, Mapping) else [(str(x), x) for x in options]
        path = "/".join([*self._scope, name])
        assert path not in self.made, f"{path} is chosen twice"
        drawn = random.Random(f"{self.seed}/{path}")
        rest = range(1, len(named))
        chosen = drawn.randrange(len(named)) if often is None else 0
        if often is not None and drawn.random() < often and rest:
            chosen = drawn.choice(rest)
        chosen = 0 if not self.plain.isdisjoint((path, name, "*")) else chosen
        chosen = self.forced.get(path, chosen)
        self.made[path], self.options[path] = chosen, len(named)
        self.features.add(f"{name}: {named[chosen][0]}")
        return named[chosen][1]

    def chance(self, name: str, often: float) -> bool:
        return self(name, (False, True), often)

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """The names of the choices made here begin with `scope`."""
        self._scope.append(scope)
        try:
            yield
        finally:
            self._scope.pop()
