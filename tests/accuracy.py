"""The error budget of every numerical test: what eager itself loses against float64; or float64, and none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from attn_rewriter.contract import measured, worst
from tests.running import joined


def assert_as_accurate(fused: Any, eager: Any, truth: Any, name: str = "") -> None:
    """Assert that `fused` is as near to `truth` as `eager` is, up to what rounding explains.

    All three are tensors, or the same nesting of tuples, lists and mappings of tensors (and of None, which must be
    None in all). For each part of a tensor, with its error being the root mean square of its difference from the truth,

        error(fused) <= 1.5 * error(eager) + one rounding unit,

    where a part is at least 128 rows, or all, and the rounding unit is the spacing of numbers of the tensor's type (of
    22 bits for float32 on CUDA) at the largest magnitude of each row of the truth (`attn_rewriter.contract`). The truth
    is computed in float64; `fused` and `eager` must have the same type and shape, and `fused` only finite elements.
    Where eager leaves a result unspecified (rows in which every key is masked), leave it out of all three. Tensors of
    whole numbers or truth values must be equal.
    """
    if isinstance(truth, Mapping):
        assert fused.keys() == eager.keys() == truth.keys(), f"{name}: different keys"
        for key in truth:
            assert_as_accurate(fused[key], eager[key], truth[key], f"{name}[{key!r}]")
    elif isinstance(truth, (tuple, list)):
        assert len(fused) == len(eager) == len(truth), f"{name}: different lengths"
        for i, parts in enumerate(zip(fused, eager, truth)):
            assert_as_accurate(*parts, f"{name}[{i}]")
    elif truth is None:
        assert fused is None and eager is None, f"{name}: only the truth is None"
    else:
        _assert_tensor_as_accurate(fused, eager, truth, name or "the output")


def assert_as_accurate_over_draws(draw: Callable[[int], tuple[Any, Any, Any]]) -> None:
    """Assert `assert_as_accurate` of 4 draws of the inputs as one, or of 16, or of 64. `draw` gives the results of one
    of them: fused, eager, and the truth.

    The error of few elements is mostly luck, and so is that of many which go back to a few, as gradients do to a loss.
    Luck changes from draw to draw, a fault does not.
    """
    drawn: list[tuple[Any, Any, Any]] = []
    for n in (4, 16, 64):
        drawn += [draw(i) for i in range(len(drawn), n)]
        try:
            return assert_as_accurate(*(joined(results) for results in zip(*drawn)))
        except AssertionError:
            if n == 64:
                raise


def assert_the_same(fused: Any, eager: Any) -> None:
    """Assert that `fused` and `eager` are one function, where a test asks which function that is, not how accurately it
    is computed: models that were changed, copied, compiled anew.

    Both are tensors (or None), or the same nesting of sequences and mappings of them, in float64. What is computed in
    another order differs there by some 1e-15, any other function by far more than the 1e-7 that PyTorch tolerates. In
    float32 the one reaches PyTorch's tolerance, 1e-5, now and then: what can't be float64 is for
    `assert_as_accurate`. Tensors of whole numbers or truth values must be equal.
    """
    for x in tree_leaves((fused, eager)):
        assert x is None or isinstance(x, torch.Tensor), f"{x!r} is no tensor"
        assert x is None or not x.is_floating_point() or x.dtype == torch.float64, f"{x.dtype} is not float64"
    torch.testing.assert_close(fused, eager)


def _assert_tensor_as_accurate(fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    assert fused.dtype == eager.dtype, f"{name} is {fused.dtype}, in eager {eager.dtype}"
    assert fused.shape == eager.shape == truth.shape, f"{name} is {fused.shape}, {eager.shape}, {truth.shape}"
    if not truth.is_floating_point():
        assert torch.equal(fused, eager), f"{name} differs from eager"
        return
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}, not float64"
    assert truth.isfinite().all(), f"{name}: the truth is not finite"
    assert fused.isfinite().all(), f"{name} is not finite"
    found = worst(measured(fused, eager, truth))
    assert found.holds, (
        f"{name} is off by {found.error:.3g}, the budget is {found.allowed:.3g} (eager {found.eager:.3g})"
    )
