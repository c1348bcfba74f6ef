"""`F.multi_head_attention_forward`, which Dynamo keeps as one call, opened into projections and one SDPA call.

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and their kin come as this call. With `need_weights=True`, the
default, PyTorch computes it with a softmax between two products even where nobody looks at the weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from attn_rewriter.graph import Call, Facts, tensor
from attn_rewriter.splice import Splice
from attn_rewriter.torch_private import scaled_dot_product_attention

NAME = "multi_head_attention_forward"


def lower(facts: Facts) -> bool:
    """Open every call that nothing stands against; whether there was one."""
    calls = [(node, call) for node in facts.graph.nodes if (call := facts.call(node)) and call.name == NAME]
    calls = [(node, call) for node, call in calls if not facts.is_in_inference_mode(node)]
    opened = [node for node, call in calls if obstacle(node, call) is None and _open(node, call, facts)]
    return bool(opened)


def obstacle(node: Node, call: Call) -> str | None:
    """Why a call stays closed."""
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return "the attention weights are also returned"
    if call["bias_k"] is not None or call["bias_v"] is not None or call["add_zero_attn"]:
        return "keys and values are extended by bias_k, bias_v or add_zero_attn"
    if call["static_k"] is not None or call["static_v"] is not None:
        return "keys or values are given as static_k, static_v"
    tensors = [call["query"], call["key"], call["value"], call["out_proj_weight"]]
    if any(tensor(value) is None for value in tensors) or not isinstance(call["num_heads"], int):
        return "an argument of the call is not known"
    return None


def _open(node: Node, call: Call, facts: Facts) -> bool:
    outputs = [user for user in node.users if user.args[1] == 0]
    if not outputs:
        return False
    with Splice(facts, outputs[0], node) as splice:
        args = {name: splice.stand_in(value) for name, value in call.args.items()}
        ndim = tensor(call["query"]).ndim  # type: ignore[union-attr]
        same = call["query"] is call["key"] is call["value"]
        attn_mask, key_padding_mask = tensor(call["attn_mask"]), tensor(call["key_padding_mask"])
        result = _attention(args, ndim == 3, same, attn_mask, key_padding_mask, splice)
        splice.value(result)
    for output in outputs:
        with Splice(facts, output, node) as splice:
            splice.replace(output, result, node.users)
    return True


def _attention(
    args: dict[str, Any],
    batched: bool,
    is_self: bool,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    splice: Splice,
) -> Any:
    """What the call computes. Its tensors are [seq_len, batch, embed_dim], or without batch [seq_len, embed_dim]."""
    heads = args["num_heads"]

    def split(x: Any) -> Any:
        return (x if batched else x.unsqueeze(1)).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)

    query, key, value = (split(x) for x in _projected(args, is_self))
    # PyTorch then takes the hint for the truth, and does not look at the mask.
    is_causal = args["is_causal"] and key_padding_mask is None and not args["need_weights"]
    mask = None if is_causal else _mask(args, attn_mask, key_padding_mask, splice.value(query).dtype)
    dropout_p = args["dropout_p"] if args["training"] else 0.0
    if args["need_weights"] and mask is not None:
        # Then PyTorch has a softmax of its own between two products, of which a row without a key is not a number.
        known = splice.value(query).size(-1)
        head_dim = known if isinstance(known, int) else query.size(-1)
        scores = (query * head_dim**-0.5) @ key.transpose(-2, -1)
        is_bool = splice.value(mask).dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
        weights = torch.softmax(scores, dim=-1)
        is_zero = isinstance(dropout_p, (int, float)) and dropout_p == 0  # it may be a node, where numbers are dynamic
        output = (weights if is_zero else F.dropout(weights, dropout_p)) @ value
    else:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
        )
    merged = output.permute(2, 0, 1, 3).flatten(2)
    return F.linear(merged if batched else merged.squeeze(1), args["out_proj_weight"], args["out_proj_bias"])


def _projected(args: dict[str, Any], is_self: bool) -> Any:
    bias = args["in_proj_bias"]
    if is_self and not args["use_separate_proj_weight"]:
        packed = F.linear(args["query"], args["in_proj_weight"], bias).chunk(3, dim=-1)
        return [packed[i] for i in range(3)]
    if args["use_separate_proj_weight"]:
        weights = [args[f"{name}_proj_weight"] for name in "qkv"]
    else:
        packed = args["in_proj_weight"].chunk(3)
        weights = [packed[i] for i in range(3)]
    split = bias.chunk(3) if bias is not None else [None] * 3
    inputs = (args["query"], args["key"], args["value"])
    return [F.linear(x, weight, split[i]) for i, (x, weight) in enumerate(zip(inputs, weights))]


def _mask(
    args: dict[str, Any], attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, dtype: torch.dtype
) -> Any:
    """Both masks as one for SDPA: a boolean one there says what to attend to, here what to leave out."""
    masks = []
    if attn_mask is not None:
        mask = args["attn_mask"]
        masks.append((mask.unflatten(0, (-1, args["num_heads"])) if attn_mask.ndim == 3 else mask, attn_mask.dtype))
    if key_padding_mask is not None:
        padding = args["key_padding_mask"].unsqueeze(-2).unsqueeze(-2)
        masks.append((padding, key_padding_mask.dtype))
    if not masks:
        return None
    if all(held == torch.bool for _, held in masks):
        drop = masks[0][0] if len(masks) == 1 else masks[0][0] | masks[1][0]
        return ~drop
    added = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf")) if held == torch.bool else mask.to(dtype)
        for mask, held in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
