"""The forward pass of one kernel and the backward pass of another."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from attn_rewriter.device import Device
from attn_rewriter.kernels.base import Kernel, Tensors
from attn_rewriter.kernels.flash import Flash, FlashForm, attend, flash_form
from attn_rewriter.spec import AttentionSpec, Shapes


class Paired(Kernel):
    """Without dropout, all that a backward pass needs of a forward pass is its output and its logsumexp, and these do
    not depend on who computed them."""

    def __init__(self, forward: Flash, backward: Flash) -> None:
        self.name = f"{forward.name}/{backward.name}"
        self.forward, self.backward = forward, backward

    def refusals(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
        reasons = [] if shapes.needs_backward else ["is for training"]
        if spec.dropout_p:
            reasons.append("has no dropout: one kernel would not drop what the other did")
        reasons += self.forward.refusals(spec, replace(shapes, needs_backward=False), device)
        reasons += self.backward.refusals(spec, shapes, device)
        form = flash_form(spec, shapes)
        masked = isinstance(form, FlashForm) and form.mask is not None
        if not reasons and masked and self.forward.mask_parts is not self.backward.mask_parts:
            reasons.append("takes its mask in two ways")
        return [*dict.fromkeys(reasons)]

    def varies(self, spec: AttentionSpec, shapes: Shapes, device: Device) -> str:
        return self.forward.varies(spec, replace(shapes, needs_backward=False), device) or self.backward.varies(
            spec, shapes, device
        )

    def attend(self, spec: AttentionSpec, shapes: Shapes, device: Device, tensors: Tensors) -> Tensor:
        return attend(self.forward, self.backward, spec, shapes, tensors, self.falls_back)
