"""What models do between `query @ keyᵀ` and the softmax, one operation a rule, read from the softmax backwards."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from attn_rewriter.patterns.match import boolean, cast, masked_fill, number, symbolic, tensor_, where
from attn_rewriter.patterns.rule import Fill, Rules
from attn_rewriter.spec import Bias, Scale, ScaleBy

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
    return (score,) if abs(c) <= 1e6 else None


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
