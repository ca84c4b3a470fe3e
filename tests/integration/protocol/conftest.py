"""A stage per test: see ``stage.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from tests.integration.protocol.stage import Stage, Stepped


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    db = Stepped(database_url)
    async with await AsyncConnection.connect(database_url, autocommit=True, row_factory=dict_row) as hand:
        stage = Stage(database_url, db, hand)
        yield stage
        for task in stage.tasks:
            task.cancel()
    await db.close()
