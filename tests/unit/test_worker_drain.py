"""What a worker waits for before it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import SecretStr

from longshift.agent import Agents
from longshift.config import Config
from longshift.worker import Worker


async def test_a_drain_waits_for_the_call_of_a_turn_that_has_ended(tmp_path: Path) -> None:
    config = Config(
        database_url=SecretStr(f"postgresql://nobody@/nothing?host={tmp_path}"),
        redis_url=SecretStr(f"unix://{tmp_path}/none"),
        artifacts_url=tmp_path.as_uri(),
    )
    worker = Worker(config, Agents([]))
    worker._build()
    with worker._underway.calling(60):
        draining = asyncio.create_task(worker.drain())
        for _ in range(10):
            await asyncio.sleep(0)
        assert (worker.running, draining.done()) == (0, False)

    await draining
    await worker.stop()
