"""What FlexAttention is handed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_rewriter.kernels.flex import _RowMajor


@pytest.mark.parametrize("dynamic", [False, True])
def test_biases_are_computed_and_laid_out_before_they_are_read(dynamic: bool) -> None:
    """As Inductor compiles T5's: `[1, heads, q_len, kv_len]` by lookups that leave the heads next to each other."""

    def looked_up(table: Tensor, buckets: Tensor) -> Tensor:
        return table[buckets].permute(2, 0, 1).unsqueeze(0)

    @torch.compile(dynamic=dynamic)
    def laid_out(table: Tensor, buckets: Tensor) -> Tensor:
        return _RowMajor.apply(looked_up(table, buckets))

    table = torch.randn(32, 4, requires_grad=True)
    for length in (16, 24):
        buckets = torch.randint(32, (length, length))
        bias, plain = laid_out(table, buckets), looked_up(table, buckets)
        assert bias.is_contiguous() and not plain.is_contiguous()
        assert torch.equal(bias, plain)
        gradient = torch.randn_like(bias)
        found, expected = (torch.autograd.grad(x, table, gradient)[0] for x in (bias, plain))
        torch.testing.assert_close(found, expected)
