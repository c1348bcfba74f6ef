"""The kernels, by name. To add one: write a file with a subclass of `Kernel` and list it here."""

from __future__ import annotations

from attn_rewriter.kernels.base import Kernel, Limits, Tensors
from attn_rewriter.kernels.decode import Decode
from attn_rewriter.kernels.fa2 import FA2
from attn_rewriter.kernels.fa3 import FA3
from attn_rewriter.kernels.fa4 import FA4
from attn_rewriter.kernels.flex import Flex
from attn_rewriter.kernels.reference import Reference
from attn_rewriter.kernels.sdpa import SDPA

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (SDPA(), FA4(), FA3(), FA2(), Flex(), Decode(), Reference())
}

__all__ = ["KERNELS", "Kernel", "Limits", "Tensors"]
