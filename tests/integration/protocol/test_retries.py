"""Accepting a retry: of an ended turn, once, in its session's order, with the root of the one before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest

from longshift.db import log, retries
from longshift.db.idempotency import Idempotency
from longshift.db.intake import Accepted
from longshift.errors import Conflict, NotFound
from longshift.model import Claim, TurnStatus, new_id
from tests.integration.protocol.stage import WEEK, Stage, finish


async def retry(stage: Stage, turn_id: UUID, *, tenant: UUID | None = None, key: str | None = None) -> Accepted:
    return await retries.retry(
        stage.db,
        turn_id,
        tenant_id=tenant or stage.tenant,
        now=datetime.now(UTC),
        lifetime=WEEK,
        idempotency=Idempotency("retry", key, b"same") if key else None,
    )


async def failed(stage: Stage) -> tuple[Claim, UUID]:
    claim, turn = await stage.running()
    end = replace(
        finish(claim, turn, seq=claim.last_seq + 2), status=TurnStatus.FAILED, output=None, error='{"code":"x"}'
    )
    assert await log.finish(stage.db, [end])
    return claim, turn


async def test_a_retry_is_a_new_turn_with_the_same_root_and_input_and_its_session_is_rung(stage: Stage) -> None:
    claim, turn = await failed(stage)

    accepted = await retry(stage, turn)

    new = await stage.turn(accepted.resource_id)
    assert (new["retry_of"], new["root_turn_id"], new["status"], new["position"]) == (turn, turn, "queued", 2)
    assert (new["agent"], new["input"], new["agent_version"]) == ("echo", {}, None)
    assert list(accepted.ring) == [(claim.session_id, "default")]
    assert (await stage.row(claim.session_id))["open_turns"] == 1
    assert await retries.chain(stage.db, claim.session_id, turn) == ([turn], 1)


async def test_a_retry_of_a_retry_has_the_root_of_the_first(stage: Stage) -> None:
    _, turn = await failed(stage)
    second = (await retry(stage, turn)).resource_id
    await stage.cancel(second)

    third = await stage.turn((await retry(stage, second)).resource_id)

    assert (third["retry_of"], third["root_turn_id"]) == (second, turn)


async def test_what_never_started_begins_anew(stage: Stage) -> None:
    """It has no turn.started to go on from: its input must come into the history."""
    _, turn = await stage.submit()
    await stage.cancel(turn)

    new = await stage.turn((await retry(stage, turn)).resource_id)

    assert (new["retry_of"], new["root_turn_id"]) == (turn, new["id"])
    with pytest.raises(Conflict, match="already being retried"):
        await retry(stage, turn)
    await stage.cancel(new["id"])
    third = (await retry(stage, new["id"])).resource_id
    for earlier in (turn, new["id"]):
        with pytest.raises(Conflict, match="already being retried"):
            await retry(stage, earlier)
    assert (await stage.turn(third))["status"] == "queued"


async def test_what_has_not_ended_or_has_succeeded_is_not_retried(stage: Stage) -> None:
    claim, turn = await stage.running()
    with pytest.raises(Conflict, match="is running: cancel it first, or let it end"):
        await retry(stage, turn)

    await log.finish(stage.db, [finish(claim, turn, seq=claim.last_seq + 2)])
    with pytest.raises(Conflict, match="has succeeded: there is nothing to retry"):
        await retry(stage, turn)


async def test_of_two_retries_at_once_one_is_accepted(stage: Stage) -> None:
    claim, turn = await failed(stage)
    async with stage.locked(claim.session_id):
        both = [stage.begin(retry(stage, turn)) for _ in range(2)]
        await stage.until_blocked(2)

    results = await asyncio.gather(*both, return_exceptions=True)

    assert {type(result) for result in results} == {Accepted, Conflict}
    (refused,) = [result for result in results if isinstance(result, Conflict)]
    assert "already being retried by turn_" in str(refused)
    assert (await stage.row(claim.session_id))["open_turns"] == 1


async def test_the_same_request_again_gives_the_same_turn(stage: Stage) -> None:
    _, turn = await failed(stage)

    first, second = await retry(stage, turn, key="k"), await retry(stage, turn, key="k")

    assert (second.resource_id, second.replayed) == (first.resource_id, True)


async def test_another_tenants_turn_does_not_exist(stage: Stage) -> None:
    _, turn = await failed(stage)

    with pytest.raises(NotFound):
        await retry(stage, turn, tenant=new_id())
