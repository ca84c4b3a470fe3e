"""Staging races: rows, a second pair of hands, and ways to stop one of our statements in the middle.

A statement is stopped after its snapshot and before its row locks by what it evaluates there: ``clock_timestamp()`` or
the comparison of two epochs, replaced in the database (not in our code) by versions that wait for an advisory lock.
What waits is looked up in ``pg_stat_activity``; nothing here sleeps for luck.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from psycopg import AsyncConnection, sql
from psycopg.rows import DictRow, dict_row
from sqlalchemy import Row, TextClause, text

from longshift.db import idempotency, intake, leases, log, mail
from longshift.db.database import Database, Params
from longshift.events import Kind, NewEvent
from longshift.model import Claim, Json, MailKind, NewTurn, TurnStatus, new_id
from longshift.testing.waiting import wait_until

T = TypeVar("T")
WEEK = timedelta(days=7)
SOFTWARE = {"version": None, "revision": None, "serves": "[]"}
"""What a worker's row says of its software, where it does not matter."""
GATE = 4711  # the advisory lock that stopped statements wait for

SLOW = """
CREATE SCHEMA slow;
CREATE FUNCTION slow.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_advisory_lock_shared({gate}); PERFORM pg_catalog.pg_advisory_unlock_shared({gate});
    RETURN pg_catalog.clock_timestamp();
END $$;
CREATE FUNCTION slow.equal(a bigint, b bigint) RETURNS boolean VOLATILE LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_advisory_lock_shared({gate}); PERFORM pg_catalog.pg_advisory_unlock_shared({gate});
    RETURN a OPERATOR(pg_catalog.=) b;
END $$;
CREATE OPERATOR slow.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = slow.equal);"""


class Stepped(Database):
    """A ``Database`` in which something else happens just before a chosen statement."""

    def __init__(self, url: str, *, timeout: timedelta = timedelta(seconds=10)) -> None:
        super().__init__(url, timeout=timeout)
        self.before: dict[TextClause, Callable[[], Awaitable[object]]] = {}

    async def fetch(self, statement: TextClause, params: Params | None = None) -> Sequence[Row[Any]]:
        if hook := self.before.pop(statement, None):
            await hook()
        return await super().fetch(statement, params)


@dataclass
class Stage:
    """One database with our statements (``db``), a free hand (``hand``), and the tenant of everything on it."""

    url: str
    db: Stepped
    hand: AsyncConnection[DictRow]
    tenant: UUID = field(default_factory=new_id)
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    # -- rows

    async def worker(self, *, heartbeat_age: float = 0, lock_key: int | None = None) -> UUID:
        worker_id = new_id()
        await self.hand.execute(
            "INSERT INTO workers (id, host, pid, queues, capacity, lock_key, heartbeat_at)"
            " VALUES (%s, 'here', 1, '{default}', 10, %s, clock_timestamp() - make_interval(secs => %s))",
            (worker_id, lock_key, heartbeat_age),
        )
        return worker_id

    async def submit(
        self,
        session_id: UUID | None = None,
        *,
        db: Database | None = None,
        key: str | None = None,
        run_after: datetime | None = None,
        queue: str = "default",
        reject_busy: bool = False,
    ) -> tuple[UUID, UUID]:
        """One turn, in a new session unless given: (session, turn)."""
        entry = intake.Entry(NewTurn(agent="echo", input={}, queue=queue, run_after=run_after), session_id or new_id())
        accepted = await intake.submit(
            db or self.db,
            [entry],
            tenant_id=self.tenant,
            resource_id=entry.turn.id,
            now=datetime.now(UTC),
            lifetime=WEEK,
            idempotency=idempotency.Idempotency("turns", key, b"same") if key else None,
            reject_busy=reject_busy,
        )
        return entry.session_id, accepted.resource_id

    async def claim(self, session_id: UUID, worker_id: UUID | None = None) -> leases.Won:
        [won] = await leases.claim(self.db, [session_id], worker_id=worker_id or await self.worker())
        return won

    async def running(self, worker_id: UUID | None = None) -> tuple[Claim, UUID]:
        """A session with one started turn, held by ``worker_id``: its lease and the turn."""
        session_id, turn_id = await self.submit()
        won = await self.claim(session_id, worker_id)
        assert await log.start(self.db, [start(won.claim, turn_id)])
        return won.claim, turn_id

    async def cancel(self, *turn_ids: UUID, db: Database | None = None) -> list[tuple[UUID, str]]:
        return await mail.end_turns(db or self.db, turn_ids, tenant_id=self.tenant, kind=MailKind.CANCEL, reason="test")

    async def signal(self, session_id: UUID, payload: Json = None) -> UUID:
        sent = await mail.signal(self.db, session_id, tenant_id=self.tenant, name="go", payload=payload)
        return sent.resource_id

    async def kill(self, worker_id: UUID) -> None:
        """What the sweeper does to a silent worker."""
        await self.hand.execute("UPDATE workers SET dead_at = clock_timestamp() WHERE id = %s", (worker_id,))

    # -- looking

    async def row(self, session_id: UUID) -> DictRow:
        return await self.one(
            "SELECT *, ready_at <= clock_timestamp() AS ready FROM sessions WHERE id = %s", session_id
        )

    async def turn(self, turn_id: UUID) -> DictRow:
        return await self.one("SELECT * FROM turns WHERE id = %s", turn_id)

    async def one(self, query: str, *params: object) -> DictRow:
        row = await (await self.hand.execute(query.encode(), params)).fetchone()
        assert row is not None
        return row

    async def log(self, session_id: UUID) -> list[tuple[int, str]]:
        """(seq, kind or key) of each event."""
        return [(event.seq, event.key or event.kind) for event in await log.read(self.db, session_id)]

    # -- staging

    @asynccontextmanager
    async def locked(self, session_id: UUID) -> AsyncIterator[AsyncConnection[DictRow]]:
        """A transaction in flight (a submit, say) that holds the session's row until the end of the block."""
        async with self.second() as other, other.transaction():
            await other.execute("SELECT 1 FROM sessions WHERE id = %s FOR NO KEY UPDATE", (session_id,))
            yield other

    @asynccontextmanager
    async def second(self) -> AsyncIterator[AsyncConnection[DictRow]]:
        connection = await AsyncConnection.connect(self.url, autocommit=True, row_factory=dict_row)
        async with connection:
            yield connection

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task

    async def until_blocked(self, backends: int = 1) -> None:
        """Wait until so many statements in this database wait for a lock."""

        async def waiting() -> bool:
            row = await self.one(
                "SELECT count(*) AS n FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock' AND state = 'active'"
            )
            return bool(row["n"] >= backends)

        _: bool = await wait_until(waiting, description=f"{backends} blocked statement(s)", limit=5)

    @asynccontextmanager
    async def slow(self) -> AsyncIterator[Database]:
        """A ``Database`` whose statements stop between snapshot and row locks while ``gate`` is shut."""
        await self.hand.execute(SLOW.format(gate=GATE).encode())
        name = sql.Identifier((await self.one("SELECT current_database() AS name"))["name"])
        await self.hand.execute(sql.SQL("ALTER DATABASE {} SET search_path = slow, pg_catalog, public").format(name))
        database = Database(self.url)
        await database.fetch(text("SELECT 1"))
        await self.hand.execute(sql.SQL("ALTER DATABASE {} RESET search_path").format(name))
        yield database
        await database.close()

    @asynccontextmanager
    async def stopped(self, work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
        """Start ``work`` (on a slow database) and stop it after its snapshot; it goes on at the end of the block."""
        async with self.second() as gate:
            await gate.execute("SELECT pg_advisory_lock(%s)", (GATE,))
            task = self.begin(work)
            await self.until_blocked()
            yield task


def event(
    turn_id: UUID | None, kind: Kind = Kind.STEP_COMPLETED, *, key: str | None = None, payload: str = "{}"
) -> NewEvent:
    return NewEvent(kind, turn_id, payload, key)


def append(claim: Claim, turn_id: UUID, *keys: str, seq: int) -> log.Append:
    return log.Append(claim, seq, tuple(event(turn_id, key=key) for key in keys))


def start(claim: Claim, turn_id: UUID, *, seq: int | None = None) -> log.Start:
    return log.Start(claim, seq or claim.last_seq + 1, (event(turn_id, Kind.TURN_STARTED),), turn_id, "1")


def finish(claim: Claim, turn_id: UUID, *, seq: int, keep: bool = False) -> log.Finish:
    events = (event(turn_id, Kind.TURN_SUCCEEDED),)
    return log.Finish(claim, seq, events, turn_id, TurnStatus.SUCCEEDED, "null", None, keep)


def leave(
    claim: Claim,
    turn_id: UUID,
    *,
    seq: int,
    seen: int,
    status: TurnStatus = TurnStatus.WAITING,
    until: datetime | None = None,
    now: datetime | None = None,
) -> log.Leave:
    kind = Kind.TURN_WAITING if status is TurnStatus.WAITING else Kind.TURN_RESCHEDULED
    return log.Leave(claim, seq, (event(turn_id, kind),), turn_id, status, until, seen, now)
