"""What a worker's row says of it, and what its heartbeat brings back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import pytest

from longshift.clock import SYSTEM
from longshift.config import Config
from longshift.db import migrations, revision
from longshift.db.liveness import Answer, Liveness, Member, Pulse
from longshift.heartbeat import Heartbeat
from longshift.hot import Hot
from longshift.metrics import WorkerMetrics
from longshift.model import Condition, new_id
from longshift.sweeper import Sweeper
from tests.integration.protocol.stage import Stage
from tests.integration.protocol.test_rescue import LONG_AGO, server_looks_old


@pytest.fixture
def liveness(stage: Stage) -> Iterator[Liveness]:
    liveness = Liveness(stage.url, stuck_after=timedelta(seconds=30))
    yield liveness
    liveness.close()


def register(liveness: Liveness) -> UUID:
    worker = new_id()
    serves = [("triage", "3"), ("triage", "4")]
    member = Member("here", 1, ["default", "gpu"], 10, new_id(), version="1.2", revision="0005", serves=serves)
    liveness.register(worker, member)
    return worker


def beat(
    liveness: Liveness, worker: UUID, *, condition: Condition | None = None, complaint: str | None = None
) -> Answer:
    pulse = Pulse(0, timedelta(0), draining=False, condition=condition, complaint=complaint)
    answer = liveness.beat(worker, pulse, want_leader=False)
    assert answer is not None
    return answer


async def test_a_row_says_which_software_it_is_what_it_serves_and_how_it_is(stage: Stage, liveness: Liveness) -> None:
    worker = register(liveness)
    beat(liveness, worker, condition=Condition.STUCK, complaint="no work taken for 31 s")

    row = await stage.one("SELECT version, revision, serves, condition, complaint FROM workers WHERE id = %s", worker)
    assert row == {
        "version": "1.2",
        "revision": "0005",
        "serves": [["triage", "3"], ["triage", "4"]],
        "condition": "stuck",
        "complaint": "no work taken for 31 s",
    }


async def test_a_heartbeat_brings_the_wish_of_an_operator(stage: Stage, liveness: Liveness) -> None:
    worker = register(liveness)
    assert not beat(liveness, worker).drain

    await stage.hand.execute("UPDATE workers SET drain_asked_at = clock_timestamp() WHERE id = %s", (worker,))
    assert beat(liveness, worker).drain


@pytest.mark.parametrize(
    ("queue", "age", "suspect", "overdue"),
    [
        pytest.param("gpu", 31, None, True, id="ready for too long"),
        pytest.param("gpu", 29, None, False, id="ready for a while"),
        pytest.param("other", 31, None, False, id="not ours"),
        pytest.param("gpu", 31, 1, False, id="for wards only"),
        pytest.param("gpu", -60, None, False, id="not yet ready"),
    ],
)
async def test_a_heartbeat_finds_work_that_is_overdue(
    stage: Stage, liveness: Liveness, queue: str, age: int, suspect: int | None, *, overdue: bool
) -> None:
    worker = register(liveness)
    session, _ = await stage.submit()
    await stage.hand.execute(
        "UPDATE sessions SET queue = %s, suspect = %s, ready_at = clock_timestamp() - make_interval(secs => %s)"
        " WHERE id = %s",
        (queue, suspect, age, session),
    )
    assert beat(liveness, worker).overdue is overdue

    await stage.hand.execute("UPDATE sessions SET lease_worker = %s WHERE id = %s", (new_id(), session))
    assert not beat(liveness, worker).overdue


async def test_a_sweeper_counts_whom_it_buries_and_what_it_rescues(stage: Stage, redis_url: str) -> None:
    await server_looks_old(stage)
    for worker in (await stage.worker(heartbeat_age=20), await stage.worker()):
        await stage.running(worker)
    row = await stage.one("SELECT clock_timestamp() AS now")
    seen = cast(Heartbeat, SimpleNamespace(watching_since=LONG_AGO, seen_at=row["now"]))
    hot, metrics = Hot(redis_url), WorkerMetrics()
    sweeper = Sweeper(stage.db, hot, heartbeat=seen, config=Config(), clock=SYSTEM, metrics=metrics)
    await sweeper.rescue()
    await hot.close()

    figures = [f"longshift_{name}_total" for name in ("workers_buried", "leases_rescued")]
    assert [metrics.registry.get_sample_value(name) for name in figures] == [1, 1]


def test_the_newest_revision_is_known_without_alembic() -> None:
    assert revision.newest() == migrations.head()
