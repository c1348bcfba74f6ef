"""PyTorch's forward-mode AD: tensors that carry a derivative along, which operations compute as they go.

No fused kernel computes it. Dynamo does not guard on whether anyone has entered a level of it (2.13), so that it is
asked here.
"""

from __future__ import annotations

from attn_rewriter import torch_private


def forward_gradients() -> bool:
    """Whether a level is alive, by `forward_ad.dual_level` or `torch.func.jvp`."""
    return torch_private.forward_level >= 0
