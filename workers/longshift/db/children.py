"""Turns that other turns have started: their start, word of their end to their parents, and their end with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from longshift.db import files, mail, retries
from longshift.db.database import Database
from longshift.db.intake import LOCK_SESSIONS, Entry, add_turns, admit
from longshift.errors import LeaseLost, NotFound
from longshift.events import encode
from longshift.model import Claim, MailKind, NewTurn, Prefix, show_id

# The parent's row stays locked until the child's session is there, so that whoever claims the parent later finds the child.
# Its session is new, and its id is known to this turn only: if it is there, an earlier try has made the turn as well.
SPAWN = text("""
WITH p AS MATERIALIZED (
    SELECT id, tenant_id FROM sessions
     WHERE id = :parent_session AND lease_epoch = :epoch AND lease_worker = :worker FOR NO KEY UPDATE),
s AS (
    INSERT INTO sessions (id, tenant_id, queue, next_position, open_turns, ready_at, dispatched_at)
    SELECT :session, p.tenant_id, :queue, 1, 1, clock_timestamp(), clock_timestamp() FROM p
    ON CONFLICT DO NOTHING RETURNING id, tenant_id),
t AS (
    INSERT INTO turns (id, session_id, tenant_id, position, status, agent, queue, input, input_artifact, root_turn_id,
                       parent_turn_id, deadline, metadata, traceparent)
    SELECT :id, s.id, s.tenant_id, 1, 'queued', :agent, :queue, CAST(:input AS json), :input_artifact, :id, :parent,
           :deadline, CAST(:metadata AS jsonb), :traceparent FROM s RETURNING id),
a AS MATERIALIZED (
    SELECT a.id FROM s JOIN artifacts a ON a.tenant_id = s.tenant_id
     WHERE a.id = ANY(CAST(:artifacts AS uuid[])) ORDER BY a.id FOR KEY SHARE OF a),
f AS (
    INSERT INTO artifact_refs (artifact_id, session_id) SELECT a.id, s.id FROM a, s)
SELECT EXISTS (SELECT 1 FROM p) AS held, EXISTS (SELECT 1 FROM t) AS made""")

# a turn takes the children over of the turns that it retries
OPEN = text("""
SELECT c.id FROM turns q JOIN turns p ON p.session_id = q.session_id AND p.root_turn_id = q.root_turn_id
  JOIN turns c ON c.parent_turn_id = p.id
 WHERE q.id = :parent AND c.status IN ('scheduled', 'queued', 'running', 'waiting') ORDER BY c.id LIMIT :limit""")

# Whoever has the parent's session locked is left alone: the sweeper tells it later. What has ended is told once, and a parent
# that has itself ended is not woken.
_TELL = """
WITH u AS MATERIALIZED (
    SELECT c.id, p.session_id FROM turns c
      LEFT JOIN turns q ON q.id = c.parent_turn_id
      LEFT JOIN turns p ON p.session_id = q.session_id AND p.root_turn_id = q.root_turn_id
                       AND p.status IN ('queued', 'running', 'waiting')
     WHERE c.parent_turn_id IS NOT NULL AND c.ended_at IS NOT NULL AND NOT c.parent_told {which}),
l AS MATERIALIZED (
    SELECT id FROM sessions WHERE id IN (SELECT session_id FROM u) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED),
t AS (
    UPDATE turns SET parent_told = true FROM u LEFT JOIN l ON l.id = u.session_id
     WHERE turns.id = u.id AND NOT turns.parent_told AND (u.session_id IS NULL OR l.id IS NOT NULL)
    RETURNING l.id)
UPDATE sessions s SET mail_seq = s.mail_seq + 1,
       ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() ELSE s.ready_at END
  FROM (SELECT DISTINCT id FROM t) x WHERE s.id = x.id RETURNING s.id, s.queue"""
TELL = text(_TELL.format(which="AND c.id = ANY(CAST(:turns AS uuid[]))"))
TELL_OLDEST = text(_TELL.format(which="ORDER BY c.ended_at LIMIT :limit"))

MADE = text("SELECT 1 FROM turns WHERE id = :id")
STANDING = ("scheduled", "queued", "running", "waiting", "succeeded")

Rung = list[tuple[UUID, str]]


async def spawn(db: Database, turn: NewTurn, *, session_id: UUID, holder: Claim) -> Rung:
    """Start a turn in a session of its own, unless it is there. Returns (session, queue) to ring.

    Raises:
        LeaseLost: ``holder`` no longer holds the parent's session.
    """
    written = encode(turn.input)
    params = {
        "parent_session": holder.session_id,
        "epoch": holder.epoch,
        "worker": holder.worker_id,
        "parent": turn.parent_turn_id,
        "id": turn.id,
        "session": session_id,
        "agent": turn.agent,
        "queue": turn.queue,
        "input": written,
        "artifacts": list(files.kept_by(turn, written)),
        "input_artifact": turn.input_artifact,
        "deadline": turn.deadline,
        "metadata": encode(turn.metadata),
        "traceparent": turn.traceparent,
    }
    row = (await db.fetch(SPAWN, params))[0]
    if not row.held:
        raise LeaseLost(f"the lease on session {holder.session_id.hex} is gone")
    return [(session_id, turn.queue)] if row.made else []


async def retry(
    db: Database, turn: NewTurn, before: UUID, *, session_id: UUID, holder: Claim, now: datetime
) -> tuple[UUID, Rung]:
    """Start ``turn`` where the child ``before`` of the same session ended, unless that one, or a retry of it, is open or has
    succeeded. Returns the turn that is there now, and (session, queue) to ring.

    Raises:
        LeaseLost: ``holder`` no longer holds the parent's session.
        NotFound: the child's session was deleted.
    """
    ring: Rung = []
    async with db.transaction() as tx:
        await tx.execute(LOCK_SESSIONS, {"sessions": [session_id, holder.session_id]})
        await mail.check_holder(tx, holder)
        old = (await tx.execute(retries.TURN, {"turn": before, "tenant": holder.tenant_id})).first()
        if old is None:
            raise NotFound(f"the child {show_id(Prefix.TURN, before)} was deleted with its session: it cannot go on")
        family = (await tx.execute(retries.FAMILY, {"session": session_id, "turn": before})).all()
        # one that is told to end, as all are whose parent fails, may not have heard it yet: the new one comes after it
        standing = [row.id for row in family if row.status in STANDING and not row.ending]
        if standing or (await tx.execute(MADE, {"id": turn.id})).first() is not None:
            return standing[-1] if standing else turn.id, ring
        again = replace(
            turn,
            input=old.input,  # and not what the agent would ask for today: the child goes on with what it has begun
            input_artifact=old.input_artifact,
            retry_of=before,
            root_turn_id=old.root_turn_id if old.attempts or old.root_turn_id != before else None,
        )
        entry = Entry(again, session_id, create=False)
        places = await admit(tx, [entry], tenant_id=holder.tenant_id, now=now, reject=False, ring=ring)
        await add_turns(tx, [entry], places, tenant_id=holder.tenant_id, lifetime=timedelta(0))
    return turn.id, ring


async def tell(db: Database, turns: Collection[UUID]) -> Rung:
    """Wake the parents of those of ``turns`` that have ended and have one. Returns (session, queue) to ring."""
    return [(row.id, row.queue) for row in await db.fetch(TELL, {"turns": list(turns)})]


async def tell_oldest(db: Database, *, limit: int = 500) -> Rung:
    """The same for all that nobody was told of: their worker died, or they never had one."""
    return [(row.id, row.queue) for row in await db.fetch(TELL_OLDEST, {"limit": limit})]


async def cancel(db: Database, parent: UUID, *, holder: Claim, limit: int = 1000) -> Rung:
    """Ask the open children of a turn to end that is about to end without success. Returns (session, queue) to ring.

    Raises:
        LeaseLost: ``holder`` no longer holds the parent's session.
    """
    ring: Rung = []
    asked: set[UUID] = set()
    while True:
        rows = await db.fetch(OPEN, {"parent": parent, "limit": limit + len(asked)})
        new = [row.id for row in rows if row.id not in asked]
        if not new:
            return ring
        asked.update(new)
        reason = "the turn that started it has ended"
        ring += await mail.end_turns(db, new, tenant_id=None, kind=MailKind.CANCEL, reason=reason, holder=holder)
