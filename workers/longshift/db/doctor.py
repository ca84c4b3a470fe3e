"""What `longshift doctor` asks Postgres: facts, no verdicts. No statement here writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.db.schema import epochs, generations, metadata

T = TypeVar("T")

SERVER = text("""
SELECT current_setting('server_version_num')::integer AS version, current_setting('server_version') AS version_name,
       pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean AS read_only,
       current_setting('synchronous_commit') AS synchronous_commit, current_setting('fsync')::boolean AS fsync,
       current_setting('full_page_writes')::boolean AS full_page_writes, current_setting('autovacuum')::boolean AS autovacuum,
       current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer AS room,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' OR backend_type IS NULL) AS connections,
       current_setting('lock_timeout') AS lock_timeout, clock_timestamp() AS now,
       EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'vector') AS vectors""")
BACKEND = text("SELECT pg_backend_pid() AS pid")
DENIED = text("""
SELECT kind || ' ' || name AS what FROM (
    SELECT 'table' AS kind, t AS name FROM unnest(CAST(:tables AS text[])) t, unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) p
     WHERE to_regclass(t) IS NOT NULL AND NOT has_table_privilege(to_regclass(t), p)
    UNION SELECT 'sequence', s FROM unnest(CAST(:sequences AS text[])) s
     WHERE to_regclass(s) IS NOT NULL AND NOT has_sequence_privilege(to_regclass(s), 'USAGE')) x ORDER BY 1""")
TRANSACTIONS = text("""
SELECT coalesce(nullif(application_name, ''), 'a client') || ' (pid ' || pid || ')' AS who,
       clock_timestamp() - xact_start AS age
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - CAST(:age AS interval)
 ORDER BY xact_start LIMIT 5""")
BACKLOG = text("SELECT queue, runnable, running, oldest_seconds, slots, workers FROM backlog ORDER BY queue")
# Everything by partial indexes. What is deleted is looked for again and again: purge_at moves on, deleted_at does not.
LEFTOVERS = text("""
SELECT (SELECT count(*) FROM sessions s JOIN workers w ON w.id = s.lease_worker
         WHERE w.dead_at < clock_timestamp() - interval '10 seconds') AS held_by_dead,
       (SELECT count(*) FROM sessions s WHERE s.lease_worker IS NOT NULL
           AND NOT EXISTS (SELECT 1 FROM workers w WHERE w.id = s.lease_worker)) AS held_by_nobody,
       (SELECT count(*) FROM sessions WHERE lease_worker IS NULL AND suspect IS NOT NULL) AS suspects,
       (SELECT count(*) FROM turns
         WHERE status IN ('scheduled', 'queued', 'running', 'waiting') AND clock_stopped_at IS NULL
           AND deadline < now() - interval '1 minute') AS past_deadline,
       (SELECT count(*) FROM tool_calls WHERE status = 'unknown') AS in_doubt,
       (SELECT count(*) FROM approvals
         WHERE answered_at IS NULL AND closed_at IS NULL AND created_at < now() - interval '1 day') AS unanswered,
       (SELECT count(*) FROM sessions WHERE purge_at IS NOT NULL AND deleted_at < now() - interval '1 day') AS unpurged,
       (SELECT count(*) FROM garbage WHERE NOT swept AND since < now() - interval '1 day') AS garbage,
       (SELECT count(*) FROM api_keys
         WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())) AS keys""")


@dataclass(frozen=True, slots=True)
class Server:
    """What Postgres says of itself; ``room``: connections that it admits, all clients together."""

    version: int
    version_name: str
    read_only: bool
    synchronous_commit: str
    fsync: bool
    full_page_writes: bool
    autovacuum: bool
    room: int
    connections: int
    lock_timeout: str
    now: datetime
    vectors: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    queue: str
    runnable: int
    running: int
    oldest_seconds: float
    slots: int
    workers: int


@dataclass(frozen=True, slots=True)
class Leftovers:
    """How many there are of things that should not be there for long."""

    held_by_dead: int
    held_by_nobody: int
    suspects: int
    past_deadline: int
    in_doubt: int
    unanswered: int
    unpurged: int
    garbage: int
    keys: int


async def server(db: Database) -> Server:
    return _made(Server, (await db.fetch(SERVER))[0])


async def pooled(db: Database) -> bool:
    """Whether two connections that are open at the same time are one to the server: a pooler gives it out by transaction."""
    async with db.connect() as one, db.connect() as other:
        return bool((await one.execute(BACKEND)).scalar() == (await other.execute(BACKEND)).scalar())


async def denied(db: Database) -> list[str]:
    """Tables and sequences that this role may not use as a worker does."""
    sequences = [epochs.name, generations.name]
    tables = [table for table in metadata.tables if table != "compatibility"]
    return [row.what for row in await db.fetch(DENIED, {"tables": tables, "sequences": sequences})]


async def transactions(db: Database, *, older_than: timedelta) -> list[tuple[str, timedelta]]:
    """Who has a transaction open that is older, and how old it is; the oldest first."""
    return [(row.who, row.age) for row in await db.fetch(TRANSACTIONS, {"age": older_than})]


async def backlog(db: Database) -> Sequence[Backlog]:
    return [_made(Backlog, row) for row in await db.fetch(BACKLOG)]


async def leftovers(db: Database) -> Leftovers:
    return _made(Leftovers, (await db.fetch(LEFTOVERS))[0])


def _made(kind: type[T], row: Row[Any]) -> T:
    return kind(**{each.name: getattr(row, each.name) for each in fields(kind)})  # type: ignore[arg-type]  # dataclasses
