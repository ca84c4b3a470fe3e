"""What agents see of earlier turns, on a fleet of real processes whose Redis forgets everything at the worst moment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from longshift.embedded import Guardian, LocalRedis
from longshift.model import Json
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import digest
from tests.support.databases import Databases
from tests.support.fleet import AGENTS, Fleet

ROUNDS = 3
FLUSHED = 2
"""In the last of them, when contexts come from Redis and all turns run; some leave their worker then, and come again."""


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
        Fleet(tmp_path, database_url=url, redis_url=own_redis.url, guardian=guardian) as fleet,
    ):
        fleet.agents = f"{AGENTS},tests.acceptance.context_agents"
        fleet.start_api()
        yield fleet


class Session:
    """A session, and what its agent must see."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.id: str | None = None
        self.history: list[Any] = []
        self.total = 0

    def asks(self, turn: int, *, gate: str | None) -> dict[str, Json]:
        n = 10 * self.number + turn
        asked = {"n": n, "gate": gate}
        self.history.append(asked)
        self.total += n
        return asked

    def answers(self, n: int) -> dict[str, Json]:
        """What the turn must return; it is in the history then."""
        answer = {"saw": digest(self.history), "messages": len(self.history), "total": self.total}
        self.history += [f"noted {n}", answer]
        return answer


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.full)])
def test_redis_forgets_everything_while_turns_run_and_no_result_changes(
    fleet: Fleet, own_redis: LocalRedis, count: int
) -> None:
    workers = [fleet.start_worker(name, metrics_port=0, capacity=count) for name in "ab"]
    sessions = [Session(number) for number in range(count)]
    for turn in range(ROUNDS):
        gate = "flush" if turn == FLUSHED else None
        turns = [_submit(fleet, session, session.asks(turn, gate=gate)) for session in sessions]
        if gate is not None:
            _until_all_are_at_the_gate(fleet, count)
            with redis.Redis.from_url(own_redis.url) as client:
                client.flushall()
            fleet.open_gate(gate)
        for session, submitted in zip(sessions, turns, strict=True):
            ended = fleet.client.wait(submitted, limit=120)
            assert ended["output"] == session.answers(ended["input"]["n"]), (turn, ended)

    assert _restored(workers, "hot") > 0
    assert _restored(workers, "warm") >= count
    assert not any("not the fold" in worker.log() for worker in workers)


def _submit(fleet: Fleet, session: Session, asked: dict[str, Json]) -> Json:
    turn = fleet.client.submit("remembering", asked, session=session.id)
    session.id = turn["session_id"]
    return turn


def _until_all_are_at_the_gate(fleet: Fleet, count: int) -> None:
    def there() -> bool:
        return sum(effect.step == "gate" for effect in fleet.effects(what="begun")) == count

    wait_until_sync(there, description="all turns run", limit=120)


def _restored(workers: list[Process], tier: str) -> float:
    """Contexts that these workers say they had from there."""
    line = re.compile(rf'^longshift_contexts_restored_total{{tier="{tier}"}} (\S+)$', re.MULTILINE)
    return sum(
        float(found) for worker in workers for found in line.findall(httpx.get(f"{worker.metrics_url}/metrics").text)
    )
