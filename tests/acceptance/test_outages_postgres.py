"""Postgres fails under load: workers live on, nothing is lost, and next to nothing is done twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import psycopg
import pytest

from longshift.embedded import Guardian, LocalPostgres
from longshift.model import Json
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import runs_of
from tests.acceptance.load import IN_FLIGHT, SETTINGS, finished_cleanly, last, running, under_load, wait_for_steps
from tests.support.databases import Databases, execute
from tests.support.fleet import Effect, Fleet
from tests.support.full_disk import FILL, can_mount, fill, move_to, small_disk
from tests.support.hanging import hanging

PAUSED = "postgres does not answer, turns are paused"


@pytest.fixture
def postgres(tmp_path: Path, guardian: Guardian) -> Iterator[LocalPostgres]:
    server = LocalPostgres(tmp_path / "postgres", guardian=guardian)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_databases(postgres: LocalPostgres) -> Databases:
    databases = Databases(postgres.url)
    databases.make_template()
    return databases


@pytest.fixture
def fleet(own_databases: Databases, redis_url: str, guardian: Guardian, tmp_path: Path) -> Iterator[Fleet]:
    with own_databases.fresh() as url, _fleet(url, redis_url, guardian, tmp_path) as fleet:
        yield fleet


@contextmanager
def _fleet(database_url: str, redis_url: str, guardian: Guardian, folder: Path) -> Iterator[Fleet]:
    with Fleet(folder, database_url=database_url, redis_url=redis_url, guardian=guardian, settings=SETTINGS) as fleet:
        fleet.start_api()
        yield fleet


def _restart(_: Fleet, server: LocalPostgres) -> None:
    server.restart(immediate=True)


def _gone(fleet: Fleet, server: LocalPostgres, *, seconds: float) -> None:
    server.kill()
    _assert_told_to_come_back(fleet)
    last(seconds)
    server.restart()


def _hung(fleet: Fleet, server: LocalPostgres, *, seconds: float) -> None:
    with hanging(server.pid):
        _assert_told_to_come_back(fleet)
        last(seconds)


def _crowded(fleet: Fleet, server: LocalPostgres, *, seconds: float) -> None:
    """Somebody else takes all connections, ours included."""
    with ExitStack() as taken, psycopg.connect(server.url, autocommit=True) as hand:
        hand.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'longshift%'")
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                taken.enter_context(contextlib.closing(psycopg.connect(server.url)))
        last(seconds)


def _assert_told_to_come_back(fleet: Fleet) -> None:
    def told() -> httpx.Response | None:
        answer = fleet.client.http.post("/v1/turns", json={"agent": "noop", "input": 1}, timeout=15)
        return answer if answer.status_code != 202 else None

    answer = wait_until_sync(told, description="a submission is refused")
    assert answer is not None
    assert (answer.status_code, answer.json()["retryable"], "Retry-After" in answer.headers) == (503, True, True)
    ready = fleet.client.http.get("/readyz", timeout=15)
    assert (ready.status_code, ready.json()["checks"]["postgres"]["status"]) == (503, "failed")


@pytest.mark.parametrize(
    "harm",
    [
        _restart,
        partial(_gone, seconds=8),  # longer than the time after which a silent worker is declared dead
        partial(_hung, seconds=8),
        partial(_crowded, seconds=4),
        pytest.param(partial(_gone, seconds=60), marks=pytest.mark.full),
        pytest.param(partial(_hung, seconds=60), marks=pytest.mark.full),
    ],
    ids=["restarted", "gone", "hung", "crowded", "gone for a minute", "hung for a minute"],
)
@pytest.mark.timeout(240)
def test_postgres_lost_under_load_kills_no_worker_and_repeats_hardly_a_step(
    fleet: Fleet, postgres: LocalPostgres, harm: Callable[[Fleet, LocalPostgres], None]
) -> None:
    workers, batch = under_load(fleet)
    in_the_air = running(fleet.effects())
    assert in_the_air >= IN_FLIGHT // 2
    harm(fleet, postgres)
    effects = finished_cleanly(fleet, batch)

    _assert_well(workers)
    assert all(PAUSED in worker.log() for worker in workers)
    repeated = sum(count - 1 for count in runs_of(effects).values())
    print(f"{repeated} of {in_the_air} running steps ran again")
    assert repeated <= in_the_air * 0.05, f"{repeated} of {in_the_air} running steps ran again"


def _assert_well(workers: list[Process]) -> None:
    assert all(worker.alive for worker in workers)
    assert not any("workers declared dead" in worker.log() for worker in workers)
    assert not any("Traceback" in worker.log() for worker in workers)


# --------------------------------------------------------------------------------------------- loses commits


@pytest.fixture
def forgetful(postgres: LocalPostgres) -> LocalPostgres:
    """Keeps what it acknowledges in memory for seconds, where its databases allow it."""
    for setting in (
        "wal_writer_delay = '10s'",
        "wal_writer_flush_after = '1GB'",
        "full_page_writes = off",
        "autovacuum = off",
    ):
        execute(postgres.url, f"ALTER SYSTEM SET {setting}")
    execute(postgres.url, "SELECT pg_reload_conf()")
    return postgres


def test_turns_go_on_from_what_the_log_still_has_when_postgres_has_lost_acknowledged_commits(
    forgetful: LocalPostgres, fleet: Fleet
) -> None:
    """What a failover to a lagging replica does, done by a crash without synchronous commits."""
    name = fleet.database_url.rsplit("/", 1)[1].split("?")[0]
    execute(forgetful.url, "ALTER DATABASE {name} SET synchronous_commit = off", name=name)  # of workers: the API is up
    workers, batch = under_load(fleet)
    wait_for_steps(fleet, "begun", "step-2", 20)
    with hanging(forgetful.pid):  # so that nothing of it can still write while it dies
        before = fleet.effects()
        forgetful.kill()
    forgetful.restart()
    effects = finished_cleanly(fleet, batch)

    _assert_well(workers)
    lost = _forgotten(before, effects[len(before) :])
    print(f"{len(lost)} acknowledged steps were lost and ran again")
    assert lost, "the crash lost nothing: the test shows nothing"
    assert all("lease lost" in worker.log() or PAUSED in worker.log() for worker in workers)


def _forgotten(before: list[Effect], after: list[Effect]) -> set[tuple[str, str]]:
    """Steps that ran again although their result had been acknowledged: the step after them had begun."""
    begun = {(e.turn, e.step) for e in before if e.what == "begun"}
    acknowledged = {(turn, f"step-{i}") for i in range(3) for turn, step in begun if step == f"step-{i + 1}"}
    return {(e.turn, e.step) for e in after if e.what == "begun"} & acknowledged


# ----------------------------------------------------------------------------------------------- no space left


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system is not permitted here")
def test_work_waits_while_the_disk_of_postgres_is_full(
    own_databases: Databases, postgres: LocalPostgres, redis_url: str, guardian: Guardian, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as disk, own_databases.fresh() as url:
        name = url.rsplit("/", 1)[1].split("?")[0]
        move_to(disk, server_url=postgres.url, name=name)
        with _fleet(url, redis_url, guardian, tmp_path) as fleet:
            workers, batch = under_load(fleet)
            execute(url, "CREATE TABLE filler (text text)")
            assert fill(url, FILL) == "53100"
            accepted = _until_refused(fleet)
            wait_until_sync(
                lambda: all(PAUSED in worker.log() for worker in workers), description="the workers are paused"
            )
            last(3)
            tries = [worker.log().count(PAUSED) for worker in workers]
            execute(url, "DROP TABLE filler")
            effects = finished_cleanly(fleet, batch)

            assert {fleet.client.wait(turn)["status"] for turn in accepted} <= {"succeeded"}
            assert max(runs_of(effects).values()) == 1
            assert max(tries) < 20, "it tries again and again without a pause"
            _assert_well(workers)
        execute(postgres.url, "DROP DATABASE {name} WITH (FORCE)", name=name)
        execute(postgres.url, "DROP TABLESPACE small")
        execute(postgres.url, "CREATE DATABASE {name}", name=name)  # for its fixture to drop


def _until_refused(fleet: Fleet) -> list[Json]:
    """Submit until the last page is full; what was accepted until then."""
    accepted: list[Json] = []
    while True:
        answer = fleet.client.http.post("/v1/turns", json={"agent": "noop", "input": 1}, timeout=15)
        if answer.status_code != 202:
            assert (answer.status_code, answer.json()["retryable"]) == (503, True)
            return accepted
        accepted.append(answer.json())
