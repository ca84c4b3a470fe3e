"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.api import Api, api_config, running_api


@pytest.fixture
async def api(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """A running API over a fresh database, an empty Redis and an empty folder; the agent ``echo`` is registered."""
    async with running_api(api_config(database_url, redis_url, tmp_path)) as api:
        yield api


@pytest.fixture
async def small_api(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """The same with small limits: 4 KiB for a turn, 64 KiB for a batch or an artifact."""
    config = api_config(database_url, redis_url, tmp_path, max_body=4096, max_batch_body=65536, max_artifact=65536)
    async with running_api(config) as api:
        yield api
