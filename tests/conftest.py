"""Fixtures that every test may use.

The servers are real, start on first use, once per run, and end with it, also when pytest is killed (``Guardian``).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, settings

from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from tests.support.databases import Databases

# Whether a busy machine draws or runs an example fast enough says nothing about the code.
settings.register_profile("machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long versions run when they are asked for: ``make test ARGS="-m full"``."""
    if "full" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("full") is not None]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def guardian() -> Iterator[Guardian]:
    """Stops the processes it watches when the run ends: ``guardian.watch(process.pid)``."""
    with Guardian() as guardian:
        yield guardian


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory, guardian: Guardian) -> Iterator[LocalPostgres]:
    """The PostgreSQL of this run. A test that restarts or kills it makes its own instead."""
    server = LocalPostgres(tmp_path_factory.mktemp("postgres"), guardian=guardian)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory, guardian: Guardian) -> Iterator[LocalRedis]:
    """The Redis of this run. A test that restarts or kills it makes its own instead."""
    server = LocalRedis(tmp_path_factory.mktemp("redis"), guardian=guardian)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def databases(postgres_server: LocalPostgres) -> Databases:
    """Makes further databases: ``with databases.fresh() as url``."""
    databases = Databases(postgres_server.url)
    databases.make_template()
    return databases


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A fresh, migrated database of this test's own."""
    with databases.fresh() as url:
        yield url


@pytest.fixture
def redis_url(redis_server: LocalRedis) -> str:
    """The Redis of this run, emptied for this test."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
