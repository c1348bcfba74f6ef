"""What several files of tests begin with."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy
import pytest
import torch

import attn_rewriter


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests with the marker `gpu`, or `gpu(n)`, are skipped where there are fewer."""
    wanted = max((mark.args[0] if mark.args else 1 for mark in item.iter_markers("gpu")), default=0)
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers in every run, whichever tests ran before it."""
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled and nothing counted yet; no patch afterwards."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    attn_rewriter.unpatch()
