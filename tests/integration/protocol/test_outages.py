"""Postgres hangs, refuses, cannot store, or has lost what it acknowledged: seen from the database layer and the journal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row
from sqlalchemy import text

from longshift.db import log
from longshift.db.database import Database
from longshift.db.liveness import Liveness, Member, Pulse
from longshift.embedded import Guardian, LocalPostgres
from longshift.errors import LeaseLost, Unavailable
from longshift.journal import RECONNECT, Journal
from longshift.lease import Lease
from longshift.model import new_id
from longshift.testing.waiting import wait_until
from tests.integration.protocol.stage import Stage, Stepped, event, start
from tests.support.databases import Databases, execute
from tests.support.full_disk import limited_files
from tests.support.hanging import hanging

SHORT = timedelta(seconds=1)
ONE = text("SELECT 1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, guardian: Guardian) -> Iterator[LocalPostgres]:
    """One that these tests stop, fill and kill."""
    server = LocalPostgres(tmp_path_factory.mktemp("postgres"), guardian=guardian)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def own_databases(server: LocalPostgres) -> Databases:
    databases = Databases(server.url)
    databases.make_template()
    return databases


@pytest.fixture
def url(own_databases: Databases) -> Iterator[str]:
    with own_databases.fresh() as url:
        yield url


@pytest.fixture
async def stage(url: str) -> AsyncIterator[Stage]:
    db = Stepped(url, timeout=SHORT)
    hand = await AsyncConnection.connect(url, autocommit=True, row_factory=dict_row)
    yield Stage(url, db, hand)
    await hand.close()
    await db.close()


@asynccontextmanager
async def journal_of(stage: Stage) -> AsyncIterator[Journal]:
    journal = Journal(stage.db)
    journal.start_lanes()
    try:
        yield journal
    finally:
        await journal.close()


async def held(stage: Stage, journal: Journal) -> tuple[Lease, UUID]:
    """A session with a started turn, whose lease the journal holds."""
    session, turn = await stage.submit()
    lease = Lease((await stage.claim(session)).claim)
    journal.hold(lease)
    begun = start(lease.claim, turn)
    await journal.write(lease, lambda seq: log.Start(lease.claim, seq, begun.events, turn, "1"))
    return lease, turn


# ------------------------------------------------------------------------------------------------------- hangs


async def test_a_statement_and_a_connect_to_a_server_that_hangs_end_and_it_is_usable_again(
    server: LocalPostgres, url: str
) -> None:
    db = Database(url, size=2, timeout=SHORT)
    await db.fetch(ONE)
    with hanging(server.pid):
        answers = await asyncio.gather(*(db.fetch(ONE) for _ in range(5)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}
    assert len(await db.fetch(ONE)) == 1
    await db.close()


async def test_a_commit_that_gets_no_answer_ends(server: LocalPostgres, url: str) -> None:
    db = Database(url, timeout=SHORT)

    async def commit_while_it_hangs() -> None:
        async with db.transaction() as tx:
            await tx.execute(text("INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'x')"))
            with hanging(server.pid):
                await tx.commit()

    with pytest.raises(Unavailable):
        await commit_while_it_hangs()
    assert len(await db.fetch(ONE)) == 1
    await db.close()


async def test_a_caller_that_is_cancelled_while_the_server_hangs_gets_away(server: LocalPostgres, url: str) -> None:
    db = Database(url, size=1, timeout=SHORT)
    await db.fetch(ONE)
    with hanging(server.pid):
        asking = asyncio.create_task(db.fetch(ONE))
        await wait_until(lambda: db.engine.sync_engine.pool.checkedout() == 1, description="it was sent")  # type: ignore[attr-defined]
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert len(await db.fetch(ONE)) == 1
    await db.close()


async def test_a_heartbeat_to_a_server_that_hangs_ends_and_the_next_one_reaches_it(
    server: LocalPostgres, url: str
) -> None:
    liveness, worker_id = Liveness(url, timeout=SHORT), new_id()
    pulse = Pulse(0, timedelta(0), draining=False)
    member = Member(host="here", pid=1, queues=["default"], capacity=1, process=new_id())
    await asyncio.to_thread(liveness.register, worker_id, member)
    with hanging(server.pid), pytest.raises(Unavailable):
        await asyncio.to_thread(liveness.beat, worker_id, pulse, want_leader=True)
    assert await asyncio.to_thread(liveness.beat, worker_id, pulse, want_leader=True) is not None
    assert liveness.leader
    liveness.close()


async def test_a_write_to_a_server_that_hangs_waits_and_is_recorded_once(server: LocalPostgres, stage: Stage) -> None:
    async with journal_of(stage) as journal:
        lease, turn = await held(stage, journal)
        with hanging(server.pid):
            writing = stage.begin(journal.append(lease, [event(turn, key="a")]))
            await wait_until(lambda: not journal.is_open, description="the journal is closed")
            assert not writing.done()
        await asyncio.wait_for(writing, 20)
        assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


# ----------------------------------------------------------------------------------------------- loses commits


async def test_acknowledged_commits_that_a_crash_lost_cost_the_lease_and_leave_no_gap(
    server: LocalPostgres, own_databases: Databases
) -> None:
    """With ``synchronous_commit = off``, what a failover to a lagging replica does is done by a crash."""
    execute(server.url, "ALTER SYSTEM SET wal_writer_delay = '10s'")
    with own_databases.fresh() as url:
        await _lose_a_tail(server, url)
    execute(server.url, "ALTER SYSTEM RESET wal_writer_delay")


async def _lose_a_tail(server: LocalPostgres, url: str) -> None:
    hand = await AsyncConnection.connect(url, autocommit=True, row_factory=dict_row)
    stage = Stage(url, Stepped(url, timeout=SHORT), hand)
    async with journal_of(stage) as journal:
        lease, turn = await held(stage, journal)
        other, turn_of_other = await held(stage, journal)
        name = url.rsplit("/", 1)[1].split("?", maxsplit=1)[0]
        execute(server.url, "ALTER DATABASE {name} SET synchronous_commit = off", name=name)
        execute(server.url, "SELECT pg_reload_conf()")
        await stage.db.engine.dispose()  # new connections have the setting
        keys = [f"step-{n}" for n in range(5)]
        for key in keys:
            await journal.append(lease, [event(turn, key=key)])
        acknowledged = lease.seq
        await hand.close()
        server.kill()
        server.restart()

        with pytest.raises(LeaseLost):
            await asyncio.wait_for(journal.append(lease, [event(turn, key="after")]), 20)
        await asyncio.wait_for(journal.append(other, [event(turn_of_other, key="kept")]), 20)
        found = await log.read(stage.db, lease.session_id)
        assert len(found) < acknowledged, "the crash lost nothing: the test shows nothing"
        assert [e.seq for e in found] == list(range(1, len(found) + 1))
        assert [e.key for e in await log.read(stage.db, other.session_id)] == [None, "kept"]
    await stage.db.close()


async def test_a_write_that_waits_for_a_connection_does_not_go_to_a_server_that_nobody_has_compared(
    server: LocalPostgres, url: str
) -> None:
    """Another coroutine meets the lost connection; the write would get a new one, to a server without the log's end."""
    db = Database(url, timeout=SHORT)
    breaks = db.breaks
    await db.fetch(ONE)
    server.restart(immediate=True)
    with pytest.raises(Unavailable):
        await db.fetch(ONE)
    with db.since(breaks), pytest.raises(Unavailable):
        await db.fetch(ONE)
    with db.since(db.breaks):
        assert len(await db.fetch(ONE)) == 1
    await db.close()


async def test_a_first_connection_to_another_server_counts_as_a_break(server: LocalPostgres, url: str) -> None:
    """A server that has gone without a word leaves old connections that look fine."""
    db = Database(url, timeout=SHORT)
    told: list[str] = []
    db.on_break = told.append
    async with db.connect():
        server.restart(immediate=True)
        assert len(await db.fetch(ONE)) == 1  # on a second connection
        assert (db.breaks, len(told)) == (1, 1)
    await db.close()


# ---------------------------------------------------------------------------------------------- cannot store


async def test_a_write_that_a_full_table_refuses_is_parked_and_stored_when_there_is_space(
    server: LocalPostgres, url: str, stage: Stage
) -> None:
    """A file-size limit, a quota: Postgres has no SQLSTATE of its own for these."""
    async with journal_of(stage) as journal:
        lease, turn = await held(stage, journal)
        with limited_files(server.pid, url) as sqlstate:
            assert sqlstate == "XX000"
            writing = stage.begin(journal.append(lease, [event(turn, key="a")]))
            await _stays_closed(journal)
            assert not writing.done()
        await asyncio.wait_for(writing, 20)
        assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


async def _stays_closed(journal: Journal) -> None:
    """It backs off to its longest pause, and opens for none of its tries: each would start steps and park their results."""
    await wait_until(lambda: not journal.is_open, description="the journal is closed")

    def given_up_hope() -> bool:
        assert not journal.is_open
        return journal._setbacks >= len(RECONNECT)

    await wait_until(given_up_hope, description="pauses have grown to the longest")


async def test_a_primary_that_became_read_only_is_left_for_the_one_that_writes(url: str, stage: Stage) -> None:
    """The old connections would stay read-only for ever."""
    name = url.rsplit("/", 1)[1].split("?", maxsplit=1)[0]
    async with journal_of(stage) as journal:
        lease, turn = await held(stage, journal)
        execute(url, "ALTER DATABASE {name} SET default_transaction_read_only = on", name=name)
        await stage.db.engine.dispose()
        writing = stage.begin(journal.append(lease, [event(turn, key="a")]))
        await _stays_closed(journal)
        with psycopg.connect(url, autocommit=True, options="-c default_transaction_read_only=off") as hand:
            hand.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(sql.Identifier(name)))
        await asyncio.wait_for(writing, 20)
        assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


async def test_a_server_without_a_free_connection_is_waited_for(server: LocalPostgres, stage: Stage) -> None:
    async with journal_of(stage) as journal:
        lease, turn = await held(stage, journal)
        await stage.db.engine.dispose()
        with contextlib.ExitStack() as taken:
            _take_all_connections(server.url, taken)
            writing = stage.begin(journal.append(lease, [event(turn, key="a")]))
            await _stays_closed(journal)
            assert not writing.done()
        await asyncio.wait_for(writing, 20)
        assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


def _take_all_connections(url: str, stack: contextlib.ExitStack) -> None:
    def take() -> None:
        while True:
            stack.enter_context(contextlib.closing(psycopg.connect(url)))

    with pytest.raises(psycopg.OperationalError, match="too many clients"):
        take()
