"""Every spelling is read as what it computes, and every kernel that takes it computes that."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from attn_rewriter.kernels import KERNELS
from attn_rewriter.kernels.flash import Flash
from tests.accuracy import assert_as_accurate
from tests.running import DRAWS, joined, rewritten, truth, with_gradients
from tests.spellings import SPELLINGS, Spelling

RUNS = [("reference", None), ("sdpa", None), ("flex", "sm_90")]


def test_every_kernel_is_run() -> None:
    """flash-attention computes in half precision alone, as what is computed in chunks: `test_flash.py` and
    `test_kernels.py` (what stands in for it is no kernel to choose: `test_faults.py`); the kernel for decoding in
    inference alone: `test_decode.py`."""
    others = (Flash.versions.keys() - {"stepwise"}) | {"chunked", "decode"}
    assert {kernel for kernel, _ in RUNS} | others == KERNELS.keys()


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_reading(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    function, report = rewritten(spelling.function, kernel="reference")
    function(*inputs)
    sites = report().sites
    if spelling.refused is not None:
        (site,) = sites
        assert site.kernel is None
        assert spelling.refused in "; ".join(refusal.reason for refusal in site.refusals)
        return
    assert [str(site.spec) for site in sites] == [spelling.computes] * spelling.n_sites
    for site in sites:
        assert site.kernel == "reference", site
        assert spelling.num_kv_heads in (None, site.shapes.num_kv_heads)


@pytest.mark.parametrize(("kernel", "device"), RUNS)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if not s.random], ids=lambda s: s.name)
def test_result_and_gradients(spelling: Spelling, kernel: str, device: str | None) -> None:
    """FlexAttention has no backward pass on CPU; as if for a GPU, and without Inductor, PyTorch computes it densely."""
    draws = [spelling.inputs(seed=seed) for seed in range(DRAWS)]
    function, _ = rewritten(spelling.function, kernel=kernel, device=device)
    if kernel in spelling.impossible:
        with pytest.raises(BackendCompilerFailed, match="KernelUnavailable"):
            function(*draws[0])
        return
    assert_as_accurate(
        joined(with_gradients(function, inputs) for inputs in draws),
        joined(with_gradients(spelling.function, inputs) for inputs in draws),
        joined(truth(spelling.function, inputs) for inputs in draws),
    )


@pytest.mark.parametrize("device", [None, "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if not s.random], ids=lambda s: s.name)
def test_other_types(spelling: Spelling, dtype: torch.dtype, device: str | None) -> None:
    """On CPU, and with FlexAttention as if for a GPU."""
    draws = [spelling.inputs(dtype, seed) for seed in range(DRAWS)]
    try:
        eager = joined(spelling.function(*inputs) for inputs in draws)
    except RuntimeError as error:
        pytest.skip(f"eager raises: {error}")
    function, _ = rewritten(
        spelling.function, device=device, kernel="auto" if device is None else ["flex", "reference"]
    )
    fused = joined(function(*inputs) for inputs in draws)
    assert_as_accurate(fused, eager, joined(truth(spelling.function, inputs)[0] for inputs in draws))
