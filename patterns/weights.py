"""What models do between the softmax and `weights @ value`, read from the product backwards."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from attn_rewriter.graph import shape, size
from attn_rewriter.patterns.match import (
    argument,
    boolean,
    cast,
    dropout,
    getitem,
    masked_fill,
    nan_to_num,
    number,
    tensor_,
    where,
)
from attn_rewriter.patterns.rule import Column, Dropout, Rules, Zeroed
from attn_rewriter.spec import ScaleBy, same

weights = Rules()

weight, other, condition = tensor_("weight"), tensor_("other"), boolean("condition")


@weights(cast(weight))
def converted(weight: Node) -> Any:
    """`softmax(scores, dtype=torch.float32).to(query.dtype)`."""
    return (weight,)


@weights(dropout(weight, number("p"), argument("training")))
def dropped_out(weight: Node, p: float, training: bool) -> Any:
    """`nn.functional.dropout(weights, p=…, training=self.training)`."""
    if not training or p == 0:
        return (weight,)
    return (weight, Dropout(p)) if 0 < p < 1 else None  # kernels take no p of 1


@weights(getitem(weight, argument("index")))
def without_sinks(weight: Node, index: Any) -> Any:
    """gpt-oss drops the sinks' column: `probs[..., :-1]`; where it was put first, `[..., 1:]`."""
    *before, last = index
    whole = all(item is Ellipsis or item == slice(None) for item in before)
    if not (whole and before.count(Ellipsis) <= 1 and isinstance(last, slice) and last.step in (None, 1)):
        return None
    if Ellipsis not in before and len(index) != len(shape(weight)):
        return None
    n = shape(weight)[-1]
    if last.start in (None, 0) and last.stop is not None:
        kept = last.stop if not isinstance(last.stop, int) or last.stop >= 0 else n + last.stop
        return (weight, Column(-1)) if same(size(kept), n - 1) else None
    return (weight, Column(0)) if last.start == 1 and last.stop is None else None


@weights(weight * other, weight * number("other"))
def gated(weight: Node, other: Node | float) -> Any:
    """Head masks, and gates a head or a query; a number in differential attention."""
    return weight, ScaleBy(other)


@weights(masked_fill(weight, condition, 0), where(condition, 0, weight))
def zeroed(weight: Node, condition: Node) -> Any:
    """CPM-Ant, FastSpeech2-Conformer: after the softmax what was masked before it is set to zero again."""
    return weight, Zeroed(condition)


@weights(where(condition, weight, 0))
def zeroed_elsewhere(weight: Node, condition: Node) -> Any:
    """The same with `where`."""
    return weight, Zeroed(condition, keep=True)


@weights(nan_to_num(weight, argument("nan")))
def without_nan(weight: Node, nan: Any) -> Any:
    """Rows in which every key is masked give zeros."""
    return (weight, Zeroed()) if nan in (None, 0) else None
