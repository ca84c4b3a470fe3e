"""Which schema this software knows, without Alembic: every worker says it with its first heartbeat, wards included."""

from __future__ import annotations

from pathlib import Path

_SCRIPTS = Path(__file__).parent / "migrations" / "versions"


def newest() -> str:
    """The newest revision that this software knows: scripts are named ``0005_operate.py``."""
    return max(script.name.partition("_")[0] for script in _SCRIPTS.glob("[0-9]*_*.py"))
