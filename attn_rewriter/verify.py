"""Checking fused attention against the model's own code, on the inputs that a graph is called with.

The graph runs once as it is, without gradients. Where it comes to the end of a site, three results are compared, with
their gradients where the site is trained: the kernel's, that of the model's own operations, and that of the same
operations in float64. What is written into is a copy; dropout is left out, as both draw numbers of their own; and so
are rows without any key, which eager code leaves unspecified, but that they are finite.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import and_
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from attn_rewriter import torch_private
from attn_rewriter.alone import by_itself
from attn_rewriter.buffers import copied
from attn_rewriter.contract import measured, worst
from attn_rewriter.describe import Description
from attn_rewriter.emit import Operands, arrange
from attn_rewriter.errors import is_out_of_memory
from attn_rewriter.find import find
from attn_rewriter.graph import Facts, Region, inputs_of, size, tensor
from attn_rewriter.hidden import hidden_from
from attn_rewriter.interior import Interior, WithoutDropout, widened
from attn_rewriter.kernels.masking import bias_terms, keep_mask
from attn_rewriter.patterns.axes import plan as steps
from attn_rewriter.pipeline import Plan, Settings, graphs, plan
from attn_rewriter.progress import working
from attn_rewriter.sites import Check
from attn_rewriter.spec import Bias, Mask, Size
from attn_rewriter.torch_private import FakeTensor, TorchDispatchMode

_LOOKS = 8
"""How often a site is compared at most, if it is off at first: over all of these, one that was wrong once still is."""


def verify(
    gm: GraphModule, inputs: Sequence[Any], settings: Settings, without: Container[int] = ()
) -> dict[int, Check]:
    """Check all sites of a graph that would be rewritten, by their number, but for some. The graph stays as it is.

    Inputs are tensors, and numbers for symbolic sizes.
    """
    copy = copied(gm)
    found: dict[torch.fx.Graph, _Sites] = {}
    number = 0
    for facts in graphs(copy, settings):
        plans = {}
        for site in [*find(facts)]:
            if number not in without and isinstance(planned := plan(site, facts, settings), Plan):
                plans[number] = _Planned(planned, Interior(planned.found, planned.site.output, facts))
            number += 1
        found[facts.graph] = _Sites(facts, plans)
    if any(isinstance(x, FakeTensor) for x in inputs) or not any(sites.plans for sites in found.values()):
        return {}
    checks: dict[int, Check] = {}
    with working("checking attention against eager code"), _random_numbers_kept(inputs), torch.no_grad():
        try:
            _Run(copy, _Context(found, checks)).run(*map(_hint, inputs))
        except Exception as error:  # of the model's own code, which may run once, or has no memory for more
            message = (
                f"attn_rewriter can't verify a graph, which does not run uncompiled: {type(error).__name__}: {error}"
            )
            warnings.warn(message, stacklevel=2)
    return checks


@contextmanager
def _random_numbers_kept(inputs: Sequence[Any]) -> Iterator[None]:
    """On CPU, and on all devices of the types that the inputs are on."""
    types = {x.device.type for x in inputs if isinstance(x, Tensor)} - {"cpu", "meta"}
    with ExitStack() as stack, torch.random.fork_rng(()):
        for kind in sorted(types):
            devices = range(torch.get_device_module(kind).device_count())
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        yield


def _hint(x: Any) -> Any:
    return x.node.hint if isinstance(x, torch.SymInt) else x


@dataclass(frozen=True)
class _Planned:
    """A plan, and the part of the graph that it replaces."""

    plan: Plan
    inside: Interior


@dataclass(frozen=True)
class _Sites:
    """The plans for one graph."""

    facts: Facts
    plans: dict[int, _Planned]


@dataclass(frozen=True)
class _Context:
    """What the runs of a graph and of its bodies share: the sites, what was found of them, the sizes that are symbols,
    and the kernels that were prepared."""

    sites: Mapping[torch.fx.Graph, _Sites]
    checks: dict[int, Check]
    symbols: dict[sympy.Symbol, int] = field(default_factory=dict)
    kernels: dict[Any, Callable[..., Tensor]] = field(default_factory=dict)

    def size(self, n: Size) -> int:
        return int(n.subs(self.symbols)) if isinstance(n, sympy.Expr) else n

    def learn(self, held: Any, value: Any) -> None:
        """What symbols are, from a fake value and the real one."""
        if isinstance(held, torch.SymInt) and isinstance(symbol := size(held), sympy.Symbol):
            self.symbols[symbol] = value
        elif isinstance(held, Tensor) and isinstance(value, Tensor):
            for n, real in zip(held.shape, value.shape):
                self.learn(n, real)


class _Run(Interpreter):
    """Runs a graph as it is, and checks its sites on the way."""

    def __init__(self, gm: GraphModule, context: _Context) -> None:
        super().__init__(gm)
        self._context, self._sites = context, context.sites[gm.graph]
        self._ends: dict[Node, list[int]] = {}
        for number, planned in self._sites.plans.items():
            self._ends.setdefault(planned.plan.site.output, []).append(number)
        self._keep_until_the_end()

    def _keep_until_the_end(self) -> None:
        """Let values live as long as a check needs them."""
        position = self._sites.facts.position
        last = {x: user for user, values in self.user_to_last_uses.items() for x in values}
        for planned in self._sites.plans.values():
            for x in planned.inside.needs:
                end = planned.plan.site.output
                if x in last and position[last[x]] < position[end]:
                    last[x] = end
        self.user_to_last_uses = {}
        for x, user in last.items():
            self.user_to_last_uses.setdefault(user, []).append(x)

    def run_node(self, n: Node) -> Any:
        if n.target is torch_private.set_grad_enabled:
            return None
        module = self._body(n)
        inputs = None if module is None else inputs_of(n, module.graph)
        result = super().run_node(n) if module is None or inputs is None else self._through(n, module, inputs)
        if n.op == "placeholder" and isinstance(result, Tensor) and self._sites.facts.writes(n):
            result = result.clone()
        self._context.learn(n.meta.get("example_value"), result)
        for number in self._ends.get(n, ()):
            planned = self._sites.plans[number]
            values = {x: self.env[x] for x in planned.inside.needs} | {n: result}
            check = _checked(_Trial(self, planned, values, self._context))
            held = self._context.checks.setdefault(number, check)  # of a body that was called before
            self._context.checks[number] = max(held, check, key=lambda check: (bool(check.verdict), check.worst))
        return result

    def _body(self, caller: Node) -> GraphModule | None:
        """The body that a node calls, if it has sites; of a condition's two, the one whose turn it is."""
        bodies = [node for node in caller.all_input_nodes if node.op == "get_attr"]
        if caller.target is torch.ops.higher_order.cond:
            condition, *branches = caller.args[:3]
            taken = branches[0] if self.map_nodes_to_values(condition, caller) else branches[1]
            bodies = [node for node in bodies if node is taken]
        modules = (self.submodules.get(str(node.target)) for node in bodies)
        found = (x for x in modules if isinstance(x, GraphModule) and x.graph in self._context.sites)
        return next(found, None)

    def _through(self, n: Node, body: GraphModule, inputs: Sequence[Any]) -> Any:
        """A region such as a checkpointed one: its body runs under what the operator runs it under."""
        given = (self.env[x] if isinstance(x, Node) else x for x in inputs)
        with ExitStack() as stack:
            for autocast in Region(None).within(n).autocasts:
                stack.enter_context(torch.autocast(*autocast))
            return _Run(body, self._context).run(*given)


# ---------------------------------------------------------------------------------------------- one site


def _checked(trial: _Trial) -> Check:
    try:
        return trial.check()
    except Exception as raised:
        if not is_out_of_memory(raised):
            return Check(verdict=f"could not be verified: {type(raised).__name__}: {raised}")
        where = trial.planned.plan.report.place
        warnings.warn(f"attn_rewriter can't verify the attention at {where}: out of memory", stacklevel=2)
        return Check()


@dataclass(frozen=True)
class _Trial:
    """A site that a run has come to the end of: what went into it, and the ways to compute what comes out."""

    run: Interpreter
    planned: _Planned
    values: Mapping[Node, Any]
    context: _Context

    @property
    def found(self) -> Description:
        return self.planned.plan.found

    @property
    def _product(self) -> torch.dtype:
        return self.found.shapes.product_dtype or self.found.shapes.dtype

    @property
    def output(self) -> Tensor:
        """Of the run, in the model's own type and layout."""
        held: Tensor = self.values[self.planned.plan.site.output]
        return held

    def check(self) -> Check:
        """The errors of the site, and whether they keep the contract."""
        if self.output.dtype == torch.float64 or not self.output.numel():  # there is nothing more exact, or nothing
            return Check()
        looked = self.look()
        looks = [looked]
        while not all(worst(squares).holds for squares in looked.values()) and len(looks) < _LOOKS:
            # A few elements' error is mostly luck, and so is eager code's where everything cancels.
            looks.append(self.look(again=True))
            looked = {what: torch.stack([look[what] for look in looks]).mean(0) for what in looked}
        judged = {what: worst(squares) for what, squares in looked.items() if squares.any()}
        errors = tuple((what, found.error, found.eager) for what, found in judged.items())
        for what, found in judged.items():
            if not found.holds:
                off = f"is off by {found.error:.3g} in its {what}, where {found.allowed:.3g} is allowed"
                return Check(errors, off)
        return Check(errors)

    def look(self, again: bool = False) -> dict[str, Tensor]:
        """What is to be judged; `again`, with inputs that are moved a little, and where eager code may lose as much as
        the terms of its gradients do."""
        values = self.moved() if again else self.values
        way = torch.randn_like(self.output) if self.output.is_floating_point() else self.output
        way = way if self.specified is None else way * self.specified
        computed = (
            self.with_gradients(self.fused, values, way),
            self.with_gradients(self.eager, values, way),
            self.with_gradients(self.eager, values, way, wide=True),
        )
        outputs, *gradients = zip(*computed)
        looked = {"output": _measured(*outputs, self.specified)}
        if gradients:
            looked["gradients"] = torch.cat([_measured(*held) for held in gradients], dim=1)
        if gradients and again:
            with _Terms():
                _, *terms = self.with_gradients(self.eager, values, way)
                _, *truths = self.with_gradients(self.eager, values, way, wide=True)
            least = torch.cat([_measured(x, x, truth) for x, truth in zip(terms, truths)], dim=1)
            looked["gradients"][1:] = torch.maximum(looked["gradients"], least)[1:]
        return looked

    def fused(self, values: Mapping[Node, Any]) -> Tensor:
        """By the kernel."""
        plan, kernels, size = self.planned.plan, self.context.kernels, self.context.size
        spec, shapes = replace(self.found.spec, dropout_p=0.0), self.found.shapes
        operands = dict(self.operands(values))
        held = [*operands.values()]
        key = plan.kernel.name, spec, shapes, *(map(_like, held))
        if key not in kernels:
            kernels[key] = by_itself(plan.kernel, spec, shapes, plan.device, operands, size)
        return self.as_output(kernels[key](*held)).to(self.output.dtype)

    def eager(self, values: Mapping[Node, Any]) -> Tensor:
        """By the model's own operations."""
        with WithoutDropout():
            held: Tensor = self.planned.inside.run(values)
        return held

    def with_gradients(
        self,
        function: Callable[[Mapping[Node, Any]], Tensor],
        values: Mapping[Node, Any],
        way: Tensor,
        wide: bool = False,
    ) -> list[Tensor]:
        """A result, and its gradients for the operands that want one, zero where they are missed; or, `wide`, these in
        float64."""
        leaves = {node: self.leaf(node, values[node], wide) for node in self.planned.inside.needs}
        wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
        needs_backward = self.found.shapes.needs_backward
        exactly = widened(self.output.device.type, self._product) if wide else nullcontext()
        with exactly, torch.set_grad_enabled(needs_backward):
            result = function(leaves)
            if not wanted or not needs_backward:
                return [result.detach()]
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if result.requires_grad:
                gradients = torch.autograd.grad(result, wanted, way.to(result.dtype), allow_unused=True)
            held = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients)]
            return [result.detach(), *(g.to(result.dtype) for g in held)]

    def leaf(self, node: Node, x: Any, wide: bool) -> Any:
        """A copy of a value, which wants a gradient where the site is trained for it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        like = tensor(node)
        x = x.detach().double() if wide else x.detach().clone()
        return x.requires_grad_(node in self.planned.inside.roots and like is not None and like.requires_grad)

    def moved(self) -> Mapping[Node, Any]:
        """Query, key and value moved at random by a rounding unit, which rounds all that follows otherwise."""
        nodes = {self.found.operands[name].node for name in ("query", "key", "value")} & self.values.keys()
        held = {node: x for node in nodes if (x := self.values[node]).is_floating_point()}
        moved = {node: x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x)) for node, x in held.items()}
        return {**self.values, **moved}

    def operands(self, values: Mapping[Node, Any]) -> Operands:
        """As kernels take them."""

        def of(node: Any) -> Any:
            return self.planned.inside.run(values, node) if isinstance(node, Node) else node

        return Operands(self.found, of, lambda x, dtype: x.to(dtype), self.context.size)

    def as_output(self, result: Tensor) -> Tensor:
        """A tensor in the layout of kernels as the site's output has it."""
        layout = steps(self.found.layout.of("output"), self.found.output)
        arranged: Tensor = arrange(result, layout, self.context.size)
        return arranged

    @cached_property
    def specified(self) -> Tensor | None:
        """Which elements of the output are specified, being of rows with a key; None where all are."""
        spec, shapes, operands = self.found.spec, self.found.shapes, self.operands(self.values)
        seen = [keep_mask([m for m in spec.modifiers if isinstance(m, Mask)], shapes, operands)]
        # A row that a bias hides as a whole: float64 still tells its scores apart.
        biases = [(str(m.tensor), m.factor) for m in spec.modifiers if isinstance(m, Bias)]
        seen += [x > hidden_from(x.dtype) / 2 for x in bias_terms(biases, operands)]
        kept = [x for x in seen if x is not None]
        if not kept or spec.sinks is not None:
            return None
        sizes = map(self.context.size, (shapes.batch, shapes.num_heads, shapes.q_len, shapes.head_dim_v))
        return self.as_output(reduce(and_, kept).any(-1, keepdim=True).expand(*sizes))


def _measured(fused: Tensor, eager: Tensor, truth: Tensor, specified: Tensor | None = None) -> Tensor:
    """What is to be judged of a kernel's result, eager code's and the truth, all zero where nothing is known. Of what
    is not specified, it is known that it is finite."""
    known = truth.isfinite() & eager.isfinite()
    known = known if specified is None else known & (specified | ~fused.isfinite())
    fused, eager, truth = (x.where(known, 0) for x in (fused, eager, truth))
    return measured(fused, eager, truth).cpu()


def _like(x: Any) -> Any:
    """What a kernel is prepared for."""
    return (x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x


# ---------------------------------------------------------------------------------------------- the truth


class _Terms(TorchDispatchMode):
    """Computes a softmax from the logsumexp of its scores, as fused kernels do in their backward pass, and its gradient
    without what is subtracted: nearly all where a weight is nearly 1, but these subtract what was rounded otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._softmax.default:
            scores, dim, is_float = args
            wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
            weights = (wide - wide.logsumexp(dim, keepdim=True)).exp()
            return weights if is_float else weights.to(scores.dtype)
        if func is torch.ops.aten._softmax_backward_data.default:
            return (args[0] * args[1]).to(args[3])
        return func(*args, **(kwargs or {}))
