"""What can go wrong, as values (`Refusal`) inside the pipeline and as exceptions where users see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch


@dataclass(frozen=True)
class Refusal:
    """Why a site stays as it is: the stage that decided it, one sentence, and the graph node it speaks of."""

    stage: str
    reason: str
    node: Any = None

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


class Refused(Exception):
    """Carries a `Refusal` from deep inside a stage to the stage's boundary."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def refuse(stage: str, reason: str, node: Any = None) -> NoReturn:
    """Give a site up, from any depth of a stage."""
    raise Refused(Refusal(stage, reason, node))


class AttnRewriterError(RuntimeError):
    """Base of the errors that this package raises on purpose."""


class KernelUnavailable(AttnRewriterError):
    """A kernel that was asked for by name cannot compute a site; the message lists its reasons."""


class RewriteError(AttnRewriterError):
    """A site must not stay as it is: with `strict=True` because something unexpected happened there (the cause is
    chained), and within `context_parallel()` because it would be wrong."""


def in_a_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something failed for want of memory, also where it says so in words alone: PyTorch's allocator on CPU, a
    package's own, or a compiler that caught it."""
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in said for word in words)
