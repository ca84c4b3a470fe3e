"""Reading all that a session has, page by page, for an export. No statement here writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.db.tool_calls import COLUMNS as CALL_COLUMNS
from longshift.db.tool_calls import record as call_record
from longshift.db.views import TURN_COLUMNS, turn_record
from longshift.model import ToolCallRecord, TurnRecord

PAGE = 200
TURNS = text(f"""
SELECT {TURN_COLUMNS} FROM turns t WHERE t.session_id = :session AND t.position > :after ORDER BY t.position LIMIT :limit""")
SCHEDULED = text(
    f"SELECT {TURN_COLUMNS} FROM turns t WHERE t.session_id = :session AND t.position IS NULL ORDER BY t.id"
)
CALLS = text(f"""
SELECT {CALL_COLUMNS} FROM tool_calls c
 WHERE c.session_id = :session AND (c.created_at, c.id) > (CAST(:since AS timestamptz), CAST(:after AS uuid))
 ORDER BY c.created_at, c.id LIMIT :limit""")
ARTIFACTS = text("""
SELECT a.id, a.name, a.content_type, a.size, a.sha256, a.created_at FROM artifact_refs r JOIN artifacts a ON a.id = r.artifact_id
 WHERE r.session_id = :session AND a.id > :after AND a.id <> ALL(CAST(:but AS uuid[])) ORDER BY a.id LIMIT :limit""")
_BEGINNING = datetime.fromisoformat("0001-01-02T00:00:00+00:00")


async def turns(db: Database, session_id: UUID) -> AsyncIterator[TurnRecord]:
    """In the order of the session; those that have no place in it yet come last."""
    after = 0
    while True:
        rows = await db.fetch(TURNS, {"session": session_id, "after": after, "limit": PAGE})
        for row in rows:
            yield turn_record(row)
        if len(rows) < PAGE:
            break
        after = rows[-1].position
    for row in await db.fetch(SCHEDULED, {"session": session_id}):
        yield turn_record(row)


async def tool_calls(db: Database, session_id: UUID) -> AsyncIterator[ToolCallRecord]:
    """The oldest first."""
    since, after = _BEGINNING, UUID(int=0)
    while True:
        rows = await db.fetch(CALLS, {"session": session_id, "since": since, "after": after, "limit": PAGE})
        for row in rows:
            yield call_record(row)
        if len(rows) < PAGE:
            return
        since, after = rows[-1].created_at, rows[-1].id


async def artifacts(db: Database, session_id: UUID, *, but: Collection[UUID]) -> AsyncIterator[Row[Any]]:
    """(id, name, content_type, size, sha256, created_at) of those that the session refers to, ``but`` some."""
    after = UUID(int=0)
    while True:
        rows = await db.fetch(ARTIFACTS, {"session": session_id, "but": list(but), "after": after, "limit": PAGE})
        for row in rows:
            yield row
        if len(rows) < PAGE:
            return
        after = rows[-1].id
