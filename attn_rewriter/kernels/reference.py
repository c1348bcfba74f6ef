"""The spec, computed step by step as it is written down: slow, of any type, and the truth for every test."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Tensors
from attn_rewriter.kernels.masking import keep, modified
from attn_rewriter.spec import AttentionSpec, Mask, Shapes


class Reference(Kernel):
    """Plain PyTorch in the operands' own type, with what the model itself fills hidden scores with."""

    name = "reference"
    adds_fills = True

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        if shapes.is_gqa:
            key = key.repeat_interleave(shapes.num_groups, dim=1)
            value = value.repeat_interleave(shapes.num_groups, dim=1)
        scores = query @ key.transpose(-2, -1)
        hidden = None
        for modifier in spec.modifiers:
            if not isinstance(modifier, Mask):
                scores = modified(scores, modifier, tensors)
                continue
            hides = ~keep(modifier, tensors)
            hidden = hides if hidden is None else hidden | hides
            if modifier.form == "additive":
                scores = scores + tensors[str(modifier.tensor)]
            else:
                lowest = torch.finfo(shapes.dtype).min  # the model's scores may be of a wider type
                fill = modifier.fills[0]
                scores = scores.masked_fill(hides, fill if math.isinf(fill) else max(fill, lowest))
        zeros = spec.fully_masked_rows == "zeros"
        if zeros and hidden is not None:  # zeros in their place, so that no gradient is made of what is no number
            scores = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        if spec.sinks is not None:
            sinks = tensors[spec.sinks] if isinstance(spec.sinks, str) else scores.new_full((), spec.sinks)
            scores = torch.cat([scores, sinks.expand_as(scores[..., :1])], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        if zeros:
            weights = weights.nan_to_num(0.0) if hidden is None else weights.masked_fill(hidden, 0.0)
        if spec.sinks is not None:
            weights = weights[..., :-1]
        return F.dropout(weights, spec.dropout_p).to(shapes.dtype) @ value
