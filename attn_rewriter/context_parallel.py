"""PyTorch's context parallelism: each process holds a part of the sequence, and attends to the keys of all.

`torch.distributed.tensor.experimental.context_parallel` replaces `F.scaled_dot_product_attention`, as long as its block
lasts, by a function that sends keys and values around the processes. A causal mask over a part, or none, it takes to be
that of the whole sequence. Any other attention would see the keys of its own process alone, and nobody would say so:
here it is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

scaled_dot_product_attention: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention
"""PyTorch's own function, whatever `F.scaled_dot_product_attention` has been replaced by."""


@dataclass(frozen=True)
class Ring:
    """The processes among which a sequence is divided, and how: what is compiled for one ring computes for no other."""

    mesh: Any
    options: str


def ring() -> Ring | None:
    """The ring of the block that we are in."""
    function: Any = F.scaled_dot_product_attention
    if function is scaled_dot_product_attention:
        return None
    module = getattr(function, "__module__", None) or ""
    if not module.startswith("torch.distributed.tensor.experimental."):
        return None
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    return Ring(held["device_mesh"], repr(sys.modules[module]._cp_options))
