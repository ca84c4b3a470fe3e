"""Two real workers, one of them killed, and a collector: one trace from the request to the model call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync
from tests.support.collector import Spans, collecting
from tests.support.databases import Databases
from tests.support.fleet import Fleet

CALLER = "0af7651916cd43dd8448eb211c80319c"
SECRET = "the-password-of-the-customer"


@pytest.fixture
def traced_fleet(
    databases: Databases, redis_url: str, guardian: Guardian, tmp_path: Path
) -> Iterator[tuple[Fleet, Spans]]:
    with collecting() as (url, spans), databases.fresh() as database_url:
        settings = {"traces": "otlp"}
        fleet = Fleet(tmp_path, database_url=database_url, redis_url=redis_url, guardian=guardian, settings=settings)
        fleet.agents = "tests.acceptance.trace_agents"
        fleet.environment = {
            **fleet.environment,
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "20",
        }
        with fleet:
            fleet.start_api()
            yield fleet, spans


def test_a_killed_worker_leaves_its_steps_in_the_trace_that_the_next_one_continues(
    traced_fleet: tuple[Fleet, Spans],
) -> None:
    fleet, spans = traced_fleet
    workers = {worker.pid: worker for worker in (fleet.start_worker(name, ready=False) for name in "ab")}
    for worker in workers.values():
        fleet.wait_ready(worker)
    headers = {"traceparent": f"00-{CALLER}-b7ad6b7169203331-01"}
    body = {"agent": "traced", "input": SECRET}
    turn = fleet.client.request("POST", "/v1/turns", json=body, headers=headers).json()
    wait_until_sync(lambda: bool(fleet.effects(turn)), description="the turn is at the gate")
    wait_until_sync(lambda: bool(spans.named("step save")), description="the spans before have been sent")
    workers[fleet.effects(turn)[0].pid].kill()
    fleet.open_gate(SECRET)
    ended = fleet.client.wait(turn)
    fleet.stop(*fleet.processes)  # which sends what is left

    assert (ended["status"], len(set(ended["output"])), ended["attempts"]) == ("succeeded", 2, 2)
    request, second = spans.one("POST /v1/turns"), spans.one("turn traced")
    assert (request.trace, request.service, second.parent) == (CALLER, "longshift-api", request.id)
    assert second.attributes["longshift.attempt"] == 2
    assert spans.below(second) == ["step at the gate", "step model:test", "step look"]
    assert spans.below(spans.one("step model:test")) == ["chat test"]
    first_look, last_look = spans.named("step look")
    lost = first_look.parent  # the span of the attempt that died was sent by nobody
    assert [(each.name, each.trace, each.parent) for each in (first_look, spans.one("step save"))] == [
        ("step look", CALLER, lost),
        ("step save", CALLER, lost),
    ]
    assert last_look.parent == second.id != lost
    assert [span.name for span in spans.found if SECRET in span.told] == []
