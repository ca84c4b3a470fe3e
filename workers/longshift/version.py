"""Which release this is."""

from __future__ import annotations

from importlib import metadata

UNKNOWN = "unknown"
"""Of sources that run without being installed."""


def version() -> str:
    """The version of the installed distribution."""
    try:
        return metadata.version("longshift")
    except metadata.PackageNotFoundError:
        return UNKNOWN
