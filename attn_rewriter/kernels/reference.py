"""The spec, computed step by step as it is written down: slow, of any type, and the truth for every test."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Tensors
from attn_rewriter.kernels.masking import keep, modified
from attn_rewriter.spec import AttentionSpec, Mask, Shapes


class Reference(Kernel):
    """Plain PyTorch in the operands' own type. A row in which every key is masked gives zeros."""

    name = "reference"

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return ""  # operations of PyTorch, each of which sees to it by itself

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        if shapes.is_gqa:
            key = key.repeat_interleave(shapes.num_groups, dim=1)
            value = value.repeat_interleave(shapes.num_groups, dim=1)
        scores = query @ key.transpose(-2, -1)
        for modifier in spec.modifiers:
            if isinstance(modifier, Mask):
                scores = scores.masked_fill(~keep(modifier, tensors), float("-inf"))
            else:
                scores = modified(scores, modifier, tensors)
        if spec.sinks is not None:
            sinks = tensors[spec.sinks] if isinstance(spec.sinks, str) else scores.new_full((), spec.sinks)
            scores = torch.cat([scores, sinks.expand_as(scores[..., :1])], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        weights = torch.where(weights == weights, weights, 0.0)
        if spec.sinks is not None:
            weights = weights[..., :-1]
        return F.dropout(weights, spec.dropout_p) @ value
