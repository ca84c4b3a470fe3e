"""A fleet is upgraded piece by piece: old and new software on one schema, which is migrated while turns run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from longshift.db.migrations import upgrade
from longshift.db.revision import newest
from longshift.embedded import Guardian, LocalRedis
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.support import history
from tests.support.databases import Databases, execute
from tests.support.fleet import Fleet
from tests.support.local_stack import call_inline

PAIRED = "workers/longshift/db/migrations/versions/0005_operate.py"
"""Since this migration old and new software may share a schema; what came before it is the oldest that may."""


@pytest.fixture
def old(
    databases: Databases, redis_server: LocalRedis, guardian: Guardian, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """A fleet of the software before, on a database of its time."""
    software = history.before(PAIRED, tmp_path_factory.mktemp("old"))
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    folder: Path = tmp_path_factory.mktemp("fleet")
    with databases.fresh() as url:
        execute(url, "DROP SCHEMA public CASCADE")
        execute(url, "CREATE SCHEMA public")
        upgrade(url, to="0004")
        with Fleet(folder, database_url=url, redis_url=redis_server.url, guardian=guardian, software=software) as fleet:
            fleet.start_api("old api")
            yield fleet


@pytest.fixture
def new(old: Fleet, guardian: Guardian) -> Iterator[Fleet]:
    """Processes of today's software, for the same fleet."""
    with Fleet(old.folder, database_url=old.database_url, redis_url=old.redis_url, guardian=guardian) as fleet:
        yield fleet


def test_a_fleet_is_migrated_and_replaced_while_turns_run(old: Fleet, new: Fleet) -> None:
    client, worker = old.client, old.start_worker("old worker")
    turns = [client.submit("loaded", n) for n in range(10)] + [client.submit("sleeper", 2) for _ in range(3)]
    gated = client.submit("gated", "upgrade")
    wait_until_sync(lambda: old.effects(gated, what="begun"), description="a step is at the gate")

    said = call_inline("migrate", folder=old.folder, database_url=old.database_url)
    assert said.code == 0, said.err
    assert client.turn(gated)["status"] == "running"
    replacement = new.start_worker("new worker")
    turns += [client.submit("loaded", n) for n in range(10, 20)]
    wait_until_sync(lambda: _works(replacement, old), description="the new worker works")
    assert worker.alive
    assert _revisions(old) == {None, newest()}
    worker.drain()
    old.open_gate("upgrade")
    assert worker.exit_code() == 0

    turns.append(gated)
    assert {client.wait(turn)["status"] for turn in turns} == {"succeeded"}
    done = Counter((effect.turn, effect.step) for effect in old.effects(what="done"))
    assert set(done.values()) == {1}
    assert {effect.pid for effect in old.effects(what="done")} == {worker.pid, replacement.pid}
    assert not [line for name in ("old worker", "new worker") for line in _errors(old.folder / f"{name}.log")]


def _works(process: Process, fleet: Fleet) -> bool:
    return any(effect.pid == process.pid for effect in fleet.effects(what="done"))


def _revisions(fleet: Fleet) -> set[str | None]:
    with psycopg.connect(fleet.database_url) as connection:
        return {row[0] for row in connection.execute("SELECT revision FROM workers WHERE dead_at IS NULL")}


def _errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if '"level": "error"' in line.lower() or "Traceback" in line]
