"""What models do between the softmax and `weights @ value`, read from the product backwards."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from attn_rewriter.patterns.match import argument, cast, dropout, number, tensor_
from attn_rewriter.patterns.rule import Dropout, Rules

weights = Rules()

weight = tensor_("weight")


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
