"""The softmax itself, as one operation or spelled out."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from attn_rewriter.graph import Call, tensor
from attn_rewriter.patterns.match import Matcher, Pattern, argument, exp, logsumexp, softmax, summed, tensor_

_score, _dim, _keepdim = tensor_("score"), argument("dim"), argument("keepdim")
_sum = summed(exp(_score), _dim, _keepdim)

_SPELLINGS: tuple[tuple[Pattern, float | None, bool | None], ...] = (
    (softmax(_score, _dim), None, True),
    (exp(_score) / _sum, None, False),
    (exp(_score - logsumexp(_score, _dim, _keepdim)), None, None),
    # "Attention is off by one": one more score of 0. (Where the maximum was subtracted first, it is a score that
    # moves with the row: whoever reads on refuses that.)
    (exp(_score) / (_sum + 1), 0.0, False),
)
"""Each with the score of the sink that it has, if any, and whether it is stable."""


@dataclass(frozen=True)
class Softmax:
    """`softmax(input, dim)`, with a constant sink or without; `nodes` are all that it is spelled with. It is `stable`
    if it subtracts the maximum of each row before it takes exponentials (None: if it subtracts something else)."""

    input: Node
    dim: int
    nodes: tuple[Node, ...]
    sink: float | None = None
    stable: bool | None = True


def read_softmax(node: Node, call: Call | None, matcher: Matcher) -> Softmax | None:
    """Read a softmax that ends at `node`; None for anything else."""
    if call is None or call.name not in ("softmax", "div", "exp"):
        return None
    for pattern, sink, stable in _SPELLINGS:
        for bound in matcher.operation(pattern, node, {}):
            dim = _one_axis(bound["dim"], bound["score"])
            if dim is not None and bound.get("keepdim", True):
                return Softmax(bound["score"], dim, tuple(dict.fromkeys(bound["nodes"])), sink, stable)
    return None


def _one_axis(dim: object, score: Node) -> int | None:
    """The axis that a reduction runs over, where it is one."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    held = tensor(score)
    return dim % held.ndim if isinstance(dim, int) and held is not None and held.ndim else None
