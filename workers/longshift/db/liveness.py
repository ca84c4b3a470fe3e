"""A worker's sign of life: one row, one direct connection of its own, used from its own thread.

The connection holds two session-level advisory locks: one under a random key, whose absence lets the sweeper decide sooner
that the worker is dead, and, in one worker of the fleet, the sweeper's leadership. It is the only connection that cannot go
through PgBouncer in transaction mode: give ``LONGSHIFT_DATABASE_URL`` as the direct address there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from secrets import randbits
from uuid import UUID

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from longshift.db.database import Translated, driver_url
from longshift.db.limits import ThreadPatience
from longshift.db.revision import signed
from longshift.model import Condition

LEADER = 0x10A6_511F  # any fixed number: the advisory lock that the fleet's one sweeper holds

OLDEST = 200
"""So many sessions that are ready, of whatever queue, are looked at to find work that is overdue."""

# What an operator has asked of the process holds for it under its new id, too, if it was declared dead meanwhile.
REGISTER = text("""
INSERT INTO workers (id, host, pid, queues, capacity, lock_key, process, isolated, version, revision, serves, drain_asked_at)
VALUES (:id, :host, :pid, CAST(:queues AS text[]), :capacity, :lock_key, :process, :isolated, :version, :revision,
        CAST(:serves AS jsonb), (SELECT max(drain_asked_at) FROM workers WHERE process = :process))""")
RELOCK = text("UPDATE workers SET lock_key = :lock_key WHERE id = :id AND dead_at IS NULL")
# The work that is overdue is looked for among the oldest only: with a queue that nobody serves there could be any number.
HEARTBEAT = text(f"""
UPDATE workers SET heartbeat_at = clock_timestamp(), running = :running,
       loop_tick_at = clock_timestamp() - CAST(:loop_age AS interval),
       watching_since = coalesce(CAST(:watching_since AS timestamptz), clock_timestamp()),
       draining_since = CASE WHEN :draining THEN coalesce(draining_since, clock_timestamp()) END,
       condition = :condition, complaint = :complaint
 WHERE id = :id AND dead_at IS NULL
RETURNING clock_timestamp() AS now, CASE WHEN :want_leader THEN pg_try_advisory_lock(:leader) END AS leads,
          EXISTS (SELECT 1 FROM sessions s WHERE s.lease_worker IS NULL AND s.suspect IS NOT NULL
                                             AND s.ready_at <= clock_timestamp()
                                             AND s.queue = ANY(workers.queues)) AS suspects,
          EXISTS (SELECT 1 FROM (SELECT s.queue FROM sessions s
                                  WHERE s.lease_worker IS NULL AND s.suspect IS NULL
                                    AND s.ready_at <= (SELECT clock_timestamp()) - CAST(:stuck_after AS interval)
                                  ORDER BY s.ready_at LIMIT {OLDEST}) q
                   WHERE q.queue = ANY(workers.queues)) AS overdue,
          drain_asked_at IS NOT NULL AS drain""")
RETIRE = text("UPDATE workers SET dead_at = clock_timestamp() WHERE id = :id AND dead_at IS NULL")
LOCK = text("SELECT pg_try_advisory_lock(:key) AS held, clock_timestamp() AS now")


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a worker reports with each heartbeat."""

    running: int
    loop_age: timedelta  # how long ago its event loop last turned
    draining: bool
    watching_since: datetime | None = None  # since when it has beaten without a break; None: since now
    condition: Condition | None = None  # None: it has not looked yet
    complaint: str | None = None  # why it is not ok


@dataclass(frozen=True, slots=True)
class Member:
    """What a worker's row says about it from its first day on.

    Attributes:
        process: the process behind it; a supervisor that started it reports its end by this.
        isolated: it is a ward, which runs suspects only.
        version: of its software.
        revision: the newest of the schema that its software knows.
        serves: its agents, by name and version.
    """

    host: str
    pid: int
    queues: Sequence[str]
    capacity: int
    process: UUID
    isolated: bool = False
    version: str | None = None
    revision: str | None = None
    serves: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a heartbeat brings back.

    Attributes:
        now: the database's time.
        suspects: some wait for a ward in the worker's queues.
        overdue: work of the worker's queues has been ready for longer than ``stuck_after``.
        drain: an operator wants the worker to drain and end.
    """

    now: datetime
    suspects: bool
    overdue: bool = False
    drain: bool = False


class Liveness:
    """The blocking connection behind a worker's heartbeat; every method may raise ``Unavailable``, then reconnects."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: timedelta = timedelta(seconds=3),
        silence: timedelta = timedelta(seconds=15),
        timeout: timedelta = timedelta(seconds=5),
        stuck_after: timedelta = timedelta(seconds=30),
    ) -> None:
        """``silence``: the server ends the session of a worker that has not beaten for so long. A process that is stopped
        (SIGSTOP, a frozen machine) keeps its connection open, and would lead the fleet, and sweep nothing, for ever.
        ``timeout``: for the answer of the server, which may hang as well. ``stuck_after``: work is overdue when it has been
        ready for so long.
        """
        self._stuck_after = stuck_after
        seconds = timeout.total_seconds()
        idle = round(silence.total_seconds() * 1000)
        self._engine = create_engine(
            driver_url(url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={
                "connect_timeout": max(2, round(connect_timeout.total_seconds())),
                "application_name": signed("longshift-heartbeat"),
                "keepalives_idle": 5,
                "keepalives_interval": 2,
                "keepalives_count": 3,
                "tcp_user_timeout": 10_000,
                "options": f"-c statement_timeout={round(seconds * 1000)} -c idle_session_timeout={idle} -c timezone=UTC",
            },
        )
        self._patience = ThreadPatience(limit=seconds + 1)
        event.listen(self._engine, "connect", lambda connection, _: self._patience.of(connection))
        self._connection: Connection | None = None
        self.lock_key = 0
        self.leader = False
        self.connected_at: datetime | None = None  # database clock; None while there is no connection

    def register(self, worker_id: UUID, member: Member) -> None:
        """Make the worker's row; from now on it may claim."""
        with self._asking():
            connection = self._open()
            connection.execute(
                REGISTER,
                {
                    "id": worker_id,
                    "host": member.host,
                    "pid": member.pid,
                    "queues": list(member.queues),
                    "capacity": member.capacity,
                    "lock_key": self.lock_key,
                    "process": member.process,
                    "isolated": member.isolated,
                    "version": member.version,
                    "revision": member.revision,
                    "serves": json.dumps(member.serves),
                },
            )

    def beat(self, worker_id: UUID, pulse: Pulse, *, want_leader: bool) -> Answer | None:
        """None: the worker was declared dead and must take a new id."""
        try:
            with self._asking():
                fresh = self._connection is None
                connection = self._open()
                if fresh:
                    connection.execute(RELOCK, {"id": worker_id, "lock_key": self.lock_key})
                row = connection.execute(
                    HEARTBEAT,
                    {
                        "id": worker_id,
                        "running": pulse.running,
                        "loop_age": pulse.loop_age,
                        "draining": pulse.draining,
                        "watching_since": pulse.watching_since if not fresh else None,
                        "want_leader": want_leader and not self.leader,
                        "leader": LEADER,
                        "condition": pulse.condition,
                        "complaint": pulse.complaint,
                        "stuck_after": self._stuck_after,
                    },
                ).first()
                if row is None:
                    return None
                self.leader = self.leader or bool(row.leads)
                return Answer(row.now, row.suspects, row.overdue, row.drain)
        except BaseException:
            self.disconnect()
            raise

    def retire(self, worker_id: UUID) -> None:
        """Say goodbye: nothing is held any more."""
        with self._asking():
            self._open().execute(RETIRE, {"id": worker_id})

    def disconnect(self) -> None:
        """Drop the connection, and with it the locks and the leadership."""
        connection, self._connection = self._connection, None
        self.leader, self.connected_at = False, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.invalidate()
                connection.close()

    def close(self) -> None:
        self.disconnect()
        self._engine.dispose()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with Translated(), self._patience.limited():
            yield

    def _open(self) -> Connection:
        if self._connection is None:
            connection = self._engine.connect()
            self.lock_key = randbits(62)
            row = connection.execute(LOCK, {"key": self.lock_key}).one()
            self._connection, self.connected_at = connection, row.now
        return self._connection
