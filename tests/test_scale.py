"""PyTorch's own engines for more than one device, around models whose attention is rewritten.

Two processes are started once for many cases: what is compared, and how, is in `tests/scale.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch.distributed")
from tests import scale

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="there is no gloo")


def run(cases: list[Any], folder: Path) -> None:
    """All cases in two processes; fails with all that went wrong in either."""
    torch.multiprocessing.spawn(scale.process, (folder, cases), nprocs=scale.WORLD)
    failed = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(scale.WORLD)]
    said = [f"--- process {rank}: {name}\n{text}" for rank, failures in enumerate(failed) for name, text in failures.items()]
    assert not said, "\n".join(said)


def test_engines(tmp_path: Path) -> None:
    """Training and inference: all attention is fused, and loss, gradients and logits are those of one process."""
    run(scale.CASES, tmp_path)
