"""A turn whose artifact store is away: it waits, and that is nobody's failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from longshift import Turn, agent, attempt
from longshift.agent import Agent
from longshift.artifacts import Spooled
from longshift.attempt import Outcome
from longshift.clock import SYSTEM
from longshift.contract import Artifact
from longshift.errors import Unavailable
from longshift.events import Context, Kind
from longshift.execution import Execution
from longshift.model import TurnStatus
from longshift.testing.bench import new_record
from longshift.testing.outside import Outside
from longshift.testing.waiting import wait_until
from longshift.testing.world import Time, World

MANY = 12  # more than the library's own steps are tried when they fail
FOR_EVER = 1_000_000


class Shelf(Outside):
    """An outside whose store is away for the first ``away`` calls; its pauses pass at once, or never."""

    away = 0
    asked = 0
    pauses_pass = True

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes | Spooled, content_type: str) -> Artifact:
        self._ask()
        return await super().put_artifact(artifact_id, name=name, data=data, content_type=content_type)

    async def get_artifact(self, artifact_id: UUID) -> bytes:
        self._ask()
        return await super().get_artifact(artifact_id)

    def _ask(self) -> None:
        self.asked += 1
        if self.asked <= self.away:
            raise Unavailable("the store is away")

    async def back_off(self, seconds: float) -> None:
        assert 0 <= seconds <= 10
        if not self.pauses_pass:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)


@asynccontextmanager
async def running(
    what: Agent[Any, Any], *, away: int, pauses_pass: bool = True
) -> AsyncIterator[tuple[asyncio.Task[Outcome], Execution, Shelf]]:
    now = datetime.now(UTC)
    record = new_record(what, None, session_id=UUID(int=1), metadata={}, now=now, until=now + timedelta(days=1))
    with ThreadPoolExecutor(2) as threads:
        world = World(record, [], {}, Time(SYSTEM))
        shelf = Shelf(world, epoch=world.claim() or 0, threads=threads)
        shelf.away, shelf.pauses_pass = away, pauses_pass
        execution = attempt.resumed(record, [], before=Context(), port=shelf, now=now)
        task = asyncio.create_task(attempt.call(what, execution, threads=threads))
        try:
            yield task, execution, shelf
        finally:
            await attempt.unwind(task, execution)


@agent("keeping")
async def keeping(turn: Turn, _: None) -> str:
    page = await turn.artifact("page", "text")
    return (await turn.read(page)).decode()


async def test_an_artifact_is_kept_as_soon_as_the_store_answers_and_its_step_counts_one_try() -> None:
    async with running(keeping, away=MANY) as (task, _, shelf):
        outcome = await asyncio.wait_for(task, 10)
    assert (outcome.status, outcome.output) == (TurnStatus.SUCCEEDED, '"text"')
    [step] = [event for event in shelf.world.events if event.kind == Kind.STEP_COMPLETED]
    assert "attempts" not in step.payload


async def test_an_artifact_is_read_as_soon_as_the_store_answers() -> None:
    @agent("reading")
    async def reading(turn: Turn, _: None) -> str:
        shelf = turn._execution.port
        assert isinstance(shelf, Shelf)
        page = await turn.artifact("page", "text")
        shelf.asked, shelf.away = 0, MANY
        return (await turn.read(page)).decode()

    async with running(reading, away=0) as (task, _, _):
        outcome = await asyncio.wait_for(task, 10)
    assert (outcome.status, outcome.output) == (TurnStatus.SUCCEEDED, '"text"')


async def test_no_time_limit_of_a_step_ends_the_wait_between_steps() -> None:
    async with running(keeping, away=FOR_EVER) as (task, _, shelf):
        shelf.step_timeout = timedelta(milliseconds=10)
        asked = await wait_until(lambda: shelf.asked if shelf.asked > MANY else 0, description="it asks")
        await asyncio.wait({task}, timeout=0.1)
        assert not task.done()
        assert shelf.asked > asked


async def test_inside_a_step_the_wait_is_that_steps_time() -> None:
    async def inside(turn: Turn) -> str:
        return (await turn.artifact("page", "text")).name

    @agent("keeping inside")
    async def keeping_inside(turn: Turn, _: None) -> str:
        turn._execution.port.step_timeout = timedelta(milliseconds=50)
        return await turn.step("inside", inside, turn)

    async with running(keeping_inside, away=FOR_EVER) as (task, _, _):
        outcome = await asyncio.wait_for(task, 10)
    assert outcome.status is TurnStatus.FAILED
    assert '"code":"step_timeout"' in str(outcome.error).replace(" ", "")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_a_drain_takes_a_turn_that_waits_for_the_store_away_at_once(before: bool) -> None:
    async with running(keeping, away=FOR_EVER, pauses_pass=before) as (task, execution, shelf):
        left = asyncio.Event()
        execution.on_quiet = left.set
        await wait_until(lambda: shelf.asked > 0, description="the store was asked")
        execution.drain()
        await asyncio.wait_for(left.wait(), 10)
        await attempt.unwind(task, execution)
        assert task.done()
        assert shelf.world.events == []
