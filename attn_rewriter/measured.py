"""What kernels were measured to take, by compute capability: tables that `choose` ranks kernels by.

A table is written by `python -m attn_rewriter bench attention --ship attn_rewriter/measured/sm_90.json`, on such a
card.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from attn_rewriter.device import Device
from attn_rewriter.spec import Shapes

FOLDER = Path(__file__).with_name("measured")
TYPICAL_LENGTH = 2048
"""Of a sequence whose length only the run knows."""


@lru_cache
def table(capability: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """The cells for a compute capability: head_dim, length, causal, groups (query heads a key head), and milliseconds
    of each kernel, "forward" and "backward". Empty where nothing was measured."""
    path = FOLDER / f"sm_{capability[0]}{capability[1]}.json"
    return tuple(json.loads(path.read_text())["cells"]) if path.exists() else ()


def passes(shapes: Shapes, causal: bool, device: Device) -> dict[str, tuple[float, ...]]:
    """By kernel, the milliseconds of its forward pass and, in training, of its backward pass, for scores that are but
    scaled: those of the cell that is nearest in length and head_dim (by their ratios)."""
    cells = [cell for cell in table(device.capability) if cell["causal"] == causal] if device.capability else []
    if not cells:
        return {}
    length, head_dim, grouped = _typical(shapes.kv_len), _typical(shapes.head_dim), _typical(shapes.num_groups) > 1

    def distance(cell: dict[str, Any]) -> float:
        apart = abs(math.log2(length / cell["length"])) + 2 * abs(math.log2(head_dim / cell["head_dim"]))
        return apart + (grouped != (cell["groups"] > 1))

    nearest = min(cells, key=distance)
    wanted = [nearest[way] for way in (("forward", "backward") if shapes.needs_backward else ("forward",))]
    return {name: tuple(times[name] for times in wanted) for name in wanted[0] if all(name in t for t in wanted)}


def _typical(size: Any) -> int:
    return max(size, 1) if isinstance(size, int) else TYPICAL_LENGTH
