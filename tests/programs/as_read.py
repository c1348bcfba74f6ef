"""Masks as they were read, where a kernel would take them as the model made them.

SDPA on a CPU is given a mask's tensor, so that nobody sees there whether the mask was understood. Kernels for GPUs
compute it from what was read. Within `as_read`, SDPA does so too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from attn_rewriter.kernels import KERNELS
from attn_rewriter.kernels.masking import coordinates, holds
from attn_rewriter.spec import AttentionSpec, Mask


class AsRead(Mapping[Any, Any]):
    """A kernel's tensors, of which the masks are made anew."""

    def __init__(self, tensors: Mapping[Any, Any], spec: AttentionSpec) -> None:
        self._tensors = tensors
        self._masks = {m.tensor: m for m in spec.modifiers if isinstance(m, Mask) and m.tensor is not None}

    def __getitem__(self, name: Any) -> Any:
        mask = self._masks.get(name)
        if mask is None:
            return self._tensors[name]
        query, key = self._tensors["query"], self._tensors["key"]
        at = coordinates(query.size(0), query.size(1), query.size(-2), key.size(-2), query.device)
        kept = holds(mask.keep, self._tensors, *at)
        if mask.form != "additive":
            return kept if mask.form == "keep" else ~kept
        made = self._tensors[name]  # of which each number stays that says the same
        other = torch.where(kept, torch.zeros_like(made), torch.full_like(made, float("-inf")))
        return torch.where((made == 0) == kept, made, other)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def as_read() -> Iterator[None]:
    """What is compiled within computes its masks from what was read of them."""

    def reading(attend: Any) -> Any:
        def attend_as_read(self: Any, spec: Any, shapes: Any, device: Any, tensors: Any) -> Any:
            return attend(self, spec, shapes, device, AsRead(tensors, spec))

        return attend_as_read

    with ExitStack() as stack:
        for name in ("sdpa", "reference"):
            kind = type(KERNELS[name])
            stack.enter_context(patch.object(kind, "attend", reading(kind.attend)))
        yield
