"""What the sweeper does: declare dead, rescue, ring, promote, expire, forget. Each a bounded pass over a partial index.

Every pass may run twice, late, or in two processes at once without harm. Rescue re-queues; it runs nothing.

**Poison.** A rescue also draws the conclusions from a death. What counts is recorded steps: ``crashes`` of a session is the
number of processes that died one after another under its turn without its recording anything. The turn becomes a *suspect*
if its process crashed by its own doing (its supervisor saw it: a signal such as SIGSEGV, an exit code), or if nobody can
say why but it is the third in a row. Suspects run in wards only, in groups of at most ``suspect``: an eighth of those that
died together, so that from group to group a thousand become 125, 16, 2 and 1. A turn that was alone in a ward that died, for
the third time in a row at least (the sixth, if nobody saw the ward die: it may have been the machine), is condemned: mail
tells the session's next holder to fail it as ``crash_loop``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.db.leases import URGENT

PATIENCE = 3
"""Deaths in a row without a recorded step after which an unexplained one makes a suspect, and a lonely one is the last."""
SHARE = 8
"""Into so many groups those are divided that died together."""
NOW = "(SELECT clock_timestamp())"
"""Evaluated once, so that an index is read as far as this and no further: plain ``clock_timestamp()`` is volatile, and every
timer in the index would be compared with another now."""
LONGEST_PAUSE = 5
"""A session is rung again after patience, 2 x, 4 x ... 2**5 x patience, as long as nobody claims it."""

# Silence counts only where nothing else explains it: not the start of the server, and not that the whole fleet was cut off.
# Against the latter speaks that somebody has been beating all the time, on one connection: the sweeper itself for a TTL, or
# one worker after the other, also such as have died since. Their times must overlap: where all have connected anew, some may
# still be trying to. An advisory lock that is gone shortens the wait.
# A server that hung runs, when it goes on, what was sent to it before: to that statement everybody has been silent. So it
# holds only for a moment after the sweeper's own last beat.
TOMBSTONE = text("""
WITH watched AS MATERIALIZED (
    SELECT pg_postmaster_start_time() < clock_timestamp() - CAST(:ttl AS interval)
       AND (CAST(:trusted_since AS timestamptz) < clock_timestamp() - CAST(:ttl AS interval)
         OR (SELECT range_agg(tstzrange(k.watching_since, CASE
                      WHEN k.heartbeat_at > clock_timestamp() - CAST(:grace AS interval) * 2 / 3 THEN 'infinity'
                      ELSE k.heartbeat_at END))
               FROM workers k
              WHERE k.watching_since <= k.heartbeat_at
                AND k.heartbeat_at > clock_timestamp() - 2 * CAST(:ttl AS interval))
            @> tstzrange(clock_timestamp() - CAST(:ttl AS interval), clock_timestamp())) AS well)
UPDATE workers w SET dead_at = clock_timestamp(), held = (SELECT count(*) FROM sessions s WHERE s.lease_worker = w.id)
  FROM watched
 WHERE w.dead_at IS NULL AND watched.well
   AND (CAST(:as_of AS timestamptz) IS NULL
     OR clock_timestamp() < CAST(:as_of AS timestamptz) + CAST(:grace AS interval))
   AND (w.heartbeat_at < clock_timestamp() - CAST(:ttl AS interval)
     OR (w.heartbeat_at < clock_timestamp() - CAST(:grace AS interval)
         AND w.lock_key IS NOT NULL
         AND NOT EXISTS (SELECT 1 FROM pg_locks k
                          WHERE k.locktype = 'advisory' AND k.granted AND k.objsubid = 1
                            AND ((CAST(k.classid AS bigint) << 32) | CAST(k.objid AS bigint)) = w.lock_key)))
RETURNING w.id""")

# a process that its parent saw end; whoever was declared dead before has the same reason for it
BURY = text("""
UPDATE workers w SET dead_at = coalesce(w.dead_at, clock_timestamp()), crashed = w.crashed OR :crashed,
       reported = true,
       held = CASE WHEN w.dead_at IS NULL THEN (SELECT count(*) FROM sessions s WHERE s.lease_worker = w.id) ELSE w.held END
 WHERE w.process = :process AND (w.dead_at IS NULL OR EXISTS (SELECT 1 FROM sessions s WHERE s.lease_worker = w.id))
RETURNING w.id""")

SERVED = text("SELECT EXISTS (SELECT 1 FROM workers WHERE process = :process) AS served")

# by id list, never by anti-join on live workers: a re-checked row would keep the stale join and lose a live lease
HOLDING_DEAD = text("""
SELECT w.id FROM workers w
 WHERE w.dead_at IS NOT NULL AND EXISTS (SELECT 1 FROM sessions s WHERE s.lease_worker = w.id)""")
HELD_BY_DEAD = text("""
SELECT id FROM sessions WHERE lease_worker = ANY(CAST(:workers AS uuid[]))
 ORDER BY id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED""")
# Under the locks of the statement before, and so with a snapshot of its own: a dead worker's last step may have been
# committed between that one's snapshot and its locks, and would not count.
RESCUE = text(f"""
WITH v AS MATERIALIZED (
    SELECT id FROM sessions WHERE id = ANY(CAST(:sessions AS uuid[])) AND lease_worker = ANY(CAST(:workers AS uuid[]))
     ORDER BY id FOR NO KEY UPDATE SKIP LOCKED),
d AS MATERIALIZED (
    SELECT s.id, t.id AS turn_id, greatest(w.held, 1) AS held, w.crashed, w.isolated, w.reported,
           CASE WHEN last.epoch = s.lease_epoch AND last.kind <> 'turn.started' THEN 1 ELSE s.crashes + 1 END AS crashes
      FROM v JOIN sessions s ON s.id = v.id JOIN workers w ON w.id = s.lease_worker
      LEFT JOIN turns t ON t.session_id = s.id AND t.status = 'running'
      LEFT JOIN LATERAL (SELECT epoch, kind FROM events e WHERE e.session_id = s.id ORDER BY seq DESC LIMIT 1) last ON true),
j AS MATERIALIZED (
    SELECT *, turn_id IS NOT NULL AND isolated AND held = 1
                                AND crashes >= CASE WHEN reported THEN {PATIENCE} ELSE {2 * PATIENCE} END AS condemned,
           EXISTS (SELECT 1 FROM mail m WHERE m.session_id = d.id AND m.turn_id = d.turn_id AND m.consumed_at IS NULL) AS ending
      FROM d),
s AS (
    UPDATE sessions s SET lease_worker = NULL, lease_epoch = nextval('epochs'), dispatched_at = clock_timestamp(),
           ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() END,
           mail_seq = s.mail_seq + CASE WHEN j.condemned THEN 1 ELSE 0 END,
           crashes = CASE WHEN j.condemned THEN 0 WHEN j.turn_id IS NULL THEN s.crashes ELSE j.crashes END,
           suspect = CASE WHEN j.condemned OR j.ending THEN NULL WHEN j.turn_id IS NULL THEN s.suspect
                          WHEN s.suspect IS NOT NULL OR j.crashed OR j.crashes >= {PATIENCE}
                          THEN CAST(ceil(least(coalesce(s.suspect, j.held), j.held) / {SHARE}.0) AS integer) END
      FROM j WHERE s.id = j.id RETURNING s.id, s.queue, s.open_turns > 0 AND s.suspect IS NULL AS ring),
m AS (
    INSERT INTO mail (id, session_id, turn_id, kind, payload)
    SELECT gen_random_uuid(), j.id, j.turn_id, 'condemn', json_build_object('reason', format(
           '%s processes died under this turn one after another, the last one with nothing else in it', j.crashes))
      FROM j JOIN s ON s.id = j.id WHERE j.condemned),
t AS (
    UPDATE turns SET status = 'queued', version = version + 1 FROM s
     WHERE turns.session_id = s.id AND turns.status = 'running')
SELECT id, queue, ring FROM s""")

RING = text(f"""
WITH v AS MATERIALIZED (
    SELECT id FROM sessions
     WHERE lease_worker IS NULL AND ready_at <= {NOW} AND queue = :queue AND suspect IS NULL
       AND (dispatched_at IS NULL
            OR dispatched_at < clock_timestamp() - CAST(:patience AS interval) * (1 << least(rings, {LONGEST_PAUSE})))
     ORDER BY ready_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED)
UPDATE sessions s SET dispatched_at = clock_timestamp(), rings = least(s.rings + 1, 100)
  FROM v WHERE s.id = v.id RETURNING s.id""")
READY = text(f"""
SELECT ARRAY(SELECT DISTINCT queue FROM (SELECT queue FROM sessions
                                          WHERE lease_worker IS NULL AND ready_at <= {NOW} AND suspect IS NULL
                                          ORDER BY ready_at LIMIT 10000) q) AS queues,
       (SELECT ready_at - clock_timestamp() FROM sessions
         WHERE lease_worker IS NULL AND ready_at > {NOW} ORDER BY ready_at LIMIT 1) AS next""")
FREE = text("""
SELECT q.queue, sum(greatest(w.capacity - w.running, 0)) AS free
  FROM workers w, unnest(w.queues) AS q(queue)
 WHERE w.dead_at IS NULL AND w.draining_since IS NULL AND NOT w.isolated GROUP BY q.queue""")

DUE = text(f"""
SELECT id, session_id FROM turns WHERE status = 'scheduled' AND run_after <= {NOW} ORDER BY run_after LIMIT :limit""")
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

OVERDUE = text(f"""
SELECT t.id FROM turns t
 WHERE t.status IN ('scheduled', 'queued', 'running', 'waiting') AND t.deadline <= {NOW}
   AND t.clock_stopped_at IS NULL
   AND NOT EXISTS (SELECT 1 FROM mail m WHERE m.session_id = t.session_id AND m.turn_id = t.id AND m.kind = 'expire'
                                          AND m.consumed_at IS NULL)
 ORDER BY t.deadline LIMIT :limit""")

FORGET_KEYS = text(f"""
DELETE FROM idempotency WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM idempotency WHERE created_at < {NOW} - CAST(:age AS interval) ORDER BY created_at LIMIT :limit))""")
# mail that came while its turn was just ending is never read by anybody
FORGET_UNREAD = text(f"""
DELETE FROM mail WHERE id = ANY(ARRAY(
    SELECT m.id FROM mail m JOIN turns t ON t.id = m.turn_id
     WHERE {URGENT} AND t.ended_at <= clock_timestamp() - CAST(:age AS interval) LIMIT :limit))""")
FORGET_MAIL = text(f"""
DELETE FROM mail WHERE id = ANY(ARRAY(
    SELECT id FROM mail WHERE consumed_at <= {NOW} - CAST(:age AS interval) ORDER BY consumed_at LIMIT :limit))""")
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


async def bury(db: Database, *, process: UUID, crashed: bool) -> list[UUID]:
    """Declare the workers of a process dead that has ended; ``crashed``: by its own doing, not by somebody's signal."""
    return [row.id for row in await db.fetch(BURY, {"process": process, "crashed": crashed})]


async def has_served(db: Database, *, process: UUID) -> bool:
    """Whether a process has ever been a worker, dead or alive."""
    return bool((await db.fetch(SERVED, {"process": process}))[0].served)


async def rescue(db: Database, *, limit: int = 1000) -> tuple[int, Rung]:
    """Release what dead workers hold, under a new epoch. Every pass looks at all of them: a claim may commit late.

    Returns the number of leases released and the sessions to ring.
    """
    dead = [row.id for row in await db.fetch(HOLDING_DEAD)]
    if not dead:
        return 0, []
    rows = await take_away(db, dead, limit=limit)
    return len(rows), [(row.id, row.queue) for row in rows if row.ring]


async def take_away(db: Database, dead: Sequence[UUID], *, limit: int) -> Sequence[Row[Any]]:
    """Release what ``dead`` workers hold: id, queue and whether to ring, of each session."""
    async with db.transaction() as tx:
        held = (await tx.execute(HELD_BY_DEAD, {"workers": list(dead), "limit": limit})).all()
        if not held:
            return []
        return (await tx.execute(RESCUE, {"workers": list(dead), "sessions": [row.id for row in held]})).all()


async def ready(db: Database) -> tuple[list[str], timedelta | None]:
    """The queues of ready sessions, and how long it is until the next timer is due (None: there is none)."""
    row = (await db.fetch(READY))[0]
    return row.queues, row.next


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
    """Delete idempotency keys, read mail and tombstones that no longer serve anything; the number of rows, of each kind at
    most ``limit``."""
    rows = 0
    for statement in (FORGET_KEYS, FORGET_MAIL, FORGET_UNREAD):
        rows += await db.execute(statement, {"age": keys_after, "limit": limit})
    return rows + await db.execute(FORGET_WORKERS, {"age": workers_after})
