"""A worker that cannot start says why, and closes what it has opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from longshift.agent import Agents, load_agents
from longshift.config import Config
from longshift.errors import Unavailable
from longshift.worker import Worker
from tests.support.databases import execute


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


async def test_the_agents_of_a_worker_are_known_before_the_worker_is_seen(
    database_url: str, tmp_path: Path, redis_url: str
) -> None:
    """Whoever waits for a worker, such as `longshift up`, submits to its agents next."""
    execute(
        database_url,
        "CREATE FUNCTION agents_first() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN"
        " IF NOT EXISTS (SELECT 1 FROM agents) THEN RAISE EXCEPTION USING MESSAGE = ''a worker without agents''; END IF;"
        " RETURN NEW; END'",
    )
    execute(
        database_url,
        "CREATE TRIGGER agents_first BEFORE INSERT ON workers FOR EACH ROW EXECUTE FUNCTION agents_first()",
    )
    config = Config(
        database_url=SecretStr(database_url), redis_url=SecretStr(redis_url), artifacts_url=tmp_path.as_uri()
    )
    worker = Worker(config, load_agents(["longshift.agents.research"]))
    try:
        await worker.start()
    finally:
        await worker.stop()
