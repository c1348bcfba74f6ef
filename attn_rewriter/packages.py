"""What is installed."""

from __future__ import annotations

import importlib
from importlib import metadata


def version(distribution: str) -> str | None:
    """A distribution's version; None where it is not installed, or so broken that it does not say."""
    try:
        return metadata.version(distribution)
    except Exception:
        return None


def unimportable(module: str) -> str | None:
    """Why a module can't be imported; None if it can."""
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a broken installation raises: also `SystemExit`, or a panic of Rust
        return f"{type(error).__name__}: {error}"
    return None
