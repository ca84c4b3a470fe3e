"""Redis goes away under load: submission goes on, turns that run go on, and what waited starts when it is back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import redis

from longshift.embedded import Guardian, LocalRedis
from longshift.model import Json
from longshift.testing.fleet import Process
from tests.acceptance.checks import runs_of
from tests.acceptance.load import SETTINGS, finished_cleanly, last, under_load
from tests.support.databases import Databases
from tests.support.fleet import Fleet
from tests.support.hanging import hanging

Harm = Callable[[Fleet, LocalRedis], list[Json]]


@pytest.fixture
def own_redis(tmp_path: Path, guardian: Guardian) -> Iterator[LocalRedis]:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def fleet(databases: Databases, own_redis: LocalRedis, guardian: Guardian, tmp_path: Path) -> Iterator[Fleet]:
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=own_redis.url, guardian=guardian, settings=SETTINGS) as fleet,
    ):
        fleet.start_api()
        yield fleet


def _submit(fleet: Fleet) -> list[Json]:
    """Accepted, whatever Redis does; the client gives up after 10 s."""
    fleet.client.http.timeout = 10
    turns = [fleet.client.submit("noop", n) for n in range(20)]
    polled = [fleet.client.turn(turn) for turn in turns]
    assert {turn["status"] for turn in polled} <= {"queued", "running", "succeeded"}
    assert fleet.client.http.get("/readyz").json()["status"] in ("ok", "degraded")
    return turns


def _killed_and_started(fleet: Fleet, server: LocalRedis) -> list[Json]:
    server.kill()
    server.restart()
    return _submit(fleet)


def _flushed(fleet: Fleet, server: LocalRedis) -> list[Json]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return _submit(fleet)


def _gone(fleet: Fleet, server: LocalRedis, *, seconds: float) -> list[Json]:
    server.kill()
    turns = _submit(fleet)
    last(seconds)
    turns += _submit(fleet)
    server.restart()
    return turns


def _hung(fleet: Fleet, server: LocalRedis, *, seconds: float) -> list[Json]:
    with hanging(server.pid):
        turns = _submit(fleet)
        last(seconds)
        return turns + _submit(fleet)


@pytest.mark.parametrize(
    "harm",
    [
        _killed_and_started,
        pytest.param(_flushed, marks=pytest.mark.full),
        partial(_gone, seconds=4),
        partial(_hung, seconds=8),  # longer than the time after which a worker calls it lost
        pytest.param(partial(_gone, seconds=60), marks=pytest.mark.full),
        pytest.param(partial(_hung, seconds=60), marks=pytest.mark.full),
    ],
    ids=["killed", "flushed", "gone", "hung", "gone for a minute", "hung for a minute"],
)
@pytest.mark.timeout(240)
def test_redis_lost_under_load_delays_turns_and_loses_none(fleet: Fleet, own_redis: LocalRedis, harm: Harm) -> None:
    workers, batch = under_load(fleet)
    more = fleet.client.submit_batch([{"agent": "noop", "input": n} for n in range(500)])
    turns = harm(fleet, own_redis)
    effects = finished_cleanly(fleet, batch)

    assert {turn["status"] for turn in fleet.client.wait_batch(more)} == {"succeeded"}
    assert {fleet.client.wait(turn)["status"] for turn in turns} == {"succeeded"}
    assert max(runs_of(effects).values()) == 1
    _assert_well(fleet, workers)


def test_turns_that_run_end_while_redis_is_away(fleet: Fleet, own_redis: LocalRedis) -> None:
    """It carries wake-ups and news; the work itself does not need it."""
    workers, batch = under_load(fleet)
    own_redis.kill()
    finished_cleanly(fleet, batch)
    own_redis.restart()
    _assert_well(fleet, workers)


def test_turns_submitted_while_redis_is_away_are_accepted_and_run_when_it_is_back(
    fleet: Fleet, own_redis: LocalRedis
) -> None:
    workers = [fleet.start_worker("a")]
    own_redis.kill()
    turns = [fleet.client.submit("noop", n) for n in range(5)]
    assert {fleet.client.turn(turn)["status"] for turn in turns} == {"queued"}
    own_redis.restart()

    assert [fleet.client.wait(turn)["status"] for turn in turns] == ["succeeded"] * 5
    _assert_well(fleet, workers)


def _assert_well(fleet: Fleet, workers: list[Process]) -> None:
    """Nobody died, nobody was called dead, and new work is taken as ever: the consumers have come back."""
    assert all(worker.alive for worker in workers)
    assert not any("workers declared dead" in worker.log() for worker in workers)
    batch = fleet.client.submit_batch([{"agent": "noop", "input": n} for n in range(50)])
    assert {turn["status"] for turn in fleet.client.wait_batch(batch)} == {"succeeded"}
