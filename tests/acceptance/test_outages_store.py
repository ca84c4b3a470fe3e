"""The artifact store fails: turns wait for it, nothing is half there, and everything else goes on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from longshift.embedded import Guardian
from longshift.model import Json
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_no_finished_step_ran_again, assert_recorded_once
from tests.support.databases import Databases
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.fleet import AGENTS, Fleet
from tests.support.object_store import BUCKET, ObjectServer

TURNS = 20
WAITS = "a turn waits for the artifact store"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with ObjectServer() as server:
            yield server


@pytest.fixture
def proxy(server: ObjectServer) -> Iterator[FaultProxy]:
    port = urlsplit(server.endpoint).port
    assert port is not None
    with FaultProxy(port, cut_after=10) as proxy:
        yield proxy


@pytest.fixture
def fleet(
    databases: Databases, redis_url: str, guardian: Guardian, tmp_path: Path, proxy: FaultProxy
) -> Iterator[Fleet]:
    url = f"s3://{BUCKET}/{tmp_path.name.lower()}?region=us-east-1&endpoint_url={proxy.url}"
    settings = {"artifacts_url": url, "agents": f"{AGENTS},tests.acceptance.store_agents", "connect_timeout": 2}
    with (
        databases.fresh() as database_url,
        Fleet(tmp_path, database_url=database_url, redis_url=redis_url, guardian=guardian, settings=settings) as fleet,
    ):
        fleet.start_api()
        yield fleet


def _worker(fleet: Fleet, name: str, *, drain_grace: float = 10) -> Process:
    return fleet.start_worker(name, agents=fleet.settings["agents"], drain_grace=drain_grace)


def _until_it_waits(worker: Process, turns: int = 1) -> None:
    wait_until_sync(lambda: worker.log().count(WAITS) >= turns, description=f"{turns} turns wait", limit=60)


def _keepers(fleet: Fleet, gate: str, count: int = TURNS) -> Json:
    turns = [{"agent": "keeper", "input": n, "metadata": {"gate": gate}} for n in range(count)]
    batch = fleet.client.submit_batch(turns)
    done = fleet.effects
    wait_until_sync(
        lambda: sum(e.what == "done" and e.step == "before" for e in done()) >= count, description="all are at the gate"
    )
    return batch


def _readiness(fleet: Fleet) -> tuple[int, Json]:
    answer = fleet.client.http.get("/readyz", timeout=10)
    return answer.status_code, answer.json()["checks"]


@pytest.mark.parametrize(
    "fault", [Fault.REFUSED, Fault.UNAVAILABLE, Fault.CUT, pytest.param(Fault.SILENT, marks=pytest.mark.full)]
)
def test_turns_wait_for_the_artifact_store_and_all_others_go_on(
    fleet: Fleet, server: ObjectServer, proxy: FaultProxy, fault: Fault
) -> None:
    worker = _worker(fleet, "a")
    batch = _keepers(fleet, "store")
    stored = {entry["Key"] for entry in server.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
    proxy.suffer(fault)
    fleet.open_gate("store")
    _until_it_waits(worker, TURNS if fault is not Fault.SILENT else 1)

    others = fleet.client.submit_batch([{"agent": "noop", "input": n} for n in range(50)])
    assert {turn["status"] for turn in fleet.client.wait_batch(others)} == {"succeeded"}
    refused = fleet.client.http.post("/v1/artifacts?name=x", content=b"bytes", timeout=120)
    assert (refused.status_code, refused.json()["retryable"], "Retry-After" in refused.headers) == (503, True, True)
    if fault is not Fault.CUT:  # there the bytes arrive, and their answer does not: no row points to them
        now_stored = {entry["Key"] for entry in server.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
        assert now_stored == stored
        status, checks = _readiness(fleet)
        assert (status, checks["artifacts"]["status"], checks["postgres"]["status"]) == (503, "failed", "ok")
    proxy.suffer(Fault.NONE)

    _assert_all_kept(fleet, batch)
    assert worker.alive
    assert fleet.client.request("POST", "/v1/artifacts?name=x", content=b"bytes").status_code == 201


def _assert_all_kept(fleet: Fleet, batch: Json, *, attempts: int = 1) -> None:
    turns = fleet.client.wait_batch(batch)
    assert [(t["status"], t["attempts"]) for t in turns] == [("succeeded", attempts)] * len(turns)
    assert [t["output"] for t in turns] == [f"page {2 * n}" for n in range(len(turns))]
    for turn in turns:
        events = fleet.client.events(turn)
        assert_gap_free(events)
        assert_recorded_once(events)
        assert_no_finished_step_ran_again(events, fleet.effects(turn))


def test_a_drain_does_not_wait_for_the_store_and_the_turn_goes_on_elsewhere(fleet: Fleet, proxy: FaultProxy) -> None:
    worker = _worker(fleet, "a", drain_grace=600)  # only who need not wait at all ends in time
    batch = _keepers(fleet, "drain", 3)
    proxy.suffer(Fault.REFUSED)
    fleet.open_gate("drain")
    _until_it_waits(worker, 3)
    worker.drain()
    assert worker.exit_code(limit=30) == 0

    proxy.suffer(Fault.NONE)
    _worker(fleet, "b")
    _assert_all_kept(fleet, batch, attempts=2)


def test_a_turn_that_waits_for_the_store_can_be_cancelled_and_expires_at_its_deadline(
    fleet: Fleet, proxy: FaultProxy
) -> None:
    worker = _worker(fleet, "a")
    proxy.suffer(Fault.REFUSED)
    cancelled = fleet.client.submit("keeper", 1)
    deadline = datetime.now(UTC) + timedelta(seconds=5)
    expiring = fleet.client.submit("keeper", 2, deadline=deadline.isoformat())
    _until_it_waits(worker, 2)
    fleet.client.cancel(cancelled)

    assert fleet.client.wait(cancelled)["status"] == "cancelled"
    assert fleet.client.wait(expiring)["status"] == "expired"
    assert worker.alive


def test_a_missing_artifact_is_no_outage(fleet: Fleet, server: ObjectServer) -> None:
    """Waiting would not bring it back."""
    _worker(fleet, "a")
    artifact = fleet.client.request("POST", "/v1/artifacts?name=x", content=b"bytes").json()
    for entry in server.client.list_objects_v2(Bucket=BUCKET)["Contents"]:
        server.client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    turn = fleet.client.wait(fleet.client.submit("reader", artifact["id"]))
    assert (turn["status"], turn["error"]["code"]) == ("failed", "not_found")


def test_an_artifact_folder_that_cannot_be_written_is_waited_for(
    databases: Databases, redis_url: str, guardian: Guardian, tmp_path: Path
) -> None:
    settings = {"agents": f"{AGENTS},tests.acceptance.store_agents"}
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=redis_url, guardian=guardian, settings=settings) as fleet,
    ):
        fleet.start_api()
        worker = _worker(fleet, "a")
        batch = _keepers(fleet, "folder")
        folder, away = tmp_path / "artifacts", tmp_path / "away"
        folder.rename(away)  # an unmounted volume
        fleet.open_gate("folder")
        _until_it_waits(worker, TURNS)
        assert fleet.client.http.post("/v1/artifacts?name=x", content=b"x").status_code == 503
        assert _readiness(fleet)[0] == 503
        away.rename(folder)
        _assert_all_kept(fleet, batch)
