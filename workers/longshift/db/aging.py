"""Which sessions have had their time: to be archived, to expire, or still to be purged; and their times to live.

``expires_at`` is not when a session expires but when the sweeper looks: a turn's path does not pay for sliding it. What
counts is the last activity: its making, its last claim, the end of its last turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database
from longshift.db.upkeep import NOW
from longshift.errors import NotFound
from longshift.events import encode
from longshift.model import Prefix, show_id

DUE = text(f"""
SELECT ARRAY(SELECT id FROM sessions WHERE purge_at <= {NOW} ORDER BY purge_at LIMIT :limit) AS buried,
       ARRAY(SELECT id FROM sessions WHERE expires_at <= {NOW} AND deleted_at IS NULL
              ORDER BY expires_at LIMIT :limit) AS expiring,
       ARRAY(SELECT id FROM sessions WHERE idle_since <= {NOW} - CAST(:archive_after AS interval) AND open_turns = 0
              ORDER BY idle_since LIMIT :limit) AS idle""")
BURIED = text("""
SELECT id, tenant_id, lease_epoch FROM sessions WHERE id = ANY(CAST(:sessions AS uuid[])) AND deleted_at IS NOT NULL""")
# a busy session, or one that was used, is looked at again when its time would be over
LOOK = text("""
WITH d AS MATERIALIZED (
    SELECT s.id, coalesce(t.ttl, CAST(:ttl AS interval)) AS ttl,
           s.open_turns > 0 OR s.lease_worker IS NOT NULL OR EXISTS (
               SELECT 1 FROM turns u WHERE u.session_id = s.id AND u.status = 'scheduled') AS busy,
           greatest(s.created_at, s.leased_at, (SELECT u.ended_at FROM turns u WHERE u.session_id = s.id
                                                 ORDER BY u.position DESC NULLS LAST LIMIT 1)) AS active_at
      FROM sessions s LEFT JOIN session_details t ON t.session_id = s.id
     WHERE s.id = ANY(CAST(:sessions AS uuid[])) AND s.expires_at <= clock_timestamp() AND s.deleted_at IS NULL
     ORDER BY s.id FOR NO KEY UPDATE OF s SKIP LOCKED),
p AS (
    UPDATE sessions SET expires_at = CASE WHEN d.busy THEN clock_timestamp() + d.ttl ELSE d.active_at + d.ttl END
      FROM d WHERE sessions.id = d.id AND (d.ttl IS NULL OR d.busy OR d.active_at + d.ttl > clock_timestamp())
    RETURNING sessions.id)
SELECT d.id, d.active_at FROM d WHERE NOT EXISTS (SELECT 1 FROM p WHERE p.id = d.id)""")
# sessions that were made without a thought of a time to live: new ones come at the end, for ids grow with time; one that is
# locked is where the next look begins
ADOPT = text("""
WITH p AS MATERIALIZED (
    SELECT id, expires_at IS NULL AND deleted_at IS NULL AS unset FROM sessions
     WHERE id > :after AND id < :before ORDER BY id LIMIT :limit),
l AS MATERIALIZED (
    SELECT id FROM sessions WHERE id IN (SELECT id FROM p WHERE unset) AND expires_at IS NULL
     ORDER BY id FOR NO KEY UPDATE SKIP LOCKED),
u AS (UPDATE sessions SET expires_at = clock_timestamp() FROM l WHERE sessions.id = l.id)
SELECT id FROM p WHERE id < ALL (SELECT id FROM p WHERE unset EXCEPT SELECT id FROM l) ORDER BY id DESC LIMIT 1""")
LATER = text("""
UPDATE sessions SET expires_at = clock_timestamp() + CAST(:pause AS interval) WHERE id = :session AND deleted_at IS NULL""")

LOCK = text("""
SELECT 1 FROM sessions WHERE id = :session AND tenant_id = :tenant AND deleted_at IS NULL FOR NO KEY UPDATE""")
SET_METADATA = text("""
INSERT INTO session_details (session_id, metadata) VALUES (:session, CAST(:metadata AS jsonb))
ON CONFLICT (session_id) DO UPDATE SET metadata = excluded.metadata""")
SET_TTL = text("""
INSERT INTO session_details (session_id, ttl) VALUES (:session, :ttl)
ON CONFLICT (session_id) DO UPDATE SET ttl = excluded.ttl""")
SET_LOOK = text("""
UPDATE sessions SET expires_at = clock_timestamp() + CAST(:ttl AS interval) WHERE id = :session""")


@dataclass(frozen=True, slots=True)
class Buried:
    """A deleted session of which something may be left."""

    id: UUID
    tenant_id: UUID
    epoch: int


@dataclass(frozen=True, slots=True)
class Expired:
    """A session that nobody has used since ``active_at``, longer than it is to live."""

    id: UUID
    active_at: datetime


@dataclass(frozen=True, slots=True)
class Due:
    """What a pass finds."""

    buried: list[UUID] = field(default_factory=list)
    expiring: list[UUID] = field(default_factory=list)
    idle: list[UUID] = field(default_factory=list)


async def due(db: Database, *, archive_after: timedelta | None, limit: int) -> Due:
    """At most ``limit`` sessions of each kind, those first that have waited longest: one statement, all that idle costs."""
    row = (await db.fetch(DUE, {"archive_after": archive_after, "limit": limit}))[0]
    return Due(row.buried, row.expiring, row.idle)


async def buried(db: Database, sessions: Collection[UUID]) -> list[Buried]:
    rows = await db.fetch(BURIED, {"sessions": list(sessions)})
    return [Buried(row.id, row.tenant_id, row.lease_epoch) for row in rows]


async def expired(db: Database, sessions: Collection[UUID], *, ttl: timedelta | None) -> list[Expired]:
    """Those of ``sessions`` whose time is over; of the others the next look is put off. ``ttl``: of those without their own."""
    rows = await db.fetch(LOOK, {"sessions": list(sessions), "ttl": ttl})
    return [Expired(row.id, row.active_at) for row in rows]


async def adopt(db: Database, *, after: UUID, before: UUID, limit: int) -> UUID | None:
    """Let the sweeper look at the next ``limit`` sessions by id; the last before one that is locked, None if there is none."""
    rows = await db.fetch(ADOPT, {"after": after, "before": before, "limit": limit})
    return rows[0].id if rows else None


async def look_later(db: Database, session_id: UUID, *, pause: timedelta) -> None:
    """It could not be deleted now."""
    await db.execute(LATER, {"session": session_id, "pause": pause})


async def change(
    db: Database,
    session_id: UUID,
    *,
    tenant_id: UUID,
    metadata: Mapping[str, str] | None = None,
    ttl: timedelta | None = None,
    set_ttl: bool = False,
    default: timedelta | None = None,
) -> None:
    """Replace a session's metadata (None: leave it), and with ``set_ttl`` its time to live (None: as the fleet is set up,
    which is ``default``).

    Raises:
        NotFound: no such session.
    """
    async with db.transaction() as tx:
        if (await tx.execute(LOCK, {"session": session_id, "tenant": tenant_id})).first() is None:
            raise NotFound(f"there is no session {show_id(Prefix.SESSION, session_id)}")
        if metadata is not None:
            await tx.execute(SET_METADATA, {"session": session_id, "metadata": encode(metadata)})
        if set_ttl:
            await tx.execute(SET_TTL, {"session": session_id, "ttl": ttl})
            await tx.execute(SET_LOOK, {"session": session_id, "ttl": ttl if ttl is not None else default})
