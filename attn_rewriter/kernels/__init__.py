"""The kernels, by name. To add one: write a file with a subclass of `Kernel` and list it here."""

from __future__ import annotations

from itertools import permutations, starmap

from attn_rewriter.kernels.aten import CuDNN, TorchFlash
from attn_rewriter.kernels.base import Kernel, Limits, Tensors
from attn_rewriter.kernels.chunked import Chunked
from attn_rewriter.kernels.decode import Decode
from attn_rewriter.kernels.fa2 import FA2
from attn_rewriter.kernels.fa3 import FA3
from attn_rewriter.kernels.fa4 import FA4
from attn_rewriter.kernels.flash import Flash
from attn_rewriter.kernels.flex import Flex
from attn_rewriter.kernels.paired import Paired
from attn_rewriter.kernels.reference import Reference
from attn_rewriter.kernels.sdpa import SDPA
from attn_rewriter.kernels.stepwise import Stepwise

_FLASH: tuple[Flash, ...] = (FA4(), FA3(), FA2(), CuDNN(), TorchFlash())

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (SDPA(), *_FLASH, Flex(), Decode(), Chunked(), Reference())
}

PAIRS: dict[str, Paired] = {pair.name: pair for pair in starmap(Paired, permutations(_FLASH, 2))}
"""Forward by one, backward by another: "cudnn/fa4"."""


def named(name: str) -> Kernel:
    """A kernel or a pair of two; `KeyError` for anything else."""
    return PAIRS[name] if name in PAIRS else KERNELS[name]


__all__ = ["KERNELS", "PAIRS", "Kernel", "Limits", "Paired", "Stepwise", "Tensors", "named"]
