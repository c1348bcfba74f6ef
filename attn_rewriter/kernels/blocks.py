"""Which blocks of queries and keys have anything to attend to: what block-sparse kernels share.

A `block_mask` is one node in the graph. Equal ones become one, so that all layers share it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import handle_torch_function, has_torch_function

from attn_rewriter.kernels.base import Tensors, number
from attn_rewriter.kernels.masking import any_in_blocks, holds, without_hidden
from attn_rewriter.spec import Bias, Modifier, Predicate, Shapes, TensorMask, conjunction

BLOCK = 128
"""Queries, and keys, of a block."""


@torch.library.custom_op("attn_rewriter::in_memory", mutates_args=())
def in_memory(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that Inductor knows nothing about, for faults of its templates (2.11 to 2.13).

    The Triton template takes a block mask to be contiguous, and reads past its end where Inductor gave a dimension of
    one element another stride. The C++ template fails on a query that is a view of a tensor with other dimensions, on
    a captured tensor that would be computed where it is read, and where what follows would be computed in its loop.
    """
    return x.clone(memory_format=torch.contiguous_format)


@in_memory.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


in_memory.register_autograd(lambda ctx, gradient: gradient)


class AsNode:
    """A function that becomes one node where it is called on stand-ins; equal ones are the same function."""

    def __call__(self, *args: Any) -> Any:
        flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
        if has_torch_function(flat):
            return handle_torch_function(self, flat, *args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class _BlockMask(AsNode):
    """The blocks in which a predicate keeps anything, and everything, as the tensors of a `BlockMask`."""

    keep: Predicate
    names: tuple[Any, ...]  # of tensors, and sizes that are symbols
    __name__ = "block_mask"
    is_shared = True

    def run(
        self, batch: int, num_heads: int, q_len: int, kv_len: int, device: Any, masks: tuple[torch.Tensor, ...]
    ) -> tuple[Any, ...]:
        batch = batch if "batch" in self.keep.varies_over() else 1
        num_heads = num_heads if "head" in self.keep.varies_over() else 1
        tensors = dict(zip(self.names, masks))

        def mask_mod(b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
            return holds(self.keep, tensors, b, h, q, k)

        blocks = create_block_mask(mask_mod, batch, num_heads, q_len, kv_len, device, BLOCK)
        return tuple(in_memory(getattr(blocks, name)) for name in TENSORS)


TENSORS = tuple(
    f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")
)
"""The fields of a `BlockMask` in the order in which it takes them."""


@dataclass(frozen=True)
class _ShownBlocks(AsNode):
    """The blocks in which an additive mask does not hide every key, as a boolean tensor of its shape: what is hidden
    inside of them, adding it hides."""

    __name__ = "shown_blocks"
    is_shared = True

    def run(self, bias: torch.Tensor) -> torch.Tensor:
        shown = without_hidden(bias)
        for dim in (-2, -1):
            shown = _by_block(shown.transpose(dim, -1)).transpose(dim, -1)
        return shown


def _by_block(x: torch.Tensor) -> torch.Tensor:
    """Whether anything is true in the block of the last dimension that an element is in."""
    length = x.size(-1)
    if length == 1:  # the same for all
        return x
    return any_in_blocks(x, BLOCK).repeat_interleave(BLOCK, -1)[..., :length]


shown_blocks = _ShownBlocks()


def mask_names(keep: Predicate) -> tuple[Any, ...]:
    """What a predicate reads: names of tensors, and sizes that are symbols."""
    return tuple(dict.fromkeys([*map(str, keep.tensors()), *keep.sizes()]))


def perhaps_masks(modifiers: Sequence[Modifier]) -> Iterator[Bias]:
    """Biases that are the same for all heads and added last, as masks are."""
    for modifier in reversed(modifiers):
        if not isinstance(modifier, Bias):
            break
        if modifier.factor == 1 and "head" not in modifier.axes:
            yield modifier


def block_mask(keep: Predicate, shapes: Shapes, tensors: Tensors, biases: Iterable[Bias] = ()) -> Any:
    """The tensors of a `BlockMask`, as `TENSORS` names them, all int32; without the blocks that biases hide."""
    for bias in biases:
        name = f"{bias.tensor}.blocks"
        tensors = ChainMap({name: shown_blocks(tensors[str(bias.tensor)])}, tensors)  # type: ignore[arg-type]
        keep = conjunction((keep, TensorMask(name, bias.axes)))
    names = mask_names(keep)
    sizes = (shapes.batch, shapes.num_heads, shapes.q_len, shapes.kv_len)
    masks = tuple(tensors[name] for name in names)
    return _BlockMask(keep, names)(*(number(n, tensors) for n in sizes), tensors["query"].device, masks)
