"""A worker that cannot start says why, and closes what it has opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from longshift.agent import Agents
from longshift.config import Config
from longshift.errors import Unavailable
from longshift.worker import Worker


async def test_a_worker_that_cannot_reach_postgres_can_be_stopped(tmp_path: Path, redis_url: str) -> None:
    config = Config(
        database_url=SecretStr(f"postgresql://nobody@/nothing?host={tmp_path}"),
        redis_url=SecretStr(redis_url),
        artifacts_url=tmp_path.as_uri(),
    )
    worker = Worker(config, Agents([]))
    with pytest.raises(Unavailable, match="Postgres"):
        await worker.start()

    await worker.stop()
