"""What others want of a session beside turns: that a turn ends, or a signal; and the look for what has come. Session rows
are locked in the order of their ids.

A turn that never started changes by its row, under the session's lock; what is wanted of a started one goes into ``mail``,
and the worker that holds (or next claims) the session records it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db import approvals
from longshift.db.database import Database, chunks
from longshift.db.idempotency import Idempotency, remember
from longshift.db.intake import LOCK_SESSIONS, Accepted
from longshift.db.leases import URGENT
from longshift.errors import LeaseLost, NotFound
from longshift.events import encode
from longshift.model import Claim, Json, MailKind, Prefix, TurnStatus, new_id, show_id

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
END_UNSTARTED = text("""
WITH t AS (
    UPDATE turns SET status = :status, version = version + 1, ended_at = clock_timestamp(), error = CAST(:error AS json)
     WHERE id = ANY(CAST(:turns AS uuid[])) AND attempts = 0 AND status IN ('scheduled', 'queued')
    RETURNING id, session_id, position),
n AS (SELECT session_id, count(position) AS n FROM t GROUP BY session_id),
s AS (
    UPDATE sessions s SET open_turns = s.open_turns - n.n,
           ready_at = CASE WHEN s.open_turns > n.n THEN s.ready_at END,
           -- or nobody would archive what the turns before these have left
           idle_since = CASE WHEN s.open_turns = n.n AND s.lease_worker IS NULL AND s.leased_at IS NOT NULL
                             THEN clock_timestamp() ELSE s.idle_since END
      FROM n WHERE s.id = n.session_id)
SELECT id FROM t""")
# who is told to end does not run again: a suspect may be ended by anybody, and needs no ward for it
ADD_MAIL = text("""
WITH m AS (
    INSERT INTO mail (id, session_id, turn_id, kind, payload)
    SELECT x.mail_id, t.session_id, t.id, :kind, CAST(:payload AS json)
      FROM unnest(CAST(:mail AS uuid[]), CAST(:turns AS uuid[])) AS x(mail_id, turn_id) JOIN turns t ON t.id = x.turn_id
     WHERE t.status IN ('queued', 'running', 'waiting')
       AND NOT EXISTS (SELECT 1 FROM mail p WHERE p.session_id = t.session_id AND p.turn_id = t.id AND p.kind = :kind
                                              AND p.consumed_at IS NULL)
    RETURNING session_id)
UPDATE sessions s SET mail_seq = s.mail_seq + 1, ready_at = clock_timestamp(), suspect = NULL
  FROM (SELECT DISTINCT session_id FROM m) x WHERE s.id = x.session_id RETURNING s.id, s.queue""")
ADD_SIGNAL = text("""
WITH s AS (
    UPDATE sessions SET mail_seq = mail_seq + 1,
           ready_at = CASE WHEN open_turns > 0 THEN clock_timestamp() ELSE ready_at END
     WHERE id = :session AND tenant_id = :tenant AND deleted_at IS NULL RETURNING id, queue)
INSERT INTO mail (id, session_id, kind, name, payload) SELECT :id, s.id, 'signal', :name, CAST(:payload AS json) FROM s
RETURNING (SELECT queue FROM s) AS queue""")
STANDS = text("SELECT 1 FROM sessions WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker")
CONSUME = text("UPDATE mail SET consumed_at = clock_timestamp(), turn_id = :turn WHERE id = :id")
# by the times: a session's approvals are answered one after the other, under its lock
ANSWERED = text("""
SELECT a.id FROM mail m JOIN approvals a ON a.session_id = m.session_id AND a.turn_id = m.turn_id AND a.name = m.name
 WHERE m.id = :id AND a.answered_at BETWEEN m.created_at AND m.consumed_at""")


def _pointer(artifact: str) -> str:
    """What wait.ended says of a large output or result; null: it is not large."""
    found = f"FROM artifacts x WHERE x.id = {artifact}"
    return f"""CASE WHEN {artifact} IS NOT NULL THEN json_build_object(
              'id', replace(CAST({artifact} AS text), '-', ''), 'size', coalesce((SELECT x.size {found}), 0),
              'sha256', coalesce((SELECT x.sha256 {found}), '')) END"""


# One statement, so that what is found and ``mail_seq`` are of one moment. Whether the caller still holds the session does not
# matter: what it makes of this is fenced.
LOOK = text(f"""
WITH a AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:session AS uuid[]), CAST(:kind AS text[]), CAST(:name AS text[]), CAST(:ref AS uuid[]),
                         CAST(:most AS bigint[])) WITH ORDINALITY AS a(session_id, kind, name, ref, most, place)),
s AS MATERIALIZED (
    SELECT s.id, s.mail_seq, EXISTS (SELECT 1 FROM mail m WHERE m.session_id = s.id AND {URGENT}) AS urgent
      FROM sessions s WHERE s.id = ANY(CAST(:session AS uuid[])))
SELECT a.place - 1 AS place, s.mail_seq, s.urgent, f.id, f.value
  FROM a JOIN s ON s.id = a.session_id
  LEFT JOIN LATERAL (
    SELECT g.id, g.created_at, json_build_object('reason', 'signal', 'payload', g.payload) AS value FROM (
        SELECT m.id, m.created_at, m.payload FROM mail m
         WHERE a.kind = 'signal' AND m.session_id = a.session_id AND m.consumed_at IS NULL AND m.kind = 'signal'
           AND m.name = a.name ORDER BY m.created_at, m.id LIMIT a.most) g
    UNION ALL
    SELECT p.id, p.answered_at, CASE WHEN p.answered_at IS NULL THEN json_build_object('reason', 'timeout')
           ELSE json_build_object('reason', 'answer', 'granted', p.answer -> 'granted', 'comment', p.answer -> 'comment',
                                  'by', 'key_' || replace(CAST(p.answered_by AS text), '-', '')) END
      FROM approvals p WHERE a.kind = 'approval' AND p.id = a.ref AND coalesce(p.answered_at, p.closed_at) IS NOT NULL
    UNION ALL
    SELECT t.id, t.ended_at, json_build_object('reason', 'child', 'status', t.status, 'output', t.output, 'error', t.error,
                                               'artifact', {_pointer("t.output_artifact")})
      FROM turns c CROSS JOIN LATERAL (  -- the child, or the newest turn that retries it: they share their parent
            SELECT * FROM turns n WHERE n.session_id = c.session_id AND n.parent_turn_id IS NOT DISTINCT FROM c.parent_turn_id
             ORDER BY n.position DESC LIMIT 1) t
     WHERE a.kind = 'child' AND c.id = a.ref AND t.status IN ('succeeded', 'failed', 'cancelled', 'expired')
    UNION ALL
    SELECT c.id, c.ended_at, json_build_object('reason', 'call', 'status', c.status, 'result', c.result, 'error', c.error,
                                               'artifact', {_pointer("c.artifact_id")}, 'note', c.note)
      FROM tool_calls c WHERE a.kind = 'call' AND c.id = a.ref AND c.session_id = a.session_id
                          AND c.status NOT IN ('started', 'unknown')) f ON true
 ORDER BY a.place, f.created_at, f.id""")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something that a turn waits for: signals by their name, anything else (approval, child, call) by its id."""

    session_id: UUID
    kind: str
    name: str
    id: UUID | None
    most: int


@dataclass(slots=True)
class Seen:
    """What was found of one thing wanted; ``found`` is (id, payload of wait.ended), signals oldest first.

    ``mail_seq`` is the session's as of the same moment; ``urgent``: there is mail that wants a turn to end.
    """

    mail_seq: int
    urgent: bool
    found: list[tuple[UUID, Mapping[str, Json]]] = field(default_factory=list)


async def look(db: Database, wanted: Sequence[Wanted]) -> dict[int, Seen]:
    """What has come of all this, by its place in ``wanted``; all of it as of one moment."""
    params = {
        "session": [w.session_id for w in wanted],
        "kind": [w.kind for w in wanted],
        "name": [w.name for w in wanted],
        "ref": [w.id for w in wanted],
        "most": [w.most for w in wanted],
    }
    seen: dict[int, Seen] = {}
    for row in await db.fetch(LOOK, params):
        one = seen.setdefault(row.place, Seen(row.mail_seq, row.urgent))
        if row.id is not None:
            one.found.append((row.id, row.value))
    return seen


async def end_turns(
    db: Database,
    turn_ids: Collection[UUID],
    *,
    tenant_id: UUID | None,
    kind: MailKind,
    reason: str,
    holder: Claim | None = None,
) -> list[tuple[UUID, str]]:
    """Ask turns to end: at once where they never started, else by mail. Returns (session, queue) to ring.

    Turns that have ended already, or belong to another tenant, are left alone. ``tenant_id`` None is the sweeper, or a
    parent turn: then only as long as ``holder`` holds its session.

    Raises:
        LeaseLost: ``holder`` does no longer.
    """
    status = TurnStatus.EXPIRED if kind is MailKind.EXPIRE else TurnStatus.CANCELLED
    ring: list[tuple[UUID, str]] = []
    for chunk in chunks(turn_ids):
        async with db.transaction() as tx:
            owned = (await tx.execute(SESSIONS_OF, {"turns": list(chunk), "tenant": tenant_id})).all()
            sessions = {row.session_id for row in owned} | ({holder.session_id} if holder is not None else set())
            await tx.execute(LOCK_SESSIONS, {"sessions": list(sessions)})
            if holder is not None:
                await check_holder(tx, holder)
            ids = [row.id for row in owned]
            error = encode({"code": status.value, "message": reason})
            done = (await tx.execute(END_UNSTARTED, {"turns": ids, "status": status.value, "error": error})).all()
            rest = list(set(ids) - {row.id for row in done})
            if rest:
                mail = {
                    "mail": [new_id() for _ in rest],
                    "turns": rest,
                    "kind": kind.value,
                    "payload": encode({"reason": reason}),
                }
                ring += [(row.id, row.queue) for row in (await tx.execute(ADD_MAIL, mail)).all()]
    return ring


async def check_holder(tx: AsyncConnection, holder: Claim) -> None:
    """Raises LeaseLost: the session, which the caller has locked, is no longer ``holder``'s."""
    params = {"session": holder.session_id, "epoch": holder.epoch, "worker": holder.worker_id}
    if (await tx.execute(STANDS, params)).first() is None:
        raise LeaseLost(f"the lease on session {holder.session_id.hex} is gone")


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
    by: UUID | None = None,
) -> Accepted:
    """Put a signal into the mailbox; ``resource_id`` is its id.

    If an approval of this name is open in the session, the signal is its answer (``by``: the API key behind it), and is
    kept as consumed.

    Raises:
        NotFound: no such session.
        InvalidInput: it would answer an approval, and does not say whether that is granted.
        IdempotencyMismatch: the key was used with another body.
    """
    mail_id = new_id()
    params = {"id": mail_id, "session": session_id, "tenant": tenant_id, "name": name, "payload": encode(payload)}
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=mail_id)
            if known is not None:
                answered = (await tx.execute(ANSWERED, {"id": known})).first()
                return Accepted(known, replayed=True, approval_id=answered.id if answered is not None else None)
        row = (await tx.execute(ADD_SIGNAL, params)).first()
        if row is None:
            raise NotFound(f"there is no session {show_id(Prefix.SESSION, session_id)}")
        # a statement of its own: under the lock, in a snapshot that has what was opened before it
        approval = await approvals.open_of_name(tx, session_id, name=name)
        if approval is not None:
            decided = await approvals.decide(tx, approval, approvals.verdict(payload), by=by)
            assert decided is not None  # it was open, and the session is locked
            await tx.execute(CONSUME, {"id": mail_id, "turn": decided.turn_id})
    return Accepted(mail_id, [(session_id, row.queue)], approval_id=approval)
