"""What holds for the whole fleet: the backlog of each queue, and how much of what there is. No statement here writes.

The statements read indexes, but they count: with a million open turns that takes about two seconds. Who calls this decides how
often that is worth it; the server ends what takes longer than the connection's time limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.metrics import Figures
from longshift.metrics.fleet import Queue

BACKLOG = text("SELECT queue, runnable, running, oldest_seconds, slots, workers FROM backlog")
# once over the open turns, whatever is counted of them
OPEN = text("""
SELECT status, queue, agent, coalesce(agent_version, '') AS version, count(*) AS turns FROM turns
 WHERE status IN ('scheduled', 'queued', 'running', 'waiting') GROUP BY 1, 2, 3, 4""")
# of those that live. Wards are parts of their workers, which do not know if one is stuck. Software of before 0005 does not say
# what it serves
WORKERS = text("""
SELECT CASE WHEN draining_since IS NOT NULL OR drain_asked_at IS NOT NULL THEN 'draining'
            ELSE coalesce(condition, 'ok') END AS condition, revision IS NULL AS old, queues, serves, isolated
  FROM workers
 WHERE dead_at IS NULL AND (NOT isolated OR condition = 'stuck') AND heartbeat_at > clock_timestamp() - CAST(:ttl AS interval)""")
OTHERS = text("""
SELECT (SELECT count(*) FROM sessions WHERE lease_worker IS NULL AND suspect IS NOT NULL)
     + (SELECT count(*) FROM sessions WHERE lease_worker IS NOT NULL AND suspect IS NOT NULL) AS suspects,
       (SELECT count(*) FROM approvals WHERE answered_at IS NULL AND closed_at IS NULL) AS approvals,
       (SELECT count(*) FROM tool_calls WHERE status = 'unknown') AS in_doubt""")

STATUSES = ("scheduled", "queued", "running", "waiting")
CONDITIONS = ("ok", "unready", "stuck", "draining")


async def figures(db: Database, *, lease_ttl: timedelta) -> Figures:
    """One look. What there is none of counts as 0, so that a figure does not vanish while somebody watches it.

    Raises:
        Unavailable: Postgres does not answer, or not in time.
    """
    backlog = {row.queue: row for row in await db.fetch(BACKLOG)}
    opened = await db.fetch(OPEN)
    workers = await db.fetch(WORKERS, {"ttl": lease_ttl})
    other = (await db.fetch(OTHERS))[0]

    turns, waiting = dict.fromkeys(STATUSES, 0), dict.fromkeys(backlog, 0)
    unserved: dict[tuple[str, str], int] = {}
    served = _served(workers)
    for row in opened:
        turns[row.status] += row.turns
        if row.status == "waiting":
            waiting[row.queue] = waiting.get(row.queue, 0) + row.turns
        if (row.queue, row.agent, row.version) not in served:
            unserved[row.agent, row.version] = unserved.get((row.agent, row.version), 0) + row.turns
    conditions = dict.fromkeys(CONDITIONS, 0)
    for row in workers:
        conditions[row.condition] = conditions.get(row.condition, 0) + 1  # newer software may have words of its own
    return Figures(
        queues={queue: _queue(backlog.get(queue), waiting=count) for queue, count in waiting.items()},
        turns=turns,
        workers=conditions,
        suspects=other.suspects,
        approvals=other.approvals,
        in_doubt=other.in_doubt,
        unserved={} if any(row.old for row in workers) else unserved,
    )


def _served(workers: Sequence[Row[Any]]) -> set[tuple[str, str, str]]:
    """Queue, agent and version ('' for any) of what somebody would take."""
    taking = [row for row in workers if row.condition != "draining" and not row.isolated]
    exact = {(queue, name, version) for row in taking for queue in row.queues for name, version in row.serves}
    return exact | {(queue, name, "") for queue, name, _ in exact}


def _queue(row: Row[Any] | None, *, waiting: int) -> Queue:
    if row is None:
        return Queue(waiting=waiting)
    return Queue(row.runnable, row.running, row.oldest_seconds, row.slots, row.workers, waiting)
