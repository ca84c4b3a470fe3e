"""Rows of archives: how far a session's log is in the cold tier, and which artifacts hold it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database

FIND = text("""
SELECT tenant_id, through_seq, event_id, manifest_id, context_id, events, bytes FROM archives WHERE session_id = :session""")


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """One row of ``archives``."""

    tenant_id: UUID
    through_seq: int
    event_id: UUID
    manifest_id: UUID
    context_id: UUID
    events: int
    bytes: int


async def find(db: Database, session_id: UUID) -> ArchiveRecord | None:
    rows = await db.fetch(FIND, {"session": session_id})
    if not rows:
        return None
    return ArchiveRecord(**{name: getattr(rows[0], name) for name in ArchiveRecord.__dataclass_fields__})
