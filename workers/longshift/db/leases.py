"""Who may run what: claims, releases, and the life of workers.

A lease belongs to a worker, not to a clock: as long as the worker lives, its leases stand. ``workers`` has one row per
worker; whoever finds that the row is tombstoned (``dead_at``) has been declared dead and must take a new id.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import TextClause, text

from longshift.db.database import Database, Params
from longshift.db.log import Key
from longshift.db.views import TURN_COLUMNS, turn_record
from longshift.model import AgentRecord, Claim, Json, MailKind, MailRecord, TurnRecord

_TAKE = """
UPDATE sessions s SET lease_worker = CAST(:worker AS uuid), lease_epoch = nextval('epochs'), leased_at = clock_timestamp(),
       dispatched_at = NULL, rings = 0, head_waiting = false, idle_since = NULL
  FROM c WHERE s.id = c.id
RETURNING s.id, s.tenant_id, s.lease_epoch, s.mail_seq, s.crashes, s.leased_at - s.ready_at AS waited"""

# The worker must have its row and no tombstone: a lease of somebody whose tombstone is long forgotten would never be
# rescued. The snapshot may be a little old; a claim that slips past its own tombstone is what the repeated rescue is for.
CLAIM = text(
    """
WITH c AS MATERIALIZED (
    SELECT id FROM sessions
     WHERE id = ANY(CAST(:sessions AS uuid[])) AND lease_worker IS NULL AND ready_at <= clock_timestamp() AND suspect IS NULL
       AND EXISTS (SELECT 1 FROM workers w WHERE w.id = CAST(:worker AS uuid) AND w.dead_at IS NULL)
     ORDER BY id FOR NO KEY UPDATE SKIP LOCKED)"""
    + _TAKE
)

# For a ward: the suspect that has waited longest, and others that may be together in a group of the same size. Not by id:
# suspects that come again and again (nobody here has their agent, say) would never let one with a larger id have its turn.
CLAIM_SUSPECTS = text(
    """
WITH g AS MATERIALIZED (
    SELECT suspect FROM sessions
     WHERE lease_worker IS NULL AND suspect IS NOT NULL AND ready_at <= clock_timestamp()
       AND queue = ANY(CAST(:queues AS text[])) ORDER BY ready_at LIMIT 1),
c AS MATERIALIZED (
    SELECT id FROM sessions
     WHERE lease_worker IS NULL AND suspect = (SELECT suspect FROM g) AND ready_at <= clock_timestamp()
       AND queue = ANY(CAST(:queues AS text[]))
       AND EXISTS (SELECT 1 FROM workers w WHERE w.id = CAST(:worker AS uuid) AND w.dead_at IS NULL)
     ORDER BY ready_at, id LIMIT least((SELECT suspect FROM g), :most) FOR NO KEY UPDATE SKIP LOCKED)"""
    + _TAKE
)

# A second statement on purpose: in the claim's own snapshot the end of the log could be stale. Rows of events up to
# archived_through do not count: a restore that did not get to its end has left some of them.
ENDS = text(f"""
SELECT s.id AS claimed_id, coalesce(last.seq, s.archived_through) AS last_seq,
       coalesce(last.id, s.archived_event_id) AS last_event_id, head.*
  FROM sessions s
  LEFT JOIN LATERAL (SELECT seq, id FROM events WHERE session_id = s.id AND seq > s.archived_through
                      ORDER BY seq DESC LIMIT 1) last ON true
  LEFT JOIN LATERAL (SELECT {TURN_COLUMNS} FROM turns t WHERE t.session_id = s.id AND t.status IN ('queued', 'running', 'waiting')
                      ORDER BY t.position LIMIT 1) head ON true
 WHERE s.id = ANY(CAST(:sessions AS uuid[]))""")

ACQUIT = text("UPDATE sessions SET suspect = NULL WHERE lease_worker = :worker AND suspect IS NOT NULL")

HEAD = text(f"""
SELECT {TURN_COLUMNS} FROM turns t WHERE t.session_id = :session AND t.status IN ('queued', 'running', 'waiting')
 ORDER BY t.position LIMIT 1""")

# A turn that waits with its clock stopped came because that wait may be over. Nobody knows while nobody runs its agent, and
# so the clock goes on: it would have no deadline if nobody ever does.
RELEASE = text("""
WITH s AS (
    UPDATE sessions SET lease_worker = NULL, queue = coalesce(:queue, queue),
           idle_since = CASE WHEN open_turns = 0 AND leased_at IS NOT NULL THEN clock_timestamp() END,
           ready_at = CASE WHEN open_turns > 0 THEN clock_timestamp() + CAST(:delay AS interval) END
     WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker
    RETURNING id, ready_at IS NOT NULL AS more),
t AS (
    UPDATE turns SET deadline = deadline + (clock_timestamp() - clock_stopped_at), clock_stopped_at = NULL FROM s
     WHERE turns.session_id = s.id AND turns.status = 'waiting' AND turns.clock_stopped_at IS NOT NULL)
SELECT more FROM s""")

HELD = text("SELECT id, lease_epoch FROM sessions WHERE lease_worker = :worker")
# by epoch: whatever the worker has claimed since it read what it holds is none of these
RECONCILE = text("""
WITH v AS MATERIALIZED (
    SELECT s.id FROM sessions s
      JOIN unnest(CAST(:sessions AS uuid[]), CAST(:epochs AS bigint[])) AS r(id, epoch) ON s.id = r.id AND s.lease_epoch = r.epoch
     WHERE s.lease_worker = :worker
     ORDER BY s.id FOR NO KEY UPDATE OF s SKIP LOCKED)
UPDATE sessions s SET lease_worker = NULL, lease_epoch = nextval('epochs'), dispatched_at = clock_timestamp(),
       ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() END
  FROM v WHERE s.id = v.id RETURNING s.id, s.queue""")

URGENT = "m.consumed_at IS NULL AND m.kind IN ('cancel', 'expire', 'condemn')"
"""Not "all but signals": a session may hold thousands of those, which the index then has no need to show."""
_MAIL = f"""
SELECT m.id, m.session_id, m.turn_id, m.kind, m.name, m.payload
  FROM mail m JOIN sessions s ON s.id = m.session_id
 WHERE s.lease_worker = :worker AND {URGENT}"""
MAIL = text(f"{_MAIL} ORDER BY m.created_at")
MAIL_OF_SESSION = text(f"{_MAIL} AND s.id = :session ORDER BY m.created_at")
MAIL_SEQ = text("SELECT mail_seq FROM sessions WHERE id = :session")

# registered_at stays: a worker of an old version that is started again does not make it the newest one
SERVE = text("""
INSERT INTO agents (name, version, queue, description, input_schema, output_schema)
VALUES (:name, :version, :queue, :description, CAST(:input_schema AS jsonb), CAST(:output_schema AS jsonb))
ON CONFLICT (name, version) DO UPDATE SET queue = excluded.queue, description = excluded.description,
   input_schema = excluded.input_schema, output_schema = excluded.output_schema""")


@dataclass(frozen=True, slots=True)
class Won:
    """A claim and the turn at the head of its session (None: claimed in vain)."""

    claim: Claim
    turn: TurnRecord | None
    crashes: int = 0  # processes that died under it since it last recorded anything
    waited: timedelta = timedelta(0)  # how long it had been ready


async def claim(db: Database, sessions: Collection[UUID], *, worker_id: UUID) -> list[Won]:
    """Take the leases of those ``sessions`` that are runnable; the others are left out, which is no error."""
    return await _claim(db, CLAIM, {"sessions": list(sessions), "worker": worker_id})


async def claim_suspects(db: Database, *, worker_id: UUID, queues: Collection[str], most: int) -> list[Won]:
    """Take the leases of a group of suspects, as many as may be together: only for a ward."""
    return await _claim(db, CLAIM_SUSPECTS, {"worker": worker_id, "queues": list(queues), "most": most})


async def _claim(db: Database, statement: TextClause, params: Params) -> list[Won]:
    async with db.transaction() as connection:
        rows = (await connection.execute(statement, params)).all()
        if not rows:
            return []
        ends = (await connection.execute(ENDS, {"sessions": [row.id for row in rows]})).all()
    by_session = {row.claimed_id: row for row in ends}
    won = []
    for row in rows:
        end = by_session[row.id]
        lease = Claim(
            session_id=row.id,
            tenant_id=row.tenant_id,
            worker_id=params["worker"],
            epoch=row.lease_epoch,
            mail_seq=row.mail_seq,
            last_seq=end.last_seq,
            last_event_id=end.last_event_id,
        )
        won.append(Won(lease, turn_record(end) if end.id is not None else None, row.crashes, row.waited))
    return won


async def acquit(db: Database, *, worker_id: UUID) -> None:
    """What this worker holds is no longer suspect; the crashes still count."""
    await db.execute(ACQUIT, {"worker": worker_id})


async def head(db: Database, session_id: UUID) -> TurnRecord | None:
    """The turn that runs next, or is running, in a session whose lease the caller holds."""
    rows = await db.fetch(HEAD, {"session": session_id})
    return turn_record(rows[0]) if rows else None


async def release(db: Database, claim: Claim, *, delay: timedelta = timedelta(0), queue: str | None = None) -> bool:
    """Give a lease back without touching the log; True if turns remain (ring after ``delay``). A lost lease is no error."""
    rows = await db.fetch(
        RELEASE,
        {"session": claim.session_id, "epoch": claim.epoch, "worker": claim.worker_id, "delay": delay, "queue": queue},
    )
    return bool(rows and rows[0].more)


async def held(db: Database, *, worker_id: UUID) -> set[Key]:
    """The leases, (session, epoch), that stand in the database under this worker's name."""
    return {(row.id, row.lease_epoch) for row in await db.fetch(HELD, {"worker": worker_id})}


async def reconcile(db: Database, *, worker_id: UUID, orphans: Collection[Key]) -> list[tuple[UUID, str]]:
    """Release leases of this worker that it knows nothing of: claims whose reply was lost. Returns (session, queue).

    ``orphans`` must have been read by ``held`` *before* the last reply to a claim was waited for.
    """
    params = {"worker": worker_id, "sessions": [key[0] for key in orphans], "epochs": [key[1] for key in orphans]}
    rows = await db.fetch(RECONCILE, params)
    return [(row.id, row.queue) for row in rows]


async def urgent_mail(db: Database, *, worker_id: UUID, session_id: UUID | None = None) -> list[MailRecord]:
    """Cancels and expiries for the sessions that this worker holds, or for that one of them."""
    if session_id is None:
        rows = await db.fetch(MAIL, {"worker": worker_id})
    else:
        rows = await db.fetch(MAIL_OF_SESSION, {"worker": worker_id, "session": session_id})
    return [MailRecord(r.id, r.session_id, r.turn_id, MailKind(r.kind), r.name, r.payload) for r in rows]


async def mail_seq(db: Database, session_id: UUID) -> int:
    """To be read *before* looking for mail; a suspend compares it."""
    rows = await db.fetch(MAIL_SEQ, {"session": session_id})
    return int(rows[0].mail_seq)


async def serve(db: Database, agents: Sequence[AgentRecord]) -> None:
    """Tell the fleet what this worker can run: the API validates submissions from it."""

    def row(agent: AgentRecord) -> dict[str, Json]:
        return {
            "name": agent.name,
            "version": agent.version,
            "queue": agent.queue,
            "description": agent.description,
            "input_schema": json.dumps(agent.input_schema),
            "output_schema": json.dumps(agent.output_schema),
        }

    async with db.transaction() as connection:
        for agent in agents:
            await connection.execute(SERVE, row(agent))
