"""Deleting sessions and tenants.

A session is deleted by one short transaction under the lock of its row (FOR UPDATE: whoever adds something that refers to
the session has a key-share lock on it): it becomes a tombstone under a new epoch, so that
nobody can use it or make it again. Then its rows are removed in pieces. ``purge_at`` is when the sweeper looks for what is
left: because whoever removed them died, or because somebody who was paused wrote another row meanwhile. Only after a look of
the sweeper's that has found nothing to go wrong, it is NULL.

Turns of a batch stay, emptied, so that the batch still counts what became of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import TextClause, text

from longshift.db.database import Database
from longshift.errors import InUse, NotFound
from longshift.model import Prefix, show_id

LOCK = text("""
SELECT tenant_id FROM sessions WHERE id = :session AND deleted_at IS NULL
   AND (CAST(:tenant AS uuid) IS NULL OR tenant_id = :tenant) FOR UPDATE""")
# a parent that still runs would wait for a child that nobody can tell it about
WHY_NOT = text("""
SELECT s.lease_worker IS NOT NULL OR EXISTS (
           SELECT 1 FROM turns t WHERE t.session_id = s.id AND t.status IN ('scheduled', 'queued', 'running', 'waiting')) AS open,
       EXISTS (SELECT 1 FROM turns t JOIN turns q ON q.id = t.parent_turn_id
                 JOIN turns p ON p.session_id = q.session_id AND p.root_turn_id = q.root_turn_id
                WHERE t.session_id = s.id AND t.parent_turn_id IS NOT NULL
                  AND p.status IN ('scheduled', 'queued', 'running', 'waiting')) AS child,
       CAST(:unused_since AS timestamptz) IS NOT NULL AND s.leased_at > :unused_since AS used,
       greatest((SELECT max(seq) FROM events e WHERE e.session_id = s.id), s.archived_through) AS events
  FROM sessions s WHERE s.id = :session""")
BURY = text("""
UPDATE sessions SET deleted_at = clock_timestamp(), purge_at = clock_timestamp() + CAST(:again AS interval),
       lease_epoch = nextval('epochs'), ready_at = NULL, dispatched_at = NULL, suspect = NULL, idle_since = NULL
 WHERE id = :session RETURNING lease_epoch""")

_PIECE = """
DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE session_id = :session {also} LIMIT :limit))"""
PURGE = {
    name: text(_PIECE.format(table=name, also=also))
    for name, also in (
        ("events", ""),
        ("checkpoints", ""),
        ("passages", ""),
        ("mail", ""),
        ("approvals", ""),
        ("tool_calls", ""),
        ("archives", ""),
        ("session_details", ""),
        ("turns", "AND batch_id IS NULL"),
    )
}
EMPTY_TURNS = text("""
UPDATE turns SET input = 'null', input_artifact = NULL, output = NULL, output_artifact = NULL,
       error = CASE WHEN error IS NOT NULL THEN json_build_object('code', 'deleted', 'message', 'its session was deleted') END,
       metadata = '{}', traceparent = NULL, version = version + 1
 WHERE session_id = :session AND batch_id IS NOT NULL
   AND (CAST(input AS text) <> 'null' OR output IS NOT NULL OR input_artifact IS NOT NULL OR output_artifact IS NOT NULL
        OR metadata <> '{}' OR error ->> 'code' IS DISTINCT FROM CASE WHEN error IS NOT NULL THEN 'deleted' END)""")
PURGED = text("UPDATE sessions SET purge_at = NULL WHERE id = :session AND deleted_at IS NOT NULL")
POSTPONE = text("""
UPDATE sessions SET purge_at = clock_timestamp() + CAST(:again AS interval) WHERE id = :session AND deleted_at IS NOT NULL""")

OF_TENANT = text("""
SELECT id FROM sessions WHERE tenant_id = :tenant AND deleted_at IS NULL AND (CAST(:after AS uuid) IS NULL OR id > :after)
 ORDER BY id LIMIT :limit""")
OPEN_OF_TENANT = text("""
SELECT id FROM turns WHERE tenant_id = :tenant AND status IN ('scheduled', 'queued', 'running', 'waiting') LIMIT :limit""")
REVOKE_KEYS = text("""
UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE tenant_id = :tenant""")
_OF_TENANT = (
    """DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE tenant_id = :tenant LIMIT :limit))"""
)
PURGE_TENANT = {name: text(_OF_TENANT.format(table=name)) for name in ("turns", "batches", "idempotency", "api_keys")}
REMOVE_TENANT = text("DELETE FROM tenants WHERE id = :tenant")
TENANTS = text("""
SELECT t.id, t.name, t.created_at,
       (SELECT count(*) FROM sessions s WHERE s.tenant_id = t.id AND s.deleted_at IS NULL) AS sessions
  FROM tenants t ORDER BY t.name""")


@dataclass(frozen=True, slots=True)
class Buried:
    """A session that is gone for everybody, and what it leaves to be removed."""

    tenant_id: UUID
    epoch: int
    events: int  # of its log, wherever they are


@dataclass(frozen=True, slots=True)
class TenantRecord:
    id: UUID
    name: str
    created_at: datetime
    sessions: int


async def bury(
    db: Database,
    session_id: UUID,
    *,
    again: timedelta,
    tenant_id: UUID | None = None,
    unused_since: datetime | None = None,
) -> Buried:
    """Make the session a tombstone. ``again``: when the sweeper looks for what is left.

    Raises:
        NotFound: no such session (of that tenant), or it is deleted already.
        InUse: it has an open turn, or its turn is the child of one; or it was used after ``unused_since``.
    """
    name = show_id(Prefix.SESSION, session_id)
    async with db.transaction() as tx:
        row = (await tx.execute(LOCK, {"session": session_id, "tenant": tenant_id})).first()
        if row is None:
            raise NotFound(f"there is no session {name}")
        state = (await tx.execute(WHY_NOT, {"session": session_id, "unused_since": unused_since})).one()
        if state.open or state.used:
            raise InUse(f"{name} has an open turn: cancel it, or wait until it has ended")
        if state.child:
            raise InUse(f"{name} belongs to a child of a turn that is still open: wait until that has ended")
        epoch = (await tx.execute(BURY, {"session": session_id, "again": again})).one().lease_epoch
    return Buried(row.tenant_id, epoch, state.events)


async def purge(db: Database, session_id: UUID, *, limit: int) -> dict[str, int]:
    """Remove the rows of a deleted session, ``limit`` at a time; how many there were, by table."""
    removed = {}
    for name, statement in PURGE.items():
        removed[name] = await _all_of(db, statement, {"session": session_id, "limit": limit})
    removed["turns"] += await db.execute(EMPTY_TURNS, {"session": session_id})
    return removed


async def purged(db: Database, session_id: UUID) -> None:
    """Nothing is left of it."""
    await db.execute(PURGED, {"session": session_id})


async def postpone(db: Database, session_id: UUID, *, again: timedelta) -> None:
    """Something was in the way: look again later."""
    await db.execute(POSTPONE, {"session": session_id, "again": again})


async def tenants(db: Database) -> list[TenantRecord]:
    rows = await db.fetch(TENANTS)
    return [TenantRecord(row.id, row.name, row.created_at, row.sessions) for row in rows]


async def sessions_of(db: Database, tenant_id: UUID, *, page: int = 200) -> AsyncIterator[UUID]:
    """The sessions of a tenant that are not deleted."""
    after = None
    while True:
        rows = await db.fetch(OF_TENANT, {"tenant": tenant_id, "after": after, "limit": page})
        for row in rows:
            yield row.id
        if len(rows) < page:
            return
        after = rows[-1].id


async def open_turns(db: Database, tenant_id: UUID, *, limit: int = 1000) -> list[UUID]:
    return [row.id for row in await db.fetch(OPEN_OF_TENANT, {"tenant": tenant_id, "limit": limit})]


async def revoke_keys(db: Database, tenant_id: UUID) -> None:
    """From now on (within the seconds for which the API remembers an answer) nobody can use the tenant."""
    await db.execute(REVOKE_KEYS, {"tenant": tenant_id})


async def purge_tenant(db: Database, tenant_id: UUID, *, limit: int) -> dict[str, int]:
    """Remove what a tenant without sessions still has, and at last the tenant."""
    removed = {}
    for name, statement in PURGE_TENANT.items():
        removed[name] = await _all_of(db, statement, {"tenant": tenant_id, "limit": limit})
    await db.execute(REMOVE_TENANT, {"tenant": tenant_id})
    return removed


async def _all_of(db: Database, statement: TextClause, params: dict[str, Any]) -> int:
    limit, removed = params["limit"], 0
    while (rows := await db.execute(statement, params)) == limit:
        removed += rows
    return removed + rows
