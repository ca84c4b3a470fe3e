"""A session of many turns on a real worker: its context keeps its budget, its restore its price, and nothing is forgotten."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr

from longshift import Budget, Passage, Turn, agent
from longshift.agent import Agents
from longshift.artifacts import open_store
from longshift.catalogue import Draft
from longshift.cold import Cold
from longshift.config import Config
from longshift.context import events, restore
from longshift.db import views
from longshift.db.database import Database
from longshift.events import Context, apply
from longshift.hot import Hot
from longshift.mailbox import Mailbox
from longshift.model import TurnRecord, new_id
from longshift.testing.waiting import wait_until
from longshift.tokens import Gauge
from longshift.worker import Worker

TURNS = 100
BUDGET = Budget(1500)
PERIL = "The vessel Aurora ran aground off Skagen"


@agent("diarist", budget=BUDGET)
async def diarist(turn: Turn, day: int) -> str:
    """A different text each day; the first has something worth remembering."""
    return f"{PERIL}. " if day == 0 else f"Day {day}: " + " ".join(f"{word}{day * 7919 % 1009}" for word in WORDS)


WORDS = "wind calm log course knots barometer rain depth cargo crew".split() * 3  # noqa: SIM905


@agent("rememberer", budget=BUDGET)
async def rememberer(turn: Turn, query: str) -> list[Passage]:
    return await turn.recall(query, sources=["history"], limit=1)


@pytest.fixture
async def worker(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[tuple[Worker, Config]]:
    config = Config(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        artifacts_url=tmp_path.as_uri(),
        embedder="tests.support.meaning:embed",
        hot_verify=1.0,
        checkpoint_events=50,
    )
    worker = Worker(config, Agents([diarist, rememberer]))
    await worker.start()
    yield worker, config
    await worker.drain()
    await worker.stop()


async def test_a_long_session_keeps_its_budget_its_price_and_its_memory(
    worker: tuple[Worker, Config],
) -> None:
    runs, config = worker
    assert config.database_url is not None
    assert config.redis_url is not None
    db, hot = Database(config.database_url.get_secret_value()), Hot(config.redis_url.get_secret_value())
    mailbox = Mailbox(db, hot, cold=Cold(db, open_store(config.require("artifacts_url"))), config=config)
    tenant = new_id()

    async def submit(draft: Draft) -> TurnRecord:
        return await record((await mailbox.submit(draft, tenant_id=tenant)).resource_id)

    async def record(turn_id: UUID) -> TurnRecord:
        found = await views.turn(db, turn_id, tenant_id=tenant)
        assert found is not None
        return found

    async def has_ended(turn: TurnRecord) -> bool:
        await runs.wake([turn.session_id])  # the lease is given back every few seconds, and nobody else rings here
        return (await record(turn.id)).status.terminal

    last = await submit(Draft("diarist", 0))
    session = last.session_id
    for day in range(1, TURNS):
        last = await submit(Draft("diarist", day, session_id=session))
    await wait_until(lambda: has_ended(last), description="the diary is written", limit=60)
    asked = await submit(Draft("rememberer", "Which boat had an accident?", session_id=session))
    await wait_until(lambda: has_ended(asked), description="the question is answered")

    found = (await record(asked.id)).output
    assert found[0]["text"] == f"assistant: {PERIL}."
    gauge, context = Gauge(None), Context()
    async for event in events(db, session, after=0):
        apply(context, event)
        if event.kind == "turn.succeeded" and event.turn_id != asked.id:
            assert sum(await gauge.count(context.messages)) <= BUDGET.tokens
    restored = await restore(db, session, through=context.seq)
    assert restored.context == context
    assert restored.rows <= 100  # of 50 events since a checkpoint, and those of the turns that made none
    await mailbox.close()
    await hot.close()
    await db.close()
