"""A fleet for each module: Postgres and Redis of the run, a database and processes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from longshift.embedded import Guardian, LocalRedis
from longshift.testing.fleet import Client
from tests.support.databases import Databases
from tests.support.fleet import Fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(scope="module")
def fleet(
    databases: Databases, redis_server: LocalRedis, guardian: Guardian, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """The API is up; workers are for the tests to start."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    folder: Path = tmp_path_factory.mktemp("fleet")
    with (
        databases.fresh() as database_url,
        Fleet(folder, database_url=database_url, redis_url=redis_server.url, guardian=guardian) as fleet,
    ):
        fleet.start_api()
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Client:
    return fleet.client
