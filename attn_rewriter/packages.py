"""What is installed."""

from __future__ import annotations

from importlib import metadata


def version(distribution: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
