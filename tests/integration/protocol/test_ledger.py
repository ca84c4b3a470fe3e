"""The ledger of tool calls: who may begin a call, who may end it, what an outcome may replace, and settling."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import pytest

from longshift.db import leases, log, mail, tool_calls, upkeep
from longshift.db.mail import Wanted
from longshift.db.tool_calls import Begun, Ending, Start
from longshift.errors import Conflict, NotFound
from longshift.events import encode
from longshift.model import CallOutcome, CallStatus, Claim, Dedupe, Effect, NewCall, Settlement, ToolCallRecord, new_id
from tests.integration.protocol.stage import Stage, leave

TTL = timedelta(seconds=15)
SILENT = "heartbeat_at = clock_timestamp() - interval '15 s'"


def start(claim: Claim, turn: UUID, *, effect: Effect = Effect.IRREVERSIBLE) -> Start:
    return Start(claim, NewCall(new_id(), turn, "pay", effect, Dedupe.TURN, "pay#0", '{"n":1}', timedelta(minutes=1)))


def ending(call: Start, status: CallStatus, result: str | None = None, *, epoch: int | None = None) -> Ending:
    error = None if status is CallStatus.DONE else encode({"type": "Error", "message": ""})
    return Ending(call.claim, call.call, CallOutcome(status, result, error=error), epoch)


async def begin(stage: Stage, call: Start) -> Begun:
    return (await tool_calls.begin(stage.db, [call]))[call.key]


async def end(stage: Stage, *endings: Ending) -> dict[UUID, ToolCallRecord]:
    return await tool_calls.end(stage.db, endings)


async def in_doubt(stage: Stage) -> Start:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    await end(stage, ending(call, CallStatus.UNKNOWN))
    return call


async def taken_over(stage: Stage, claim: Claim) -> Claim:
    """Another worker's lease on the session of ``claim``, whose worker was declared dead."""
    await stage.kill(claim.worker_id)
    await upkeep.rescue(stage.db)
    return (await stage.claim(claim.session_id)).claim


async def settle(stage: Stage, call: Start, outcome: Settlement = Settlement.DONE) -> object:
    record, _ = await tool_calls.settle(
        stage.db, call.call.id, tenant_id=stage.tenant, outcome=outcome, result="paid", note="n", by=new_id()
    )
    return record


async def status(stage: Stage, call: Start) -> str:
    return str((await stage.one("SELECT status FROM tool_calls WHERE id = %s", call.call.id))["status"])


# -- beginning


async def test_only_the_holder_can_begin_a_call(stage: Stage) -> None:
    claim, turn = await stage.running()
    mine = start(claim, turn)
    later = await taken_over(stage, claim)

    assert await begin(stage, mine) == Begun(held=False)
    assert await tool_calls.standing(stage.db, [mine.call.id]) == {}
    assert await begin(stage, replace(mine, claim=later)) == Begun(held=True, attempts=1)
    assert await begin(stage, mine) == Begun(held=False)


async def test_who_has_given_the_lease_back_cannot_begin_a_call(stage: Stage) -> None:
    claim, turn = await stage.running()
    await leases.release(stage.db, claim)

    assert await begin(stage, start(claim, turn)) == Begun(held=False)


async def test_a_begin_does_not_wait_for_a_session_that_somebody_has_locked(stage: Stage) -> None:
    (claim, turn), (free, other) = await stage.running(), await stage.running()
    calls = [start(claim, turn), start(free, other)]
    async with stage.locked(claim.session_id):
        found = await tool_calls.begin(stage.db, calls)

    assert [found[call.key].held for call in calls] == [False, True]


@pytest.mark.parametrize("effect", [Effect.READ, Effect.WRITE])
async def test_a_call_that_may_be_repeated_begins_again_under_the_next_lease(stage: Stage, effect: Effect) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn, effect=effect)
    await begin(stage, call)
    later = replace(call, claim=await taken_over(stage, claim))

    assert await begin(stage, later) == Begun(held=True, attempts=2)
    assert await begin(stage, later) == Begun(held=True, attempts=3)


async def test_an_irreversible_call_that_somebody_started_begins_only_over_that_very_start(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    assert (await begin(stage, call)).attempts == 1
    assert (await begin(stage, call)).attempts == 2  # the answer was lost
    later = replace(call, claim=await taken_over(stage, claim))

    found = await begin(stage, later)

    assert found.standing is not None
    assert (found.attempts, found.standing.status, found.standing.epoch) == (0, CallStatus.STARTED, claim.epoch)
    assert (await begin(stage, replace(later, over=later.claim.epoch))).attempts == 0
    assert (await begin(stage, replace(later, over=claim.epoch))).attempts == 3
    last = replace(call, claim=await taken_over(stage, later.claim), over=claim.epoch)
    assert (await begin(stage, last)).attempts == 0  # that start is not the last one any more


@pytest.mark.parametrize("status", [CallStatus.DONE, CallStatus.UNKNOWN, CallStatus.FAILED])
async def test_what_stands_is_returned_instead_of_a_start_unless_it_failed(stage: Stage, status: CallStatus) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    await end(stage, ending(call, status, '{"a": 1}'))
    found = await begin(stage, call)

    if status is CallStatus.FAILED:
        assert found == Begun(held=True, attempts=2)
    else:
        assert found.standing is not None
        assert (found.attempts, found.standing.status, found.standing.result) == (0, status, {"a": 1})


async def test_an_outcome_that_commits_between_the_snapshot_of_a_begin_and_its_locks_is_found(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn, effect=Effect.WRITE)
    await begin(stage, call)
    later = replace(call, claim=await taken_over(stage, claim))
    async with stage.slow() as slow:
        async with stage.stopped(tool_calls.begin(slow, [later])) as beginning:
            await end(stage, ending(call, CallStatus.DONE, '"paid"'))
        found = (await beginning)[later.key]

    assert found.standing is not None
    assert (found.attempts, found.standing.result) == (0, "paid")


# -- ending


async def test_who_has_lost_the_lease_can_still_say_how_its_call_ended(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    later = replace(call, claim=await taken_over(stage, claim))

    assert await end(stage, ending(call, CallStatus.DONE, '"paid"')) == {}

    found = await begin(stage, later)
    assert found.standing is not None
    assert (found.standing.status, found.standing.result) == (CallStatus.DONE, "paid")


async def test_the_first_of_two_results_stands_and_is_returned(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn, effect=Effect.WRITE)
    await begin(stage, call)
    later = replace(call, claim=await taken_over(stage, claim))
    await begin(stage, later)
    await end(stage, ending(call, CallStatus.DONE, '"first"'))

    standing = await end(stage, ending(later, CallStatus.DONE, '"second"'))

    assert standing[call.call.id].result == "first"


@pytest.mark.parametrize("status", [CallStatus.FAILED, CallStatus.UNKNOWN])
async def test_that_an_earlier_start_came_to_nothing_says_nothing_of_a_later_one(
    stage: Stage, status: CallStatus
) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    later = replace(call, claim=await taken_over(stage, claim), over=claim.epoch)
    await begin(stage, later)

    standing = await end(stage, ending(call, status))

    assert standing[call.call.id].status is CallStatus.STARTED


async def test_the_holder_can_give_up_the_start_of_another_but_not_a_newer_one(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    later = replace(call, claim=await taken_over(stage, claim))

    await end(stage, ending(later, CallStatus.UNKNOWN, epoch=later.claim.epoch))
    assert await status(stage, call) == "started"
    await end(stage, ending(later, CallStatus.UNKNOWN, epoch=claim.epoch))
    assert await status(stage, call) == "unknown"


async def test_that_it_is_done_wins_over_what_was_less_certain_but_not_over_an_operator(stage: Stage) -> None:
    for earlier in (CallStatus.FAILED, CallStatus.UNKNOWN):
        claim, turn = await stage.running()
        call = start(claim, turn)
        await begin(stage, call)
        await end(stage, ending(call, earlier))
        assert await end(stage, ending(call, CallStatus.DONE, "1")) == {}
        assert await status(stage, call) == "done"
    for decided, stands in ((Settlement.GIVE_UP, "given_up"), (Settlement.NOT_DONE, "failed")):
        call = await in_doubt(stage)
        await settle(stage, call, decided)
        assert (await end(stage, ending(call, CallStatus.DONE, "1")))[call.call.id].status.value == stands


async def test_an_outcome_is_kept_even_if_a_failover_has_lost_the_start(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    await stage.hand.execute("DELETE FROM tool_calls")

    await end(stage, ending(call, CallStatus.DONE, '"paid"'))

    found = await begin(stage, call)
    assert found.standing is not None
    assert found.standing.result == "paid"


# -- whether a start can still come to something


@pytest.mark.parametrize(
    ("how", "gone"),
    [
        ("UPDATE workers SET heartbeat_at = clock_timestamp() - interval '1 hour'", False),  # silent, but no tombstone
        ("UPDATE workers SET dead_at = clock_timestamp()", True),  # its connection has ended: so the sweeper was quick
        (f"UPDATE workers SET dead_at = clock_timestamp(), {SILENT}", False),  # it may be stopped, or cut off
        (f"UPDATE workers SET dead_at = clock_timestamp(), {SILENT}, reported = true", True),
        ("DELETE FROM workers", False),
        ("UPDATE tool_calls SET started_at = clock_timestamp() - interval '74 s'", False),
        ("UPDATE tool_calls SET started_at = clock_timestamp() - interval '76 s'", True),
    ],
)
async def test_a_starter_is_gone_when_its_end_was_seen_or_its_time_is_over(stage: Stage, how: str, gone: bool) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    await stage.hand.execute(how.encode())

    found = await tool_calls.starter_gone(stage.db, call.call.id, epoch=claim.epoch, lease_ttl=TTL)

    assert found is gone


async def test_time_does_not_end_a_call_whose_thread_was_left_behind_but_the_end_of_its_process_does(
    stage: Stage,
) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    error = encode({"type": "TimeoutError", "message": "", "left_behind": True})
    await tool_calls.end(stage.db, [Ending(claim, call.call, CallOutcome(CallStatus.UNKNOWN, error=error))])
    await stage.hand.execute("UPDATE tool_calls SET started_at = clock_timestamp() - interval '1 hour'")

    assert not await tool_calls.starter_gone(stage.db, call.call.id, epoch=claim.epoch, lease_ttl=TTL)
    await stage.kill(claim.worker_id)
    assert await tool_calls.starter_gone(stage.db, call.call.id, epoch=claim.epoch, lease_ttl=TTL)


async def test_a_starter_whose_lock_is_held_is_not_gone_whatever_its_row_says(stage: Stage) -> None:
    worker = await stage.worker(lock_key=4712)
    claim, turn = await stage.running(worker)
    call = start(claim, turn)
    await begin(stage, call)
    await stage.kill(worker)
    async with stage.second() as alive:
        await alive.execute("SELECT pg_advisory_lock(4712)")
        assert not await tool_calls.starter_gone(stage.db, call.call.id, epoch=claim.epoch, lease_ttl=TTL)
        await alive.execute("SELECT pg_advisory_unlock(4712)")
    assert await tool_calls.starter_gone(stage.db, call.call.id, epoch=claim.epoch, lease_ttl=TTL)
    assert not await tool_calls.starter_gone(stage.db, call.call.id, epoch=claim.epoch + 1, lease_ttl=TTL)


# -- settling


async def test_a_call_in_doubt_is_settled_once_and_its_session_is_woken(stage: Stage) -> None:
    call = await in_doubt(stage)
    before = await stage.row(call.claim.session_id)

    record, ring = await tool_calls.settle(
        stage.db,
        call.call.id,
        tenant_id=stage.tenant,
        outcome=Settlement.DONE,
        result={"no": 7},
        note="seen",
        by=new_id(),
    )

    assert (record.status, record.result, record.note) == (CallStatus.DONE, {"no": 7}, "seen")
    assert ring == [(call.claim.session_id, "default")]
    assert (await stage.row(call.claim.session_id))["mail_seq"] == before["mail_seq"] + 1
    with pytest.raises(Conflict, match=r"not in doubt any more: key_[0-9a-f]{32} settled it at .*, and it is done"):
        await settle(stage, call, Settlement.GIVE_UP)
    assert (await stage.row(call.claim.session_id))["mail_seq"] == before["mail_seq"] + 1


@pytest.mark.parametrize("by", ["an operator", "the worker that was cut off"])
async def test_a_turn_that_waits_for_the_end_of_a_doubt_is_woken_and_finds_it(stage: Stage, by: str) -> None:
    call = await in_doubt(stage)
    wanted = [Wanted(call.claim.session_id, "call", "", call.call.id, 1)]
    seen = (await mail.look(stage.db, wanted))[0]
    await log.leave(stage.db, [leave(call.claim, call.call.turn_id, seq=2, seen=seen.mail_seq)])
    assert (seen.found, (await stage.row(call.claim.session_id))["ready_at"]) == ([], None)

    if by == "an operator":
        await settle(stage, call)
    else:
        await end(stage, ending(call, CallStatus.DONE, '"paid"'))
        assert await tool_calls.wake(stage.db, call.claim.session_id) == [(call.claim.session_id, "default")]

    assert (await stage.row(call.claim.session_id))["ready"]
    [(_, value)] = (await mail.look(stage.db, wanted))[0].found
    assert (value["status"], value["result"]) == ("done", "paid")


async def test_what_became_of_a_call_is_told_to_turns_of_its_own_session_only(stage: Stage) -> None:
    call = await in_doubt(stage)
    await settle(stage, call)
    other, _ = await stage.running()

    wanted = [Wanted(session, "call", "", call.call.id, 1) for session in (call.claim.session_id, other.session_id)]
    looks = await mail.look(stage.db, wanted)

    assert [len(looks[place].found) for place in (0, 1)] == [1, 0]


async def test_a_call_that_an_operator_lets_be_made_again_can_be_in_doubt_again(stage: Stage) -> None:
    call = await in_doubt(stage)
    await settle(stage, call, Settlement.NOT_DONE)
    assert (await begin(stage, call)).attempts == 2
    await end(stage, ending(call, CallStatus.UNKNOWN))

    [record] = (await tool_calls.standing(stage.db, [call.call.id])).values()
    assert (record.settled_at, record.settled_by, record.note) == (None, None, None)
    await settle(stage, call)
    assert await status(stage, call) == "done"


async def test_of_two_operators_who_settle_at_once_one_wins(stage: Stage) -> None:
    call = await in_doubt(stage)
    async with stage.locked(call.claim.session_id):
        both = [stage.begin(settle(stage, call, outcome)) for outcome in (Settlement.DONE, Settlement.NOT_DONE)]
        await stage.until_blocked(2)
    answers = await asyncio.gather(*both, return_exceptions=True)

    assert sorted(type(answer).__name__ for answer in answers) == ["Conflict", "ToolCallRecord"]


async def test_only_what_is_in_doubt_can_be_settled_and_only_by_its_tenant(stage: Stage) -> None:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)

    with pytest.raises(Conflict, match="under way since"):
        await settle(stage, call)
    with pytest.raises(NotFound):
        await tool_calls.settle(stage.db, call.call.id, tenant_id=new_id(), outcome=Settlement.DONE, by=new_id())
    assert await status(stage, call) == "started"


async def test_calls_are_listed_newest_first_page_by_page(stage: Stage) -> None:
    claim, turn = await stage.running()
    calls = [start(claim, turn) for _ in range(5)]
    for call in calls:
        await begin(stage, call)
    doubtful = await in_doubt(stage)
    newest = [call.call.id for call in reversed(calls)]

    first = await tool_calls.list_calls(stage.db, tenant_id=stage.tenant, session_id=claim.session_id, limit=2)
    rest = await tool_calls.list_calls(
        stage.db, tenant_id=stage.tenant, session_id=claim.session_id, turn_id=turn, before=first[-1].id
    )
    unknown = await tool_calls.list_calls(stage.db, tenant_id=stage.tenant)
    started = await tool_calls.list_calls(
        stage.db, tenant_id=stage.tenant, session_id=claim.session_id, status=CallStatus.STARTED
    )

    assert [call.id for call in first + rest] == newest
    assert [call.id for call in unknown] == [doubtful.call.id]
    assert [call.id for call in started] == newest
    assert await tool_calls.list_calls(stage.db, tenant_id=new_id(), session_id=claim.session_id) == []
