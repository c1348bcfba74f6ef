"""What models do between `query @ keyᵀ` and the softmax, one operation a rule, read from the softmax backwards."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from attn_rewriter.graph import shape
from attn_rewriter.patterns.match import (
    append,
    argument,
    boolean,
    cast,
    clamp,
    masked_fill,
    maximum,
    minimum,
    number,
    pad,
    reduced,
    symbolic,
    tanh,
    tensor_,
    where,
)
from attn_rewriter.patterns.rule import Column, Fill, Rules, Shift
from attn_rewriter.spec import Bias, Clamp, Scale, ScaleBy, Softcap, same

scores = Rules()

score, other, symbol = tensor_("score"), tensor_("other"), symbolic("other")
condition = boolean("condition")
c = number("c")


@scores(score * c)
def scaled(score: Node, c: float) -> Any:
    """Nearly every decoder: `scores * head_dim**-0.5`."""
    return score, Scale(c)


@scores(score / c)
def divided(score: Node, c: float) -> Any:
    """BERT's line of models, GPT-J, Falcon: `scores / math.sqrt(head_dim)`."""
    return (score, Scale(1 / c)) if c != 0 else None


@scores(-score)
def negated(score: Node) -> Any:
    """Distances as scores."""
    return score, Scale(-1.0)


@scores(score * other, score * symbol)
def scaled_by(score: Node, other: Node) -> Any:
    """A learned temperature: SwinV2's `logit_scale`, one number a head. Also any float under `dynamic=True`."""
    return score, ScaleBy(other)


@scores(score / other, score / symbol)
def divided_by(score: Node, other: Node) -> Any:
    """The same as a divisor."""
    return score, ScaleBy(other, inverse=True)


@scores(score + c, score - c)
def shifted(score: Node, c: float) -> Any:
    """Adding one number to every score changes no weight, unless it swallows them or lifts them out of a mask."""
    return (score, Shift(c)) if abs(c) <= 1e6 else None


@scores(score - reduced("by", score))
def less_its_maximum(score: Node, by: Node) -> Any:
    """`scores - scores.max(-1, keepdim=True)` keeps a softmax from overflow: gpt-oss, GroundingDINO, CogView."""
    return score, Shift(by)


@scores(tanh(score))
def capped(score: Node) -> Any:
    """Gemma-2, VaultGemma, T5Gemma: `tanh(scores / cap) * cap`. The two scales around it are rules of their own."""
    return score, Softcap(1.0)


@scores(score + other)
def biased(score: Node, other: Node) -> Any:
    """An additive mask, or a bias: which of the two is settled by reading `other`."""
    return score, Bias(other)


@scores(score - other)
def unbiased(score: Node, other: Node) -> Any:
    """`scores - (1 - mask) * 10000`."""
    return score, Bias(other, -1.0)


@scores(masked_fill(score, condition, c))
def filled(score: Node, condition: Node, c: float) -> Any:
    """XLM, DeBERTa and most code outside transformers: `scores.masked_fill(mask == 0, -inf)`."""
    return score, Fill(condition, c)


@scores(where(condition, score, c))
def kept_where(score: Node, condition: Node, c: float) -> Any:
    """GPT-2's and ImageGPT's `where(causal_mask, scores, min)`."""
    return score, Fill(condition, c, keep=True)


@scores(where(condition, c, score))
def dropped_where(score: Node, condition: Node, c: float) -> Any:
    """The same with the mask inverted."""
    return score, Fill(condition, c)


@scores(cast(score))
def converted(score: Node) -> Any:
    """`scores.float()`: fused kernels hold scores in float32 anyway."""
    return (score,)


@scores(clamp(score, argument("low"), argument("high")))
def clamped(score: Node, low: Any, high: Any) -> Any:
    """GroundingDINO and DBRX keep scores or projections within a range."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return (score, Clamp(low, high)) if isinstance(low, (int, float)) and isinstance(high, (int, float)) else None


@scores(maximum(score, c))
def at_least(score: Node, c: float) -> Any:
    """XGLM and OPT: `torch.max(scores, torch.tensor(finfo.min))` after a mask was added."""
    return score, Clamp(lower=c)


@scores(minimum(score, c))
def at_most(score: Node, c: float) -> Any:
    """The other side."""
    return score, Clamp(upper=c)


@scores(append(score, other, argument("dim")))
def with_sinks(score: Node, other: Node, dim: int) -> Any:
    """gpt-oss: one more column, with a learned score a head."""
    return (score, Column(-1, other)) if _is_column(other, dim) else None


@scores(append(other, score, argument("dim")))
def with_sinks_first(score: Node, other: Node, dim: int) -> Any:
    """The same on the other side."""
    return (score, Column(0, other)) if _is_column(other, dim) else None


def _is_column(sinks: Node, dim: int) -> bool:
    return dim in (-1, len(shape(sinks)) - 1) and same(shape(sinks)[-1], 1)


@scores(pad(score, argument("widths"), argument("mode"), argument("value")))
def padded(score: Node, widths: Any, mode: Any, value: Any) -> Any:
    """x-transformers' `softmax_one`: a column of zeros."""
    if mode != "constant" or not isinstance(value, (int, float, type(None))) or list(widths) not in ([0, 1], [1, 0]):
        return None
    return score, Column(0 if widths[0] else -1, float(value or 0))
