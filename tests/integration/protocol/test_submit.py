"""Accepting turns: once per key, in order, without deadlocks, and counted right."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from psycopg import errors

from longshift.db import database, intake, leases, upkeep
from longshift.errors import IdempotencyMismatch, NotFound, SessionBusy
from longshift.model import NewTurn, new_id
from tests.integration.protocol.stage import WEEK, Stage

SOON = datetime(2999, 1, 1, tzinfo=UTC)


async def due(stage: Stage, *turns: UUID) -> None:
    """The time of scheduled turns has come."""
    await stage.hand.execute("UPDATE turns SET run_after = now() WHERE id = ANY(%s)", (list(turns),))


async def submit_many(stage: Stage, *sessions: UUID, lock: bool = False) -> list[UUID]:
    entries = [intake.Entry(NewTurn(agent="echo", input={}, queue="default"), session) for session in sessions]
    await intake.submit(
        stage.db,
        entries,
        tenant_id=stage.tenant,
        resource_id=new_id(),
        now=datetime.now(UTC),
        lifetime=WEEK,
        lock=sessions if lock else (),
    )
    return [entry.turn.id for entry in entries]


async def test_a_second_equal_submit_waits_for_the_first_and_gets_its_turn(stage: Stage) -> None:
    session = new_id()
    await stage.submit(session)
    async with stage.locked(session):
        first = stage.begin(stage.submit(session, key="k"))
        await stage.until_blocked(1)
        second = stage.begin(stage.submit(session, key="k"))
        await stage.until_blocked(2)

    assert (await first)[1] == (await second)[1]
    assert (await stage.row(session))["open_turns"] == 2


async def test_a_key_taken_after_the_session_would_deadlock(stage: Stage) -> None:
    """Why the idempotency row comes first in the lock order: crossed, two submits wait for each other."""
    session, _ = await stage.submit()
    insert = "INSERT INTO idempotency VALUES (%s, 'turns', 'k', '', %s) ON CONFLICT DO NOTHING"
    async with stage.second() as crossed:
        await crossed.execute("SET deadlock_timeout = '100ms'")
        await crossed.execute("BEGIN")
        await crossed.execute("SELECT 1 FROM sessions WHERE id = %s FOR NO KEY UPDATE", (session,))
        ours = stage.begin(stage.submit(session, key="k"))
        await stage.until_blocked()
        with pytest.raises(errors.DeadlockDetected):
            await crossed.execute(insert, (stage.tenant, new_id()))
        await crossed.execute("ROLLBACK")
    assert (await ours)[0] == session


async def test_a_key_used_with_another_body_is_refused(stage: Stage) -> None:
    _, turn = await stage.submit(key="k")
    await stage.hand.execute("UPDATE idempotency SET request_hash = 'other'")

    with pytest.raises(IdempotencyMismatch):
        await stage.submit(key="k")

    assert (await stage.one("SELECT count(*) AS n FROM turns")) == {"n": 1}
    assert (await stage.turn(turn))["status"] == "queued"


async def test_a_submit_that_fails_forgets_its_key(stage: Stage) -> None:
    session, _ = await stage.submit()
    with pytest.raises(SessionBusy):
        await stage.submit(session, key="k", reject_busy=True)

    assert (await stage.one("SELECT count(*) AS n FROM idempotency")) == {"n": 0}


async def test_positions_follow_the_order_of_acceptance(stage: Stage) -> None:
    session = new_id()

    turns = await asyncio.gather(*(stage.submit(session) for _ in range(20)))

    rows = await (await stage.hand.execute("SELECT position FROM turns ORDER BY position")).fetchall()
    assert [row["position"] for row in rows] == list(range(1, len(turns) + 1))
    assert (await stage.row(session))["open_turns"] == 20


async def test_turns_of_others_and_of_deleted_sessions_are_refused(stage: Stage) -> None:
    session, _ = await stage.submit()
    stranger = Stage(stage.url, stage.db, stage.hand)
    with pytest.raises(NotFound):
        await stranger.submit(session)
    await stage.hand.execute("UPDATE sessions SET deleted_at = now() WHERE id = %s", (session,))
    with pytest.raises(NotFound):
        await stage.submit(session)

    assert (await stage.row(session))["open_turns"] == 1


async def cancel_both(stage: Stage, low: UUID, high: UUID, turns: list[UUID]) -> None:
    await stage.cancel(*turns)


async def submit_both(stage: Stage, low: UUID, high: UUID, turns: list[UUID]) -> None:
    await submit_many(stage, high, low)


async def promote_both(stage: Stage, low: UUID, high: UUID, turns: list[UUID]) -> None:
    await upkeep.promote(stage.db)


async def submit_in_chunks(stage: Stage, low: UUID, high: UUID, turns: list[UUID]) -> None:
    await submit_many(stage, high, low, lock=True)


@pytest.mark.parametrize("work", [cancel_both, submit_both, promote_both, submit_in_chunks])
async def test_whoever_waits_for_a_session_holds_none_with_a_higher_id(
    stage: Stage,
    work: Callable[[Stage, UUID, UUID, list[UUID]], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two that lock several sessions can then never wait for each other."""
    low, high = sorted([new_id(), new_id()])
    turns = [(await stage.submit(session))[1] for session in (high, low)]
    await due(stage, *[(await stage.submit(session, run_after=SOON))[1] for session in (high, low)])
    if work is submit_in_chunks:
        monkeypatch.setattr(database.chunks, "__kwdefaults__", {"size": 1})
    async with stage.locked(low) as other:
        working = stage.begin(_as_coroutine(work(stage, low, high, turns)))
        await stage.until_blocked()
        await other.execute("SELECT 1 FROM sessions WHERE id = %s FOR NO KEY UPDATE NOWAIT", (high,))
    await working


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


async def test_a_scheduled_turn_stands_outside_the_order_until_it_is_due(stage: Stage) -> None:
    session, later = await stage.submit(run_after=SOON)
    row = await stage.row(session)
    assert (row["open_turns"], row["ready_at"]) == (0, None)
    _, first = await stage.submit(session)
    assert await upkeep.promote(stage.db) == []
    await due(stage, later)

    assert await upkeep.promote(stage.db) == [(session, "default")]
    assert await upkeep.promote(stage.db) == []

    positions = [(await stage.turn(turn))["position"] for turn in (first, later)]
    assert positions == [1, 2]
    assert (await stage.row(session))["open_turns"] == 2


async def test_two_sweepers_promote_a_turn_once(stage: Stage) -> None:
    session, later = await stage.submit(run_after=SOON)
    await due(stage, later)
    async with stage.locked(session):
        both = [stage.begin(upkeep.promote(stage.db)) for _ in range(2)]
        await stage.until_blocked(2)

    assert sorted([await both[0], await both[1]]) == [[], [(session, "default")]]
    assert (await stage.row(session))["open_turns"] == 1


async def test_a_cancel_that_overtakes_a_promotion_leaves_the_counters_right(stage: Stage) -> None:
    session, later = await stage.submit(run_after=SOON)
    await due(stage, later)
    async with stage.locked(session):
        cancelling = stage.begin(stage.cancel(later))
        await stage.until_blocked(1)
        promoting = stage.begin(upkeep.promote(stage.db))
        await stage.until_blocked(2)
    await asyncio.gather(cancelling, promoting)

    row = await stage.row(session)
    assert (row["open_turns"], row["ready_at"]) == (0, None)
    assert (await stage.turn(later))["status"] == "cancelled"


async def test_a_promotion_behind_a_submit_takes_the_next_position(stage: Stage) -> None:
    session, later = await stage.submit(run_after=SOON)
    await due(stage, later)
    async with stage.locked(session):
        submitting = stage.begin(stage.submit(session))
        await stage.until_blocked(1)
        promoting = stage.begin(upkeep.promote(stage.db))
        await stage.until_blocked(2)
    await promoting

    assert (await stage.turn((await submitting)[1]))["position"] == 1
    assert (await stage.turn(later))["position"] == 2


async def test_a_submit_does_not_ring_a_session_that_is_held_back(stage: Stage) -> None:
    """It would be marked as rung too early, and then wait for the sweeper's patience when its time has come."""
    session, _ = await stage.submit()
    claim = (await stage.claim(session)).claim
    await leases.release(stage.db, claim, delay=timedelta(hours=1))

    await stage.submit(session)

    row = await stage.row(session)
    assert (row["ready"], row["dispatched_at"]) == (False, None)
