"""The ledger of a worker: many calls in one statement, answers that are late or lost, leases that are gone; and the last look
before an irreversible call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from longshift.clock import SYSTEM
from longshift.config import Config
from longshift.db import leases, log, tool_calls
from longshift.db.database import Database
from longshift.db.liveness import Liveness, Member
from longshift.errors import InvalidInput, LeaseLost, Unavailable
from longshift.heartbeat import Heartbeat
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.ledger import Lane, Ledger
from longshift.model import CallOutcome, CallStatus, Dedupe, Effect, NewCall, ToolCallRecord, new_id
from longshift.underway import UnderWay
from tests.integration.protocol.stage import Stage, start

PAID = CallOutcome(CallStatus.DONE, '"paid"')


@pytest.fixture
async def journal(stage: Stage) -> AsyncIterator[Journal]:
    journal = Journal(stage.db)
    journal.start_lanes()
    yield journal
    await journal.close()


@pytest.fixture
async def ledger(stage: Stage, journal: Journal) -> AsyncIterator[Ledger]:
    ledger = Ledger(stage.db, journal)
    ledger.start_lanes()
    yield ledger
    await ledger.close()


async def held(stage: Stage, journal: Journal) -> tuple[Lease, UUID]:
    session, turn = await stage.submit()
    lease = Lease((await stage.claim(session)).claim)
    journal.hold(lease)
    begun = start(lease.claim, turn)
    await journal.write(lease, lambda seq: log.Start(lease.claim, seq, begun.events, turn, "1"))
    return lease, turn


def call(turn: UUID, text: str = "{}") -> NewCall:
    return NewCall(new_id(), turn, "pay", Effect.IRREVERSIBLE, Dedupe.TURN, "pay#0", text, timedelta(minutes=1))


async def no_answer() -> None:
    raise Unavailable("no answer")


@asynccontextmanager
async def counted(lane: Lane[Any, Any]) -> AsyncIterator[list[int]]:
    """How many calls each statement of a lane had."""
    sizes: list[int] = []
    statement = lane._statement

    async def counting(db: Database, writes: Sequence[Any]) -> Any:
        sizes.append(len(writes))
        return await statement(db, writes)

    lane._statement = counting
    yield sizes


async def test_calls_that_come_together_go_together(stage: Stage, journal: Journal, ledger: Ledger) -> None:
    places = [await held(stage, journal) for _ in range(5)]
    calls = [(lease, call(turn)) for lease, turn in places for _ in range(4)]

    async with counted(ledger._begins) as begins, counted(ledger._ends) as ends:
        assert await asyncio.gather(*(ledger.begin(*each) for each in calls)) == [1] * 20
        assert await asyncio.gather(*(ledger.end(*each, PAID) for each in calls)) == [None] * 20

    assert (sum(begins), sum(ends)) == (20, 20)
    assert len(begins) <= 2
    assert len(ends) <= 2


async def test_a_bad_value_fails_alone(stage: Stage, journal: Journal, ledger: Ledger) -> None:
    lease, turn = await held(stage, journal)
    calls = [call(turn, text) for text in ("{}", "not json", "{}")]

    begun = await asyncio.gather(*(ledger.begin(lease, each) for each in calls), return_exceptions=True)

    assert [type(each) for each in begun] == [int, InvalidInput, int]


async def test_begins_and_ends_without_an_answer_are_sent_again(stage: Stage, journal: Journal, ledger: Ledger) -> None:
    lease, turn = await held(stage, journal)
    paying = call(turn)
    stage.db.before[tool_calls.BEGIN] = no_answer
    assert await ledger.begin(lease, paying) == 1

    stage.db.before[tool_calls.END] = no_answer
    assert await ledger.end(lease, paying, PAID) is None

    found = await ledger.begin(lease, paying)
    assert isinstance(found, ToolCallRecord)
    assert found.result == "paid"


async def test_a_begin_waits_for_whoever_has_locked_the_session(stage: Stage, journal: Journal, ledger: Ledger) -> None:
    lease, turn = await held(stage, journal)
    async with stage.locked(lease.session_id):
        beginning = stage.begin(ledger.begin(lease, call(turn)))
        await asyncio.gather(*(ledger.end(lease, call(turn), PAID) for _ in range(3)))  # not fenced: it need not wait
        assert not beginning.done()

    assert await beginning == 1


async def test_a_begin_without_the_lease_is_refused_and_an_end_is_not(
    stage: Stage, journal: Journal, ledger: Ledger
) -> None:
    lease, turn = await held(stage, journal)
    paying = call(turn)
    await ledger.begin(lease, paying)
    await leases.release(stage.db, lease.claim)

    with pytest.raises(LeaseLost):
        await ledger.begin(lease, call(turn))
    assert lease.lost
    assert await ledger.end(lease, paying, PAID) is None
    assert (await tool_calls.standing(stage.db, [paying.id]))[paying.id].status is CallStatus.DONE


async def test_who_no_longer_waits_for_a_begin_gets_none(stage: Stage, journal: Journal, ledger: Ledger) -> None:
    lease, turn = await held(stage, journal)
    journal.suspect("no answer")
    paying = call(turn)
    beginning = stage.begin(ledger.begin(lease, paying))
    await asyncio.sleep(0)
    beginning.cancel()
    await journal.ready()
    await ledger.begin(lease, call(turn))

    assert await tool_calls.standing(stage.db, [paying.id]) == {}


# -- what a worker remembers


async def test_a_worker_that_ends_waits_for_a_call_but_not_beyond_its_time() -> None:
    ticks = [0.0]
    underway = UnderWay(SYSTEM.__class__(now=SYSTEM.now, monotonic=lambda: ticks[0]))
    with underway.calling(5):
        waiting = asyncio.create_task(underway.finished())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert underway.calls == 1
    await waiting
    with underway.calling(5):
        ticks[0] = 100.0
        await underway.finished()


async def test_a_heart_is_heard_for_as_long_as_nobody_can_have_declared_it_dead(stage: Stage) -> None:
    ticks = [0.0]
    clock = SYSTEM.__class__(now=SYSTEM.now, monotonic=lambda: ticks[0])
    member = Member(host="here", pid=1, queues=["default"], capacity=1, process=new_id())
    heartbeat = Heartbeat(
        Liveness(stage.url),
        config=Config(lock_grace=timedelta(seconds=3)),
        member=member,
        clock=clock,
        on_reborn=lambda _: None,
        on_silence=lambda _: None,
    )

    def heard() -> bool:
        return heartbeat.is_heard

    await asyncio.to_thread(heartbeat.register)
    ticks[0] = 2.9
    assert heard()
    ticks[0] = 3.1
    assert not heard()
    await asyncio.to_thread(heartbeat._beat)
    assert heard()
    await stage.kill(heartbeat.worker_id)
    ticks[0] = 6.2
    heartbeat._loop = asyncio.get_running_loop()
    await asyncio.to_thread(heartbeat._beat)  # answered by its tombstone: that is not being heard
    assert not heard()
    await asyncio.to_thread(heartbeat.stop)
