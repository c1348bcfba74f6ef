"""A second opinion on every site that would be rewritten, once, when its graph is compiled.

What is read of a model is read by code, and code errs. So what was read is compared with what the model's own
operations give, on inputs that are made up:

- each mask, at all of its coordinates, or of a large one at some queries with all of their keys;
- where the scores are few, the whole site, in float64: the model's operations beside the spec (`kernels/reference.py`),
  and their gradients where they are wanted; and on CPU, in its own types, the kernel that will run, where that needs
  no compiling.

Constants are what they are. Inputs of the graph are random, but biased to be interesting: padding that hides all keys,
none, the first or the last ones, or some between; documents of one token; positions out of order. Operations that are
dear, or may do more than to compute, are not run: what they give is random as well.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from attn_rewriter.buffers import HandedOn, buffer_of
from attn_rewriter.contract import measured, worst
from attn_rewriter.describe import Description
from attn_rewriter.device import Device
from attn_rewriter.emit import Operands, arrange
from attn_rewriter.graph import Facts, same_view, size, tensor
from attn_rewriter.interior import Interior, WithoutDropout, before, called, is_leaf, levels, widened
from attn_rewriter.kernels import KERNELS, Kernel
from attn_rewriter.kernels.masking import holds, keep, keep_mask
from attn_rewriter.patterns.axes import plan as steps
from attn_rewriter.spec import AXES, Mask, Size
from attn_rewriter.torch_private import FakeTensor, tree_map

log = logging.getLogger("attn_rewriter")

COORDINATES = 2**22
"""Of a mask, all of which are compared."""

MASK = {"cpu": 2**22, "cuda": 2**28}
"""Elements of what masks are made of, by device, in all draws together: more take too long to compute once more."""

SCORES = {"cpu": 2**18, "cuda": 2**22}
"""Scores of a site that is run as a whole, by device."""

QUERIES = 64
"""Of a large mask, so many rows are compared."""

DRAWS = 5
"""Made-up inputs, besides those that the graph is called with."""

WHOLE = (0, 1, 2)
"""The draws for which a whole site is run: with the graph's own inputs, and with masks that hide all and a part."""

AGREES = 1e-6
"""Differences in float64, relative to the largest number, up to which two ways to compute the same agree. A mask that
is read wrongly, or a scale, differs by far more."""

SLACK, GROSS = 8.0, 5e-3
"""How many times what the contract allows, and what part of the result, the kernel's error must exceed to count: on a
few made-up numbers luck counts for more, and what is lost where weights are nearly 1."""


@dataclass
class Opinions:
    """What was found in the graphs of one compilation; `inputs` are those that the outermost graph is called with."""

    inputs: Sequence[Any] = ()
    known: dict[Any, str] = field(default_factory=dict)
    spelled: dict[Any, str] = field(default_factory=dict)

    def on(self, found: Description, output: Node, facts: Facts, kernel: Kernel, device: Device) -> str:
        """What the model's own operations say against a site as it was read; empty where nothing does."""
        held = tensor(output)
        if held is None or held.device.type not in SCORES or held.device.type != device.type:
            return ""
        site = _Site(Interior(found, output, facts), kernel, device, self.spelled)
        key = site.meaning
        if key not in self.known:
            try:
                self.known[key] = self._ask(site)
            except Exception as error:  # of operations that were not made for made-up inputs
                log.debug("no second opinion", exc_info=error)
                self.known[key] = ""
        return self.known[key]

    def _ask(self, site: _Site) -> str:
        for draw in self._draws(site):
            try:
                values = draw.values(site)
            except Exception as error:  # an index out of range, say
                log.debug("these inputs are none for the model", exc_info=error)
                continue
            said = site.masks_differ(values)
            if not said and site.is_small and draw.number in WHOLE:
                said = site.differs(values)
            if said:
                return said
        return ""

    def _draws(self, site: _Site) -> Iterator[_Draw]:
        given = [x for x in self.inputs if isinstance(x, Tensor)]
        inputs = self.inputs if not any(isinstance(x, FakeTensor) for x in given) else ()
        if inputs:
            yield _Draw(0, inputs)
        batch, _, q_len, kv_len = site.sizes
        for number in range(1, min(DRAWS, MASK[site.device.type] // max(batch * q_len * kv_len, 1)) + 1):
            yield _Draw(number, inputs)


# ---------------------------------------------------------------------------------------------- inputs


class _Draw:
    """Values for the nodes of a graph: those that follow from the graph's own inputs in the first draw, and made-up
    ones in others, but for what was read by value."""

    def __init__(self, number: int, inputs: Sequence[Any]) -> None:
        self.number, self.inputs = number, inputs
        self.generator = torch.Generator("cpu").manual_seed(number)
        self.env: dict[Node, Any] = {}

    def values(self, site: _Site) -> dict[Node, Any]:
        """Of all that a site needs, or, where it is large, its masks. Operands that enter the arithmetic are random
        numbers, unless they are the graph's own inputs; all else is computed."""
        inside = site.inside
        wanted = inside.needs if site.is_small else inside.masks
        for node in inside.roots if site.is_small else ():
            if self.number or node.op != "placeholder":
                self.env[node] = self._number(node)
        self._compute(inside.facts, wanted, inside.output)
        return {node: self.env[node] for node in wanted}

    def _number(self, node: Node) -> Any:
        like = tensor(node)
        return _concrete(node.meta["example_value"]) if like is None else self._normal(like).to(like.dtype)

    def _normal(self, like: Tensor) -> Tensor:
        sizes = [_hint(n) for n in like.shape]
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64).to(like.device)

    def _compute(self, facts: Facts, nodes: Sequence[Node], until: Node) -> None:
        """Run what nodes are computed from, in the order of the graph, writes included."""
        with levels(facts, self.env.__getitem__) as go_to:
            for node in before(facts, nodes, until, self.env, is_leaf):
                if not is_leaf(node):
                    go_to(node)
                    self.env[node] = self._run(node)
                else:
                    for written in facts.written(node):
                        self.env[written].copy_(self._made_up(written))
                    self.env[node] = self._leaf(facts, node)

    def _run(self, node: Node) -> Any:
        like = tensor(node)
        if like is not None and math.prod(map(_hint, like.shape)) > MASK[like.device.type]:
            raise MemoryError(f"{node} is too large to be computed once more")
        return called(node, self.env.__getitem__)

    def _leaf(self, facts: Facts, node: Node) -> Any:
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(facts.graph.owning_module)
            return held.detach().clone() if isinstance(held, Tensor) else held
        if node.op == "placeholder":
            given = facts.argument(node)
            if given is not None and facts.outer is not None and facts.caller is not None:
                self._compute(facts.outer, [given], facts.caller)
                return self.env[given]
            known = buffer_of(node) if facts.outer is None else None
            if facts.outer is None and self.inputs and (not self.number or known is not None):
                held = self.inputs[facts.graph.find_nodes(op="placeholder").index(node)]
                return held.detach().clone() if isinstance(held, Tensor) else _concrete(held)
            if isinstance(known, HandedOn) and (like := tensor(node)) is not None:  # of a graph that is not called yet
                return known.read().tensor([*map(_hint, like.shape)], like)
        written = next((x for x in facts.written(node) if same_view(x, node)), None)
        return self._made_up(node) if written is None else self.env[written]

    def _made_up(self, node: Node) -> Any:
        """A value of a node's type and shape."""
        like = tensor(node)
        if like is None:
            return _concrete(node.meta.get("example_value"))
        sizes = [*map(_hint, like.shape)]
        if math.prod(sizes) > MASK[like.device.type]:
            raise MemoryError(f"{node} is too large to be made up")
        if like.dtype == torch.bool:
            return self._pattern(sizes).to(like.device)
        if like.dtype.is_floating_point:
            low = torch.finfo(like.dtype).min
            kinds: tuple[Callable[[], Tensor], ...] = (
                lambda: self._normal(like),
                lambda: self._pattern(sizes).double(),
                lambda: torch.where(self._pattern(sizes), 0.0, low),
            )
            return kinds[self.number % 3]().to(like.device, like.dtype)
        return self._integers(sizes).to(like.device, like.dtype)

    def _integers(self, sizes: Sequence[int]) -> Tensor:
        last = sizes[-1] if sizes else 1

        def below(most: int) -> Tensor:
            return torch.randint(0, max(most, 1), (*sizes,), generator=self.generator)

        match self.number % 4:
            case 1:
                return self._pattern(sizes).long()
            case 2:
                return (below(3) == 0).long().cumsum(-1) if sizes else below(last)  # documents, some of one token
            case 3:
                return below(last)
        return torch.arange(last).expand(tuple(sizes)).clone() if sizes else below(2)

    def _pattern(self, sizes: Sequence[int]) -> Tensor:
        """What a mask of tokens may be, another one in each row."""
        n = sizes[-1] if sizes else 1
        rows = math.prod(sizes[:-1])
        at = torch.arange(n)
        cut = torch.randint(0, n + 1, (rows, 1), generator=self.generator)
        kinds = torch.stack(
            [
                torch.zeros(rows, n, dtype=torch.bool),
                at >= cut,
                at < cut,
                torch.rand(rows, n, generator=self.generator) < 0.6,
                torch.ones(rows, n, dtype=torch.bool),
            ]
        )
        chosen = (torch.arange(rows) + self.number - 1) % len(kinds)
        return kinds[chosen, torch.arange(rows)].reshape(tuple(sizes))


def _concrete(value: Any) -> Any:
    return tree_map(_hint, value)


def _hint(n: Any) -> Any:
    return n.node.hint if isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) else n


# ---------------------------------------------------------------------------------------------- one site


@dataclass(frozen=True)
class _Site:
    """A site as it was read, the kernel that will run, and the operations that it will replace."""

    inside: Interior
    kernel: Kernel
    device: Device
    spelled: dict[Any, str]

    @property
    def found(self) -> Description:
        return self.inside.found

    @property
    def meaning(self) -> Any:
        """The same for sites that compute the same by the same operations, as those of many layers do."""
        names: dict[Any, str] = {}

        def named(node: Node) -> str:
            like = tensor(node)
            shape = () if like is None else (like.dtype, tuple(like.shape), like.requires_grad)
            # Numbers are made up for each site; masks are computed, and may be the same in many layers.
            is_own = node in self.inside.roots or node in self.inside.nodes
            return names.setdefault(node, f"{len(names)} {shape}" if is_own else self._spelled(node))

        told = [
            (str(node.op), str(node.target), str(torch.fx.map_arg((node.args, node.kwargs), named)), named(node))
            for node in self.inside.nodes
        ]
        operands = {
            name: named(state.node) for name, state in self.found.operands.items() if isinstance(state.node, Node)
        }
        around = self.inside.facts.region(self.inside.output)
        return self.found.spec, str(self.found.shapes), self.kernel.name, str(told), str(operands), str(around)

    def _spelled(self, node: Node) -> str:
        """The same for nodes that are computed alike."""
        if node not in self.spelled:
            text = f"{node.name} {id(node.graph)}"
            if not is_leaf(node) and not self.inside.facts.writes(node):
                text = f"{node.target}{torch.fx.map_arg((node.args, node.kwargs), self._spelled)}"
            self.spelled[node] = self.spelled.setdefault(text, f"#{len(self.spelled)}")
        return self.spelled[node]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch, heads, queries and keys, in this run."""
        shapes = self.found.shapes
        return tuple(self.size(n) for n in (shapes.batch, shapes.num_heads, shapes.q_len, shapes.kv_len))

    @property
    def is_small(self) -> bool:
        return math.prod(self.sizes) <= SCORES[self.device.type]

    def size(self, n: Size) -> int:
        """What a size is in this run."""
        if not isinstance(n, sympy.Expr):
            return n
        return int(n.xreplace({symbol: self._hints[symbol] for symbol in n.free_symbols}))

    @cached_property
    def _hints(self) -> Mapping[Any, int]:
        found: dict[Any, int] = {}
        facts: Facts | None = self.inside.facts
        while facts is not None:
            for node in facts.graph.nodes:
                held = node.meta.get("example_value")
                for n in held.shape if isinstance(held, Tensor) else (held,):
                    if isinstance(n, torch.SymInt) and isinstance(symbol := size(n), sympy.Symbol):
                        found.setdefault(symbol, sympy.Integer(n.node.hint))
            facts = facts.outer
        return found

    def operands(self, values: Mapping[Node, Any], dtype: torch.dtype | None = None) -> Operands:
        """As kernels take them, those that are computed with in this type."""

        def of(node: Any) -> Any:
            return self.inside.run(values, node) if isinstance(node, Node) else node

        return Operands(self.found, of, lambda x, own: x.to(dtype or own), self.size)

    # -- masks

    def masks_differ(self, values: Mapping[Node, Any]) -> str:
        """Whether a mask hides other keys than was read of it, in words."""
        operands = self.operands(values)
        for mask in self.found.spec.modifiers:
            if isinstance(mask, Mask) and mask.tensor is not None:
                said = self._mask_differs(mask, operands)
                if said:
                    return said
        return ""

    def _mask_differs(self, mask: Mask, operands: Operands) -> str:
        own = operands[str(mask.tensor)]
        kept = keep(mask, operands)
        varies = mask.keep.varies_over()
        counts = [n if axis in varies or kept.size(i) > 1 else 1 for i, (axis, n) in enumerate(zip(AXES, self.sizes))]
        at = [torch.arange(n, device=kept.device) for n in counts]
        if math.prod(counts) > COORDINATES:
            n = counts[2]
            some = torch.linspace(0, n - 1, QUERIES, device=kept.device).long()
            ends = torch.arange(n, device=kept.device)[[0, 1, -2, -1]]
            at[2] = torch.cat([some, ends]).unique()
            at[0], at[1] = (x[[0, -1]].unique() for x in at[:2])
        coordinates = [x.view([-1 if i == axis else 1 for i in range(4)]) for axis, x in enumerate(at)]
        read = holds(mask.keep, operands, *coordinates)
        # A dimension of one element is the same for all.
        where = tuple(x if kept.size(i) > 1 else x * 0 for i, x in enumerate(coordinates))
        said = kept[where]
        if bool((read != said).any()):
            return f"a mask is read as {mask.keep}, which the model's own operations do not give"
        if mask.form == "additive":
            fills = own[where][~said].double()
            if not bool(torch.isin(fills, torch.tensor(mask.fills, dtype=fills.dtype, device=fills.device)).all()):
                return f"a mask adds other numbers than {', '.join(f'{fill:g}' for fill in mask.fills)}"
        return ""

    # -- the whole

    def differs(self, values: Mapping[Node, Any]) -> str:
        """Whether the model's operations give something else than the spec, or than the kernel, in words."""
        if not isinstance(self.found.shapes.num_groups, int):
            return ""
        exact = self._compared(values)
        # On CUDA, cuDNN keeps one backward plan for a shape, whatever the strides: to call it here with others than the
        # model's would make the model's gradients wrong (2.11).
        if exact or self.kernel.needs_inductor or self.device.type != "cpu":
            return exact
        return self._kernel_differs(values)

    def _compared(self, values: Mapping[Node, Any]) -> str:
        specified = self._specified(values)
        read, eager = (self._exactly(compute, values, specified) for compute in (self._spec, self._eager))
        if any((a.isnan() & ~b.isnan()).any() for a, b in zip(read, eager)):
            # Where float64 holds a fill that is infinite in the model's own type, that type decides.
            own = self._results(self._eager, values, specified)
            eager = [torch.where(a.isnan() & x.isnan(), a, b) for a, b, x in zip(read, eager, own)]
        for what, a, b in zip(_what(), read, eager):
            if what == "gradients":  # where eager code has none, nothing is asked
                a = a.where(b.isfinite(), b)
            if not _agree(a, b):
                return (
                    f"its {what} {'differ' if what[-1] == 's' else 'differs'} from what the model's own operations give"
                )
        return ""

    def _kernel_differs(self, values: Mapping[Node, Any]) -> str:
        """Whether the kernel, in its own types and as it will be called, is further off than rounding explains."""
        specified = self._specified(values)
        with self.around():
            fused, eager = (self._results(compute, values, specified) for compute in (self._fused, self._eager))
        for what, a, b, truth in zip(_what(), fused, eager, self._exactly(self._eager, values, specified)):
            known = b.isfinite() & truth.isfinite()
            off = worst(measured(*(x.where(known, 0) for x in (a.to(b.dtype), b, truth.double()))))
            gross = GROSS * truth.where(known, 0).square().mean().sqrt().item()
            # Where a row sees one key, gradients are exactly zero; the numbers that they are made of are of size one.
            rounding = SLACK * torch.finfo(b.dtype).eps
            if not off.error <= max(SLACK * off.allowed, gross, rounding):
                return f"{self.kernel.name} is off by {off.error:.3g} in its {what}, eager code by {off.eager:.3g}"
        return ""

    def _exactly(
        self, compute: Callable[[Mapping[Node, Any]], Tensor], values: Mapping[Node, Any], specified: Tensor | None
    ) -> list[Tensor]:
        """Results in float64."""
        shapes = self.found.shapes
        wide = {node: x.double() if _is_float(x) else x for node, x in values.items()}
        with widened(self.device.type, shapes.product_dtype or shapes.dtype):
            return self._results(compute, wide, specified)

    def around(self) -> AbstractContextManager[Any]:
        """The autocast that the site is under."""
        dtype = self.inside.facts.autocast(self.inside.output, self.device.type)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _results(
        self, compute: Callable[[Mapping[Node, Any]], Tensor], values: Mapping[Node, Any], specified: Tensor | None
    ) -> list[Tensor]:
        """An output, and its gradients for the operands that want one, zero where they are missed."""
        needs_backward = self.found.shapes.needs_backward
        leaves, wanted = {}, []
        for node, x in values.items():
            like = tensor(node)
            wants = needs_backward and node in self.inside.roots and like is not None and like.requires_grad
            leaves[node] = x.detach().clone().requires_grad_(wants) if isinstance(x, Tensor) else x
            wanted += [leaves[node]] if wants else []
        with torch.set_grad_enabled(needs_backward), WithoutDropout():
            output = compute(leaves)
            output = output if specified is None else torch.where(specified, output, 0.0)
            if not wanted or not output.requires_grad:
                return [output.detach(), *(torch.zeros_like(x) for x in wanted)]
            generator = torch.Generator("cpu").manual_seed(0)
            way = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            gradients = torch.autograd.grad(output, wanted, way, allow_unused=True)
        return [output.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients))]

    def _eager(self, values: Mapping[Node, Any]) -> Tensor:
        result: Tensor = self.inside.run(values)
        return result

    def _spec(self, values: Mapping[Node, Any]) -> Tensor:
        return self._called(KERNELS["reference"], self.operands(values, torch.float64), torch.float64)

    def _fused(self, values: Mapping[Node, Any]) -> Tensor:
        return self._called(self.kernel, self.operands(values), self.found.shapes.dtype)

    def _called(self, kernel: Kernel, operands: Operands, dtype: torch.dtype) -> Tensor:
        found = self.found
        shapes = found.shapes
        if dtype == torch.float64:
            shapes = replace(shapes, dtype=dtype, product_dtype=dtype)
        result = kernel(replace(found.spec, dropout_p=0.0), shapes, self.device, operands)
        arranged: Tensor = arrange(result, steps(found.layout.of("output"), found.output), self.size)
        held = tensor(self.inside.output)
        return arranged if dtype == torch.float64 or held is None else arranged.to(held.dtype)

    def _specified(self, values: Mapping[Node, Any]) -> Tensor | None:
        """Which elements of the output are compared; None for all. In a row without a key, a number that is added to
        the scores swallows them in their own type, but perhaps not in float64."""
        spec = self.found.spec
        masks = [m for m in spec.modifiers if isinstance(m, Mask)]
        lasting = torch.finfo(torch.float64).eps / 2
        faint = any(
            m.form == "additive" and any(math.isfinite(fill) and abs(fill) * lasting < 1 for fill in m.fills)
            for m in masks
        )
        kept = keep_mask(masks, self.found.shapes, self.operands(values)) if faint else None
        if kept is None:
            return None
        seen = kept.any(-1, keepdim=True).expand(*self.sizes[:3], self.size(self.found.shapes.head_dim_v))
        shown: Tensor = arrange(seen, steps(self.found.layout.of("output"), self.found.output), self.size)
        return shown


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same up to rounding in float64, and no number at the same places."""
    known = a.isfinite() & b.isfinite()
    if not torch.equal(a.isnan(), b.isnan()) or not bool((known | a.isnan() | (a == b)).all()):
        return False
    a, b = a.where(known, 0.0), b.where(known, 0.0)
    return not a.numel() or bool((a - b).abs().max() <= AGREES * (1 + b.abs().max()))


def _what() -> Iterator[str]:
    """What results are, in words."""
    return chain(["output"], repeat("gradients"))
