"""What clients put in: turns, batches, cancels, signals. One transaction each, session rows locked in the order of their ids.

Nobody here writes a session's log. A turn that never started changes by its row, under the session's lock; what is wanted
of a started one goes into ``mail``, and the worker that holds (or next claims) the session records it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db.database import Database
from longshift.errors import IdempotencyMismatch, NotFound, SessionBusy, Unavailable
from longshift.events import storable_json
from longshift.model import Json, MailKind, NewTurn, Prefix, TurnStatus, new_id, show_id

CHUNK = 1000
T = TypeVar("T")

REMEMBER = text("""
INSERT INTO idempotency (tenant_id, route, key, request_hash, resource_id) VALUES (:tenant, :route, :key, :hash, :resource)
ON CONFLICT DO NOTHING RETURNING resource_id""")
# a request without a key of its own: only one that is marked as a repeat, and soon enough, is the one before
REMEMBER_UNKEYED = text("""
INSERT INTO idempotency (tenant_id, route, key, request_hash, resource_id) VALUES (:tenant, :route, :key, :hash, :resource)
ON CONFLICT (tenant_id, route, key) DO UPDATE SET resource_id = excluded.resource_id, created_at = clock_timestamp()
 WHERE NOT :repeat OR idempotency.created_at < clock_timestamp() - CAST(:within AS interval)
RETURNING resource_id""")
REMEMBERED = text("""
SELECT request_hash, resource_id FROM idempotency WHERE tenant_id = :tenant AND route = :route AND key = :key
   AND (CAST(:within AS interval) IS NULL OR created_at >= clock_timestamp() - CAST(:within AS interval))""")

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
INSERT INTO turns (id, session_id, tenant_id, position, status, agent, agent_version, queue, input, root_turn_id, run_after,
                   deadline, batch_id, batch_index, custom_id, traceparent, metadata)
SELECT r.id, r.session_id, :tenant, r.position, CASE WHEN r.position IS NULL THEN 'scheduled' ELSE 'queued' END, r.agent,
       r.agent_version, r.queue, CAST(r.input AS json), r.id, r.run_after,
       coalesce(r.deadline, coalesce(r.run_after, clock_timestamp()) + CAST(:lifetime AS interval)),
       CAST(:batch AS uuid), r.batch_index, r.custom_id, r.traceparent, CAST(r.metadata AS jsonb)
  FROM unnest(CAST(:id AS uuid[]), CAST(:session AS uuid[]), CAST(:position AS bigint[]), CAST(:agent AS text[]),
              CAST(:version AS text[]), CAST(:queue AS text[]), CAST(:input AS text[]), CAST(:run_after AS timestamptz[]),
              CAST(:deadline AS timestamptz[]), CAST(:batch_index AS int[]), CAST(:custom_id AS text[]),
              CAST(:traceparent AS text[]), CAST(:metadata AS text[]))
       AS r(id, session_id, position, agent, agent_version, queue, input, run_after, deadline, batch_index, custom_id,
            traceparent, metadata)""")
ADD_BATCH = text("""
INSERT INTO batches (id, tenant_id, total, metadata) VALUES (:id, :tenant, :total, CAST(:metadata AS jsonb))""")
ADD_SESSION = text("""
INSERT INTO sessions (id, tenant_id, queue) VALUES (:id, :tenant, 'default') ON CONFLICT DO NOTHING RETURNING id""")
OWNED = text("SELECT 1 FROM sessions WHERE id = :id AND tenant_id = :tenant AND deleted_at IS NULL")
ADD_DETAILS = text("""
INSERT INTO session_details (session_id, metadata) VALUES (:id, CAST(:metadata AS jsonb))
ON CONFLICT (session_id) DO UPDATE SET metadata = excluded.metadata""")

SESSIONS_OF = text("""
SELECT id, session_id FROM turns
 WHERE id = ANY(CAST(:turns AS uuid[])) AND (CAST(:tenant AS uuid) IS NULL OR tenant_id = :tenant)""")
OPEN_OF_BATCH = text("""
SELECT id FROM turns
 WHERE batch_id = :batch AND tenant_id = :tenant AND status IN ('scheduled', 'queued', 'running', 'waiting')""")
# by position, never "all others": of two concurrent replacements only the older may be cancelled
OPEN_BEFORE = text("""
SELECT b.id FROM turns t JOIN turns b ON b.session_id = t.session_id AND b.position < t.position
 WHERE t.id = :turn AND b.status IN ('queued', 'running', 'waiting')""")
LOCK_SESSIONS = text("SELECT id FROM sessions WHERE id = ANY(CAST(:sessions AS uuid[])) ORDER BY id FOR NO KEY UPDATE")
END_UNSTARTED = text("""
WITH t AS (
    UPDATE turns SET status = :status, version = version + 1, ended_at = clock_timestamp(), error = CAST(:error AS json)
     WHERE id = ANY(CAST(:turns AS uuid[])) AND attempts = 0 AND status IN ('scheduled', 'queued')
    RETURNING id, session_id, position),
n AS (SELECT session_id, count(position) AS n FROM t GROUP BY session_id),
s AS (
    UPDATE sessions s SET open_turns = s.open_turns - n.n,
           ready_at = CASE WHEN s.open_turns > n.n THEN s.ready_at END
      FROM n WHERE s.id = n.session_id)
SELECT id FROM t""")
ADD_MAIL = text("""
WITH m AS (
    INSERT INTO mail (id, session_id, turn_id, kind, payload)
    SELECT x.mail_id, t.session_id, t.id, :kind, CAST(:payload AS json)
      FROM unnest(CAST(:mail AS uuid[]), CAST(:turns AS uuid[])) AS x(mail_id, turn_id) JOIN turns t ON t.id = x.turn_id
     WHERE t.status IN ('queued', 'running', 'waiting')
       AND NOT EXISTS (SELECT 1 FROM mail p WHERE p.session_id = t.session_id AND p.turn_id = t.id AND p.kind = :kind
                                              AND p.consumed_at IS NULL)
    RETURNING session_id)
UPDATE sessions s SET mail_seq = s.mail_seq + 1, ready_at = clock_timestamp()
  FROM (SELECT DISTINCT session_id FROM m) x WHERE s.id = x.session_id RETURNING s.id, s.queue""")
ADD_SIGNAL = text("""
WITH s AS (
    UPDATE sessions SET mail_seq = mail_seq + 1,
           ready_at = CASE WHEN open_turns > 0 THEN clock_timestamp() ELSE ready_at END
     WHERE id = :session AND tenant_id = :tenant AND deleted_at IS NULL RETURNING id, queue)
INSERT INTO mail (id, session_id, kind, name, payload) SELECT :id, s.id, 'signal', :name, CAST(:payload AS json) FROM s
RETURNING (SELECT queue FROM s) AS queue""")


@dataclass(frozen=True, slots=True)
class Entry:
    """One turn to be accepted, and where it goes. ``create``: the session need not exist yet."""

    turn: NewTurn
    session_id: UUID
    create: bool = True


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's promise that equal keys mean the same request.

    ``within``: there is no key; the client's library says by itself whether this is a ``repeat`` of an equal request that
    is at most so old.
    """

    route: str
    key: str
    request_hash: bytes
    within: timedelta | None = None
    repeat: bool = False


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
            params = {"id": batch.id, "tenant": tenant_id, "total": batch.total, "metadata": _json(batch.metadata)}
            await tx.execute(ADD_BATCH, params)
        if lock:
            await tx.execute(LOCK_SESSIONS, {"sessions": list(lock)})
        index = 0
        for chunk in _chunks(entries):
            places = await _admit(tx, chunk, tenant_id=tenant_id, now=now, reject=reject_busy, ring=ring)
            await _add_turns(tx, chunk, places, tenant_id=tenant_id, lifetime=lifetime, batch=batch, first_index=index)
            index += len(chunk)
    return Accepted(resource_id, ring)


async def remember(tx: AsyncConnection, promise: Idempotency, *, tenant_id: UUID, resource_id: UUID) -> UUID | None:
    """The resource an equal request made before, else None. Waits for a first request that is still in flight."""
    row = {**_where(promise, tenant_id), "hash": promise.request_hash, "resource": resource_id}
    if promise.within is None:
        new = (await tx.execute(REMEMBER, row)).first()
    else:
        new = (await tx.execute(REMEMBER_UNKEYED, row | {"repeat": promise.repeat})).first()
    if new is not None:
        return None
    found = (await tx.execute(REMEMBERED, _where(promise, tenant_id))).first()
    if found is None:
        raise Unavailable("the idempotency key was just forgotten: send the request again")
    return _same(found, promise)


async def recall(db: Database, promise: Idempotency, *, tenant_id: UUID) -> UUID | None:
    """The resource that an equal request made before: asked first, so that a repeat is not validated again.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    if promise.within is not None and not promise.repeat:
        return None
    rows = await db.fetch(REMEMBERED, _where(promise, tenant_id))
    return _same(rows[0], promise) if rows else None


def _where(promise: Idempotency, tenant_id: UUID) -> dict[str, Any]:
    return {"tenant": tenant_id, "route": promise.route, "key": promise.key, "within": promise.within}


def _same(found: Row[Any], promise: Idempotency) -> UUID:
    if bytes(found.request_hash) != promise.request_hash:
        raise IdempotencyMismatch(f"Idempotency-Key {promise.key!r} was used before with another body: use a new key")
    return UUID(str(found.resource_id))


async def _admit(
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


async def _add_turns(
    tx: AsyncConnection,
    chunk: Sequence[Entry],
    places: Sequence[int | None],
    *,
    tenant_id: UUID,
    lifetime: timedelta,
    batch: NewBatch | None,
    first_index: int,
) -> None:
    turns = [e.turn for e in chunk]
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
            "input": [_json(t.input) for t in turns],
            "run_after": [t.run_after for t in turns],
            "deadline": [t.deadline for t in turns],
            "batch_index": [first_index + i if batch else None for i in range(len(turns))],
            "custom_id": [t.custom_id for t in turns],
            "traceparent": [t.traceparent for t in turns],
            "metadata": [_json(t.metadata) for t in turns],
        },
    )


async def create_session(
    db: Database,
    session_id: UUID,
    *,
    tenant_id: UUID,
    metadata: Mapping[str, str],
    idempotency: Idempotency | None = None,
) -> tuple[UUID, bool]:
    """The session's id, and whether it is new: a client may choose the id and repeat the request.

    Raises:
        NotFound: the id belongs to somebody else, or to a deleted session.
        IdempotencyMismatch: the key was used with another body.
    """
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=session_id)
            if known is not None:
                return known, False
        made = (await tx.execute(ADD_SESSION, {"id": session_id, "tenant": tenant_id})).first() is not None
        if not made and (await tx.execute(OWNED, {"id": session_id, "tenant": tenant_id})).first() is None:
            raise NotFound(f"{show_id(Prefix.SESSION, session_id)} cannot be used: choose another id")
        if made and metadata:
            await tx.execute(ADD_DETAILS, {"id": session_id, "metadata": _json(metadata)})
    return session_id, made


async def end_turns(
    db: Database,
    turn_ids: Collection[UUID],
    *,
    tenant_id: UUID | None,
    kind: MailKind,
    reason: str,
) -> list[tuple[UUID, str]]:
    """Ask turns to end: at once where they never started, else by mail. Returns (session, queue) to ring.

    Turns that have ended already, or belong to another tenant, are left alone. ``tenant_id`` None is the sweeper.
    """
    status = TurnStatus.EXPIRED if kind is MailKind.EXPIRE else TurnStatus.CANCELLED
    ring: list[tuple[UUID, str]] = []
    for chunk in _chunks(turn_ids):
        async with db.transaction() as tx:
            owned = (await tx.execute(SESSIONS_OF, {"turns": list(chunk), "tenant": tenant_id})).all()
            await tx.execute(LOCK_SESSIONS, {"sessions": list({row.session_id for row in owned})})
            ids = [row.id for row in owned]
            error = json.dumps({"code": status.value, "message": reason})
            done = (await tx.execute(END_UNSTARTED, {"turns": ids, "status": status.value, "error": error})).all()
            rest = list(set(ids) - {row.id for row in done})
            if rest:
                mail = {
                    "mail": [new_id() for _ in rest],
                    "turns": rest,
                    "kind": kind.value,
                    "payload": json.dumps({"reason": reason}),
                }
                ring += [(row.id, row.queue) for row in (await tx.execute(ADD_MAIL, mail)).all()]
    return ring


async def open_of_batch(db: Database, batch_id: UUID, *, tenant_id: UUID) -> list[UUID]:
    return [row.id for row in await db.fetch(OPEN_OF_BATCH, {"batch": batch_id, "tenant": tenant_id})]


async def open_before(db: Database, turn_id: UUID) -> list[UUID]:
    """The open turns that come before this one in its session: what ``on_busy=replace`` cancels."""
    return [row.id for row in await db.fetch(OPEN_BEFORE, {"turn": turn_id})]


async def signal(
    db: Database,
    session_id: UUID,
    *,
    tenant_id: UUID,
    name: str,
    payload: Json,
    idempotency: Idempotency | None = None,
) -> Accepted:
    """Put a signal into the mailbox; ``resource_id`` is its id.

    Raises:
        NotFound: no such session.
        IdempotencyMismatch: the key was used with another body.
    """
    mail_id = new_id()
    params = {"id": mail_id, "session": session_id, "tenant": tenant_id, "name": name, "payload": _json(payload)}
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=mail_id)
            if known is not None:
                return Accepted(known, replayed=True)
        row = (await tx.execute(ADD_SIGNAL, params)).first()
        if row is None:
            raise NotFound(f"there is no session {show_id(Prefix.SESSION, session_id)}")
    return Accepted(mail_id, [(session_id, row.queue)])


def _json(value: Json) -> str:
    return storable_json(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _chunks(items: Iterable[T], *, size: int = CHUNK) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
