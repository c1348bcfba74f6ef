"""Second derivatives of a fused call, which no kernel has.

A compiler without AOTAutograd, such as "eager", runs the rewritten graph under PyTorch's autograd, where plain code can
be differentiated twice (`create_graph=True`). So what a kernel gives goes on through a function that has two ways back:
as long as nobody differentiates the backward pass, to the kernel; otherwise to its operands, by the operations that the
spec says. The forward pass is computed once, and again only on the second way.

AOTAutograd has no second derivatives, with a rewriter or without. What it traces is the kernel alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Tensors
from attn_rewriter.kernels.blocks import AsNode
from attn_rewriter.kernels.masking import coordinates, holds
from attn_rewriter.kernels.reference import Reference
from attn_rewriter.spec import AttentionSpec, Mask, Modifier, Shapes
from attn_rewriter.torch_private import is_functorch_wrapped_tensor


def twice_differentiable(result: Any, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> Any:
    """A kernel's result, or the stand-in for it, differentiable twice."""
    if not shapes.needs_backward:
        return result
    names = ("query", "key", "value", *sorted({*spec.numeric, *map(str, spec.keep.tensors())}), *spec.keep.sizes())
    return _Twice(spec, shapes, device, names)(result, tuple(tensors[name] for name in names))


@dataclass(frozen=True)
class _Twice(AsNode):
    spec: AttentionSpec
    shapes: Shapes
    device: Device
    names: tuple[Any, ...]
    __name__ = "twice_differentiable"

    def run(self, result: Tensor, operands: tuple[Any, ...]) -> Tensor:
        if not result.requires_grad or not all(map(_is_plain, (result, *operands))):
            return result
        found: Tensor = _TwoWaysBack.apply(self, result, *operands)
        return found

    def fake(self, result: Tensor, operands: tuple[Any, ...]) -> Tensor:
        return result

    def computed(self, operands: Sequence[Any]) -> Tensor:
        """By the spec's operations. Masks are made from what was read of them, as kernels do."""
        tensors: dict[Any, Any] = dict(zip(self.names, operands))
        (batch, num_heads, q_len, _), kv_len = tensors["query"].shape, tensors["key"].size(-2)
        modifiers: list[Modifier] = []
        for i, modifier in enumerate(self.spec.modifiers):
            if isinstance(modifier, Mask):
                at = coordinates(batch, num_heads, q_len, kv_len, tensors["query"].device)
                tensors[f"mask.{i}"] = holds(modifier.keep, tensors, *at)
                modifier = Mask(f"mask.{i}", modifier.keep, "keep")
            modifiers.append(modifier)
        return Reference()(replace(self.spec, modifiers=tuple(modifiers)), self.shapes, self.device, tensors)


def _is_plain(x: Any) -> bool:
    """Whether this is run, not traced by AOTAutograd, nor within a transform of `torch.func`."""
    return not isinstance(x, Tensor) or (type(x) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(x))


class _TwoWaysBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _Twice, result: Tensor, *operands: Any) -> Tensor:
        ctx.how, ctx.dtype = how, result.dtype
        ctx.others = [None if isinstance(x, Tensor) else x for x in operands]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in operands))
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        nowhere = (None,) * len(ctx.others)
        if not torch.is_grad_enabled():  # nobody will differentiate this
            return None, gradient, *nowhere
        if ctx.how.spec.dropout_p:
            raise RuntimeError("attn_rewriter: fused attention with dropout has no second derivative")
        # Views, so that each gradient is that by this operand alone: one may be another, or computed from another.
        operands = [other if x is None else x.view_as(x) for x, other in zip(ctx.saved_tensors, ctx.others)]
        wanted = [i for i, x in enumerate(operands) if isinstance(x, Tensor) and x.requires_grad]
        output = ctx.how.computed(operands).to(ctx.dtype)
        by = [operands[i] for i in wanted]
        found = torch.autograd.grad(output, by, gradient, create_graph=True, allow_unused=True)
        gradients = dict(zip(wanted, found))
        return None, None, *(gradients.get(i) for i in range(len(operands)))
