"""What the benchmarks of whole models share: a Llama of random weights, ways to compile it, and what was rewritten."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from attn_rewriter.api import optimize
from attn_rewriter.bench import run
from attn_rewriter.bench.measure import Cell
from attn_rewriter.report import Report
from attn_rewriter.torch_private import fresh_cache

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.10 as well

PARTS = (1, 3000 / 4096, 1 / 2, 1 / 4)


@dataclass(frozen=True)
class Llama:
    """A Llama's sizes, by their names in its configuration."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads

    def training_flops(self, length: int) -> float:
        """Of the products of a token's training step: twice a weight forward and four times backward, and the same for
        its attention to half of `length` tokens. (What is computed once more, by a kernel's backward pass, is none of
        the model's.)"""
        of_keys = 2 * self.num_key_value_heads * self.head_dim
        projections = self.hidden_size * (2 * self.hidden_size + of_keys + 3 * self.intermediate_size)
        weights = self.num_hidden_layers * projections + self.hidden_size * self.vocab_size
        return 6.0 * (weights + self.num_hidden_layers * self.hidden_size * length)


@dataclass(frozen=True)
class Column:
    """What is done, one of `kinds`, and the batch and length it is done for."""

    kind: str
    batch: int
    tokens: int
    kinds: ClassVar[Collection[str]]

    def __str__(self) -> str:
        return f"{self.kind}-{self.batch}x{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """An argparse type: what `str` makes of a column."""
        match = re.fullmatch(rf"({'|'.join(cls.kinds)})-([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not like {next(iter(cls.kinds))}-2x4096, with one of {', '.join(cls.kinds)}"
            )
        return cls(match[1], int(match[2]), int(match[3]))


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on; ends where a model can't be made."""
    run.require("transformers", "a model")
    return run.setup(options)


def build(sizes: Llama, device: str, dtype: torch.dtype, attn_implementation: str = "eager") -> Any:
    """A Llama with random weights, made where it will be used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(
            LlamaConfig(**asdict(sizes)), dtype=dtype, attn_implementation=attn_implementation
        )


def left_padding(batch: int, length: int, device: str) -> Tensor:
    """A mask `[batch, length]` of prompts of these parts of the length, over and over: 0 on the left of each."""
    lengths = [int(length * PARTS[i % len(PARTS)]) for i in range(batch)]
    first = length - torch.tensor(lengths, device=device)
    return (torch.arange(length, device=device) >= first[:, None]).long()


def compile_in_place(model: nn.Module, rewrite: bool, compiler: str) -> None:
    """Compile a model with static shapes, its attention rewritten or as it is."""
    if rewrite:
        optimize(model, compiler=compiler, dynamic=False)
    else:
        model.compile(backend=compiler, dynamic=False)


def from_scratch(device: str, compiler: str) -> AbstractContextManager[None]:
    """Empty caches, for the time of a compilation; in a process that has compiled before."""
    warm_up(device, compiler)
    return fresh_cache()


@lru_cache
def warm_up(device: str, compiler: str) -> None:
    """Imports, compile workers and library handles, so that the first cell doesn't pay for them."""
    square = torch.randn(256, 256, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
    with fresh_cache():
        torch.compile(lambda x: (x @ x).relu() + x, backend=compiler)(square)


def rewriting(report: Report) -> Cell:
    """What a cell keeps of a report; all of it where a site is not fused."""
    kernels = Counter(site.kernel for site in report.sites if site.kernel)
    cell: Cell = {"sites": report.n_sites, "fused": report.n_fused, "kernels": dict(kernels)}
    cell["rewrite_ms"] = report.rewrite_seconds * 1e3
    return cell if report.n_fused == report.n_sites else cell | {"report": str(report)}


def sites(cell: Cell) -> str:
    """As in "4/4: flex 2, sdpa 2"; nothing where no attention was rewritten."""
    if "sites" not in cell:
        return ""
    kernels = ", ".join(f"{name} {count}" for name, count in sorted(cell.get("kernels", {}).items()))
    return f"{cell['fused']}/{cell['sites']}" + (f": {kernels}" if kernels else "")
