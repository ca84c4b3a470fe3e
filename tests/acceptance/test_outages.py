"""Postgres or Redis goes away under load: workers live on, nothing is lost, and next to nothing is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis

from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.model import Json
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_no_finished_step_ran_again, assert_recorded_once, runs_of
from tests.support.databases import Databases
from tests.support.fleet import Effect, Fleet

TURNS = 300
IN_FLIGHT = 200
SETTINGS = {"lease_ttl": 5, "lock_grace": 2, "heartbeat": 0.5}


@pytest.fixture
def postgres(tmp_path: Path, guardian: Guardian) -> Iterator[LocalPostgres]:
    server = LocalPostgres(tmp_path / "postgres", guardian=guardian)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path, guardian: Guardian) -> Iterator[LocalRedis]:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    server.start()
    yield server
    server.stop()


def _under_load(fleet: Fleet) -> tuple[list[Process], Json]:
    """Two workers, and a batch of which most turns are past their first step."""
    fleet.start_api()
    workers = [fleet.start_worker(name) for name in "ab"]
    turns = [{"agent": "loaded", "input": n, "metadata": {"gate": "load"}} for n in range(TURNS)]
    batch = fleet.client.submit_batch(turns)
    _wait_for_steps(fleet, "begun", "start", TURNS)
    fleet.open_gate("load")
    _wait_for_steps(fleet, "begun", "step-0", IN_FLIGHT)
    return workers, batch


def _wait_for_steps(fleet: Fleet, what: str, step: str, count: int) -> None:
    def enough() -> bool:
        return sum(e.what == what and e.step == step for e in fleet.effects()) >= count

    wait_until_sync(enough, description=f"{count} steps {step!r} have {what}", limit=60)


def _running(effects: Sequence[Effect]) -> int:
    """Steps that have begun and not ended."""
    begun = {(e.turn, e.step) for e in effects if e.what == "begun"}
    return len(begun - {(e.turn, e.step) for e in effects if e.what == "done"})


def _assert_finished_cleanly(fleet: Fleet, batch: Json) -> list[Effect]:
    turns = fleet.client.wait_batch(batch, limit=60)
    assert len(turns) == TURNS
    assert {turn["status"] for turn in turns} == {"succeeded"}
    effects = fleet.effects()
    for turn in turns:
        events = fleet.client.events(turn)
        assert_gap_free(events)
        assert_recorded_once(events)
        assert_no_finished_step_ran_again(events, [e for e in effects if e.turn == turn["id"]])
    return effects


def test_postgres_restarted_under_load_kills_no_worker_and_repeats_hardly_a_step(
    postgres: LocalPostgres, redis_url: str, guardian: Guardian, tmp_path: Path
) -> None:
    databases = Databases(postgres.url)
    databases.make_template()
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=redis_url, guardian=guardian, settings=SETTINGS) as fleet,
    ):
        workers, batch = _under_load(fleet)
        running = _running(fleet.effects())
        assert running >= IN_FLIGHT
        postgres.restart(immediate=True)
        effects = _assert_finished_cleanly(fleet, batch)

        assert all(worker.alive for worker in workers)
        assert all("postgres does not answer" in worker.log() for worker in workers)
        repeated = sum(count - 1 for count in runs_of(effects).values())
        print(f"{repeated} of {running} running steps ran again")
        assert repeated <= running * 0.05, f"{repeated} of {running} running steps ran again"


def _kill_and_start(server: LocalRedis) -> None:
    server.kill()
    server.restart()


def _flush(server: LocalRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


@pytest.mark.parametrize("harm", [_kill_and_start, pytest.param(_flush, marks=pytest.mark.full)])
def test_redis_lost_under_load_delays_turns_and_loses_none(
    databases: Databases,
    own_redis: LocalRedis,
    guardian: Guardian,
    tmp_path: Path,
    harm: Callable[[LocalRedis], None],
) -> None:
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=own_redis.url, guardian=guardian, settings=SETTINGS) as fleet,
    ):
        workers, batch = _under_load(fleet)
        more = fleet.client.submit_batch([{"agent": "noop", "input": n} for n in range(500)])
        harm(own_redis)
        effects = _assert_finished_cleanly(fleet, batch)

        assert {turn["status"] for turn in fleet.client.wait_batch(more)} == {"succeeded"}
        assert all(worker.alive for worker in workers)
        assert max(runs_of(effects).values()) == 1


def test_turns_submitted_while_redis_is_away_are_accepted_and_run_when_it_is_back(
    databases: Databases, own_redis: LocalRedis, guardian: Guardian, tmp_path: Path
) -> None:
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=own_redis.url, guardian=guardian, settings=SETTINGS) as fleet,
    ):
        fleet.start_api()
        fleet.start_worker("a")
        own_redis.kill()
        turns = [fleet.client.submit("noop", n) for n in range(5)]
        own_redis.restart()

        assert [fleet.client.wait(turn)["status"] for turn in turns] == ["succeeded"] * 5
