"""PyTorch's own engines for more than one device, around models whose attention is rewritten.

Two processes are started once for many cases: what is compared, and how, is in `tests/scale.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed")
from tests import scale

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="there is no gloo")


def run(table: str, folder: Path) -> None:
    """All cases of a table in two processes; fails with all that went wrong in either."""
    torch.multiprocessing.spawn(scale.process, (folder, table), nprocs=scale.WORLD)
    failed = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(scale.WORLD)]
    said = [
        f"--- process {rank}: {name}\n{text}" for rank, failures in enumerate(failed) for name, text in failures.items()
    ]
    assert not said, "\n".join(said)


def test_engines(tmp_path: Path) -> None:
    """Training and inference: all attention is fused, and loss, gradients and logits are those of one process."""
    run("CASES", tmp_path)


def test_context_parallel(tmp_path: Path) -> None:
    """A sequence of which each process holds a part: the same as in one, or an error. (On CPU the ring is PyTorch's,
    its operator is not, see `ring_on_cpu`.)"""
    run("PARTS", tmp_path)
