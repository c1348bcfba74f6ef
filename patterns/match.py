"""Patterns that look like the mathematics they stand for: `cap * tanh(score / cap)`.

A pattern is an operation under its canonical name (`attn_rewriter.graph`), so that one pattern covers function,
method, operator and in-place spellings. Sums and products match in either order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attn_rewriter.graph import Facts, tensor

_COMMUTATIVE = {"add", "mul", "maximum", "minimum"}
_REDUCING = {"max", "amax", "unpack", "getitem", "reshape", "permute", "expand", "cast", "copy", "detach"}


@dataclass(frozen=True, eq=False)
class Pattern:
    """An operation, with a pattern or a Python value for each parameter that is looked at."""

    name: str
    args: dict[str, Any]

    def __add__(self, other: Any) -> Pattern:
        return Pattern("add", {"input": self, "other": other})

    def __sub__(self, other: Any) -> Pattern:
        return Pattern("sub", {"input": self, "other": other})

    def __mul__(self, other: Any) -> Pattern:
        return Pattern("mul", {"input": self, "other": other})

    def __truediv__(self, other: Any) -> Pattern:
        return Pattern("div", {"input": self, "other": other})

    def __neg__(self) -> Pattern:
        return Pattern("neg", {"input": self})

    @property
    def weight(self) -> int:
        """The number of operations: a pattern with more of them says more."""
        return 1 + sum(arg.weight for arg in self.args.values() if isinstance(arg, Pattern))


@dataclass(frozen=True, eq=False)
class Variable(Pattern):
    """Stands for any value of a kind: "tensor", "boolean" tensor, "number" (a Python number, or a tensor of one
    element whose value is known), "symbolic" number (known only to the run), or "argument" (a Python value as it
    is). Twice the same is the same value."""

    kind: str = "tensor"

    @property
    def weight(self) -> int:
        return 0


def tensor_(name: str) -> Variable:
    return Variable(name, {}, "tensor")


def boolean(name: str) -> Variable:
    return Variable(name, {}, "boolean")


def number(name: str) -> Variable:
    return Variable(name, {}, "number")


def symbolic(name: str) -> Variable:
    return Variable(name, {}, "symbolic")


def argument(name: str) -> Variable:
    return Variable(name, {}, "argument")


@dataclass(frozen=True, eq=False)
class Reduced(Pattern):
    """Stands for what is computed from `of` by reductions, views and casts alone, such as its row maximum; `name` is
    the name of the result."""

    of: Pattern = Pattern("", {})


def reduced(name: str, of: Pattern) -> Reduced:
    return Reduced(name, {}, of)


def operation(name: str, *parameters: str) -> Callable[..., Pattern]:
    """What writes the pattern of an operation down: called with a pattern or a value for each of the parameters."""
    return lambda *args: Pattern(name, dict(zip(parameters, args, strict=True)))


tanh, cast, exp = (operation(name, "input") for name in ("tanh", "cast", "exp"))
maximum, minimum = (operation(name, "input", "other") for name in ("maximum", "minimum"))
masked_fill = operation("masked_fill", "input", "mask", "value")
where = operation("where", "condition", "input", "other")
nan_to_num = operation("nan_to_num", "input", "nan")
clamp = operation("clamp", "input", "min", "max")
softmax = operation("softmax", "input", "dim")
summed = operation("sum", "input", "dim", "keepdim")
logsumexp = operation("logsumexp", "input", "dim", "keepdim")
getitem = operation("getitem", "input", "index")
append = operation("append", "input", "other", "dim")  # `torch.cat` of two tensors
pad = operation("pad", "input", "pad", "mode", "value")
dropout = operation("dropout", "input", "p", "training")


Constant = Callable[[Any, Node], "float | None"]


@dataclass
class Matcher:
    """Matches patterns in one graph. A match also has the "nodes" that it read, the outermost first."""

    facts: Facts
    constant: Constant

    def match(self, pattern: Any, value: Any, at: Node, bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every way to read `value`, an argument of `at`, as `pattern`; yields names with their values."""
        if not isinstance(pattern, Pattern):
            if self.constant(value, at) == pattern:
                yield bound
        elif isinstance(pattern, Variable) and pattern.kind == "argument":
            yield {**bound, pattern.name: value}
        elif isinstance(pattern, Variable):
            found = self._value(pattern, value, at)
            if found is not None and bound.get(pattern.name, found) == found:
                yield {**bound, pattern.name: found}
        elif isinstance(pattern, Reduced):
            yield from self._reduced(pattern, value, at, bound)
        elif isinstance(value, Node) and tensor(value) is not None:
            yield from self.operation(pattern, self.facts.current(value, at), bound)

    def _reduced(self, pattern: Reduced, value: Any, at: Node, bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
        bound = {**bound, pattern.name: value}
        while (call := self.facts.call(value)) is not None and call.name in _REDUCING:
            bound = {**bound, "nodes": (*bound.get("nodes", ()), value)}
            at, value = value, call["input"]
            yield from self.match(pattern.of, value, at, bound)

    def operation(self, pattern: Pattern, node: Node, bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every way to read the operation of `node` as `pattern`."""
        call = self.facts.call(node)
        if call is None or call.name != pattern.name:
            return
        if call.args.get("alpha", 1) != 1 or call.args.get("rounding_mode") is not None:
            return
        if any(parameter not in call.args for parameter in pattern.args):
            return
        orders = [call.args]
        if pattern.name in _COMMUTATIVE:
            orders.append({**call.args, "input": call["other"], "other": call["input"]})
        for args in orders:
            read = {**bound, "nodes": (*bound.get("nodes", ()), node)}
            yield from self._match_all(list(pattern.args.items()), args, node, read)

    def _match_all(
        self, patterns: list[tuple[str, Any]], args: dict[str, Any], node: Node, bound: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        if not patterns:
            yield bound
            return
        (parameter, pattern), *rest = patterns
        for found in self.match(pattern, args[parameter], node, bound):
            yield from self._match_all(rest, args, node, found)

    def _value(self, variable: Variable, value: Any, at: Node) -> Any:
        if variable.kind == "number":
            return self.constant(value, at)
        if variable.kind == "symbolic":
            held = value.meta.get("example_value") if isinstance(value, Node) else None
            return value if isinstance(held, (torch.SymFloat, torch.SymInt)) else None
        held = tensor(value)
        if held is None or (variable.kind == "boolean") != (held.dtype == torch.bool):
            return None
        return self.facts.current(value, at)
