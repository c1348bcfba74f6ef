"""From a site to what it computes: an `AttentionSpec`, its shapes, and where its operands are in the graph.

One walk goes backwards from the value product through the softmax to the score product. A rule of `patterns/` peels
off each operation on the way; the axes of every tensor are tracked, so that views need no rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from attn_rewriter.buffers import Buffer, buffer_of
from attn_rewriter.context_parallel import ring
from attn_rewriter.errors import Refusal, Refused, refuse
from attn_rewriter.find import Site
from attn_rewriter.graph import (
    Call,
    Facts,
    describe_node,
    graph_break,
    guarded,
    holds,
    is_inplace,
    is_pure,
    looks_at_shape_only,
    shape,
    tensor,
)
from attn_rewriter.hidden import (
    SWALLOWED,
    Done,
    NotHidden,
    Zeroing,
    fully_masked_rows,
    hidden_from,
    is_masking,
    levels,
    swallows,
)
from attn_rewriter.patterns.axes import Atom, Dim, Dims, backward, extent, fresh, leaves
from attn_rewriter.patterns.masks import LONGEST, MaskReader, axes
from attn_rewriter.patterns.match import Matcher
from attn_rewriter.patterns.operands import Factor, Operand, Product, State, available, product, trace
from attn_rewriter.patterns.rule import Column, Dropout, Fill, Rules, Shift, Zeroed
from attn_rewriter.patterns.scores import scores
from attn_rewriter.patterns.weights import weights
from attn_rewriter.spec import (
    AXES,
    AttentionSpec,
    Band,
    Bias,
    Clamp,
    FullyMasked,
    Mask,
    Modifier,
    Predicate,
    Scale,
    ScaleBy,
    Shapes,
    Size,
    Softcap,
    Values,
    at_most,
    conjunction,
    every_row_sees_a_key,
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
        if facts.is_in_inference_mode(site.output):
            refuse("describe", "the graph enters inference mode around the attention", site.output)
        reading = _Reading(site, facts)
        return reading.sdpa() if site.kind == "sdpa" else reading.softmax()
    except Refused as refused:
        return refused.refusal


class Step(NamedTuple):
    """What is done to scores or weights, the dimensions of the tensor it is done to, and the type of its result."""

    what: Any
    dims: Dims
    dtype: torch.dtype


Steps = tuple[Step, ...]
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
        self._check_precision((*self.site.softmax.nodes, *before.nodes), _dtype(before.node))
        self._check_precision(after.nodes, _dtype(found.node))
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
            steps=(*(Step(step, before.dims, _dtype(scored.node)) for step in scored.steps), *before.steps),
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
            score_dtype=_dtype(scored.node),
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
            is_bool = _dtype(mask) == torch.bool
            steps.append(Fill(mask, float("-inf"), keep=True) if is_bool else Bias(mask))
        return self._finish(
            steps=tuple(Step(step, (*out[:-1], kv), _dtype(node)) for step in steps),
            # PyTorch's softmax here is a safe one: a row of minus infinities gives zeros.
            after=tuple(
                Step(step, (*out[:-1], kv), _dtype(node))
                for step in (Zeroed(), *([Dropout(dropout_p)] if dropout_p else ()))
            ),
            batch=[*out[:-2]],
            named={"query": out[-2], "key": kv, "head_dim": head_dim, "head_dim_v": out[-1]},
            output=out,
            interior=(),
            score_dtype=_dtype(node),
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
                    found = tuple(Step(step, dims, _dtype(node)) for step in peeled[1:])
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

    @staticmethod
    def _check_precision(nodes: Sequence[Node], product: torch.dtype) -> None:
        """What lies between the products may be of a wider type than they are, but of no narrower one: a cast to that
        loses more than eager code does elsewhere, and is a part of the model, as fake quantisation is."""
        for node in nodes:
            held = tensor(node)
            if held is not None and not holds(held.dtype, product):
                name = str(held.dtype).removeprefix("torch.")
                refuse("describe", f"{describe_node(node)} rounds to {name}, which is narrower than the products", node)

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
        steps = tuple(term for step in steps for term in self._terms(step))
        after = tuple(step for step in after if not isinstance(step.what, Column))
        names, late_names = ([self._register(step) for step in chain] for chain in (steps, after))
        layout = self._layout(batch, named)
        prescaled = self.operands["query"].origin.scale * self.operands["key"].origin.scale
        modifiers: list[Modifier] = [Scale(prescaled)]
        done: list[Done] = []
        shifted = False
        for step, name in zip(steps, names):
            modifier = self._modifier(step, name, score_dtype)
            # A clamp that changes no score that is seen still changes where hidden ones end.
            # PyTorch's own attention adds in float32 at least, where float16's lowest number swallows no score.
            dtype = step.dtype if self.site.softmax else torch.promote_types(step.dtype, torch.float32)
            done.append(Done(step.what if isinstance(step.what, Clamp) else modifier, dtype))
            if modifier is None:
                shifted = shifted or isinstance(step.what, Shift)
                continue
            if shifted and (isinstance(modifier, (Softcap, Clamp)) or getattr(modifier, "per_key", False)):
                refuse("describe", f"scores go through {modifier} after they were shifted", self.site.anchor)
            modifiers = _followed_by(modifiers, modifier)
        dropout_p, gates, zeroing = self._after_softmax(after, late_names)
        stable = self._is_stable(steps, done)
        if not stable and any(self._overflows(step, each.modifier) for step, each in zip(steps, done)):
            refuse("describe", "a number is added to scores whose exponentials may overflow by it", self.site.anchor)
        empty = self._fully_masked_rows(done, zeroing, layout, stable, sinks)
        modifiers = _without_idle_masks([m for m in modifiers if m != Scale(1.0)])
        spec = AttentionSpec(tuple(modifiers), dropout_p, sinks, gates, empty)
        operands = {
            name: operand.best(layout.of(name), broadcast=name not in _PRODUCT)
            for name, operand in self.operands.items()
        }
        for name, state in operands.items():
            if not state.atoms <= {atom for dim in layout.of(name) for atom in leaves(dim)}:
                refuse("describe", f"the {name} has an axis that does not belong to it", state.node)
        shapes = self._shapes(spec, layout, operands, score_dtype)
        # Within a ring these are the keys of one process, and the mask is that of all. And the mean of all values is
        # that of the last ones, too.
        if ring() is None and empty in ("impossible", "zeros", "nan"):
            shapes = replace(shapes, kv_len=spec.keep.reach(shapes.q_len, shapes.kv_len, self._at_most))
        return Description(spec, shapes, operands, layout, output, interior)

    def _overflows(self, step: Step, read: Modifier | None) -> bool:
        """Whether a number, or a tensor of known ones that is no mask, is added to scores, too large for an
        exponential."""
        match step.what:
            case Shift(by=by):
                return isinstance(by, (int, float)) and abs(by) > SWALLOWED
            case Bias(tensor=Node() as bias) if isinstance(read, Bias):
                return SWALLOWED < self._largest(bias) < math.inf
        return False

    def _at_most(self, a: Size, b: Size) -> bool:
        """Whether `a <= b`, now and for as long as this graph is called: other sizes are compiled anew."""
        return at_most(a, b) or (not at_most(b, a) and guarded(a, b, self.site.output))

    def _is_stable(self, steps: Steps, done: list[Done]) -> bool | None:
        """Whether the maximum of each row is subtracted after all masks; None where something else is."""
        known = self.site.softmax is None or self.site.softmax.stable
        if known is not False:
            return known
        last = max((i for i, step in enumerate(done) if _may_hide(step.modifier)), default=-1)
        shifts = [step for step in steps[last + 1 :] if isinstance(step.what, Shift)]
        return None if shifts and not any(map(_is_by_row_maximum, shifts)) else bool(shifts)

    def _fully_masked_rows(
        self, done: list[Done], zeroing: Zeroing, layout: Layout, stable: bool | None, sinks: Any
    ) -> FullyMasked:
        """What rows are that see no key, if there may be any; refuses where a hidden key may come back."""
        try:
            levels(done)
            if sinks is not None:  # there is always something to attend to
                return "impossible"
            may_mask = any(_may_hide(step.modifier) for step in done if isinstance(step.modifier, Bias))
            if may_mask and not stable:
                raise NotHidden("the maximum is not subtracted from a row that a bias may hide")
            if may_mask and zeroing == "hidden":
                raise NotHidden("weights that a mask hides are set to zero, beside a bias that may be a mask, too")
            masks = [(step.modifier, step.dtype) for step in done if isinstance(step.modifier, Mask)]
            if may_mask and not all(swallows(fill, dtype) for mask, dtype in masks for fill in mask.fills):
                raise NotHidden("a mask's fill does not swallow scores, beside a bias that may be a mask, too")
            trained = tensor(self.site.output).requires_grad  # type: ignore[union-attr]
            filled = any(mask.form != "additive" and max(mask.fills) > -math.inf for mask, _ in masks)
            if may_mask and trained and filled:
                raise NotHidden("in training, a mask fills scores beside a bias that may be a mask, too")
            if self.kept and not self._every_row_sees_a_key(layout):
                rows = fully_masked_rows(done, zeroing, self._learned() if trained else None, stable)
                if may_mask and zeroing == "nan" and rows != "zeros":
                    raise NotHidden("what is no number becomes zero, beside a bias that may be a mask, too")
                return rows
            return "zeros" if may_mask and zeroing == "nan" else "impossible"
        except NotHidden as shown:
            refuse("describe", str(shown), self.site.anchor)

    def _learned(self) -> set[str]:
        """The operands that want gradients."""
        held = {name: tensor(operand.origin.node) for name, operand in self.operands.items()}
        return {name for name, value in held.items() if value is not None and value.requires_grad}

    def _every_row_sees_a_key(self, layout: Layout) -> bool:
        sizes = {axis: extent(leaves(getattr(layout, axis))) for axis in AXES}

        def at_query(values: Values) -> Values:
            """The same tensor read at the query's own position, whichever axis it was read along."""
            held: Any = values.tensor
            names = tuple(tuple(atom.name.replace("key", "query") for atom in leaves(dim)) for dim in held[1])
            return Values((held[0], names), ())

        return every_row_sees_a_key(conjunction(self.kept), sizes, at_query, self._at_most)

    def _without_column(self, steps: Steps, after: Steps, key: Dim, sink: float | None) -> tuple[Steps, Any]:
        """The steps without the column of the sinks, and the sinks: a name, a number or None."""
        before = [i for i, step in enumerate(steps) if isinstance(step.what, Column)]
        dropped = [i for i, step in enumerate(after) if isinstance(step.what, Column)]
        if not before and not dropped:
            if sink is not None and any(isinstance(step.what, Shift) for step in steps):
                refuse("describe", "scores are shifted before a softmax with a constant sink", self.site.anchor)
            return steps, sink
        if not (len(before) == len(dropped) == 1) or sink is not None:
            refuse("describe", "a column that stands beside the keys is not taken away again", self.site.anchor)
        (i,), (j,) = before, dropped
        column = steps[i].what
        sides = [leaves(step.dims[-1]) for step in (steps[i], after[j])]
        if column.side != after[j].what.side or any(side != leaves(key) for side in sides):
            refuse("describe", "another column is taken away than was put beside the keys", self.site.anchor)
        if not all(isinstance(step.what, (Shift, Dropout)) for step in (*steps[i + 1 :], *after[:j])):
            refuse("describe", "more is done to scores and sinks together than a softmax", self.site.anchor)
        if any(isinstance(step.what, Shift) for step in steps[:i]):
            refuse("describe", "scores are shifted before sinks stand beside them", self.site.anchor)
        sinks = column.sinks
        if isinstance(sinks, Node):
            sinks = self._score_operand("sinks", sinks, steps[i].dims)
        return steps[:i] + steps[i + 1 :], sinks

    def _terms(self, step: Step) -> Steps:
        """A bias that is a sum (T5's positions and mask), as its terms."""
        bias = step.what
        call = self.facts.call(bias.tensor) if isinstance(bias, Bias) and bias.factor == 1 else None
        if call is None or call.name != "add" or call["alpha"] != 1:
            return (step,)
        terms = [available(self.facts, call[side], bias.tensor, self.site.output) for side in ("input", "other")]
        if any(term is None or _dtype(term) != _dtype(bias.tensor) for term in terms):
            return (step,)
        return tuple(part for term in terms for part in self._terms(step._replace(what=Bias(term))))

    def _after_softmax(self, after: Steps, names: list[str | None]) -> tuple[float, tuple[ScaleBy, ...], Zeroing]:
        """What the weights go through: the dropout, the gates, and which of them are set to zero."""
        dropouts: list[float] = []
        gates: list[ScaleBy] = []
        zeroing: Zeroing = "nothing"
        for step, name in zip(after, names):
            match step.what:
                case Dropout(p):
                    dropouts.append(p)
                case ScaleBy() if name is None:
                    gates.append(step.what)
                case ScaleBy(inverse=inverse):
                    origin = self.operands[str(name)].origin
                    if any(atom.axis == "key" for atom in origin.atoms):
                        refuse("describe", "weights are multiplied by a tensor that varies over the keys", origin.node)
                    gates.append(ScaleBy(name, inverse))
                case Zeroed(condition=None):
                    zeroing = "nan" if zeroing == "nothing" else zeroing
                case Zeroed():
                    zeroing = self._zeroing(step.what, str(name))
        if len(dropouts) > 1:
            refuse("describe", "the weights are dropped out twice", self.site.anchor)
        return sum(dropouts), tuple(gates), zeroing

    def _zeroing(self, step: Zeroed, name: str) -> Zeroing:
        """Weights may be set to zero after the softmax where the scores were masked before it."""
        operand = self.operands.pop(name).origin
        read = self.reader.boolean(operand.node, operand.dims)
        kept, before = read if step.keep else ~read, conjunction(self.kept)
        kept, before = (p.rename({held: self._meaning(*held) for held in p.tensors()}) for p in (kept, before))  # type: ignore[misc]
        if conjunction((before, kept)) != before:
            refuse("describe", "weights are set to zero after the softmax that were not masked before", operand.node)
        return "hidden" if conjunction((kept, before)) == kept else "some"

    def _meaning(self, node: Node, dims: Dims) -> str:
        """The same for two tensors with the same elements, such as `mask == 0` where it is computed twice. A tensor
        that something writes into is told apart by how often that happened before it was read."""
        known: dict[tuple[Node, int], str] = {}

        def spelled(node: Node, reader: Node) -> str:
            before = sum(facts.position[write] < facts.position[reader] for write in facts.writes(node))
            if (node, before) not in known:
                again = is_pure(node) and not facts.writes(node)
                arguments = map_arg((node.args, node.kwargs), lambda x: spelled(x, node)) if again else before
                known[node, before] = f"{node.target}{arguments}" if again else f"{node.name}@{before}"
            return known[node, before]

        facts = self.facts
        return f"{spelled(node, self.site.output)} {dims}"

    def _register(self, step: Step) -> str | None:
        match step.what:
            case Fill(condition=node):
                return self._score_operand("mask", node, step.dims)
            case Zeroed(condition=Node() as node):
                return self._score_operand("zeroed", node, step.dims)
            case Bias(tensor=Node() as node):
                return self._score_operand("bias", node, step.dims)
            case ScaleBy(factor=Node() as node):
                return self._score_operand("scale", node, step.dims)
        return None

    def _modifier(self, taken: Step, name: str | None, score_dtype: torch.dtype) -> Modifier | None:
        """A step as a modifier of the spec: its tensor by name, and read as a mask where it is one. None where it
        changes no score that is seen."""
        step = taken.what
        if isinstance(step, Shift):
            self._check_shift(step, taken.dims)
            return None
        if isinstance(step, Clamp):
            lower = -math.inf if is_masking(step.lower, score_dtype) else step.lower
            return None if (lower, step.upper) == (-math.inf, math.inf) else Clamp(lower, step.upper)
        if isinstance(step, Mask):
            self.kept.append(step.keep)
        if name is None:
            return step
        origin = self.operands[name].origin
        if isinstance(step, Fill):
            if not is_masking(step.value, score_dtype):
                refuse("describe", f"scores are filled with {step.value:g}, which is no mask", origin.node)
            read = self.reader.boolean(origin.node, origin.dims)
            form, kept = ("keep", read) if step.keep else ("drop", ~read)
            return self._mask(name, kept, form, origin, (step.value,))
        if isinstance(step, Bias):
            dtype = torch.promote_types(score_dtype, self.operands[name].states[0].dtype or score_dtype)
            added = self.reader.additive(origin.node, origin.dims, dtype) if step.factor == 1 else None
            if added is not None:
                return self._mask(name, added.keep, "additive", origin, added.fills)
            return Bias(name, step.factor, axes(origin.dims), self._may_mask(origin))
        return ScaleBy(name, step.inverse, any(atom.axis == "key" for atom in origin.atoms))

    def _mask(self, name: str, kept: Predicate, form: str, origin: State, fills: tuple[float, ...]) -> Mask:
        self.kept.append(kept)
        return Mask(name, self._named(kept, name, origin), form, fills)

    def _may_mask(self, bias: State) -> bool:
        """Whether a bias that can't be read may hide all keys of a row: one that no parameter had a part in, unless it
        varies over heads and keys, as ALiBi's slopes do, or is known to be small."""
        if set(axes(bias.dims)) == {"head", "key"}:
            return False
        held = tensor(bias.node)
        low = torch.promote_types(held.dtype, torch.float16) if held is not None else torch.float16
        if self._largest(bias.node) < -hidden_from(low) / 2:
            return False
        seen, stack = set[Node](), [bias.node]
        while stack:
            node = stack.pop()
            held = tensor(node)
            if held is not None and (held.requires_grad or isinstance(held, torch.nn.Parameter)):
                return False
            seen.add(node)
            stack += [x for x in node.all_input_nodes if x not in seen]
        return True

    def _largest(self, value: Any) -> float:
        """What no number in a value exceeds: in a buffer, in positions, or in what plain arithmetic makes of these,
        such as ALiBi's distances times slopes."""
        if isinstance(value, (int, float)):
            return abs(value)
        if not isinstance(value, Node) or not self.facts.unchanged(value, self.site.output):
            return math.inf
        if (held := tensor(value)) is None:  # a size
            return LONGEST
        if not held.is_floating_point() and held.dtype not in (torch.int32, torch.int64):  # which wraps around
            return math.inf
        found = buffer.largest() if isinstance(buffer := buffer_of(value), Buffer) else self._largest_of(value)
        return found if not held.is_floating_point() or found <= torch.finfo(held.dtype).max else math.inf

    def _largest_of(self, node: Node) -> float:
        call = self.facts.call(node)
        if call is None or (call.name == "pad" and call["value"]):
            return math.inf
        if call.name in _PASSING:
            return self._largest(call["input"])
        if call.name == "arange":
            return max(self._largest(call["start"]), self._largest(call["end"]))
        if call.name in ("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros"):
            return self._largest(call.args.get("fill_value", 1))
        if call.name in ("where", "masked_fill"):
            return max(self._largest(call["input"]), self._largest(call["other" if call.name == "where" else "value"]))
        if call.name in ("add", "sub", "mul"):
            a, b = self._largest(call["input"]), self._largest(call["other"])
            return a * b if call.name == "mul" else a + b * self._largest(call.args.get("alpha", 1))
        return math.inf

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
        for name, state in operands.items():
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
            learned=tuple(sorted(spec.numeric & self._learned())) if output.requires_grad else (),
        )


def _without_idle_masks(modifiers: list[Modifier]) -> list[Modifier]:
    """A bias hides no key where its sum with the scores is capped, clamped or multiplied by a tensor afterwards."""
    bends = [i for i, m in enumerate(modifiers) if isinstance(m, (Softcap, Clamp, ScaleBy))]
    last = max(bends, default=-1)
    return [replace(m, may_mask=False) if isinstance(m, Bias) and i < last else m for i, m in enumerate(modifiers)]


_PASSING = {"neg", "abs", "getitem", "reshape", "permute", "expand", "cast", "move", "copy", "detach", "pad"}
"""Operations that make no number larger."""


def _may_hide(modifier: Modifier | None) -> bool:
    return isinstance(modifier, Mask) or (isinstance(modifier, Bias) and modifier.may_mask)


def _is_by_row_maximum(step: Step) -> bool:
    """Whether a shift's maximum was taken over the keys alone. (It is some maximum of the scores that it shifts.)"""
    if not isinstance(step.what, Shift) or not isinstance(step.what.by, Node):
        return False
    sizes = (*(1 for _ in step.dims), *shape(step.what.by))[-len(step.dims) :]
    return all(
        any(atom.axis == "key" for atom in leaves(dim)) or same(extent(leaves(dim)), n)
        for dim, n in zip(step.dims, sizes)
    )


def _dtype(node: Any) -> torch.dtype:
    held = tensor(node)
    assert held is not None
    return held.dtype


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
