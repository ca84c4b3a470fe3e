"""What the parent of a worker process learns and does when that has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from longshift import deaths
from longshift.db import upkeep
from longshift.db.liveness import REGISTER
from longshift.hot import Hot
from longshift.model import new_id
from tests.integration.protocol.stage import SOFTWARE, Stage


@pytest.fixture
async def hot(redis_url: str) -> AsyncIterator[Hot]:
    hot = Hot(redis_url)
    yield hot
    await hot.close()


async def test_a_process_that_exits_with_code_0_and_has_not_signed_off_has_crashed(stage: Stage, hot: Hot) -> None:
    process, worker = new_id(), new_id()
    row = {"id": worker, "host": "here", "pid": 1, "queues": ["default"], "capacity": 10, "lock_key": None}
    await stage.db.execute(REGISTER, row | SOFTWARE | {"process": process, "isolated": False})
    claim, _ = await stage.running(worker)

    assert await deaths.report(stage.db, hot, process=process, code=0)
    row = await stage.row(claim.session_id)
    assert (row["lease_worker"], row["suspect"], row["crashes"]) == (None, 1, 1)
    assert not await deaths.report(stage.db, hot, process=process, code=0), "now it has signed off"


async def test_a_process_that_was_declared_dead_before_its_report_had_served(stage: Stage, hot: Hot) -> None:
    process, worker = new_id(), new_id()
    row = {"id": worker, "host": "here", "pid": 1, "queues": ["default"], "capacity": 10, "lock_key": None}
    await stage.db.execute(REGISTER, row | SOFTWARE | {"process": process, "isolated": False})
    await stage.kill(worker)
    await upkeep.rescue(stage.db)

    assert await deaths.report(stage.db, hot, process=process, code=70)
    assert not await deaths.report(stage.db, hot, process=new_id(), code=70), "that one never became a worker"
