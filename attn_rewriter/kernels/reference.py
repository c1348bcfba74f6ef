"""The spec, computed step by step as it is written down: slow, of any type, and the truth for every test."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Tensors
from attn_rewriter.kernels.fully_masked import lifted_rows
from attn_rewriter.kernels.masking import keep_mask, modified
from attn_rewriter.spec import AttentionSpec, Bias, Mask, Shapes


class Reference(Kernel):
    """Plain PyTorch in the operands' own type."""

    name = "reference"
    adds_fills = True

    def goes_through_scores(self, shapes: Shapes) -> bool:
        return True

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return ""  # operations of PyTorch, each of which sees to it by itself

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        if shapes.is_gqa:
            key = key.repeat_interleave(shapes.num_groups, dim=1)
            value = value.repeat_interleave(shapes.num_groups, dim=1)
        scores = query @ key.transpose(-2, -1)
        product = scores  # and what it is scaled by
        for modifier in spec.modifiers:
            if not isinstance(modifier, Mask):
                scores = modified(scores, modifier, tensors)
                product = product if isinstance(modifier, Bias) else modified(product, modifier, tensors)
        keep = keep_mask((m for m in spec.modifiers if isinstance(m, Mask)), shapes, tensors)
        if keep is not None:
            scores = self._masked(scores, keep, spec, shapes, tensors)
        if spec.may_mask:
            lifted, rows = lifted_rows(spec, shapes, tensors)
            through = torch.where(lifted > float("-inf"), product - product.detach(), 0.0)
            scores = torch.where(rows, lifted + through, scores)
        if spec.sinks is not None:
            sinks = tensors[spec.sinks] if isinstance(spec.sinks, str) else scores.new_full((), spec.sinks)
            scores = torch.cat([scores, sinks.expand_as(scores[..., :1])], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        if spec.fully_masked_rows == "zeros":
            weights = weights if keep is None else weights.where(keep, 0.0)
            weights = torch.where(weights == weights, weights, 0.0)
        if spec.sinks is not None:
            weights = weights[..., :-1]
        return F.dropout(weights, spec.dropout_p) @ value

    @staticmethod
    def _masked(
        scores: torch.Tensor, keep: torch.Tensor, spec: AttentionSpec, shapes: Shapes, tensors: Tensors
    ) -> torch.Tensor:
        """Scores whose hidden ones are minus infinity, but in rows without a key what gives equal weights."""
        hidden = scores.masked_fill(~keep, float("-inf"))
        rows = ~keep.any(-1, keepdim=True)
        match spec.fully_masked_rows:
            case "mean" | "zeros":
                return torch.where(rows, torch.zeros_like(scores), hidden)
            case "mean, added":
                return torch.where(rows, scores - scores.detach(), hidden)
            case "by fill":
                lifted, rows = lifted_rows(spec, shapes, tensors)
                return torch.where(rows, lifted, hidden)
        return hidden
