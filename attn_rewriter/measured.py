"""What kernels were measured to take, by compute capability: tables that `choose` ranks kernels by.

A table is written by `python -m attn_rewriter bench attention --ship attn_rewriter/measured/sm_90.json`, on such a
card; others of that capability, as `sm_90_h100.json`, add to it (kernels are compared within a cell).
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from attn_rewriter.device import Device
from attn_rewriter.spec import Shapes

FOLDER = Path(__file__).with_name("measured")
TYPICAL_LENGTH = 2048
"""Of a sequence whose length only the run knows."""


@lru_cache
def table(capability: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """The cells for a compute capability: head_dim, length, causal, groups (query heads a key head), the products of
    numbers that a product of matrices takes, and milliseconds of each kernel, "forward" and "backward". Empty where
    nothing was measured."""
    name = f"sm_{capability[0]}{capability[1]}"
    paths = sorted([*FOLDER.glob(f"{name}.json"), *FOLDER.glob(f"{name}_*.json")])
    return tuple(cell for path in paths for cell in json.loads(path.read_text())["cells"])


def passes(shapes: Shapes, causal: bool, device: Device) -> dict[str, tuple[float, ...]]:
    """By kernel, the milliseconds of its forward pass and, in training, of its backward pass, for scores that are but
    scaled: those of the cell that is nearest in length and head_dim (by their ratios), or the mean of those that are,
    for as many products as there are here, where that is known."""
    cells = [cell for cell in table(device.capability) if cell["causal"] == causal] if device.capability else []
    if not cells:
        return {}
    length, head_dim, grouped = _typical(shapes.kv_len), _typical(shapes.head_dim), _typical(shapes.num_groups) > 1
    sizes = (shapes.batch, shapes.q_len, shapes.num_heads, shapes.head_dim, shapes.kv_len)
    products = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None

    def distance(cell: dict[str, Any]) -> float:
        apart = abs(math.log2(length / cell["length"])) + 2 * abs(math.log2(head_dim / cell["head_dim"]))
        return apart + (grouped != (cell["groups"] > 1))

    def share(cell: dict[str, Any]) -> float:
        return 1.0 if products is None else products / cell["products"]

    least = min(map(distance, cells))
    nearest = [cell for cell in cells if math.isclose(distance(cell), least, abs_tol=1e-9)]
    ways = ("forward", "backward") if shapes.needs_backward else ("forward",)
    known = [name for name in nearest[0]["forward"] if all(name in cell[way] for cell in nearest for way in ways)]
    return {name: tuple(mean(cell[way][name] * share(cell) for cell in nearest) for way in ways) for name in known}


def _typical(size: Any) -> int:
    return max(size, 1) if isinstance(size, int) else TYPICAL_LENGTH
