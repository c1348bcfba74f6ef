"""From a site to what it computes: an `AttentionSpec`, its shapes, and where its operands are in the graph.

One walk goes backwards from the value product through the softmax to the score product. A rule of `patterns/` peels
off each operation on the way; the axes of every tensor are tracked, so that views need no rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from attn_rewriter.context_parallel import ring
from attn_rewriter.errors import Refusal, Refused, refuse
from attn_rewriter.find import Site
from attn_rewriter.graph import (
    Call,
    Facts,
    describe_node,
    graph_break,
    guarded,
    is_inplace,
    is_pure,
    looks_at_shape_only,
    shape,
    tensor,
)
from attn_rewriter.patterns.axes import Atom, Dim, Dims, backward, extent, fresh, leaves
from attn_rewriter.patterns.masks import MaskReader, axes
from attn_rewriter.patterns.match import Matcher
from attn_rewriter.patterns.operands import Factor, Operand, Product, State, available, product, trace
from attn_rewriter.patterns.rule import Column, Dropout, Fill, Rules, Shift, Zeroed
from attn_rewriter.patterns.scores import scores
from attn_rewriter.patterns.weights import weights
from attn_rewriter.spec import (
    MASKED,
    AttentionSpec,
    Band,
    Bias,
    Clamp,
    Mask,
    Modifier,
    Predicate,
    Scale,
    ScaleBy,
    Shapes,
    Size,
    Softcap,
    at_most,
    conjunction,
    is_masking,
    same,
)


@dataclass(frozen=True)
class Layout:
    """The axes of a site. Batch and heads may be several axes of the model's tensors, or none."""

    batch: Dim
    kv_head: Dim
    group: Dim
    query: Dim
    key: Dim
    head_dim: Dim
    head_dim_v: Dim

    @property
    def head(self) -> Dim:
        return self.kv_head + self.group

    def of(self, name: str) -> Dims:
        """The layout of an operand: "query", "key", "value", "output", or anything that broadcasts to the scores."""
        layouts = {
            "query": (self.batch, self.head, self.query, self.head_dim),
            "key": (self.batch, self.kv_head, self.key, self.head_dim),
            "value": (self.batch, self.kv_head, self.key, self.head_dim_v),
            "output": (self.batch, self.head, self.query, self.head_dim_v),
        }
        return layouts.get(name, (self.batch, self.head, self.query, self.key))


@dataclass(frozen=True)
class Description:
    """A site, read. `operands` maps the spec's names, and query, key and value, to the graph; `output` are the
    dimensions of the site's output; `interior` are the nodes that become dead with it. `shapes.kv_len` counts the keys
    up to the last one that is seen: of a static cache, a prompt sees as many as it has queries."""

    spec: AttentionSpec
    shapes: Shapes
    operands: dict[str, State]
    layout: Layout
    output: Dims
    interior: tuple[Node, ...]


def describe(site: Site, facts: Facts) -> Description | Refusal:
    """Read a site, or say why it can't be read."""
    try:
        if facts.is_transformed(site.output):
            refuse("describe", "the attention is inside a transform of torch.func", site.output)
        reading = _Reading(site, facts)
        return reading.sdpa() if site.kind == "sdpa" else reading.softmax()
    except Refused as refused:
        return refused.refusal


Steps = tuple[tuple[Any, Dims], ...]
_PRODUCT = ("query", "key", "value")


@dataclass(frozen=True)
class _Chain:
    """A walk backwards that arrived: at `node`, with the dimensions `dims`, having looked through `nodes` and peeled
    off `steps`, each with the dimensions of the tensor it applies to, in the order in which they are computed."""

    node: Node
    dims: Dims
    steps: Steps
    nodes: tuple[Node, ...]


class _Reading:
    """One site being read: what was found so far."""

    def __init__(self, site: Site, facts: Facts) -> None:
        self.site, self.facts = site, facts
        self.reader = MaskReader(facts, site.output)
        self.matcher = Matcher(facts, self.reader.constant)
        self.operands: dict[str, Operand] = {}
        self.kept: list[Predicate] = []  # by the masks, with the graph's tensors
        self.depth, self.refusal = -1, Refusal("describe", "nothing could be read", site.anchor)

    # -- the two kinds of sites ---------------------------------------------------------------------------------

    def softmax(self) -> Description:
        """`weights @ value`, with the weights from a softmax over the axis that this product contracts."""
        found = product(self.site.output, self.facts.call(self.site.output), self.reader.constant)
        if found is None or found.steps or len(found.contracted) != 1:
            refuse("describe", "the value product can't be read", self.site.output)
        dims = found.labelled(fresh(shape(found.node)))
        for factor in (found.left, found.right):
            own = tuple(dims[label] if label is not None else () for label in factor.labels)
            weights_node = self.facts.current(factor.value, found.node)
            for after in self._walk(weights_node, own, weights, lambda node, _: node is self.site.anchor):
                value = found.other(factor)
                self._check_weights(found, factor, dims, after)
                return self._before_softmax(found, value, dims, after)
        raise Refused(self.refusal)

    def _check_weights(self, found: Product, factor: Factor, dims: dict[Any, Dim], after: _Chain) -> None:
        """The softmax must run over the keys, and each weight meet each value once."""
        assert self.site.softmax is not None
        if leaves(after.dims[self.site.softmax.dim]) != leaves(dims[found.contracted[0]]):
            refuse("describe", "the softmax runs over another axis than the value product contracts", self.site.anchor)
        if sum(label not in factor.labels for label in found.out) > 1:
            refuse("describe", "the weights are broadcast over several sets of values", found.node)

    def _before_softmax(self, found: Product, value: Factor, dims: dict[Any, Dim], after: _Chain) -> Description:
        assert self.site.softmax is not None
        self.depth = -1
        for before in self._walk(self.site.softmax.input, after.dims, scores, self._is_product):
            scored = product(before.node, self.facts.call(before.node), self.reader.constant)
            assert scored is not None
            return self._between(scored, before, found, value, dims, after)
        raise Refused(self.refusal)

    def _is_product(self, node: Node, call: Call | None) -> bool:
        return product(node, call, self.reader.constant) is not None

    def _between(
        self, scored: Product, before: _Chain, found: Product, value: Factor, dims: dict[Any, Dim], after: _Chain
    ) -> Description:
        """Both products are known: tell query from key, and the axes from each other."""
        assert self.site.softmax is not None
        self._check_interior((*after.nodes, *self.site.softmax.nodes), before.nodes)
        key_dim = leaves(dims[found.contracted[0]])
        axes = scored.labelled(before.dims)
        rows = [
            x
            for x in scored.out
            if leaves(axes[x]) == key_dim and (x in scored.left.labels) != (x in scored.right.labels)
        ]
        key = scored.left if rows and rows[-1] in scored.left.labels else scored.right
        query = scored.other(key)
        if not rows or rows[-1] in query.labels:
            refuse("describe", "the softmax runs over an axis that is not the keys'", scored.node)
        rest = [x for x in scored.out if x != rows[-1]]
        query_rows = [x for x in rest if x not in key.labels][-1:]
        self._product_operand("query", query, axes, scored.node, scaled=True)
        self._product_operand("key", key, axes, scored.node, scaled=True)
        self._product_operand("value", value, dims, found.node)
        return self._finish(
            steps=(*((step, before.dims) for step in scored.steps), *before.steps),
            after=after.steps,
            sink=self.site.softmax.sink,
            batch=[axes[x] for x in rest if x not in query_rows],
            named={
                "query": sum((axes[x] for x in query_rows), ()),
                "key": key_dim,
                "head_dim": sum((axes[x] for x in scored.contracted), ()),
                "head_dim_v": sum((dims[x] for x in found.out if x not in found.other(value).labels), ()),
            },
            output=tuple(dims[x] for x in found.out),
            interior=(*after.nodes, *self.site.softmax.nodes, *before.nodes),
            score_dtype=tensor(scored.node).dtype,  # type: ignore[union-attr]
        )

    def sdpa(self) -> Description:
        """`F.scaled_dot_product_attention` says what it computes; what is left to read is its mask and its heads."""
        node = self.site.anchor
        call = self.facts.call(node)
        assert call is not None
        q, k, v, attn_mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
        known, dropout_p = (self.reader.constant(call[name], node) for name in ("scale", "dropout_p"))
        scale: Any = call["scale"] if known is None else known
        if any(tensor(x) is None for x in (q, k, v)) or dropout_p is None:
            refuse("describe", "an argument of the call is not known", node)
        if len(shape(q)) < 3 or (scale is None and not isinstance(shape(q)[-1], int)):
            refuse("describe", "the call's shape or scale is not known", node)
        if call["enable_gqa"] and not same(shape(k)[-3], shape(v)[-3]):
            refuse("describe", "key and value have different numbers of heads", node)
        out = fresh(shape(node))
        head_dim, kv = fresh([shape(q)[-1], shape(k)[-2]])
        ndim = len(out)
        dims: dict[Any, Dim] = dict(enumerate(out)) | {"head_dim": head_dim, "key": kv}
        heads, kv_heads = (shape(q)[-3], shape(k)[-3]) if call["enable_gqa"] else (1, 1)
        if not same(heads, kv_heads) and not same(kv_heads, 1):
            if not (isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0):
                refuse("describe", "the numbers of heads are not known", node)
            out[-3][0].split(kv_heads, heads // kv_heads)
            dims["kv_head"] = leaves(out[-3])[:1]

        def operand(name: str, value: Node, *last: Any) -> None:
            labels: list[Any] = [*range(ndim - len(shape(value)), ndim - 2), *last]
            if name != "query" and "kv_head" in dims:
                labels[-3] = "kv_head"
            labels = [None if same(n, 1) else label for n, label in zip(shape(value), labels)]
            self._product_operand(name, Factor(value, tuple(labels)), dims, node, scaled=name != "value")

        operand("query", q, ndim - 2, "head_dim")
        operand("key", k, "key", "head_dim")
        operand("value", v, "key", ndim - 1)
        if scale is None:
            scale = shape(q)[-1] ** -0.5
        steps: list[Any] = [ScaleBy(scale) if isinstance(scale, Node) else Scale(scale)]
        if call["is_causal"]:
            steps.append(Mask(None, Band(None, 0), "keep"))
        if attn_mask is not None:
            mask = self.facts.current(attn_mask, node)
            is_bool = tensor(mask).dtype == torch.bool  # type: ignore[union-attr]
            steps.append(Fill(mask, float("-inf"), keep=True) if is_bool else Bias(mask))
        return self._finish(
            steps=tuple((step, (*out[:-1], kv)) for step in steps),
            after=((Dropout(dropout_p), (*out[:-1], kv)),) if dropout_p else (),
            batch=[*out[:-2]],
            named={"query": out[-2], "key": kv, "head_dim": head_dim, "head_dim_v": out[-1]},
            output=out,
            interior=(),
            score_dtype=tensor(node).dtype,  # type: ignore[union-attr]
        )

    # -- walking ------------------------------------------------------------------------------------------------

    def _walk(
        self,
        node: Node,
        dims: Dims,
        rules: Rules,
        arrived: Callable[[Node, Call | None], bool],
        steps: Steps = (),
        nodes: tuple[Node, ...] = (),
    ) -> Iterator[_Chain]:
        """Every way back from `node` to where the walk has arrived."""
        call = self.facts.call(node)
        if arrived(node, call):
            yield _Chain(node, dims, steps, (*nodes, node))
            return
        if len(nodes) > self.depth:
            self.depth = len(nodes)
            self.refusal = Refusal("describe", f"no rule reads {describe_node(node)} at this place", node)
        if (held := tensor(node)) is not None and not held.is_floating_point():
            return  # rounded to integers
        into = backward(call, node, dims) if call is not None else None
        if into is not None and call is not None:
            source = self.facts.current(call["input"], node)
            yield from self._walk(source, into, rules, arrived, steps, (*nodes, node))
            return
        for rule in rules:
            for bound in self.matcher.operation(rule.pattern, node, {}):
                read = bound.pop("nodes")
                peeled = rule.apply(**bound)
                if peeled is not None and self._fits(peeled[0], node, peeled[1:]):
                    found = tuple((step, dims) for step in peeled[1:])
                    yield from self._walk(peeled[0], dims, rules, arrived, found + steps, (*nodes, *read))

    @staticmethod
    def _fits(a: Node, b: Node, steps: Sequence[Any]) -> bool:
        """Whether the dimensions of `b` are those of `a`, from which it was made. A column beside the keys does not
        count: the keys' axis is that of the keys alone."""
        end = -1 if any(isinstance(step, Column) for step in steps) else None
        return len(shape(a)) == len(shape(b)) and all(map(same, shape(a)[:end], shape(b)[:end]))

    def _check_interior(self, late: Sequence[Node], early: Sequence[Node]) -> None:
        """Everything between the score product and the output must serve this attention alone, and run as the fused
        call will."""
        nodes = (*late, *early, self.site.output)
        inside = set(nodes)
        for node in nodes:
            if self.facts.region(node) != self.facts.region(self.site.output):
                refuse("describe", "a part of the attention runs in another grad mode, autocast or context", node)
            if is_inplace(node) and node.args[:1] and node.args[0] not in inside:
                refuse("describe", f"{describe_node(node)} writes into a tensor from outside of the attention", node)
        for node in (*late, *early):
            for user in node.users:
                if user not in inside and not looks_at_shape_only(user, node):
                    what = "weights" if node in late else "scores"
                    is_output = user.op == "output"
                    how = f"returned{graph_break(user.graph)}" if is_output else f"used by {describe_node(user)}"
                    refuse("describe", f"the attention {what} are also {how}", user)

    # -- operands -----------------------------------------------------------------------------------------------

    def _product_operand(
        self, name: str, factor: Factor, dims: dict[Any, Dim], at: Node, *, scaled: bool = False
    ) -> None:
        own = tuple(dims[label] if label is not None else () for label in factor.labels)
        self._trace(name, self.facts.current(factor.value, at), own, scaled=scaled)

    def _score_operand(self, name: str, node: Node, dims: Dims) -> str:
        """Name a tensor that broadcasts to scores with `dims`."""
        sizes = shape(node)
        own = tuple(() if same(n, 1) else dim for n, dim in zip(sizes, dims[len(dims) - len(sizes) :]))
        name = f"{name}{sum(known.startswith(name) for known in self.operands)}"
        self._trace(name, node, own)
        return name

    def _trace(self, name: str, node: Node, dims: Dims, *, scaled: bool = False) -> None:
        stays = self.facts.lasts if name in _PRODUCT else self.facts.unchanged  # others can be copied
        if not stays(node, self.site.output):
            refuse("describe", f"{describe_node(node)} is modified in place after the attention read it", node)
        self.operands[name] = trace(self.facts, self.reader.constant, node, dims, self.site.output, scaled=scaled)

    # -- putting it together ------------------------------------------------------------------------------------

    def _finish(
        self,
        *,
        steps: Steps,
        after: Steps,
        batch: list[Dim],
        named: dict[str, Dim],
        output: Dims,
        interior: tuple[Node, ...],
        score_dtype: torch.dtype,
        sink: float | None = None,
    ) -> Description:
        steps, sinks = self._without_column(steps, after, named["key"], sink)
        steps = tuple(term for step in steps for term in self._terms(*step))
        after = tuple((step, dims) for step, dims in after if not isinstance(step, Column))
        names, late_names = ([self._register(step, dims) for step, dims in chain] for chain in (steps, after))
        layout = self._layout(batch, named)
        prescaled = self.operands["query"].origin.scale * self.operands["key"].origin.scale
        modifiers: list[Modifier] = [Scale(prescaled)]
        shifted = False
        for (step, dims), name in zip(steps, names):
            modifier = self._modifier(step, dims, name, score_dtype)
            if modifier is None:
                shifted = shifted or isinstance(step, Shift)
                continue
            if shifted and (isinstance(modifier, (Softcap, Clamp)) or getattr(modifier, "per_key", False)):
                refuse("describe", f"scores go through {modifier} after they were shifted", self.site.anchor)
            if any(isinstance(earlier, Mask) for earlier in modifiers):
                self._check_after_mask(modifier)
            modifiers = _followed_by(modifiers, modifier)
        dropout_p, gates, zeroed = self._after_softmax(after, late_names)
        spec = AttentionSpec(tuple(m for m in modifiers if m != Scale(1.0)), dropout_p, sinks, gates, zeroed)
        operands = {
            name: operand.best(layout.of(name), broadcast=name not in _PRODUCT)
            for name, operand in self.operands.items()
        }
        for name, state in operands.items():
            if not state.atoms <= {atom for dim in layout.of(name) for atom in leaves(dim)}:
                refuse("describe", f"the {name} has an axis that does not belong to it", state.node)
        shapes = self._shapes(spec, layout, operands, score_dtype)
        if ring() is None:  # else these are the keys of one process, and the mask is that of all
            shapes = replace(shapes, kv_len=spec.keep.reach(shapes.q_len, shapes.kv_len, self._at_most))
        return Description(spec, shapes, operands, layout, output, interior)

    def _at_most(self, a: Size, b: Size) -> bool:
        """Whether `a <= b`, now and for as long as this graph is called: other sizes are compiled anew."""
        return at_most(a, b) or (not at_most(b, a) and guarded(a, b, self.site.output))

    def _without_column(self, steps: Steps, after: Steps, key: Dim, sink: float | None) -> tuple[Steps, Any]:
        """The steps without the column of the sinks, and the sinks: a name, a number or None."""
        before = [i for i, (step, _) in enumerate(steps) if isinstance(step, Column)]
        dropped = [(step, dims) for step, dims in after if isinstance(step, Column)]
        if not before and not dropped:
            if sink is not None and any(isinstance(step, Shift) for step, _ in steps):
                refuse("describe", "scores are shifted before a softmax with a constant sink", self.site.anchor)
            return steps, sink
        if not (len(before) == len(dropped) == 1) or sink is not None:
            refuse("describe", "a column that stands beside the keys is not taken away again", self.site.anchor)
        (i,) = before
        column, dims = steps[i]
        if column.side != dropped[0][0].side or any(leaves(d[-1]) != leaves(key) for d in (dims, dropped[0][1])):
            refuse("describe", "another column is taken away than was put beside the keys", self.site.anchor)
        together = [step for step, _ in steps[i + 1 :]] + [s for s, _ in after[: after.index(dropped[0])]]
        if not all(isinstance(step, (Shift, Dropout)) for step in together):
            refuse("describe", "more is done to scores and sinks together than a softmax", self.site.anchor)
        if any(isinstance(step, Shift) for step, _ in steps[:i]):
            refuse("describe", "scores are shifted before sinks stand beside them", self.site.anchor)
        sinks = column.sinks
        if isinstance(sinks, Node):
            sinks = self._score_operand("sinks", sinks, dims)
        return steps[:i] + steps[i + 1 :], sinks

    def _terms(self, step: Any, dims: Dims) -> Steps:
        """A bias that is a sum (T5's positions and mask), as its terms."""
        call = self.facts.call(step.tensor) if isinstance(step, Bias) and step.factor == 1 else None
        if call is None or call.name != "add" or call["alpha"] != 1:
            return ((step, dims),)
        terms = [available(self.facts, call[side], step.tensor, self.site.output) for side in ("input", "other")]
        if any(term is None or tensor(term).dtype != tensor(step.tensor).dtype for term in terms):  # type: ignore[union-attr]
            return ((step, dims),)
        return tuple(part for term in terms for part in self._terms(Bias(term), dims))

    def _after_softmax(self, after: Steps, names: list[str | None]) -> tuple[float, tuple[ScaleBy, ...], bool]:
        """What the weights go through: the dropout, the gates, and whether rows without any key are zero."""
        dropouts, gates, zeroed = [], [], False
        for (step, _), name in zip(after, names):
            match step:
                case Dropout(p):
                    dropouts.append(p)
                case ScaleBy() if name is None:
                    gates.append(step)
                case ScaleBy():
                    origin = self.operands[str(name)].origin
                    if any(atom.axis == "key" for atom in origin.atoms):
                        refuse("describe", "weights are multiplied by a tensor that varies over the keys", origin.node)
                    gates.append(ScaleBy(name, step.inverse))
                case Zeroed():
                    if step.condition is not None:
                        self._check_zeroed(step, str(name))
                    zeroed = True
        if len(dropouts) > 1:
            refuse("describe", "the weights are dropped out twice", self.site.anchor)
        return sum(dropouts), tuple(gates), zeroed

    def _check_zeroed(self, step: Zeroed, name: str) -> None:
        """Weights may be set to zero after the softmax where the scores were masked before it."""
        operand = self.operands.pop(name).origin
        read = self.reader.boolean(operand.node, operand.dims)
        kept, before = read if step.keep else ~read, conjunction(self.kept)
        kept, before = (p.rename({held: self._meaning(*held) for held in p.tensors()}) for p in (kept, before))  # type: ignore[misc]
        if conjunction((before, kept)) != before:
            refuse("describe", "weights are set to zero after the softmax that were not masked before", operand.node)

    def _meaning(self, node: Node, dims: Dims) -> str:
        """The same for two tensors with the same elements, such as `mask == 0` where it is computed twice."""
        known: dict[Node, str] = {}

        def spelled(node: Node) -> str:
            if node not in known:
                known[node] = node.name
                if is_pure(node) and self.facts.unchanged(node):
                    known[node] = f"{node.target}{map_arg((node.args, node.kwargs), spelled)}"
            return known[node]

        return f"{spelled(node)} {dims}"

    def _check_after_mask(self, modifier: Modifier) -> None:
        """What is done to scores after they were masked must leave the masked ones so low that nobody attends."""
        match modifier:
            case ScaleBy():
                refuse("describe", "scores are scaled by a tensor after a mask", self.site.anchor)
            case Scale(factor) if not factor * MASKED < -1e3:
                refuse("describe", f"scores are scaled by {factor:g} after a mask", self.site.anchor)
            case Softcap():
                refuse("describe", f"scores go through {modifier} after a mask", self.site.anchor)
            case Clamp(lower) if not lower < -1e3:
                refuse("describe", f"scores go through {modifier} after a mask", self.site.anchor)

    def _register(self, step: Any, dims: Dims) -> str | None:
        match step:
            case Fill():
                return self._score_operand("mask", step.condition, dims)
            case Zeroed() if step.condition is not None:
                return self._score_operand("zeroed", step.condition, dims)
            case Bias(tensor=node):
                return self._score_operand("bias", node, dims)  # type: ignore[arg-type]
            case ScaleBy(factor=Node()):
                return self._score_operand("scale", step.factor, dims)  # type: ignore[arg-type]
        return None

    def _modifier(self, step: Any, dims: Dims, name: str | None, score_dtype: torch.dtype) -> Modifier | None:
        """A step as a modifier of the spec: its tensor by name, and read as a mask where it is one. None where it
        changes nothing."""
        if isinstance(step, Shift):
            self._check_shift(step, dims)
            return None
        if isinstance(step, Clamp):
            lower = -math.inf if is_masking(step.lower, score_dtype) else step.lower
            return None if (lower, step.upper) == (-math.inf, math.inf) else Clamp(lower, step.upper)
        if name is None:
            return step
        origin = self.operands[name].origin
        if isinstance(step, Fill):
            if not is_masking(step.value, score_dtype):
                refuse("describe", f"scores are filled with {step.value:g}, which is no mask", origin.node)
            read = self.reader.boolean(origin.node, origin.dims)
            return self._mask(name, read if step.keep else ~read, "keep" if step.keep else "drop", origin)
        if isinstance(step, Bias):
            dtype = torch.promote_types(score_dtype, self.operands[name].states[0].dtype or score_dtype)
            kept = self.reader.additive(origin.node, origin.dims, dtype) if step.factor == 1 else None
            if kept is not None:
                return self._mask(name, kept, "additive", origin)
            return Bias(name, step.factor, axes(origin.dims))
        return ScaleBy(name, step.inverse, any(atom.axis == "key" for atom in origin.atoms))

    def _mask(self, name: str, kept: Predicate, form: str, origin: State) -> Mask:
        self.kept.append(kept)
        return Mask(name, self._named(kept, name, origin), form)

    def _check_shift(self, step: Shift, dims: Dims) -> None:
        """What is taken off the scores must be the same for all keys of a row."""
        if isinstance(step.by, Node):
            sizes = shape(step.by)
            own = [dim for n, dim in zip(sizes, dims[len(dims) - len(sizes) :]) if not same(n, 1)]
            if any(atom.axis == "key" for dim in own for atom in leaves(dim)):
                refuse("describe", "scores are shifted by a tensor that varies over the keys", step.by)

    def _named(self, keep: Predicate, mask: str, origin: State) -> Predicate:
        """Give the tensors inside a predicate names: the mask's own to the one that is the whole mask."""
        names: dict[Any, str] = {}
        held: Any
        for held in keep.tensors():
            if held not in names:
                node, dims = held
                names[held] = mask if node is origin.node else f"{mask}.{len(names)}"
                self.operands.setdefault(names[held], Operand((State(node, dims),)))
        return keep.rename(names)

    def _layout(self, batch: list[Dim], named: dict[str, Dim]) -> Layout:
        """Tell batch from heads. Heads that key and value both lack are the groups of GQA and MQA."""
        dims = [leaves(dim) for dim in batch]
        held = self.operands["key"].origin.atoms | self.operands["value"].origin.atoms
        if len(dims) == 1 and len(dims[0]) > 1:  # [batch * heads, …]
            dims = [dims[0][:1], dims[0][1:]]
        group = tuple(atom for dim in dims[1:] for atom in dim if atom not in held)
        dims = [tuple(atom for atom in dim if atom not in group) for dim in dims]
        while group and len(dims) > 2 and not dims[-1]:
            dims.pop()
        kv_head = dims.pop() if len(dims) > 1 else ()
        layout = Layout(sum(dims, ()), kv_head, group, **{name: leaves(dim) for name, dim in named.items()})
        for axis in ("batch", "head", *named):
            atoms: Sequence[Atom] = getattr(layout, axis)
            for i, atom in enumerate(atoms):
                atom.name = axis if len(atoms) == 1 else f"{axis}/{i}"
        return layout

    def _shapes(
        self, spec: AttentionSpec, layout: Layout, operands: dict[str, State], score_dtype: torch.dtype
    ) -> Shapes:
        output = tensor(self.site.output)
        assert output is not None
        # Under autocast a product runs in a narrower type than its operands have, and an SDPA call has its mask in it
        # as well; exact casts were peeled off.
        used = {"query": score_dtype, "key": score_dtype, "value": output.dtype}
        if self.site.kind == "sdpa" and self.facts.autocast(self.site.output, output.device.type) is not None:
            used |= dict.fromkeys(spec.numeric, output.dtype)
        dtypes: list[torch.dtype] = [output.dtype]
        wide: list[torch.dtype] = []
        learned: list[str] = []
        for name, state in operands.items():
            if name in spec.numeric and (like := tensor(state.node)) is not None and like.requires_grad:
                learned.append(name)
            if state.dtype is not None and (name in used or name in spec.numeric):
                narrower = name in used and torch.promote_types(state.dtype, used[name]) != used[name]
                (dtypes if name in _PRODUCT else wide).append(used[name] if narrower else state.dtype)
        if not all(dtype.is_floating_point for dtype in (*dtypes, *wide)):
            refuse("describe", "an operand is not a floating-point tensor", self.site.output)
        product_dtype = reduce(torch.promote_types, dtypes)
        return Shapes(
            batch=extent(leaves(layout.batch)),
            num_heads=extent(leaves(layout.head)),
            num_kv_heads=extent(leaves(layout.kv_head)),
            q_len=extent(leaves(layout.query)),
            kv_len=extent(leaves(layout.key)),
            head_dim=extent(leaves(layout.head_dim)),
            head_dim_v=extent(leaves(layout.head_dim_v)),
            dtype=reduce(torch.promote_types, wide, product_dtype),
            product_dtype=product_dtype,
            needs_backward=output.requires_grad,
            learned=tuple(sorted(learned)) if output.requires_grad else (),
        )


def _followed_by(modifiers: list[Modifier], modifier: Modifier) -> list[Modifier]:
    """Modifiers with one more at the end. Scales and clamps are joined with the one before; a scale also across a
    cap: `factor * cap * tanh(x / cap)` is a cap of `factor * cap` on `factor * x`."""
    *rest, last = modifiers or [Scale(1.0)]
    if isinstance(modifier, Scale):
        if isinstance(last, Scale):
            return [*rest, Scale(last.factor * modifier.factor)]
        if isinstance(last, Softcap) and modifier.factor > 0:
            return [*_followed_by(rest, modifier), Softcap(last.cap * modifier.factor)]
    if isinstance(modifier, Clamp) and isinstance(last, Clamp):
        low, high = (min(max(x, modifier.lower), modifier.upper) for x in (last.lower, last.upper))
        return [*rest, Clamp(low, high)]
    return [*rest, last, modifier]
