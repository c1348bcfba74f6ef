"""How long something takes, on a CPU or a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from attn_rewriter import torch_private

CYCLES = 2_000_000
"""Of a GPU's clock, in a millisecond."""


def milliseconds(
    step: Callable[[], object], calls: int = 1, *, held_ms: float = 0.0, cuda: bool | None = None
) -> float:
    """How long one of `calls` steps in a row takes: between two events on CUDA, else by the clock. `cuda` is whether
    the steps run there (None: where it is in use).

    The GPU first sleeps for `held_ms`. Steps that are launched in this time run back to back.
    """

    def steps() -> None:
        for _ in range(calls):
            step()

    if not (torch.cuda.is_initialized() if cuda is None else cuda):
        return seconds_of(steps) * 1e3 / calls
    if held_ms:
        torch_private.cuda_sleep(int(held_ms * CYCLES))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    steps()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def seconds_of(run: Callable[[], object]) -> float:
    """How long one call takes, a GPU's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for what a GPU still has in its queue."""
    other = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "cuda"  # type: ignore[union-attr]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif other:
        torch.accelerator.synchronize()


def calls_in(reading_ms: float, step: Callable[[], object], *, cuda: bool | None = None) -> int:
    """How many steps take so many milliseconds together; two are taken to find out."""
    warm = min(milliseconds(step, cuda=cuda) for _ in range(2))
    return max(1, math.ceil(reading_ms / max(warm, 1e-3)))
