"""What several files of tests begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attn_rewriter


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled and nothing counted yet; no patch afterwards."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    attn_rewriter.unpatch()
