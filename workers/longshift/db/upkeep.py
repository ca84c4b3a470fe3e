"""What the sweeper does: declare dead, rescue, ring, promote, expire, forget. Each a bounded pass over a partial index.

Every pass may run twice, late, or in two processes at once without harm. Rescue re-queues; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database

# An advisory lock that is gone only shortens the wait, and only while nothing else explains its absence: a server or a
# sweeper's connection younger than the TTL has not seen the locks that were lost with the one before.
# A server that hung runs, when it goes on, what was sent to it before: to that statement everybody has been silent. So it
# holds only for a moment after the sweeper's own last beat.
TOMBSTONE = text("""
UPDATE workers w SET dead_at = clock_timestamp()
 WHERE w.dead_at IS NULL
   AND (CAST(:as_of AS timestamptz) IS NULL
     OR clock_timestamp() < CAST(:as_of AS timestamptz) + CAST(:grace AS interval))
   AND (greatest(w.heartbeat_at, pg_postmaster_start_time(), CAST(:trusted_since AS timestamptz))
          < clock_timestamp() - CAST(:ttl AS interval)
     OR (w.heartbeat_at < clock_timestamp() - CAST(:grace AS interval)
         AND greatest(pg_postmaster_start_time(), CAST(:trusted_since AS timestamptz))
               < clock_timestamp() - CAST(:ttl AS interval)
         AND w.lock_key IS NOT NULL
         AND NOT EXISTS (SELECT 1 FROM pg_locks k
                          WHERE k.locktype = 'advisory' AND k.granted AND k.objsubid = 1
                            AND ((CAST(k.classid AS bigint) << 32) | CAST(k.objid AS bigint)) = w.lock_key)))
RETURNING w.id""")

# by id list, never by anti-join on live workers: a re-checked row would keep the stale join and lose a live lease
HOLDING_DEAD = text("""
SELECT w.id FROM workers w
 WHERE w.dead_at IS NOT NULL AND EXISTS (SELECT 1 FROM sessions s WHERE s.lease_worker = w.id)""")
RESCUE = text("""
WITH v AS MATERIALIZED (
    SELECT id FROM sessions WHERE lease_worker = ANY(CAST(:workers AS uuid[]))
     ORDER BY id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED),
s AS (
    UPDATE sessions s SET lease_worker = NULL, lease_epoch = nextval('epochs'), dispatched_at = clock_timestamp(),
           ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() END
      FROM v WHERE s.id = v.id RETURNING s.id, s.queue, s.open_turns),
t AS (
    UPDATE turns SET status = 'queued', version = version + 1 FROM s
     WHERE turns.session_id = s.id AND turns.status = 'running')
SELECT id, queue, open_turns > 0 AS ring FROM s""")

RING = text("""
WITH v AS MATERIALIZED (
    SELECT id FROM sessions
     WHERE lease_worker IS NULL AND ready_at <= clock_timestamp() AND queue = :queue
       AND (dispatched_at IS NULL OR dispatched_at < clock_timestamp() - CAST(:patience AS interval))
     ORDER BY ready_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED)
UPDATE sessions s SET dispatched_at = clock_timestamp() FROM v WHERE s.id = v.id RETURNING s.id""")
READY_QUEUES = text("""
SELECT DISTINCT queue FROM (SELECT queue FROM sessions WHERE lease_worker IS NULL AND ready_at <= clock_timestamp()
                             ORDER BY ready_at LIMIT 10000) q""")
FREE = text("""
SELECT q.queue, sum(greatest(w.capacity - w.running, 0)) AS free
  FROM workers w, unnest(w.queues) AS q(queue) WHERE w.dead_at IS NULL AND w.draining_since IS NULL GROUP BY q.queue""")

DUE = text("""
SELECT id, session_id FROM turns WHERE status = 'scheduled' AND run_after <= clock_timestamp() ORDER BY run_after LIMIT :limit""")
LOCK_SESSIONS = text("SELECT id FROM sessions WHERE id = ANY(CAST(:sessions AS uuid[])) ORDER BY id FOR NO KEY UPDATE")
PROMOTE = text("""
WITH d AS MATERIALIZED (
    SELECT t.id, t.session_id, t.queue, row_number() OVER (PARTITION BY t.session_id ORDER BY t.run_after, t.id) AS place
      FROM turns t WHERE t.id = ANY(CAST(:turns AS uuid[])) AND t.status = 'scheduled'),
n AS (SELECT session_id, count(*) AS n, min(queue) AS queue FROM d GROUP BY session_id),
s AS (
    UPDATE sessions s SET next_position = s.next_position + n.n, open_turns = s.open_turns + n.n,
           queue = CASE WHEN s.open_turns = 0 THEN n.queue ELSE s.queue END,
           ready_at = CASE WHEN s.head_waiting THEN s.ready_at ELSE coalesce(s.ready_at, clock_timestamp()) END
      FROM n WHERE s.id = n.session_id
    RETURNING s.id, s.queue, s.next_position - n.n AS base),
t AS (
    UPDATE turns SET status = 'queued', position = s.base + d.place, version = turns.version + 1
      FROM d JOIN s ON s.id = d.session_id WHERE turns.id = d.id)
SELECT id, queue FROM s""")

OVERDUE = text("""
SELECT t.id FROM turns t
 WHERE t.status IN ('scheduled', 'queued', 'running', 'waiting') AND t.deadline <= clock_timestamp()
   AND NOT EXISTS (SELECT 1 FROM mail m WHERE m.session_id = t.session_id AND m.turn_id = t.id AND m.kind = 'expire'
                                          AND m.consumed_at IS NULL)
 ORDER BY t.deadline LIMIT :limit""")

FORGET_KEYS = text("""
DELETE FROM idempotency WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM idempotency WHERE created_at < clock_timestamp() - CAST(:age AS interval) LIMIT :limit))""")
# mail that came while its turn was just ending is never read by anybody
FORGET_MAIL = text("""
DELETE FROM mail WHERE id = ANY(ARRAY(
    SELECT m.id FROM mail m LEFT JOIN turns t ON t.id = m.turn_id
     WHERE m.consumed_at <= clock_timestamp() - CAST(:age AS interval)
        OR t.ended_at <= clock_timestamp() - CAST(:age AS interval) LIMIT :limit))""")
FORGET_WORKERS = text("""
DELETE FROM workers w WHERE w.dead_at < clock_timestamp() - CAST(:age AS interval)
   AND NOT EXISTS (SELECT 1 FROM sessions s WHERE s.lease_worker = w.id)""")

Rung = list[tuple[UUID, str]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How long a silent worker is believed to live."""

    ttl: timedelta
    lock_grace: timedelta
    trusted_since: datetime  # since when (database clock) the sweeper has watched without a break
    as_of: datetime | None = None  # when (database clock) it last saw the server; must be younger than ``lock_grace``


async def tombstone(db: Database, verdict: Verdict) -> list[UUID]:
    """Declare silent workers dead; from then on their heartbeats write nothing."""
    params = {"ttl": verdict.ttl, "grace": verdict.lock_grace, "trusted_since": verdict.trusted_since}
    params |= {"as_of": verdict.as_of}
    return [row.id for row in await db.fetch(TOMBSTONE, params)]


async def rescue(db: Database, *, limit: int = 1000) -> tuple[int, Rung]:
    """Release what dead workers hold, under a new epoch. Every pass looks at all of them: a claim may commit late.

    Returns the number of leases released and the sessions to ring.
    """
    dead = [row.id for row in await db.fetch(HOLDING_DEAD)]
    if not dead:
        return 0, []
    rows = await db.fetch(RESCUE, {"workers": dead, "limit": limit})
    return len(rows), [(row.id, row.queue) for row in rows if row.ring]


async def ready_queues(db: Database) -> list[str]:
    return [row.queue for row in await db.fetch(READY_QUEUES)]


async def free_slots(db: Database) -> dict[str, int]:
    """Turns that the live workers of each queue could still take, by their last heartbeats."""
    return {row.queue: int(row.free) for row in await db.fetch(FREE)}


async def undispatched(db: Database, *, queue: str, patience: timedelta, limit: int) -> list[UUID]:
    """Ready sessions whose wake-up was never sent, or sent more than ``patience`` ago; marked as sent now."""
    rows = await db.fetch(RING, {"queue": queue, "patience": patience, "limit": limit})
    return [row.id for row in rows]


async def promote(db: Database, *, limit: int = 500) -> Rung:
    """Give turns whose ``run_after`` has come their place in their session's order."""
    due = await db.fetch(DUE, {"limit": limit})
    if not due:
        return []
    async with db.transaction() as tx:
        await tx.execute(LOCK_SESSIONS, {"sessions": list({row.session_id for row in due})})
        rows = (await tx.execute(PROMOTE, {"turns": [row.id for row in due]})).all()
    return [(row.id, row.queue) for row in rows]


async def overdue(db: Database, *, limit: int = 500) -> Sequence[UUID]:
    """Open turns past their deadline that nobody has yet been told to expire."""
    return [row.id for row in await db.fetch(OVERDUE, {"limit": limit})]


async def forget(db: Database, *, keys_after: timedelta, workers_after: timedelta, limit: int = 1000) -> int:
    """Delete idempotency keys, read mail and tombstones that no longer serve anything; the number of rows."""
    keys = await db.execute(FORGET_KEYS, {"age": keys_after, "limit": limit})
    keys += await db.execute(FORGET_MAIL, {"age": keys_after, "limit": limit})
    return keys + await db.execute(FORGET_WORKERS, {"age": workers_after})
