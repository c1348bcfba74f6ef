"""From what a site computes, at which shapes and on which device, to the kernel that will compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from attn_rewriter.device import Device
from attn_rewriter.errors import KernelUnavailable, Refusal
from attn_rewriter.kernels import KERNELS, Kernel
from attn_rewriter.spec import AttentionSpec, Shapes

Request = Union[str, Sequence[str]]


@dataclass(frozen=True)
class Choice:
    """The kernel that will run, and every other one that was asked before it with its reasons."""

    kernel: Kernel
    refused: tuple[Refusal, ...] = ()


def order(device: Device) -> tuple[str, ...]:
    """The kernels to try on a device in automatic mode, the preferred one first."""
    return ("sdpa",)


def requested(kernel: Request) -> tuple[str, ...] | None:
    """The names in a request, checked; None for "auto"."""
    names = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    if names == ("auto",):
        return None
    unknown = [name for name in names if name not in KERNELS]
    if unknown or not names:
        asked = f"unknown kernel {unknown[0]!r}" if unknown else "no kernel is named"
        raise ValueError(f"{asked}: choose from 'auto', {', '.join(map(repr, KERNELS))}, or a list of these")
    return names


def choose(spec: AttentionSpec, shapes: Shapes, device: Device, kernel: Request = "auto") -> Choice | Refusal:
    """The first usable kernel in the device's order, or in the order asked for.

    Raises `KernelUnavailable` where kernels were asked for by name and none of them can run.
    """
    names = requested(kernel)
    refused: list[Refusal] = []
    for name in names or order(device):
        reasons = KERNELS[name].refusals(spec, shapes, device)
        if not reasons:
            return Choice(KERNELS[name], tuple(refused))
        refused += [Refusal("choose", f"{name}: {reason}") for reason in reasons]
    said = "; ".join(refusal.reason for refusal in refused)
    if names is not None:
        raise KernelUnavailable(f"no requested kernel can compute {spec} at {shapes} on {device}: {said}")
    return Refusal("choose", said)
