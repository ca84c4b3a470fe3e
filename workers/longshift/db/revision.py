"""Which schemas this software understands, without Alembic, which is slow to import.

Revisions are numbers of four digits: the order of their names is the order of the migrations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SCRIPTS = Path(__file__).parent / "migrations" / "versions"

NEEDED = "0005"
"""The newest migration that expands: without it this software cannot work. Contracting ones may still be to come."""


@dataclass(frozen=True, slots=True)
class Software:
    """What a version of the software knows of the schema.

    Attributes:
        needed: the oldest revision on which it works.
        newest: the newest that it knows. It works on newer ones, too, as long as the database says so (``compatibility``).
    """

    needed: str
    newest: str

    def understands(self, revision: str, *, oldest: str | None) -> bool:
        """Whether it works on a database at ``revision``, in which ``oldest`` is what ``compatibility`` says."""
        return self.needed <= revision and (oldest is None or oldest <= self.newest)


@cache
def newest() -> str:
    """The newest revision that this software knows: scripts are named ``0005_operate.py``."""
    return max(script.name.partition("_")[0] for script in _SCRIPTS.glob("[0-9]*_*.py"))


def ours() -> Software:
    return Software(needed=NEEDED, newest=newest())


def signed(process: str) -> str:
    """``longshift-api/0005``: how a connection is named in Postgres, so that others see which software it belongs to."""
    return f"{process}/{newest()}"
