"""PyTorch's own engines for more than one device, around models whose attention is rewritten.

Two processes are started once for many cases: what is compared, and how, is in `tests/scale.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import scale

two_gpus = pytest.param("cuda", marks=pytest.mark.gpu(2))


def run(table: str, folder: Path, device: str) -> None:
    """All cases of a table in two processes; fails with all that went wrong in either."""
    torch.multiprocessing.spawn(scale.process, (folder, table, device), nprocs=scale.WORLD)
    for rank in range(scale.WORLD):
        failures = json.loads((folder / f"{rank}.json").read_text())
        assert not failures, "\n".join(f"--- process {rank}: {name}\n{text}" for name, text in failures.items())


@pytest.mark.parametrize("device", ["cpu", two_gpus])
def test_engines(device: str, tmp_path: Path) -> None:
    """Training and inference: all attention is fused, and loss, gradients and logits are those of one process."""
    run("CASES", tmp_path, device)


def test_context_parallel(tmp_path: Path) -> None:
    """A sequence of which each process holds a part: the same as in one, or an error. (On a CPU the ring is PyTorch's,
    its operator is not, see `ring_on_cpu`.)"""
    run("PARTS", tmp_path, "cpu")


@pytest.mark.parametrize("device", [two_gpus])
def test_context_parallel_on_gpus(device: str, tmp_path: Path) -> None:
    """The same with PyTorch's own operators."""
    run("PARTS_ON_GPUS", tmp_path, device)
