"""Who works and what each runs, and asking workers to drain: what operators and the API see of a fleet."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database
from longshift.db.liveness import LEADER
from longshift.model import Condition

SILENT = timedelta(seconds=15)
"""A worker that has not beaten for so long does not count as alive, here as in the view ``backlog``."""

ALIVE = text("""
SELECT pid FROM workers
 WHERE host = :host AND dead_at IS NULL AND heartbeat_at > clock_timestamp() - CAST(:age AS interval)""")

# the leader is whoever has its lock on the connection of its heartbeat; an advisory lock belongs to a database
WORKERS = text("""
WITH locks AS MATERIALIZED (
    SELECT k.pid, (CAST(k.classid AS bigint) << 32) | CAST(k.objid AS bigint) AS key FROM pg_locks k
     WHERE k.locktype = 'advisory' AND k.granted AND k.objsubid = 1
       AND k.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
SELECT w.id, w.process, w.host, w.pid, w.version, w.revision, w.queues, w.serves, w.capacity, w.running, w.isolated,
       w.condition, w.complaint, w.started_at, w.heartbeat_at, w.draining_since, w.drain_asked_at,
       clock_timestamp() - w.heartbeat_at AS silence,
       EXISTS (SELECT 1 FROM locks l JOIN locks m ON m.pid = l.pid WHERE l.key = :leader AND m.key = w.lock_key) AS leads
  FROM workers w WHERE w.dead_at IS NULL ORDER BY w.host, w.started_at, w.id""")

# Of each worker the first of its sessions, and how many there are. What it is doing is told by what it has recorded last: the
# start of a step is recorded only for tools.
RUNNING = text("""
SELECT w.id AS worker_id, r.* FROM unnest(CAST(:workers AS uuid[])) AS w(id) CROSS JOIN LATERAL (
    SELECT count(*) OVER () AS total, s.id AS session_id, s.leased_at AS since, t.id AS turn_id, t.tenant_id, t.agent,
           t.agent_version, t.attempts, last.key AS last_key, last.kind AS last_kind, last.created_at AS last_at,
           (SELECT c.tool FROM tool_calls c WHERE c.session_id = s.id AND c.status = 'started' AND c.epoch = s.lease_epoch
             ORDER BY c.started_at DESC LIMIT 1) AS calling
      FROM sessions s
      LEFT JOIN LATERAL (SELECT * FROM turns x WHERE x.session_id = s.id AND x.status IN ('queued', 'running', 'waiting')
                          ORDER BY x.position LIMIT 1) t ON true
      LEFT JOIN LATERAL (SELECT e.key, e.kind, e.created_at FROM events e WHERE e.session_id = s.id
                          ORDER BY e.seq DESC LIMIT 1) last ON true
     WHERE s.lease_worker = w.id AND (CAST(:tenant AS uuid) IS NULL OR s.tenant_id = :tenant)
     ORDER BY s.leased_at LIMIT :limit) r""")

# By process: whoever was declared dead meanwhile goes on under a new id, and is still the same worker to its operator. Dead rows
# too: one that has not heard of its death takes this along (``liveness.REGISTER``).
ASK = text("""
UPDATE workers SET drain_asked_at = clock_timestamp()
 WHERE process = ANY(CAST(:processes AS uuid[])) AND drain_asked_at IS NULL""")
LEFT = text("""
SELECT count(*) AS workers, coalesce(sum(running), 0) AS turns FROM workers
 WHERE process = ANY(CAST(:processes AS uuid[])) AND dead_at IS NULL
   AND heartbeat_at > clock_timestamp() - CAST(:silent AS interval)""")

SERVED = text("""
SELECT EXISTS (SELECT 1 FROM workers w, jsonb_array_elements(w.serves) a
                WHERE w.dead_at IS NULL AND w.draining_since IS NULL AND w.drain_asked_at IS NULL AND NOT w.isolated
                  AND w.heartbeat_at > clock_timestamp() - CAST(:silent AS interval) AND w.id <> :but
                  AND :queue = ANY(w.queues)
                  AND a ->> 0 = :agent AND (CAST(:version AS text) IS NULL OR a ->> 1 = :version)) AS served""")

# Open turns by the partial indexes over them. One that has not started and asked for no version runs in any.
VERSIONS = text("""
WITH open AS (
    SELECT agent, agent_version AS version, count(*) AS turns FROM (
        SELECT agent, agent_version FROM turns WHERE status IN ('queued', 'running', 'waiting')
        UNION ALL SELECT agent, agent_version FROM turns WHERE status = 'scheduled') t
     GROUP BY agent, agent_version),
alive AS (
    SELECT a ->> 0 AS agent, a ->> 1 AS version, count(*) AS workers,
           count(*) FILTER (WHERE w.draining_since IS NULL AND w.drain_asked_at IS NULL) AS staying
      FROM workers w, jsonb_array_elements(w.serves) a
     WHERE w.dead_at IS NULL AND NOT w.isolated AND w.heartbeat_at > clock_timestamp() - CAST(:silent AS interval)
     GROUP BY 1, 2)
SELECT coalesce(open.agent, alive.agent) AS agent, coalesce(open.version, alive.version) AS version,
       coalesce(turns, 0) AS turns, coalesce(workers, 0) AS workers, coalesce(staying, 0) AS staying
  FROM open FULL JOIN alive ON open.agent = alive.agent AND open.version = alive.version
 ORDER BY 1, 2 NULLS FIRST""")


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker that nobody has declared dead.

    Attributes:
        version, revision: of its software, and the newest of the schema that this knows; None: older than 0005.
        serves: its agents, [name, version].
        running: sessions that it holds, as of its last heartbeat.
        silence: since its last heartbeat.
        leads: it is the one whose sweeper works.
    """

    id: UUID
    process: UUID | None
    host: str
    pid: int
    version: str | None
    revision: str | None
    queues: Sequence[str]
    serves: Sequence[Sequence[str]]
    capacity: int
    running: int
    isolated: bool
    condition: Condition | None
    complaint: str | None
    started_at: datetime
    heartbeat_at: datetime
    draining_since: datetime | None
    drain_asked_at: datetime | None
    silence: timedelta
    leads: bool

    @property
    def alive(self) -> bool:
        return self.silence < SILENT

    @property
    def state(self) -> str:
        """In one word: silent, draining, or its condition."""
        if not self.alive:
            return "silent"
        if self.draining_since or self.drain_asked_at:
            return "draining"
        return self.condition or "-"


@dataclass(frozen=True, slots=True)
class RunningRecord:
    """A session that a worker holds, and its turn (None: the lease is about to be given back).

    Attributes:
        since: when this worker claimed it.
        last: key of the step or kind of the event that was recorded last.
        calling: the tool that is being called.
        total: how many sessions that worker holds, those that are not in the list included.
    """

    worker_id: UUID
    session_id: UUID
    since: datetime
    turn_id: UUID | None
    tenant_id: UUID | None
    agent: str | None
    agent_version: str | None
    attempts: int | None
    last: str | None
    last_at: datetime | None
    calling: str | None
    total: int


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version of an agent, and who needs it.

    Attributes:
        version: None: turns that have not started and asked for none.
        turns: open ones that have begun in it, or asked for it.
        workers: those that serve it, draining ones included; wards do not count.
        staying: those of them that do not drain.
    """

    agent: str
    version: str | None
    turns: int
    workers: int
    staying: int


async def alive(db: Database, *, host: str, age: timedelta = timedelta(seconds=5)) -> set[int]:
    """The process ids of the workers on ``host`` whose last heartbeat is younger than ``age``."""
    return {row.pid for row in await db.fetch(ALIVE, {"host": host, "age": age})}


async def list_workers(db: Database) -> list[WorkerRecord]:
    """All workers that nobody has declared dead, wards and silent ones included."""
    found = []
    for row in await db.fetch(WORKERS, {"leader": LEADER}):
        values = {name: getattr(row, name) for name in WorkerRecord.__dataclass_fields__}
        condition = Condition(row.condition) if row.condition in set(Condition) else None  # a word of newer software
        found.append(WorkerRecord(**values | {"condition": condition}))
    return found


async def running(
    db: Database, worker_ids: Collection[UUID], *, tenant_id: UUID | None = None, limit: int = 500
) -> list[RunningRecord]:
    """What these workers run, of each at most ``limit`` sessions, those first that it has had for longest.

    Args:
        tenant_id: only sessions of this tenant; None: all.
    """
    params = {"workers": list(worker_ids), "tenant": tenant_id, "limit": limit}
    return [
        RunningRecord(
            worker_id=r.worker_id,
            session_id=r.session_id,
            since=r.since,
            turn_id=r.turn_id,
            tenant_id=r.tenant_id,
            agent=r.agent,
            agent_version=r.agent_version,
            attempts=r.attempts,
            last=r.last_key or r.last_kind,
            last_at=r.last_at,
            calling=r.calling,
            total=r.total,
        )
        for r in await db.fetch(RUNNING, params)
    ]


async def ask_to_drain(db: Database, processes: Collection[UUID]) -> None:
    """Their next heartbeat tells them. May be repeated, and must be while one waits for their end: see ``ASK``."""
    await db.execute(ASK, {"processes": list(processes)})


async def left(db: Database, processes: Collection[UUID]) -> tuple[int, int]:
    """How many of these workers are still there, and how many turns they run."""
    row = (await db.fetch(LEFT, {"processes": list(processes), "silent": SILENT}))[0]
    return row.workers, row.turns


async def serves(db: Database, *, agent: str, version: str | None, queue: str, but: UUID) -> bool:
    """Whether a worker of ``queue`` other than ``but`` lives, is to stay, and has this agent (None: in any version)."""
    params = {"agent": agent, "version": version, "queue": queue, "but": but, "silent": SILENT}
    return bool((await db.fetch(SERVED, params))[0].served)


async def versions(db: Database) -> list[VersionRecord]:
    """All versions of agents that a worker serves or an open turn is bound to."""
    return [
        VersionRecord(r.agent, r.version, r.turns, r.workers, r.staying)
        for r in await db.fetch(VERSIONS, {"silent": SILENT})
    ]
