"""What clients put in: sessions, turns and batches. One transaction each, session rows locked in the order of their ids.

Nobody here writes a session's log: a submission counts, gives places and marks the session ready.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db import files
from longshift.db.database import Database, chunks
from longshift.db.idempotency import Idempotency, remember
from longshift.errors import NotFound, SessionBusy
from longshift.events import encode
from longshift.model import NewTurn, Prefix, new_id, show_id

LOCK_SESSIONS = text("SELECT id FROM sessions WHERE id = ANY(CAST(:sessions AS uuid[])) ORDER BY id FOR NO KEY UPDATE")
ADMIT = text("""
INSERT INTO sessions (id, tenant_id, queue, next_position, open_turns, ready_at, dispatched_at)
SELECT g.id, :tenant, g.queue, g.n, g.n,
       CASE WHEN g.n > 0 THEN clock_timestamp() END, CASE WHEN g.n > 0 THEN clock_timestamp() END
  FROM unnest(CAST(:session AS uuid[]), CAST(:queue AS text[]), CAST(:n AS bigint[]), CAST(:create AS boolean[]))
       AS g(id, queue, n, may_create)
 WHERE g.may_create OR EXISTS (SELECT 1 FROM sessions x WHERE x.id = g.id)
 ORDER BY g.id
ON CONFLICT (id) DO UPDATE SET
   next_position = sessions.next_position + excluded.next_position,
   open_turns = sessions.open_turns + excluded.open_turns,
   queue = CASE WHEN sessions.open_turns = 0 AND excluded.open_turns > 0 THEN excluded.queue ELSE sessions.queue END,
   ready_at = CASE WHEN excluded.open_turns = 0 OR sessions.head_waiting THEN sessions.ready_at
                   ELSE coalesce(sessions.ready_at, clock_timestamp()) END,
   dispatched_at = CASE WHEN excluded.open_turns = 0 OR sessions.head_waiting OR sessions.lease_worker IS NOT NULL
                          OR sessions.ready_at > clock_timestamp()  -- held back: no wake-up will be sent now
                        THEN sessions.dispatched_at ELSE clock_timestamp() END
 WHERE sessions.tenant_id = excluded.tenant_id AND sessions.deleted_at IS NULL AND (NOT :reject OR sessions.open_turns = 0)
RETURNING id, queue, next_position, open_turns,
          lease_worker IS NULL AND NOT head_waiting AND ready_at <= clock_timestamp() AS ring""")
BUSY = text("SELECT 1 FROM sessions WHERE id = :session AND tenant_id = :tenant AND deleted_at IS NULL")

ADD_TURNS = text("""
INSERT INTO turns (id, session_id, tenant_id, position, status, agent, agent_version, queue, input, input_artifact,
                   root_turn_id, retry_of,
                   parent_turn_id, run_after, deadline, batch_id, batch_index, custom_id, traceparent, metadata)
SELECT r.id, r.session_id, :tenant, r.position, CASE WHEN r.position IS NULL THEN 'scheduled' ELSE 'queued' END, r.agent,
       r.agent_version, r.queue, CAST(r.input AS json), r.input_artifact,
       coalesce(r.root, r.id), r.retry_of, r.parent_turn_id, r.run_after,
       coalesce(r.deadline, coalesce(r.run_after, clock_timestamp()) + CAST(:lifetime AS interval)),
       CAST(:batch AS uuid), r.batch_index, r.custom_id, r.traceparent, CAST(r.metadata AS jsonb)
  FROM unnest(CAST(:id AS uuid[]), CAST(:session AS uuid[]), CAST(:position AS bigint[]), CAST(:agent AS text[]),
              CAST(:version AS text[]), CAST(:queue AS text[]), CAST(:input AS text[]), CAST(:root AS uuid[]),
              CAST(:retry_of AS uuid[]), CAST(:run_after AS timestamptz[]),
              CAST(:deadline AS timestamptz[]), CAST(:batch_index AS int[]), CAST(:custom_id AS text[]),
              CAST(:traceparent AS text[]), CAST(:metadata AS text[]), CAST(:parent AS uuid[]), CAST(:input_artifact AS uuid[]))
       AS r(id, session_id, position, agent, agent_version, queue, input, root, retry_of, run_after, deadline, batch_index,
            custom_id, traceparent, metadata, parent_turn_id, input_artifact)""")
ADD_BATCH = text("""
INSERT INTO batches (id, tenant_id, total, metadata) VALUES (:id, :tenant, :total, CAST(:metadata AS jsonb))""")
ADD_SESSION = text("""
INSERT INTO sessions (id, tenant_id, queue, expires_at)
VALUES (:id, :tenant, 'default', clock_timestamp() + CAST(:ttl AS interval)) ON CONFLICT DO NOTHING RETURNING id""")
OWNED = text("SELECT 1 FROM sessions WHERE id = :id AND tenant_id = :tenant AND deleted_at IS NULL")
ADD_DETAILS = text("""
INSERT INTO session_details (session_id, metadata, ttl) VALUES (:id, CAST(:metadata AS jsonb), :ttl)
ON CONFLICT (session_id) DO UPDATE SET metadata = excluded.metadata, ttl = excluded.ttl""")


@dataclass(frozen=True, slots=True)
class Entry:
    """One turn to be accepted, and where it goes. ``create``: the session need not exist yet."""

    turn: NewTurn
    session_id: UUID
    create: bool = True


@dataclass(frozen=True, slots=True)
class NewBatch:
    total: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    id: UUID = field(default_factory=new_id)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a submission made. ``replayed``: nothing new, ``resource_id`` is what the first request made."""

    resource_id: UUID
    ring: Sequence[tuple[UUID, str]] = ()  # (session, queue): send these wake-ups now that it is committed
    replayed: bool = False
    approval_id: UUID | None = None  # of a signal: the approval that it has answered


async def submit(
    db: Database,
    entries: Iterable[Entry],
    *,
    tenant_id: UUID,
    resource_id: UUID,
    now: datetime,
    lifetime: timedelta,
    batch: NewBatch | None = None,
    idempotency: Idempotency | None = None,
    reject_busy: bool = False,
    lock: Collection[UUID] = (),
) -> Accepted:
    """Accept all ``entries`` or none; ``resource_id`` is the turn's or the batch's.

    ``lock``: sessions that several chunks may name. They are locked first and in order, or two batches over the same
    sessions could wait for each other.

    Raises:
        NotFound: a session is somebody else's, deleted, or missing where it may not be created.
        SessionBusy: ``reject_busy`` and the session has an open turn.
        IdempotencyMismatch: the key was used with another body.
    """
    ring: list[tuple[UUID, str]] = []
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=resource_id)
            if known is not None:
                return Accepted(known, replayed=True)
        if batch is not None:
            params = {"id": batch.id, "tenant": tenant_id, "total": batch.total, "metadata": encode(batch.metadata)}
            await tx.execute(ADD_BATCH, params)
        if lock:
            await tx.execute(LOCK_SESSIONS, {"sessions": list(lock)})
        index = 0
        for chunk in chunks(entries):
            places = await admit(tx, chunk, tenant_id=tenant_id, now=now, reject=reject_busy, ring=ring)
            await add_turns(tx, chunk, places, tenant_id=tenant_id, lifetime=lifetime, batch=batch, first_index=index)
            index += len(chunk)
    return Accepted(resource_id, ring)


async def admit(
    tx: AsyncConnection,
    chunk: Sequence[Entry],
    *,
    tenant_id: UUID,
    now: datetime,
    reject: bool,
    ring: list[tuple[UUID, str]],
) -> list[int | None]:
    """Create or lock the sessions and give each turn its position (None: scheduled for later)."""
    later = [e.turn.run_after is not None and e.turn.run_after > now for e in chunk]
    counts = Counter(e.session_id for e, postponed in zip(chunk, later, strict=True) if not postponed)
    firsts = {e.session_id: e for e in reversed(chunk)}
    params = {
        "tenant": tenant_id,
        "session": list(firsts),
        "queue": [e.turn.queue for e in firsts.values()],
        "n": [counts[session_id] for session_id in firsts],
        "create": [e.create for e in firsts.values()],
        "reject": reject,
    }
    rows = (await tx.execute(ADMIT, params)).all()
    if missing := firsts.keys() - {row.id for row in rows}:
        await _refuse(tx, min(missing), tenant_id=tenant_id)
    ring.extend((row.id, row.queue) for row in rows if row.ring and counts[row.id])
    following = {row.id: row.next_position - counts[row.id] for row in rows}
    places: list[int | None] = []
    for entry, postponed in zip(chunk, later, strict=True):
        if postponed:
            places.append(None)
        else:
            following[entry.session_id] += 1
            places.append(following[entry.session_id])
    return places


async def _refuse(tx: AsyncConnection, session_id: UUID, *, tenant_id: UUID) -> None:
    name = show_id(Prefix.SESSION, session_id)
    if (await tx.execute(BUSY, {"session": session_id, "tenant": tenant_id})).first() is not None:
        raise SessionBusy(f"{name} has an open turn and on_busy is 'reject': wait for it, or use on_busy 'enqueue'")
    raise NotFound(f"there is no session {name}")


async def add_turns(
    tx: AsyncConnection,
    chunk: Sequence[Entry],
    places: Sequence[int | None],
    *,
    tenant_id: UUID,
    lifetime: timedelta,
    batch: NewBatch | None = None,
    first_index: int = 0,
) -> None:
    """Insert the turns of ``chunk`` at their ``places``."""
    turns = [e.turn for e in chunk]
    inputs = [encode(t.input) for t in turns]
    await tx.execute(
        ADD_TURNS,
        {
            "tenant": tenant_id,
            "lifetime": lifetime,
            "batch": batch.id if batch else None,
            "id": [t.id for t in turns],
            "session": [e.session_id for e in chunk],
            "position": list(places),
            "agent": [t.agent for t in turns],
            "version": [t.agent_version for t in turns],
            "queue": [t.queue for t in turns],
            "input": inputs,
            "root": [t.root_turn_id for t in turns],
            "retry_of": [t.retry_of for t in turns],
            "run_after": [t.run_after for t in turns],
            "deadline": [t.deadline for t in turns],
            "batch_index": [first_index + i if batch else None for i in range(len(turns))],
            "custom_id": [t.custom_id for t in turns],
            "traceparent": [t.traceparent for t in turns],
            "metadata": [encode(t.metadata) for t in turns],
            "parent": [t.parent_turn_id for t in turns],
            "input_artifact": [t.input_artifact for t in turns],
        },
    )
    named = ((e.session_id, files.kept_by(e.turn, written)) for e, written in zip(chunk, inputs, strict=True))
    await files.refer(tx, named, tenant_id=tenant_id)


async def create_session(
    db: Database,
    session_id: UUID,
    *,
    tenant_id: UUID,
    metadata: Mapping[str, str],
    ttl: timedelta | None = None,
    default_ttl: timedelta | None = None,
    idempotency: Idempotency | None = None,
) -> tuple[UUID, bool]:
    """The session's id, and whether it is new: a client may choose the id and repeat the request.

    ``ttl``: how long it is kept after its last activity; None: as the fleet is set up, which is ``default_ttl``.

    Raises:
        NotFound: the id belongs to somebody else, or to a deleted session.
        IdempotencyMismatch: the key was used with another body.
    """
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=session_id)
            if known is not None:
                return known, False
        params = {"id": session_id, "tenant": tenant_id, "ttl": ttl if ttl is not None else default_ttl}
        made = (await tx.execute(ADD_SESSION, params)).first() is not None
        if not made and (await tx.execute(OWNED, {"id": session_id, "tenant": tenant_id})).first() is None:
            raise NotFound(f"{show_id(Prefix.SESSION, session_id)} cannot be used: choose another id")
        if made and (metadata or ttl is not None):
            await tx.execute(ADD_DETAILS, {"id": session_id, "metadata": encode(metadata), "ttl": ttl})
    return session_id, made
