"""Wake-ups may be lost or doubled: turns of a session still run in order, one at a time, and none is forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from uuid_utils.compat import uuid7

from longshift.embedded import Guardian, LocalRedis
from longshift.model import Json
from longshift.testing.meddler import Meddler
from tests.support.databases import Databases
from tests.support.fleet import Fleet

ROUNDS = 4
AT_ONCE = 20
PATIENT = {"lease_ttl": 15}  # three busy workers on a small machine: nobody shall be declared dead


@pytest.fixture
def meddler(redis_server: LocalRedis, redis_url: str) -> Iterator[Meddler]:
    with Meddler(redis_url, drop=0.1, double=0.1) as meddler:
        yield meddler


@pytest.fixture
def fleet(databases: Databases, meddler: Meddler, guardian: Guardian, tmp_path: Path) -> Iterator[Fleet]:
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=meddler.url, guardian=guardian, settings=PATIENT) as fleet,
    ):
        fleet.start_api()
        for name in "abc":
            fleet.start_worker(name, capacity=100)
        yield fleet


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.full)])
def test_turns_keep_their_order_when_a_tenth_of_wakeups_is_lost_and_a_tenth_doubled(
    fleet: Fleet, meddler: Meddler, count: int
) -> None:
    sessions = [f"ses_{uuid7().hex}" for _ in range(count)]
    first = _submit(fleet, sessions, [0])  # each turn with a wake-up of its own: what is lost must be rung again
    turns = _wait(fleet, first)
    turns += _wait(fleet, _submit(fleet, sessions, range(1, ROUNDS)))  # these meet their sessions in every state

    assert len(turns) == count * ROUNDS
    assert {(turn["status"], turn["attempts"]) for turn in turns} == {("succeeded", 1)}
    lines = defaultdict(list)
    for effect in fleet.effects():
        if effect.what in ("entered", "left"):
            lines[effect.more["session"]].append((effect.what, effect.more["place"]))
    expected = [(what, place) for place in range(ROUNDS) for what in ("entered", "left")]
    assert lines.keys() == set(sessions)
    assert [session for session, found in lines.items() if found != expected] == []
    total = meddler.passed + meddler.dropped + meddler.doubled
    assert meddler.dropped > total // 20
    assert meddler.doubled > total // 20


def _submit(fleet: Fleet, sessions: list[str], rounds: Iterable[int]) -> list[Json]:
    return [
        fleet.client.submit_batch([{"agent": "ordered", "input": place, "session_id": s} for s in some])
        for place in rounds
        for some in (sessions[i : i + AT_ONCE] for i in range(0, len(sessions), AT_ONCE))
    ]


def _wait(fleet: Fleet, batches: list[Json]) -> list[Json]:
    return [turn for batch in batches for turn in fleet.client.wait_batch(batch)]
