"""What processes answer when they are asked how they are, while what they need goes away, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from longshift.cli.app import app
from longshift.db import migrations
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.errors import Unavailable
from longshift.model import Json
from longshift.testing.fleet import Process
from longshift.testing.waiting import wait_until_sync
from tests.support.fleet import Fleet

SETTINGS = {"metrics_port": 0, "database_timeout": 2, "connect_timeout": 2}
Answers = dict[str, tuple[int, str]]


class Site:
    """Servers of its own, a worker, an API process and an exporter."""

    def __init__(self, fleet: Fleet, postgres: LocalPostgres, redis: LocalRedis) -> None:
        self.fleet, self.postgres, self.redis = fleet, postgres, redis
        self.processes = {
            "api": fleet.start_api(),
            "worker": fleet.start_worker("worker"),
            "exporter": fleet.start_exporter(),
        }
        self.http = httpx.Client(timeout=10, trust_env=False)

    def ask(self, process: Process, path: str) -> tuple[int, Json]:
        answer = self.http.get(f"{process.metrics_url}{path}")
        return answer.status_code, answer.json()

    def ready(self) -> Answers:
        """The code and the status with which each says whether it is ready."""
        found = {name: self.ask(process, "/readyz") for name, process in self.processes.items()}
        return {name: (code, body["status"]) for name, (code, body) in found.items()}

    def until(self, expected: Answers) -> None:
        wait_until_sync(lambda: self.ready() == expected, description=f"they say {expected}")

    def all_live_and_none_stuck(self) -> bool:
        live = all(self.ask(process, "/livez")[0] == 200 for process in self.processes.values())
        return live and self.ask(self.processes["worker"], "/stuckz")[0] == 200

    def figure(self, name: str, *, of: str) -> list[float]:
        text = self.http.get(f"{self.processes[of].metrics_url}/metrics").text
        return [float(value) for value in re.findall(rf"^{name} (\S+)$", text, flags=re.MULTILINE)]


WELL: Answers = {"api": (200, "ok"), "worker": (200, "ok"), "exporter": (200, "ok")}
AWAY = (503, "unavailable")


@pytest.fixture
def site(tmp_path: Path, guardian: Guardian) -> Iterator[Site]:
    postgres = LocalPostgres(tmp_path / "postgres", guardian=guardian)
    redis = LocalRedis(tmp_path / "redis", guardian=guardian)
    try:
        url, redis_url = postgres.start(), redis.start()
        migrations.upgrade(url)
        with Fleet(tmp_path, database_url=url, redis_url=redis_url, guardian=guardian, settings=SETTINGS) as fleet:
            yield Site(fleet, postgres, redis)
    finally:
        redis.stop()
        postgres.stop()


@pytest.mark.timeout(120)
def test_each_dependency_that_is_away_is_named_and_nothing_is_dead_or_stuck_for_it(site: Site, tmp_path: Path) -> None:
    site.until(WELL)
    assert _probe(site.processes["worker"], "ready") == (0, "ok")

    site.redis.kill()
    site.until(WELL | {"api": (200, "degraded"), "worker": AWAY})
    _, answer = site.ask(site.processes["worker"], "/readyz")
    failed = [name for name, check in answer["checks"].items() if check["status"] != "ok"]
    assert (failed, site.all_live_and_none_stuck()) == (["redis"], True)
    code, said = _probe(site.processes["worker"], "ready")
    assert (code, said.startswith("unavailable: redis: ")) == (1, True)
    site.redis.restart()
    site.until(WELL)

    store = tmp_path / "artifacts"
    store.rename(tmp_path / "unmounted")
    site.until(WELL | {"api": AWAY, "worker": AWAY})
    assert site.all_live_and_none_stuck()
    (tmp_path / "unmounted").rename(store)
    site.until(WELL)

    site.postgres.kill()
    site.until(dict.fromkeys(WELL, AWAY))
    assert site.all_live_and_none_stuck()
    _until_the_exporter_counts(site, up=0.0, well=[])
    site.postgres.restart()
    site.until(WELL)
    _until_the_exporter_counts(site, up=1.0, well=[1.0])
    assert all(process.alive for process in site.processes.values())

    _drains(site)


def _until_the_exporter_counts(site: Site, *, up: float, well: list[float]) -> None:
    """``well``: workers that say of themselves that they are ok; the exporter looks again after some seconds."""

    def counted() -> bool:
        found = site.figure(r'longshift_workers\{condition="ok"\}', of="exporter")
        return (site.figure("longshift_exporter_up", of="exporter"), found) == ([up], well)

    wait_until_sync(counted, description=f"the exporter says up {up} and {well} ok")


def _drains(site: Site) -> None:
    """Last, for the worker ends: while it lets a step finish, it says why it takes no more."""
    worker = site.processes["worker"]
    site.fleet.client.submit("gated", "drain")
    wait_until_sync(lambda: _at_the_gate(site), description="the turn is at its gate")
    worker.drain()

    def says() -> Any:
        with suppress(httpx.TransportError):
            return site.ready()["worker"] == (503, "draining")

    wait_until_sync(says, description="the worker says that it drains")
    assert site.figure("longshift_worker_draining", of="worker") == [1.0]
    assert site.ask(worker, "/livez")[0] == 200
    site.fleet.open_gate("drain")
    assert worker.exit_code() == 0
    with pytest.raises(Unavailable):
        app(["probe", "live", "--url", worker.metrics_url], standalone_mode=False)


def _at_the_gate(site: Site) -> bool:
    return any(effect.step == "at the gate" for effect in site.fleet.effects(what="begun"))


def _probe(process: Process, what: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["probe", what, "--url", process.metrics_url])
    return result.exit_code, result.output.strip()
