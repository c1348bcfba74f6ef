"""What a kernel is to the rest of the package: a declaration of what it can do, and its call."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attn_rewriter.context_parallel import ring
from attn_rewriter.device import Device
from attn_rewriter.spec import AttentionSpec, Bias, Shapes, Size

Tensors = Mapping[Any, torch.Tensor]
"""Tensors by name. A symbolic size is a key as well, its value the number that it is in this run."""


def number(size: Size, tensors: Tensors) -> Any:
    """A size as what tensors can be made of and compared with."""
    return size if isinstance(size, int) else tensors[size]


@dataclass(frozen=True)
class Limits:
    """The part of a declaration that is the same for all kernels; None means no limit. `platforms` are those of
    `Device.platform`, `archs` AMD's architectures. `max_blocks` is what CUDA takes in the dimensions of a grid that
    kernels give to batch and heads."""

    platforms: frozenset[str] | None = None
    archs: frozenset[str] = frozenset({"gfx90a", "gfx942", "gfx950"})
    min_capability: tuple[int, int] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    max_head_dim: int | None = None
    max_blocks: int | None = None

    def refusals(self, shapes: Shapes, device: Device) -> list[str]:
        """One sentence for each limit that is not kept."""
        reasons = []
        if self.platforms is not None and device.platform not in self.platforms:
            reasons.append(f"runs on {', '.join(sorted(self.platforms))}, not on {device.platform}")
        elif self.platforms is not None and device.platform == "rocm" and device.arch not in self.archs:
            reasons.append(f"runs on {', '.join(sorted(self.archs))} of AMD's, this is {device}")
        elif device.platform == "cuda" and (device.capability or (0, 0)) < (self.min_capability or (0, 0)):
            assert self.min_capability is not None
            reasons.append(f"needs sm_{self.min_capability[0]}{self.min_capability[1]} or newer, this is {device}")
        if self.dtypes is not None and shapes.dtype not in self.dtypes:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
            reasons.append(f"computes in {names}, not in {str(shapes.dtype).removeprefix('torch.')}")
        if self.max_head_dim is not None:
            for size in (shapes.head_dim, shapes.head_dim_v):
                if not isinstance(size, int) or size > self.max_head_dim:
                    reasons.append(f"head_dim is at most {self.max_head_dim}, here {size}")
                    break
        most = max((n for n in (shapes.batch, shapes.num_heads) if isinstance(n, int)), default=0)
        if self.max_blocks is not None and device.type == "cuda" and most > self.max_blocks:
            reasons.append(f"its CUDA kernels take at most {self.max_blocks} batches and heads")
        return reasons


FUSED_HEAD_DIM = 256
"""The most features of a head that fused kernels take on CUDA."""


class Kernel:
    """A way to compute attention.

    A new kernel is one file with one subclass, listed in `attn_rewriter/kernels/__init__.py`. It says what it can
    compute in `limits` and `refusals`, and computes it in `attend`, which is plain PyTorch: the emitter runs it on
    stand-ins to put its operations into the graph, the tests run it on tensors. So it must not look at the contents
    of tensors, and takes sizes and types from `shapes`. Optional packages are imported in `attend` alone.
    It says in `varies` where it is not deterministic.
    One that attends to the keys of all processes within `context_parallel()` says `goes_round`. One that computes rows
    without a key by what the model's masks add to the scores, be it a different number for each key, says `adds_fills`;
    one that gives the scores of such rows their gradients whatever the weights are says so in `goes_through_scores`.
    """

    name: str
    limits: ClassVar[Limits] = Limits()
    needs_inductor: ClassVar[bool] = False
    goes_round: ClassVar[bool] = False
    adds_fills: ClassVar[bool] = False
    falls_back: bool = False

    def with_fallback(self) -> Kernel:
        """The same kernel, but where it raises while the model runs, something slower computes the same, if it can."""
        made = copy(self)
        made.falls_back = True
        return made

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        """Why this kernel cannot compute `spec`, a sentence each; empty means that it can."""
        reasons = self.limits.refusals(shapes, device)
        if ring() is not None and not self.goes_round:
            reasons.append("sees no keys of other processes, as within context_parallel()")
        if torch.are_deterministic_algorithms_enabled() and (varies := self.varies(spec, shapes, device)):
            reasons.append(f"{varies}, and torch.use_deterministic_algorithms is on")
        if shapes.is_gqa and not isinstance(shapes.num_groups, int):
            reasons.append("the number of heads that share a key is not known")
        return reasons + self._fully_masked(spec, shapes)

    def _fully_masked(self, spec: AttentionSpec, shapes: Shapes) -> list[str]:
        """Why it can't compute rows without a key as the model does."""
        rows = spec.fully_masked_rows
        if rows == "by fill" and (shapes.needs_backward or not self.adds_fills):
            passes = "in training" if self.adds_fills else "with different numbers"
            return [f"computes no rows that see no key where masks fill them {passes}"]
        learned = any(isinstance(m, Bias) and m.tensor in shapes.learned for m in spec.modifiers)
        bent = isinstance(spec.affine(), str)
        if rows == "mean, added" and shapes.needs_backward and (learned or bent) and not self.adds_fills:
            what = "biases" if learned else "scores that are capped"
            return [f"gives no gradient to {what} from rows that see no key"]
        added = spec.may_mask or rows == "mean, added"
        return self.no_closed_gradient(spec, shapes) if added and not self.goes_through_scores(shapes) else []

    def goes_through_scores(self, shapes: Shapes) -> bool:
        """Whether scores of rows without a key get their gradients whatever the weights of these rows are."""
        return False

    @staticmethod
    def no_closed_gradient(spec: AttentionSpec, shapes: Shapes) -> list[str]:
        """Why rows without a key, of scores to which masks are added, have no gradients that a product with one matrix
        for each head gives (`fully_masked.gradient_of_weights`)."""
        if not shapes.needs_backward:
            return []
        reasons = []
        if spec.may_mask and ("query" in spec.hides_over or ("head" in spec.hides_over and shapes.is_gqa)):
            reasons.append("gives keys no gradient from rows that numbers handed in hide, other ones for each query")
        if spec.dropout_p:
            reasons.append("gives keys no gradient, where weights are dropped, from rows that see no key")
        return reasons

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        """Why its result, or in training a gradient, differs from run to run on the same inputs; empty where it is
        known not to. Asked where `torch.use_deterministic_algorithms` is on, which includes that it only warns."""
        return "does not say that it is deterministic"

    def __call__(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        """The output, `[batch, num_heads, q_len, head_dim_v]` in `shapes.dtype` or `shapes.product_dtype`.

        `tensors` holds "query", "key", "value" and the names in the spec, in the layouts of `attn_rewriter.spec`;
        all but the masks have the type `shapes.dtype`.
        """
        output = self.attend(spec, shapes, device, tensors)
        for gate in spec.gates:
            output = gate.apply(output, tensors)
        return output

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> torch.Tensor:
        """The output before the gates, which are the same for all kernels."""
        raise NotImplementedError
