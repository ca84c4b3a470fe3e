"""The journal against a server that answers late, not at all, or with a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text

from longshift.artifacts import open_store
from longshift.attempt import resumed
from longshift.clock import SYSTEM
from longshift.cold import Cold
from longshift.config import load
from longshift.db import leases, log
from longshift.errors import InvalidInput, LeaseLost, TurnEvicted, Unavailable
from longshift.events import Context
from longshift.hot import Hot
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.ledger import Ledger
from longshift.mailbox import Mailbox
from longshift.mailroom import Mailroom
from longshift.metrics import WorkerMetrics
from longshift.notices import Notices
from longshift.observing import Observer
from longshift.port import Outside, TurnPort
from longshift.retrieval import Retrieval
from longshift.runner import Run
from longshift.steps import StepDefinition
from longshift.testing.waiting import wait_until
from longshift.underway import UnderWay
from tests.integration.protocol.stage import Stage, event, finish, start


@pytest.fixture
async def journal(stage: Stage) -> AsyncIterator[Journal]:
    journal = Journal(stage.db)
    journal.start_lanes()
    yield journal
    await journal.close()


async def held(stage: Stage, journal: Journal) -> tuple[Lease, UUID]:
    """A session with a started turn, whose lease the journal holds."""
    session, turn = await stage.submit()
    lease = Lease((await stage.claim(session)).claim)
    journal.hold(lease)
    begun = start(lease.claim, turn)
    await journal.write(lease, lambda seq: log.Start(lease.claim, seq, begun.events, turn, "1"))
    return lease, turn


async def no_answer() -> None:
    raise Unavailable("no answer")


async def test_a_bad_value_fails_alone_in_a_batch_of_many(stage: Stage, journal: Journal) -> None:
    leases = [await held(stage, journal) for _ in range(3)]
    payloads = ["{}", "{}", "not json", "{}"]

    results = await asyncio.gather(
        *(
            journal.append(lease, [event(turn, key=f"{n}", payload=payload)])
            for lease, turn in leases
            for n, payload in enumerate(payloads)
        ),
        return_exceptions=True,
    )

    assert [type(result) for result in results] == [type(None), type(None), InvalidInput, type(None)] * 3
    for lease, _ in leases:
        assert [key for _, key in await stage.log(lease.session_id)] == ["turn.started", "0", "1", "3"]


async def test_an_unanswered_write_is_sent_again_and_recorded_once(stage: Stage, journal: Journal) -> None:
    lease, turn = await held(stage, journal)
    stage.db.before[log.APPEND] = no_answer

    await journal.append(lease, [event(turn, key="a")])

    assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


async def test_a_write_that_happened_without_an_answer_is_recognised(stage: Stage, journal: Journal) -> None:
    lease, turn = await held(stage, journal)
    done = finish(lease.claim, turn, seq=2)

    async def it_happens_but_the_answer_is_lost() -> None:
        await log.finish(stage.db, [done])
        raise Unavailable("no answer")

    stage.db.before[log.FINISH] = it_happens_but_the_answer_is_lost
    answer = await journal.write(lease, lambda seq: done)

    assert (answer.flag, lease.ended) == (False, True)
    assert (await stage.row(lease.session_id))["open_turns"] == 0


async def test_a_write_that_postgres_refuses_since_the_lease_is_gone_is_counted(stage: Stage) -> None:
    metrics = WorkerMetrics()
    journal = Journal(stage.db, metrics=metrics)
    journal.start_lanes()
    lease, turn = await held(stage, journal)
    await stage.hand.execute("UPDATE sessions SET lease_worker = NULL, lease_epoch = nextval('epochs')")
    with pytest.raises(LeaseLost):
        await journal.append(lease, [event(turn, key="a"), event(turn, key="b")])
    await journal.close()

    assert metrics.registry.get_sample_value("longshift_writes_fenced_total") == 1


async def test_a_lost_tail_costs_the_lease_and_forks_nothing(stage: Stage, journal: Journal) -> None:
    """A failover to a lagging replica while nothing was under way."""
    lease, turn = await held(stage, journal)
    await journal.append(lease, [event(turn, key="a"), event(turn, key="b")])
    await stage.hand.execute("DELETE FROM events WHERE session_id = %s AND seq > 1", (lease.session_id,))
    journal.suspect("the connection was lost")

    with pytest.raises(LeaseLost):
        await journal.append(lease, [event(turn, key="c")])

    assert await stage.log(lease.session_id) == [(1, "turn.started")]


async def test_a_lease_given_up_while_its_write_is_under_way_does_not_end_the_lane(
    stage: Stage, journal: Journal
) -> None:
    (lost, turn), (kept, other) = await held(stage, journal), await held(stage, journal)

    async def declared_dead() -> None:
        journal.lose(lost)

    stage.db.before[log.APPEND] = declared_dead
    with pytest.raises(LeaseLost):
        await journal.append(lost, [event(turn, key="a")])

    await journal.append(kept, [event(other, key="a")])
    assert len(await stage.log(kept.session_id)) == 2


async def test_an_unexpected_error_drops_one_turn_and_does_not_end_the_lane(stage: Stage, journal: Journal) -> None:
    """The agent is not told: its turn would fail for something that is not its fault. It comes again."""
    lease, turn = await held(stage, journal)
    other, turn_of_other = await held(stage, journal)

    async def a_bug() -> None:
        raise KeyError("a bug")

    stage.db.before[log.APPEND] = a_bug
    with pytest.raises(LeaseLost):
        await journal.append(lease, [event(turn, key="a")])

    await journal.append(other, [event(turn_of_other, key="b")])
    assert await stage.log(other.session_id) == [(1, "turn.started"), (2, "b")]


async def test_two_leases_of_one_session_in_one_journal_do_not_answer_for_each_other(
    stage: Stage, journal: Journal
) -> None:
    stale, turn = await held(stage, journal)
    await stage.hand.execute(
        "UPDATE sessions SET lease_worker = NULL, ready_at = now() WHERE id = %s", (stale.session_id,)
    )
    lease = Lease((await stage.claim(stale.session_id)).claim)
    journal.hold(lease)

    results = await asyncio.gather(
        journal.append(stale, [event(turn, key="old"), event(turn, key="old too")]),
        journal.append(lease, [event(turn, key="new")]),
        return_exceptions=True,
    )

    assert [type(result) for result in results] == [LeaseLost, type(None)]
    assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "new")]


async def test_an_unexpected_error_after_an_outage_does_not_leave_the_journal_closed(
    stage: Stage, journal: Journal
) -> None:
    lease, turn = await held(stage, journal)

    async def something_else() -> None:
        raise RuntimeError("not an outage")

    stage.db.before[log.STANDING] = something_else
    journal.suspect("no answer")
    await asyncio.wait_for(journal.append(lease, [event(turn, key="a")]), timeout=5)

    assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


async def test_an_unexpected_error_when_a_write_is_looked_up_does_not_end_the_lane(
    stage: Stage, journal: Journal
) -> None:
    lease, turn = await held(stage, journal)
    looked_up = asyncio.Event()

    async def something_else() -> None:
        looked_up.set()
        raise RuntimeError("not an outage")

    stage.db.before[log.STANDING] = something_else
    async with stage.locked(lease.session_id):
        writing = asyncio.create_task(journal.append(lease, [event(turn, key="a")]))
        await asyncio.wait_for(looked_up.wait(), timeout=5)
    await asyncio.wait_for(writing, timeout=5)

    assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


async def test_a_session_that_somebody_has_locked_does_not_keep_the_journal_closed_after_a_break(
    stage: Stage, journal: Journal
) -> None:
    lease, turn = await held(stage, journal)
    broken = asyncio.Event()

    async def break_the_connection() -> None:  # where the driver says so: inside the statement
        stage.db._break("connection lost")
        broken.set()
        await no_answer()

    stage.db.before[log.APPEND] = break_the_connection
    async with stage.locked(lease.session_id):
        writing = asyncio.create_task(journal.append(lease, [event(turn, key="a")]))
        await asyncio.wait_for(broken.wait(), timeout=5)
        await asyncio.wait_for(journal.ready(), timeout=5)
    await asyncio.wait_for(writing, timeout=5)

    assert await stage.log(lease.session_id) == [(1, "turn.started"), (2, "a")]


async def test_a_question_that_is_given_up_does_not_pause_the_worker(stage: Stage, journal: Journal) -> None:
    async def is_asked() -> bool:
        row = await stage.one(
            "SELECT count(*) AS n FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(60)'"
        )
        return bool(row["n"])

    asking = stage.begin(stage.db.fetch(text("SELECT pg_sleep(60)")))
    await wait_until(is_asked, description="the server is asked")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert journal.is_open


async def test_no_step_begins_under_a_lease_that_was_lost_in_an_outage(
    stage: Stage, journal: Journal, tmp_path: Path
) -> None:
    lease, _ = await held(stage, journal)
    record = await leases.head(stage.db, lease.session_id)
    assert record is not None
    run = Run(lease, claimed_at=0)
    run.begin(record, Observer())
    with ThreadPoolExecutor(1) as threads:
        port = TurnPort(_outside(stage, journal, threads, tmp_path), lease, record, observer=Observer())
        run.execution = resumed(record, [], before=Context(), port=port, now=datetime.now(UTC))
        began: list[str] = []

        async def somebody_else_takes_it() -> None:
            await stage.hand.execute("UPDATE sessions SET lease_worker = NULL, lease_epoch = nextval('epochs')")

        stage.db.before[log.STANDING] = somebody_else_takes_it
        journal.suspect("no answer")
        with run.execution.entered(threaded=False), pytest.raises(TurnEvicted):
            await run.execution.perform(StepDefinition("effect", began.append), ["now"], {})

    assert (lease.lost, began) == (True, [])


def _outside(stage: Stage, journal: Journal, threads: ThreadPoolExecutor, folder: Path) -> Outside:
    hot = Hot("redis://127.0.0.1:1")  # nothing is sent
    cold = Cold(stage.db, open_store(f"file://{folder}"))
    return Outside(
        db=stage.db,
        journal=journal,
        notices=Notices(hot),
        mailroom=Mailroom(stage.db, Notices(hot)),
        mailbox=Mailbox(stage.db, hot, cold=cold, config=load()),
        cold=cold,
        retrieval=Retrieval(stage.db),
        clock=SYSTEM,
        step_threads=threads,
        agent_threads=threads,
        step_timeout=timedelta(seconds=5),
        inline=1024,
        max_event=1024,
        max_value=1024,
        ledger=Ledger(stage.db, journal),
        underway=UnderWay(SYSTEM),
        lease_ttl=timedelta(seconds=15),
        lock_grace=timedelta(seconds=3),
        is_beating=lambda: True,
    )
