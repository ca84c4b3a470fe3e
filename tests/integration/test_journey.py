"""A session on its way through all three tiers and back: its agent cannot tell where its history was (R20)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from sqlalchemy import text

from longshift import Retry, Turn, agent, step
from longshift.agent import Agents
from longshift.client import Client
from longshift.clock import SYSTEM
from longshift.config import Config
from longshift.db import archives, keys
from longshift.model import Prefix, parse_id
from longshift.testing.waiting import wait_until
from longshift.worker import Worker
from tests.support.api import KEY, Api
from tests.support.tiers import damage, mend


class Trouble(Exception):
    """What an agent cannot get over."""


done: list[str] = []
trouble: list[str] = []


@step
async def act(name: str) -> str:
    done.append(name)
    return name


@step(retry=Retry(attempts=1))
async def stumble() -> None:
    if trouble:
        raise Trouble(trouble.pop())


@agent("talk")
async def talk(turn: Turn, word: str) -> list[Any]:
    """What was said before, and what it remembers; says a word itself."""
    seen = [(message["role"], message["content"]) for message in turn.history[:-1]]
    await act(word)
    await stumble()
    return [seen, word]


@dataclass
class Journey:
    api: Api
    worker: Worker
    redis_url: str
    session: str = ""

    async def submit(self, word: str) -> str:
        return str((await self.api.submit(f"/v1/sessions/{self.session}/turns", agent="talk", input=word))["id"])

    async def run(self, turn: str) -> dict[str, Any]:
        """Let the worker have it; the turn when it has ended."""
        await self.worker.wake([parse_id(Prefix.SESSION, self.session)])
        async with Client(self.api.url, KEY) as client:
            return dict(await client.wait(turn))

    async def say(self, word: str) -> list[Any]:
        """One more turn: the history that its agent saw."""
        ended = await self.run(await self.submit(word))
        assert ended["status"] == "succeeded", ended
        return list(ended["output"][0])

    async def move(self, verb: str) -> None:
        answer = await self.api.client.post(f"/v1/sessions/{self.session}/{verb}")
        assert answer.status_code == 200, answer.text

    async def forget(self) -> None:
        """Redis loses everything."""
        await self.worker._hot.contexts.flush()
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushdb()

    def tiers(self) -> dict[str, int]:
        """How often each tier has served a context."""
        found = self.worker.metrics.registry.collect()
        samples = [s for metric in found for s in metric.samples if s.name == "longshift_contexts_restored_total"]
        return {s.labels["tier"]: int(s.value) for s in samples}


@pytest.fixture
async def journey(api: Api, redis_url: str) -> AsyncIterator[Journey]:
    config = Config(
        database_url=api.edge.config.database_url,
        redis_url=api.edge.config.redis_url,
        artifacts_url=api.edge.config.artifacts_url,
        hot_verify=1.0,
    )
    worker = Worker(config, Agents([talk]), clock=SYSTEM)
    await worker.start()
    done.clear()
    trouble.clear()
    yield Journey(api, worker, redis_url, await api.session())
    await worker.stop()


async def test_an_agent_sees_the_same_history_from_every_tier(journey: Journey) -> None:
    said: list[Any] = []

    async def next_word(word: str) -> None:
        assert await journey.say(word) == said
        said.extend([["user", word], ["assistant", [list(said), word]]])

    for word in ("one", "two"):
        await next_word(word)
    await journey.forget()
    await next_word("from the log")
    await journey.move("archive")
    await journey.forget()
    await next_word("from the cold tier")
    await journey.forget()
    await next_word("from the checkpoint that was kept of it")
    await journey.move("archive")
    await journey.move("archive")
    await next_word("from redis, although it is archived")
    await journey.move("restore")
    await journey.forget()
    await next_word("from the log that is back")

    assert journey.tiers() == {"warm": 4, "cold": 1, "hot": 1}


async def test_a_context_is_in_redis_before_a_worker_gets_to_its_turn(journey: Journey) -> None:
    await journey.say("one")
    await journey.move("archive")
    await journey.forget()
    key = await keys.find_tenant(journey.api.db, "default"), parse_id(Prefix.SESSION, journey.session)
    contexts = journey.api.edge.hot.contexts

    turn = await journey.submit("two")

    _: bool = await wait_until(lambda: _is_known(contexts, key), description="the context is in Redis")
    ended = await journey.run(turn)
    assert ended["output"][0] == [["user", "one"], ["assistant", [[], "one"]]]
    assert journey.tiers() == {"hot": 1}


async def _is_known(contexts: Any, key: Any) -> bool:
    return key in await contexts.known([key])


async def test_a_turn_is_retried_that_is_in_the_archive(journey: Journey) -> None:
    await journey.say("before")
    trouble.append("no luck")
    failed = await journey.run(await journey.submit("once"))
    assert failed["status"] == "failed"
    await journey.move("archive")
    await journey.forget()

    retry = (await journey.api.client.post(f"/v1/turns/{failed['id']}/retry")).json()
    ended = await journey.run(retry["id"])

    assert ended["output"][1] == "once"
    assert done == ["before", "once"]
    steps = (await journey.api.client.get(f"/v1/turns/{retry['id']}/steps")).json()["data"]
    assert [(step["name"], step["status"]) for step in steps] == [
        ("act", "completed"),
        ("stumble", "failed"),
        ("stumble", "completed"),
    ]


async def test_a_turn_without_its_context_fails_and_says_so_until_the_store_is_mended(journey: Journey) -> None:
    await journey.say("one")
    await journey.move("archive")
    record = await archives.find(journey.api.db, parse_id(Prefix.SESSION, journey.session))
    assert record is not None
    await damage(journey.api.edge.cold, record.context_id, tenant_id=record.tenant_id)
    await journey.forget()
    assert await journey.say("two") == [["user", "one"], ["assistant", [[], "one"]]]  # folded from the archived events

    await journey.move("archive")
    await journey.forget()
    record = await archives.find(journey.api.db, parse_id(Prefix.SESSION, journey.session))
    assert record is not None
    kept = [
        await damage(journey.api.edge.cold, each, tenant_id=record.tenant_id)
        for each in (record.context_id, record.manifest_id)
    ]
    failed = await journey.run(await journey.submit("three"))
    assert failed["error"]["code"] == "artifact_corrupt"

    await mend(journey.api.edge.cold, *kept)
    retry = (await journey.api.client.post(f"/v1/turns/{failed['id']}/retry")).json()
    assert (await journey.run(retry["id"]))["status"] == "succeeded"
    assert (await journey.api.db.fetch(text("SELECT count(*) AS n FROM archives")))[0].n == 1
