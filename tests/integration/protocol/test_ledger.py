"""The ledger of tool calls: who may begin a call, who may end it, what an outcome may replace, and settling."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest

from longshift.db import tool_calls, upkeep
from longshift.db.tool_calls import Begun, Ending, Start
from longshift.errors import Conflict, NotFound
from longshift.model import CallStatus, Claim, Dedupe, Effect, Settlement, new_id
from tests.integration.protocol.stage import Stage

TTL = timedelta(seconds=15)


def start(claim: Claim, turn: UUID, *, effect: Effect = Effect.IRREVERSIBLE, over: int | None = None) -> Start:
    return Start(claim, new_id(), turn, "pay", effect, Dedupe.TURN, "pay#0", '{"n":1}', timedelta(minutes=1), over)


async def begin(stage: Stage, call: Start) -> Begun:
    return (await tool_calls.begin(stage.db, [call]))[call.id, call.claim.epoch]


async def in_doubt(stage: Stage) -> Start:
    claim, turn = await stage.running()
    call = start(claim, turn)
    await begin(stage, call)
    await tool_calls.end(stage.db, [Ending(call, CallStatus.UNKNOWN, error='{"type":"TimeoutError","message":""}')])
    return call


async def taken_over(stage: Stage, claim: Claim) -> Claim:
    """Another worker's lease on the session of ``claim``, whose worker was declared dead."""
    await stage.kill(claim.worker_id)
    await upkeep.rescue(stage.db)
    return (await stage.claim(claim.session_id)).claim


async def settle(stage: Stage, call: Start, outcome: Settlement = Settlement.DONE, **more: object) -> object:
    record, _ = await tool_calls.settle(
        stage.db, call.id, tenant_id=stage.tenant, outcome=outcome, result="paid", note="n", by=new_id()
    )
    return record


async def status(stage: Stage, call: Start) -> str:
    return str((await stage.one("SELECT status FROM tool_calls WHERE id = %s", call.id))["status"])


# -- settling


async def test_a_call_in_doubt_is_settled_once_and_its_session_is_woken(stage: Stage) -> None:
    call = await in_doubt(stage)
    before = await stage.row(call.claim.session_id)

    record, ring = await tool_calls.settle(
        stage.db, call.id, tenant_id=stage.tenant, outcome=Settlement.DONE, result={"no": 7}, note="seen", by=new_id()
    )

    assert (record.status, record.result, record.note) == (CallStatus.DONE, {"no": 7}, "seen")
    assert ring == [(call.claim.session_id, "default")]
    assert (await stage.row(call.claim.session_id))["mail_seq"] == before["mail_seq"] + 1
    with pytest.raises(Conflict, match=r"not in doubt any more: key_[0-9a-f]{32} settled it at .*, and it is done"):
        await settle(stage, call, Settlement.GIVE_UP)
    assert (await stage.row(call.claim.session_id))["mail_seq"] == before["mail_seq"] + 1


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
        await tool_calls.settle(stage.db, call.id, tenant_id=new_id(), outcome=Settlement.DONE, by=new_id())
    assert await status(stage, call) == "started"


async def test_calls_are_listed_newest_first_page_by_page(stage: Stage) -> None:
    claim, turn = await stage.running()
    calls = [start(claim, turn) for _ in range(5)]
    for call in calls:
        await begin(stage, call)
    doubtful = await in_doubt(stage)
    newest = [call.id for call in reversed(calls)]

    first = await tool_calls.list_calls(stage.db, tenant_id=stage.tenant, session_id=claim.session_id, limit=2)
    rest = await tool_calls.list_calls(
        stage.db, tenant_id=stage.tenant, session_id=claim.session_id, turn_id=turn, before=first[-1].id
    )
    unknown = await tool_calls.list_calls(stage.db, tenant_id=stage.tenant, status=CallStatus.UNKNOWN)
    started = await tool_calls.list_calls(stage.db, tenant_id=stage.tenant, status=CallStatus.STARTED)

    assert [call.id for call in first + rest] == newest
    assert [call.id for call in unknown] == [doubtful.id]
    assert [call.id for call in started] == newest
    assert await tool_calls.list_calls(stage.db, tenant_id=new_id(), session_id=claim.session_id) == []
