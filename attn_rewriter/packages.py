"""What is installed, and what is imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from attn_rewriter.progress import working

TESTED = ("2.11", "2.13")
"""The oldest and the newest PyTorch for which the tests were run (on the oldest, those of kernels on a GPU)."""


def untested() -> str | None:
    """That PyTorch is newer than any that was tested, in words; None where it is not."""
    here, newest = (tuple(map(int, str(text).split(".")[:2])) for text in (torch.__version__, TESTED[1]))
    if here <= newest:
        return None
    return (
        f"attn_rewriter was tested with PyTorch {TESTED[0]} to {TESTED[1]}, and this is {torch.__version__}: "
        "`verify=True` compares each site with the model's own code"
    )


@cache
def warn_if_untested() -> None:
    """Say so once."""
    if said := untested():
        warnings.warn(said, stacklevel=2)


def version(distribution: str) -> str | None:
    """A distribution's version; None where it is not installed, or so broken that it does not say."""
    try:
        return metadata.version(distribution)
    except Exception:
        return None


def unimportable(module: str) -> str | None:
    """Why a module can't be imported; None if it can."""
    try:
        with working(f"importing {module}"):
            importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a broken installation raises: also `SystemExit`, or a panic of Rust
        return f"{type(error).__name__}: {error}"
    return None


def once_imported(name: str, then: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Call a function on a module: at once where it is imported already, or as soon as someone imports it. What is
    returned calls that off."""
    finder = _AfterImport(name, then)
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, finder)
    return finder.remove


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        self.remove()
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
