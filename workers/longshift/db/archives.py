"""Rows of archives, and what moves events between the log and the cold tier.

No lease is taken. What decides is one short transaction under the lock of the session's row, in which nobody else may be
using the session (no open turn, no lease) and its log must end where it ended when it was read:

    archive    seal: the archive's row, its references, ``archived_through``; then the events up to there are trimmed
    restore    the events are put back, which changes nothing yet; unseal: all are there, ``archived_through`` is 0 again

So up to ``archived_through`` the archive is what counts, whatever rows of events are (still, or already) there. Rows are
removed and put back in pieces, each under the same lock and condition, so that no turn waits for long; a process that dies
in between leaves ``idle_since``, by which the sweeper finds the session again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db.database import Database
from longshift.db.log import event_of
from longshift.errors import InUse, NotFound
from longshift.events import Event
from longshift.model import Prefix, show_id
from longshift.segments import StoredEvent

FIND = text("""
SELECT tenant_id, through_seq, event_id, manifest_id, context_id, events, bytes FROM archives WHERE session_id = :session""")

# one statement, so that where the archive ends and what follows it are of one moment; lengths are known without the payloads
READ = text("""
SELECT s.archived_through, e.* FROM sessions s LEFT JOIN LATERAL (
    SELECT *, sum(octet_length(CAST(payload AS text))) OVER (ORDER BY seq) - octet_length(CAST(payload AS text)) AS before,
           count(*) OVER () AS found
      FROM (SELECT session_id, seq, id, epoch, turn_id, kind, key, schema_version, payload, created_at FROM events
             WHERE session_id = s.id AND seq > greatest(:after, s.archived_through)
               AND (CAST(:turns AS uuid[]) IS NULL OR turn_id = ANY(CAST(:turns AS uuid[])))
               AND (CAST(:kinds AS text[]) IS NULL OR kind = ANY(CAST(:kinds AS text[])))
             ORDER BY seq LIMIT :limit) p) e ON e.before < :bytes
 WHERE s.id = :session AND s.deleted_at IS NULL ORDER BY e.seq""")
STORED = text("""
SELECT seq, id, epoch, turn_id, kind, key, schema_version, created_at, CAST(payload AS text) AS payload FROM events
 WHERE session_id = :session AND seq > :after AND seq <= :through ORDER BY seq LIMIT :limit""")

LOCK = text("SELECT 1 FROM sessions WHERE id = :session FOR NO KEY UPDATE")
HEAD = text("""
SELECT s.tenant_id, s.lease_epoch, s.archived_through, s.archived_event_id,
       s.lease_worker IS NOT NULL AS leased, s.open_turns > 0 OR s.lease_worker IS NOT NULL AS in_use,
       coalesce(last.seq, s.archived_through) AS last_seq, coalesce(last.id, s.archived_event_id) AS last_event_id
  FROM sessions s LEFT JOIN LATERAL (SELECT seq, id FROM events WHERE session_id = s.id AND seq > s.archived_through
                                      ORDER BY seq DESC LIMIT 1) last ON true
 WHERE s.id = :session AND s.deleted_at IS NULL AND (CAST(:tenant AS uuid) IS NULL OR s.tenant_id = :tenant)""")

HOLD = text("SELECT id FROM artifacts WHERE id = ANY(CAST(:artifacts AS uuid[])) ORDER BY id FOR KEY SHARE")
REFER = text("""
INSERT INTO artifact_refs (artifact_id, session_id)
SELECT id, :session FROM unnest(CAST(:artifacts AS uuid[])) AS a(id) ON CONFLICT DO NOTHING""")
ADD = text("""
INSERT INTO archives (session_id, tenant_id, through_seq, event_id, manifest_id, context_id, events, bytes)
VALUES (:session, :tenant, :through_seq, :event_id, :manifest_id, :context_id, :events, :bytes)
ON CONFLICT (session_id) DO UPDATE SET through_seq = excluded.through_seq, event_id = excluded.event_id,
   manifest_id = excluded.manifest_id, context_id = excluded.context_id, events = excluded.events, bytes = excluded.bytes,
   created_at = clock_timestamp()""")
# checkpoints of what is archived would be followed by events that are no longer there; idle_since stays until all is trimmed
SEAL = text("""
UPDATE sessions SET archived_through = :through, archived_event_id = :event, checkpoint_seq = 0,
       idle_since = coalesce(idle_since, clock_timestamp()) WHERE id = :session""")
DROP_CHECKPOINTS = text("DELETE FROM checkpoints WHERE session_id = :session")

FREE = text("""
SELECT archived_through FROM sessions
 WHERE id = :session AND open_turns = 0 AND lease_worker IS NULL AND deleted_at IS NULL FOR NO KEY UPDATE SKIP LOCKED""")
TRIM = text("""
DELETE FROM events WHERE session_id = :session AND seq <= (
    SELECT max(seq) FROM (SELECT seq FROM events WHERE session_id = :session AND seq <= :through
                           ORDER BY seq LIMIT :limit) e)""")
TRIMMED = text("""
UPDATE sessions SET idle_since = NULL
 WHERE id = :session AND NOT EXISTS (SELECT 1 FROM events WHERE session_id = :session)""")
# the sweeper finds it if what is put back stays half done
BEGIN_RESTORE = text("""
UPDATE sessions SET idle_since = coalesce(idle_since, clock_timestamp()) WHERE id = :session AND deleted_at IS NULL""")
PUT_BACK = text("""
INSERT INTO events (session_id, seq, id, epoch, turn_id, kind, key, schema_version, payload, created_at)
SELECT :session, r.seq, r.id, r.epoch, r.turn_id, r.kind, r.key, r.version, CAST(r.payload AS json), r.created_at
  FROM unnest(CAST(:seq AS bigint[]), CAST(:id AS uuid[]), CAST(:epoch AS bigint[]), CAST(:turn AS uuid[]),
              CAST(:kind AS text[]), CAST(:key AS text[]), CAST(:version AS smallint[]), CAST(:payload AS text[]),
              CAST(:created_at AS timestamptz[]))
       AS r(seq, id, epoch, turn_id, kind, key, version, payload, created_at)
 ORDER BY r.seq ON CONFLICT DO NOTHING""")
COUNT = text("SELECT count(*) AS n FROM events WHERE session_id = :session AND seq <= :through")
UNSEAL = text("""
UPDATE sessions SET archived_through = 0, archived_event_id = NULL, idle_since = clock_timestamp() WHERE id = :session""")
REMOVE = text("DELETE FROM archives WHERE session_id = :session")
GIVE_UP = text("UPDATE sessions SET idle_since = NULL WHERE id = :session AND open_turns = 0")


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


@dataclass(frozen=True, slots=True)
class Head:
    """Where a session's log ends, and how much of it is archived."""

    tenant_id: UUID
    lease_epoch: int
    archived_through: int
    archived_event_id: UUID | None
    leased: bool
    in_use: bool
    last_seq: int
    last_event_id: UUID | None

    def same_log(self, other: Head) -> bool:
        mine = (self.archived_through, self.archived_event_id, self.last_seq, self.last_event_id)
        return mine == (other.archived_through, other.archived_event_id, other.last_seq, other.last_event_id)


@dataclass(frozen=True, slots=True)
class Page:
    """Events in order. ``cut``: there are more, of those that were asked for, but so many bytes are enough at a time."""

    events: list[Event]
    cut: bool = False


async def find(db: Database, session_id: UUID) -> ArchiveRecord | None:
    rows = await db.fetch(FIND, {"session": session_id})
    if not rows:
        return None
    return ArchiveRecord(**{name: getattr(rows[0], name) for name in ArchiveRecord.__dataclass_fields__})


async def read(
    db: Database,
    session_id: UUID,
    *,
    after: int,
    limit: int,
    most_bytes: int,
    turn_ids: Collection[UUID] | None = None,
    kinds: Collection[str] | None = None,
) -> tuple[int, Page]:
    """How far the log is archived, and the events behind ``after`` and behind that: at most ``limit``, and none that begins
    behind ``most_bytes`` of payloads; of a deleted session nothing, whatever is left of it."""
    params = {
        "session": session_id,
        "after": after,
        "limit": limit,
        "bytes": most_bytes,
        "turns": list(turn_ids) if turn_ids is not None else None,
        "kinds": [str(kind) for kind in kinds] if kinds is not None else None,
    }
    rows = await db.fetch(READ, params)
    events = [event_of(row) for row in rows if row.seq is not None]
    return (rows[0].archived_through if rows else 0), Page(events, cut=bool(events) and rows[0].found > len(events))


async def stored(db: Database, session_id: UUID, *, after: int, through: int, limit: int) -> list[StoredEvent]:
    """At most ``limit`` events with their payloads as text."""
    rows = await db.fetch(STORED, {"session": session_id, "after": after, "through": through, "limit": limit})
    return [StoredEvent(**{name: getattr(row, name) for name in StoredEvent.__dataclass_fields__}) for row in rows]


async def head(db: Database, session_id: UUID, *, tenant_id: UUID | None = None) -> Head:
    """
    Raises:
        NotFound: no such session (of that tenant), or it is deleted.
    """
    rows = await db.fetch(HEAD, {"session": session_id, "tenant": tenant_id})
    if not rows:
        raise NotFound(f"there is no session {show_id(Prefix.SESSION, session_id)}")
    return Head(**{name: getattr(rows[0], name) for name in Head.__dataclass_fields__})


async def seal(
    db: Database,
    session_id: UUID,
    archive: ArchiveRecord,
    *,
    seen: Head,
    added: Collection[UUID],
) -> bool:
    """From now on ``archive`` counts for the events up to its end; False: the session has been used, or archived, since
    it was ``seen``.

    ``added``: the artifacts of the archive that the session does not refer to yet.
    """
    async with db.transaction() as tx:
        if not await _as_seen(tx, session_id, seen):
            return False
        held = (await tx.execute(HOLD, {"artifacts": list(added)})).all()
        if len(held) != len(added):  # collected: it took longer than uploads are kept
            return False
        await tx.execute(REFER, {"session": session_id, "artifacts": list(added)})
        values = {name: getattr(archive, name) for name in ArchiveRecord.__dataclass_fields__ if name != "tenant_id"}
        await tx.execute(ADD, values | {"session": session_id, "tenant": archive.tenant_id})
        end = {"session": session_id, "through": archive.through_seq, "event": archive.event_id}
        await tx.execute(SEAL, end)
        await tx.execute(DROP_CHECKPOINTS, {"session": session_id})
    return True


async def trim(db: Database, session_id: UUID, *, limit: int) -> int | None:
    """Remove at most ``limit`` events that are archived: how many there were, None if the session is in use."""
    async with db.transaction() as tx:
        free = (await tx.execute(FREE, {"session": session_id})).first()
        if free is None:
            return None
        found = {"session": session_id, "through": free.archived_through, "limit": limit}
        removed = (await tx.execute(TRIM, found)).rowcount
        if removed < limit:
            await tx.execute(TRIMMED, {"session": session_id})
        return removed


async def begin_restore(db: Database, session_id: UUID) -> None:
    await db.execute(BEGIN_RESTORE, {"session": session_id})


async def put_back(db: Database, session_id: UUID, events: Sequence[StoredEvent], *, seen: Head) -> bool:
    """Write archived events into the log again; False: the session has been used since it was ``seen``."""
    columns = {
        "session": session_id,
        "seq": [event.seq for event in events],
        "id": [event.id for event in events],
        "epoch": [event.epoch for event in events],
        "turn": [event.turn_id for event in events],
        "kind": [event.kind for event in events],
        "key": [event.key for event in events],
        "version": [event.schema_version for event in events],
        "payload": [event.payload for event in events],
        "created_at": [event.created_at for event in events],
    }
    async with db.transaction() as tx:
        if not await _as_seen(tx, session_id, seen):
            return False
        await tx.execute(PUT_BACK, columns)
    return True


async def unseal(db: Database, session_id: UUID, *, seen: Head) -> bool:
    """From now on the log is in Postgres again, whole; False: it is not, or the session has been used meanwhile."""
    async with db.transaction() as tx:
        if not await _as_seen(tx, session_id, seen):
            return False
        counted = (await tx.execute(COUNT, {"session": session_id, "through": seen.archived_through})).one()
        if counted.n != seen.archived_through:
            return False
        await tx.execute(UNSEAL, {"session": session_id})
        await tx.execute(REMOVE, {"session": session_id})
    return True


async def give_up(db: Database, session_id: UUID) -> None:
    """Do not try again until the session has been used."""
    await db.execute(GIVE_UP, {"session": session_id})


async def _as_seen(tx: AsyncConnection, session_id: UUID, seen: Head) -> bool:
    """Lock the session; whether nobody uses it and its log is as it was.

    Raises:
        NotFound: it is deleted.
        InUse: it is in use.
    """
    await tx.execute(LOCK, {"session": session_id})
    name = show_id(Prefix.SESSION, session_id)
    row = (await tx.execute(HEAD, {"session": session_id, "tenant": None})).first()  # a snapshot younger than the lock
    if row is None:
        raise NotFound(f"there is no session {name}")
    now = Head(**{field: getattr(row, field) for field in Head.__dataclass_fields__})
    if now.in_use:
        raise InUse(f"{name} has an open turn: wait until it has ended, or cancel it")
    return now.same_log(seen)
