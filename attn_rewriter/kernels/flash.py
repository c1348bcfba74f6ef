"""What flash attention has in common, whoever computes it: its forms, and one operator for all of them.

Packages are called through a custom operator with a fake implementation and a backward pass of its own, so that every
version goes through `torch.compile`, whatever its package registers. It takes the names of two kernels, as the passes
of two may be mixed.

A package may raise in the middle of a run, long after it was chosen. Where it was chosen automatically, the operator
then computes the same pass step by step (`stepwise.py`): output and logsumexp, or the gradients from these, are the
same whoever computes them. It says so once, computes calls of the same kind in this way from then on, and no graph that
is compiled later gets that kernel. What passes is an error for want of memory, as the steps need no less; one with
dropout, as what was dropped is known to the package alone; and what CUDA reports only after the call.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from attn_rewriter.device import Device, made_current
from attn_rewriter.errors import is_out_of_memory
from attn_rewriter.hidden import hidden_from
from attn_rewriter.kernels.base import FUSED_HEAD_DIM, Kernel, Limits, Tensors
from attn_rewriter.kernels.blocks import mask_names
from attn_rewriter.kernels.fully_masked import completed, gradient_of_lifted, lifted_rows, lost
from attn_rewriter.kernels.masking import bias_terms, scaled_query, sink_scores
from attn_rewriter.packages import unimportable, version
from attn_rewriter.spec import (
    EVERY_KEY,
    AttentionSpec,
    Band,
    Bias,
    Mask,
    Predicate,
    Scale,
    ScaleBy,
    Shapes,
    Size,
    Softcap,
    at_most,
    predicate_from_text,
    predicate_to_text,
    same,
)

log = logging.getLogger("attn_rewriter")

HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class FlashForm:
    """`softcap(query_scales(query) @ keyᵀ * scale + Σ biases)`, either with a softcap or with biases, within a window:
    query `i` sees the keys from `i + shift - left` to `i + shift + right`, with `shift = kv_len - q_len` (the last
    query is aligned with the last key), None being no bound. Where `mask` is not None, it says instead which keys are
    seen, and `no_window` why that is no window."""

    scale: float = 1.0
    query_scales: tuple[ScaleBy, ...] = ()
    biases: tuple[Bias, ...] = ()
    softcap: float = 0.0
    left: int | None = None
    right: int | None = None
    mask: Predicate | None = None
    no_window: str = ""


def flash_form(spec: AttentionSpec, shapes: Shapes) -> FlashForm | str:
    """The spec as a `FlashForm`, or the reason why it is none."""
    scale, softcap, masked = 1.0, 0.0, False
    query_scales: list[ScaleBy] = []
    biases: list[Bias] = []
    for modifier in spec.modifiers:
        match modifier:
            case Scale(factor) if not softcap:
                scale *= factor
                biases = [replace(bias, factor=bias.factor * factor) for bias in biases]
            case ScaleBy(per_key=False) if not softcap and not biases:
                query_scales.append(modifier)
            case Bias() if not softcap:
                biases.append(modifier)
            case Softcap(cap) if not softcap and not masked and not biases:
                softcap = cap
            case Mask():
                masked = True
            case _:
                return f"computes no {modifier}" + (
                    " after a softcap" if softcap else " after a mask" if masked else ""
                )
    form = FlashForm(scale, tuple(query_scales), tuple(biases), softcap)
    keep = spec.keep.within(shapes.q_len, shapes.kv_len)
    if keep == EVERY_KEY:
        return form
    window = _window(keep, shapes)
    if isinstance(window, str):
        return replace(form, mask=keep, no_window=window)
    return replace(form, left=window[0], right=window[1])


def _window(keep: Predicate, shapes: Shapes) -> tuple[Any, Any] | str:
    """A predicate as the left and right side of a window, or the reason why it is none."""
    if not isinstance(keep, Band):
        return f"takes a window, not {keep}"
    shift = shapes.kv_len - shapes.q_len
    left, right = _distance(shift, keep.lower, -1), _distance(shift, keep.upper, 1)
    for bound in (left, right):
        if bound is not None and (not isinstance(bound, int) or bound < 0):
            return f"aligns its windows with the last query and key, and they must meet: not {keep} at {shapes}"
    if (left, right) != (None, 0) and not at_most(shapes.q_len, shapes.kv_len):
        return f"takes windows over at least as many keys as queries, not {keep} at {shapes}"  # FA2 widens them
    return left, right


def _distance(shift: Size, bound: Size | None, sign: int) -> Size | None:
    """How far a bound on `key - query` is from the diagonal that ends at the last query and key."""
    if bound is None:
        return None
    distance = sympy.expand(sign * (bound - shift))
    return int(distance) if distance.is_Integer else distance


@lru_cache
def missing(distribution: str, module: str, at_least: str) -> str | None:
    """Why a package can't be used; None if it can."""
    found = version(distribution)
    if found is None:
        return f"{distribution} is not installed"
    if TorchVersion(found) < at_least:
        return f"needs {distribution} {at_least} or newer, this is {found}"
    error = unimportable(module)
    return error and f"{distribution} {found} can't be imported: {error}"


class Flash(Kernel):
    """A version of flash-attention. What it can compute is a `FlashForm`; `forward` and `backward` call its package."""

    distribution: ClassVar[str]
    extra: ClassVar[str | None] = None  # of this package, that installs it
    module: ClassVar[str]
    at_least: ClassVar[str]
    has_dropout: ClassVar[bool] = False
    limits = Limits(
        platforms=frozenset({"cuda"}),
        min_capability=(8, 0),
        dtypes=HALF,
        max_head_dim=FUSED_HEAD_DIM,
        max_blocks=2**16 - 1,
    )
    versions: ClassVar[dict[str, type[Flash]]] = {}

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.versions[cls.name] = cls

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        form = flash_form(spec, shapes)
        reasons = super().refusals(spec, _narrow(shapes, form), device)
        if isinstance(form, str):
            reasons.append(form)
        elif form.biases and (no_bias := self.no_bias(form, shapes, device)):
            reasons += no_bias
        elif form.mask is not None:
            reasons += self.no_mask(form, shapes, device)
            if not reasons and next(form.mask.sizes(), None) is not None:
                reasons.append("takes masks whose lengths and offsets are known")
        if spec.may_mask and spec.keep != EVERY_KEY:
            reasons.append("takes no mask beside a bias that may be one, too")
        if spec.dropout_p and not self.has_dropout:
            reasons.append("has no dropout")
        if isinstance(shapes.head_dim, int) and shapes.head_dim % 8:
            reasons.append(f"head_dim is a multiple of 8, here {shapes.head_dim}")
        if not same(shapes.head_dim, shapes.head_dim_v):
            reasons.append("query and value have one head_dim")
        if not reasons and (absent := missing(self.distribution, self.module, self.at_least)):
            reasons.append(absent)
        if not reasons and self.name in _raised:
            reasons.append(f"raised in this process: {_raised[self.name]}")
        return reasons

    @staticmethod
    def no_bias(form: FlashForm, shapes: Shapes, device: Device) -> list[str]:
        """Why it can't compute the biases of a form."""
        return ["computes no bias"]

    @staticmethod
    def no_mask(form: FlashForm, shapes: Shapes, device: Device) -> list[str]:
        """Why it can't compute the mask of a form."""
        return [form.no_window]

    @staticmethod
    def mask_parts(form: FlashForm, shapes: Shapes, tensors: Tensors) -> list[Tensor]:
        """What it wants to know of the mask of a form, computed in the graph, where all layers share it."""
        raise NotImplementedError

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> Tensor:
        return attend(self, self, spec, shapes, tensors, self.falls_back)

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output `[batch, q_len, num_heads, head_dim]`, logsumexp `[batch, num_heads, q_len]`, minus infinity where a
        row has no key, and what the dropout depends on."""
        raise NotImplementedError

    @staticmethod
    def backward(gradient: Tensor, kept: Kept, how: How) -> tuple[Tensor, ...]:
        """The gradients of query, key and value."""
        raise NotImplementedError


def attend(
    forward: Flash, backward: Flash, spec: AttentionSpec, shapes: Shapes, tensors: Tensors, falls_back: bool
) -> Tensor:
    """A form that both kernels compute, each in its pass."""
    form = flash_form(spec, shapes)
    assert not isinstance(form, str)
    query, key, value = scaled_query(form.query_scales, tensors), tensors["key"], tensors["value"]
    if (dtype := _narrow(shapes, form).dtype) != shapes.dtype:
        query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = form.scale
    if not scale > 0:  # kernels take the largest score before they multiply
        query, scale = query * scale, 1.0
    sinks = None if spec.sinks is None else sink_scores(spec.sinks, tensors).squeeze(-1)
    parts: list[Tensor] = []
    masks: list[Tensor] = []
    if form.mask is not None:
        parts = forward.mask_parts(form, shapes, tensors)
        masks = [tensors[name] for name in mask_names(form.mask)]
    # Kernels look out for minus infinity. Of a block of other numbers as low as these they make NaN: a row's largest
    # score is rounded after it was multiplied by log2(e), the product that it is subtracted from is not.
    lowest = hidden_from(shapes.dtype)
    terms = bias_terms(((str(bias.tensor), bias.factor) for bias in form.biases), tensors)
    gradient: Tensor | None = None
    lifted: Tensor | None = None
    if spec.may_mask:
        lifted, rows = lifted_rows(spec, shapes, tensors)
        terms = [lifted]
        if shapes.needs_backward:
            gradient = gradient_of_lifted(query, scale, spec, shapes, tensors)
        query = torch.where(rows, query.new_zeros(()), query)
    biases = [bias.masked_fill(bias <= lowest, float("-inf")) for bias in terms]
    window = (-1 if side is None else side for side in (form.left, form.right))
    names, numbers = (forward.name, backward.name), (scale, form.softcap, *window, spec.dropout_p)
    options = (*names, *numbers, predicate_to_text(form.mask), falls_back)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attention = flash_attention_with_dropout if spec.dropout_p else flash_attention
    output = attention(query, key, value, sinks, parts, masks, biases, *options)[0].transpose(1, 2)
    output = completed(output, query.transpose(1, 2), scale, spec, shapes, tensors)
    output = output if gradient is None else output + gradient
    return output if lifted is None else lost(output, lifted, spec, shapes)


def _narrow(shapes: Shapes, form: FlashForm | str) -> Shapes:
    """With the type of query, key and value: biases are added in float32, whatever their own."""
    only_biases = isinstance(form, FlashForm) and form.biases and not form.query_scales
    return replace(shapes, dtype=shapes.product_dtype or shapes.dtype) if only_biases else shapes


@dataclass(frozen=True)
class How:
    """The rest of a call: numbers, -1 being no bound; where there is a mask, the predicate, its parts as the kernel
    wants them, and the tensors that the predicate names, in their order; and what is added to the scores, which
    broadcasts to `[batch, num_heads, q_len, kv_len]`."""

    scale: float
    softcap: float
    left: int
    right: int
    dropout_p: float
    mask: Predicate | None = None
    parts: Sequence[Tensor] = ()
    masks: Sequence[Tensor] = ()
    biases: Sequence[Tensor] = ()

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def window(self) -> tuple[int, int]:
        return self.left, self.right


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    logsumexp: Tensor
    random: Tensor


_raised: dict[str, str] = {}
"""By the name of a kernel, what it raised where it was computed step by step instead."""

_failed: set[tuple[Any, ...]] = set()
"""The kinds of calls that did."""

Pass = tuple[Any, ...]


def _computed(
    way: str, name: str, how: How, falls_back: bool, run: Callable[[type[Flash]], Pass], *given: Tensor
) -> Pass:
    """What `run` makes of a kernel, or, where that raises, of the one that computes step by step."""
    kernel, stepwise = Flash.versions[name], Flash.versions["stepwise"]
    if not falls_back or how.dropout_p:
        return run(kernel)

    def kind() -> tuple[Any, ...]:
        return way, name, replace(how, parts=(), masks=(), biases=()), *((x.shape, x.dtype, x.device) for x in given)

    if name in _raised and kind() in _failed:
        return run(stepwise)
    try:
        return run(kernel)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        found = run(stepwise)  # which raises as well where it is CUDA that is out of order
        _failed.add(kind())
        said = f"{type(error).__name__}: {error}"
        log.info("%s raised in its %s pass: %s", name, way, said, exc_info=error)
        if _raised.setdefault(name, said) is said:
            _warn(way, name, said, given)
        return found


def _warn(way: str, name: str, said: str, given: Sequence[Tensor]) -> None:
    shapes = ", ".join(str((*x.shape,)) for x in given)
    warnings.warn(
        f"attn_rewriter: {name} raised in its {way} pass, given {given[0].dtype} of {shapes}: {said} "
        "(computed step by step instead, which is right but slow, here and wherever it raises again; what is compiled "
        "from now on gets another kernel, after torch.compiler.reset() everything does; with strict=True this raises)",
        stacklevel=2,
    )


def _held(x: Tensor) -> Tensor:
    """A tensor whose elements all lie in memory: Hopper's copies take no stride of 0, as the gradient of a sum has."""
    return x.contiguous() if 0 in x.stride() else x


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    parts: Sequence[Tensor],
    masks: Sequence[Tensor],
    biases: Sequence[Tensor],
    forward: str,
    backward: str,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    dropout_p: float,
    mask: str,
    falls_back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    how = How(scale, softcap, left, right, dropout_p, predicate_from_text(mask), parts, masks, biases)
    given = _held(query), _held(key), _held(value)
    with made_current(query.device):
        passed = _computed("forward", forward, how, falls_back, lambda kernel: kernel.forward(*given, how), *given)
    output, logsumexp, random = passed
    if sinks is not None:
        output, logsumexp = _with_sinks(output, logsumexp, sinks)
    # Contiguous, as the fake says: version 2 lays its output out as its query.
    random = query.new_empty(2, dtype=torch.int64) if random is None else random
    return output.contiguous(), logsumexp.contiguous(), random


def _with_sinks(output: Tensor, logsumexp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logsumexp with one more score in each row, which has no value. (The backward pass of a kernel is right
    with these: it takes the weights from the logsumexp.)"""
    together = torch.logaddexp(logsumexp, sinks.float())
    share = _weight(logsumexp, together).transpose(1, 2).unsqueeze(-1)
    return (output * share).to(output.dtype), together


def _weight(score: Tensor, logsumexp: Tensor) -> Tensor:
    """Of a score in its row; none where there is nothing in the row."""
    return (score - logsumexp).exp().masked_fill(logsumexp == float("-inf"), 0.0)


def _like_flash_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_len, num_heads, _ = query.shape
    output = query.new_empty(batch, q_len, num_heads, value.size(-1))
    logsumexp = query.new_empty(batch, num_heads, q_len, dtype=torch.float32)
    return output, logsumexp, query.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("attn_rewriter::flash_attention_backward", mutates_args=())
def _flash_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    random: Tensor,
    parts: Sequence[Tensor],
    masks: Sequence[Tensor],
    biases: Sequence[Tensor],
    backward: str,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    dropout_p: float,
    mask: str,
    falls_back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    how = How(scale, softcap, left, right, dropout_p, predicate_from_text(mask), parts, masks, biases)
    kept = Kept(_held(query), _held(key), _held(value), output, logsumexp, random)
    gradient = _held(gradient)
    run = lambda kernel: kernel.backward(gradient, kept, how)  # noqa: E731
    with made_current(query.device):
        found = _computed("backward", backward, how, falls_back, run, *kept[:3])
    return tuple(x.contiguous() for x in found)


@_flash_attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, sinks, parts, masks, biases, *ctx.options = inputs
    ctx.counts = len(parts), len(masks), len(biases)
    ctx.save_for_backward(query, key, value, sinks, *output, *parts, *masks, *biases)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, *others: None) -> tuple[Any, ...]:
    if gradient is None:  # nobody wants any, as where they are computed in another way (`twice.py`)
        return *(None for _ in range(4)), *([None] * count for count in ctx.counts), *(None for _ in ctx.options)
    query, key, value, sinks, output, logsumexp, random, *rest = ctx.saved_tensors
    held = iter(rest)
    lists = [[*islice(held, count)] for count in ctx.counts]
    kept = query, key, value, output, logsumexp, random
    found = _flash_attention_backward(gradient, *kept, *lists, *ctx.options[1:])
    of_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        of_sinks = _gradient_of_sinks(gradient, output, logsumexp, sinks)
    return *found, of_sinks, *([None] * count for count in ctx.counts), *(None for _ in ctx.options)


def _gradient_of_sinks(gradient: Tensor, output: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """Their weight times what all weights of a row have in common, `-Σ gradient * output`."""
    along = (gradient.float() * output.float()).sum(-1).transpose(1, 2)
    return (_weight(sinks.float(), logsumexp) * -along).sum_to_size(sinks.shape).to(sinks.dtype)


def _operator(name: str, *tags: torch.Tag) -> Any:
    made = torch.library.custom_op(f"attn_rewriter::{name}", _flash_attention, mutates_args=(), tags=tags)
    made.register_fake(_like_flash_attention)
    made.register_autograd(_gradients, setup_context=_save)
    return getattr(torch.ops.attn_rewriter, name).default


flash_attention = _operator("flash_attention")
"""Query `[batch, q_len, num_heads, head_dim]`, key and value `[batch, kv_len, num_kv_heads, head_dim]`, sinks that
broadcast to `[batch, num_heads, q_len]`, the parts of a mask, and biases, which get no gradient, to the output, shaped
as the query, its logsumexp, and the state of the dropout."""

flash_attention_with_dropout = _operator("flash_attention_with_dropout", torch.Tag.nondeterministic_seeded)
"""The same where it draws random numbers: PyTorch may neither merge two calls of it nor, but for a checkpoint that
restores the generator, compute one again."""
