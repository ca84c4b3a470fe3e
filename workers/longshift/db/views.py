"""Reading turns, sessions, batches and agents: what the API and the command line show. No statement here writes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.model import AgentRecord, BatchRecord, SessionRecord, TurnRecord, TurnStatus

TURN_COLUMNS = """t.id, t.session_id, t.tenant_id, t.status, t.agent, t.agent_version, t.queue, t.input, t.input_artifact,
 t.output, t.output_artifact, t.error,
 t.position, t.root_turn_id, t.retry_of, t.parent_turn_id, t.attempts, t.version, t.first_seq, t.run_after,
 t.deadline + coalesce(clock_timestamp() - t.clock_stopped_at, interval '0') AS deadline,
 t.batch_id, t.batch_index, t.custom_id, t.usage, t.metadata, t.traceparent, t.created_at, t.started_at, t.ended_at"""

TURN = text(f"SELECT {TURN_COLUMNS} FROM turns t WHERE t.id = :turn AND t.tenant_id = :tenant")
TURNS = text(f"""
SELECT {TURN_COLUMNS} FROM turns t
 WHERE t.tenant_id = :tenant AND (CAST(:before AS uuid) IS NULL OR t.id < :before)
   AND (CAST(:status AS text[]) IS NULL OR t.status = ANY(:status))
   AND (CAST(:agent AS text) IS NULL OR t.agent = :agent)
   AND (CAST(:session AS uuid) IS NULL OR t.session_id = :session)
   AND (CAST(:batch AS uuid) IS NULL OR t.batch_id = :batch)
   AND (CAST(:since AS timestamptz) IS NULL OR t.created_at >= :since)
   AND t.metadata @> CAST(:metadata AS jsonb)
 ORDER BY t.id DESC LIMIT :limit""")
RESULTS = text(f"""
SELECT {TURN_COLUMNS} FROM turns t
 WHERE t.batch_id = :batch AND t.tenant_id = :tenant AND t.batch_index > :after
   AND (NOT :ended OR t.status IN ('succeeded', 'failed', 'cancelled', 'expired'))
 ORDER BY t.batch_index LIMIT :limit""")
BLOCKERS = text("""
SELECT b.id FROM turns t JOIN turns b ON b.session_id = t.session_id AND b.position < t.position
 WHERE t.id = :turn AND b.status IN ('queued', 'running', 'waiting') ORDER BY b.position LIMIT 1""")

_SESSION = """
SELECT s.id, s.tenant_id, s.queue, s.open_turns, s.next_position, s.lease_worker IS NOT NULL AS leased,
       s.created_at, greatest(s.created_at, s.leased_at, s.idle_since) AS active_at, d.ttl, s.archived_through,
       greatest(s.expires_at, CASE WHEN s.expires_at IS NOT NULL
                              THEN greatest(s.created_at, s.leased_at, s.idle_since) + d.ttl END) AS expires_at,
       coalesce(d.metadata, '{}'::jsonb) AS metadata,
       greatest((SELECT max(seq) FROM events e WHERE e.session_id = s.id), s.archived_through) AS last_seq
  FROM sessions s LEFT JOIN session_details d ON d.session_id = s.id
 WHERE s.tenant_id = :tenant AND s.deleted_at IS NULL"""
SESSION = text(f"{_SESSION} AND s.id = :session")
SESSIONS = text(f"{_SESSION} AND (CAST(:before AS uuid) IS NULL OR s.id < :before) ORDER BY s.id DESC LIMIT :limit")

_BATCH = "SELECT b.id, b.tenant_id, b.total, b.metadata, b.created_at FROM batches b WHERE b.tenant_id = :tenant"
BATCH = text(f"{_BATCH} AND b.id = :batch")
BATCHES = text(f"{_BATCH} AND (CAST(:before AS uuid) IS NULL OR b.id < :before) ORDER BY b.id DESC LIMIT :limit")
COUNTS = text("""
SELECT batch_id, status, count(*) AS turns, max(ended_at) AS last_ended_at FROM turns
 WHERE batch_id = ANY(CAST(:batches AS uuid[])) GROUP BY batch_id, status""")

# of one name that version last which new turns get: of those that a worker serves, the one that came last
AGENTS = text("""
SELECT name, version, queue, description, input_schema, output_schema FROM agents a
 ORDER BY name, EXISTS (SELECT 1 FROM workers w
                         WHERE w.dead_at IS NULL AND w.draining_since IS NULL AND w.drain_asked_at IS NULL AND NOT w.isolated
                           AND w.heartbeat_at > clock_timestamp() - interval '15 seconds'
                           AND w.serves @> jsonb_build_array(jsonb_build_array(a.name, a.version))), registered_at""")


@dataclass(frozen=True, slots=True)
class TurnFilter:
    """What a list of turns may be narrowed by; None means any."""

    status: Sequence[TurnStatus] | None = None
    agent: str | None = None
    session_id: UUID | None = None
    batch_id: UUID | None = None
    created_since: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def turn_record(row: Row[Any]) -> TurnRecord:
    """The record of a row that has ``TURN_COLUMNS``."""
    values = {name: getattr(row, name) for name in TurnRecord.__dataclass_fields__}
    return TurnRecord(**values | {"status": TurnStatus(row.status)})


async def turn(db: Database, turn_id: UUID, *, tenant_id: UUID) -> TurnRecord | None:
    rows = await db.fetch(TURN, {"turn": turn_id, "tenant": tenant_id})
    return turn_record(rows[0]) if rows else None


async def turns(
    db: Database, *, tenant_id: UUID, where: TurnFilter, before: UUID | None = None, limit: int = 20
) -> list[TurnRecord]:
    """Newest first; ``before`` is the id of the last turn of the page before."""
    params = {
        "tenant": tenant_id,
        "before": before,
        "status": [s.value for s in where.status] if where.status is not None else None,
        "agent": where.agent,
        "session": where.session_id,
        "batch": where.batch_id,
        "since": where.created_since,
        "metadata": json.dumps(dict(where.metadata)),
        "limit": limit,
    }
    return [turn_record(row) for row in await db.fetch(TURNS, params)]


async def blocked_by(db: Database, turn_id: UUID) -> UUID | None:
    """The open turn of the same session that must end before this one starts."""
    rows = await db.fetch(BLOCKERS, {"turn": turn_id})
    return rows[0].id if rows else None


async def results(
    db: Database, batch_id: UUID, *, tenant_id: UUID, ended_only: bool = True, page: int = 500
) -> AsyncIterator[TurnRecord]:
    """The turns of a batch in its order, fetched page by page."""
    after = -1
    while True:
        params = {"batch": batch_id, "tenant": tenant_id, "after": after, "ended": ended_only, "limit": page}
        rows = await db.fetch(RESULTS, params)
        for row in rows:
            yield turn_record(row)
        if len(rows) < page:
            return
        after = rows[-1].batch_index


def _session_record(row: Row[Any]) -> SessionRecord:
    return SessionRecord(**{name: getattr(row, name) for name in SessionRecord.__dataclass_fields__})


async def session(db: Database, session_id: UUID, *, tenant_id: UUID) -> SessionRecord | None:
    rows = await db.fetch(SESSION, {"session": session_id, "tenant": tenant_id})
    return _session_record(rows[0]) if rows else None


async def sessions(
    db: Database, *, tenant_id: UUID, before: UUID | None = None, limit: int = 20
) -> list[SessionRecord]:
    rows = await db.fetch(SESSIONS, {"tenant": tenant_id, "before": before, "limit": limit})
    return [_session_record(row) for row in rows]


async def batch(db: Database, batch_id: UUID, *, tenant_id: UUID) -> BatchRecord | None:
    rows = await db.fetch(BATCH, {"batch": batch_id, "tenant": tenant_id})
    return (await _counted(db, rows))[0] if rows else None


async def batches(db: Database, *, tenant_id: UUID, before: UUID | None = None, limit: int = 20) -> list[BatchRecord]:
    return await _counted(db, await db.fetch(BATCHES, {"tenant": tenant_id, "before": before, "limit": limit}))


async def _counted(db: Database, rows: Sequence[Row[Any]]) -> list[BatchRecord]:
    counts: dict[UUID, dict[TurnStatus, int]] = {row.id: {} for row in rows}
    last: dict[UUID, datetime] = {}
    for row in await db.fetch(COUNTS, {"batches": list(counts)}):
        counts[row.batch_id][TurnStatus(row.status)] = row.turns
        if row.last_ended_at is not None:
            last[row.batch_id] = max(row.last_ended_at, last.get(row.batch_id, row.last_ended_at))
    return [
        BatchRecord(r.id, r.tenant_id, r.total, counts[r.id], r.metadata, r.created_at, last.get(r.id)) for r in rows
    ]


async def agents(db: Database) -> list[AgentRecord]:
    """What workers have registered; of one name that version comes last which turns get that ask for none."""
    return [
        AgentRecord(r.name, r.version, r.queue, r.description, r.input_schema, r.output_schema)
        for r in await db.fetch(AGENTS)
    ]
