"""Redis, killed and started again: who listens hears again, and wake-ups keep their order."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from longshift import wakeup
from longshift.embedded import Guardian, LocalRedis
from longshift.hot import Hot
from longshift.model import new_id
from longshift.testing.waiting import wait_until

KILLS = 8
LISTENERS = 30


@pytest.fixture
def own_redis(tmp_path: Path, guardian: Guardian) -> Iterator[LocalRedis]:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    server.start()
    yield server
    server.stop()


async def test_who_listens_hears_again_however_often_redis_is_killed_while_others_come_and_go(
    own_redis: LocalRedis,
) -> None:
    """redis-py's reader may drop the connection in the moment in which somebody subscribes: that must end no task."""
    hot = Hot(own_redis.url)

    async def come_and_go(number: int) -> None:
        for turn in range(1_000_000):
            async with hot.listen(f"longshift.turn.{number}.{turn}"):
                await asyncio.sleep(0)

    others = [asyncio.create_task(come_and_go(number)) for number in range(LISTENERS)]
    for _ in range(KILLS):
        await asyncio.to_thread(own_redis.kill)
        await asyncio.to_thread(own_redis.restart)
    async with hot.listen("here") as messages:

        async def heard() -> bool:
            await hot.announce([("here", "hello")])
            return not messages.empty()

        assert await wait_until(heard, description="the message arrives")
    assert not any(task.done() for task in others)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await hot.close()


async def test_a_turn_that_lost_its_worker_is_rung_before_all_others(redis_url: str) -> None:
    hot, early, late, rescued = Hot(redis_url), new_id(), new_id(), new_id()
    await hot.ring([(early, "default")])
    await hot.ring([(late, "default")])
    await hot.ring([(rescued, "default")], first=True)

    with redis.Redis.from_url(redis_url) as client:
        taken = [client.rpop(wakeup.queue_key("default")) for _ in range(3)]
    order = [next(each for each in (early, late, rescued) if each.hex in _body(message)) for message in taken]
    assert order == [rescued, early, late]
    await hot.close()


def _body(message: object) -> str:
    assert isinstance(message, bytes)
    return base64.b64decode(json.loads(message)["body"]).decode()
