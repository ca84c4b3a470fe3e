"""A worker in this process that nobody wakes: what it says of itself, at its port, in its row and by its gauges."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr

from longshift import Turn, agent
from longshift.agent import Agents
from longshift.config import Config
from longshift.model import Json, Prefix, show_id
from longshift.testing.waiting import wait_until
from longshift.worker import Worker
from tests.integration.protocol.stage import Stage

SOON = timedelta(seconds=1)


@agent("echo", version="1")
async def echo(turn: Turn, value: Json) -> Json:
    return value


released = threading.Event()


@agent("pausing", version="1")
async def pausing(turn: Turn, value: Json) -> Json:
    """Awaits something outside of any step."""
    await turn.step("before", echo.function, turn, value)
    while not released.is_set():  # noqa: ASYNC110 - it is set by a test
        await asyncio.sleep(0.01)
    return value


def block() -> bool:
    return released.wait(30)


@agent("threaded", version="1")
async def threaded(turn: Turn, value: Json) -> bool:
    return await turn.step("block", block)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    released.clear()
    yield
    released.set()


@dataclass
class Scene:
    stage: Stage
    worker: Worker
    http: httpx.AsyncClient

    async def status(self, path: str) -> tuple[int, str]:
        answer = await self.http.get(path)
        return answer.status_code, answer.json()["status"]

    async def condition(self) -> str | None:
        row = await self.stage.one("SELECT condition FROM workers")
        found: str | None = row["condition"]
        return found

    def figure(self, name: str, **labels: str) -> float | None:
        return self.worker.metrics.registry.get_sample_value(name, labels)

    async def submit(self, name: str) -> UUID:
        """A turn of that agent, which this worker runs: its id."""
        session, turn = await self.stage.submit()
        await self.stage.hand.execute("UPDATE turns SET agent = %s WHERE id = %s", (name, turn))
        await self.worker.wake([session])
        return turn

    async def succeeded(self, turn: UUID) -> None:
        async def so() -> bool:
            return bool((await self.stage.turn(turn))["status"] == "succeeded")

        _: bool = await wait_until(so, description="the turn has succeeded")

    async def until(self, expected: str) -> None:
        async def so() -> bool:
            return await self.condition() == expected

        _: bool = await wait_until(so, description=f"the worker says that it is {expected}")


@pytest.fixture
async def scene(stage: Stage, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Scene]:
    caplog.set_level("INFO")
    config = Config(
        database_url=SecretStr(stage.url),
        redis_url=SecretStr(redis_url),
        artifacts_url=tmp_path.as_uri(),
        heartbeat=timedelta(seconds=0.1),
        stuck_after=SOON,
        metrics_port=0,
        capacity=10,
        threads=1,
        step_timeout=SOON,
    )
    worker = Worker(config, Agents([echo, pausing, threaded]))
    try:
        await worker.start()
        port = next(record.__dict__["port"] for record in caplog.records if record.message == "metrics are served")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            yield Scene(stage, worker, http)
    finally:
        await worker.stop()


async def test_a_worker_that_nobody_wakes_is_stuck_once_work_is_overdue_and_until_it_takes_some(scene: Scene) -> None:
    await scene.until("ok")
    assert await scene.status("/stuckz") == (200, "ok")

    session, turn = await scene.stage.submit()
    await scene.until("stuck")
    assert await scene.status("/stuckz") == (503, "stuck")
    assert await scene.status("/readyz") == (200, "ok"), "what it needs answers: it is another fault"
    assert scene.figure("longshift_worker_stuck") == 1

    await scene.worker.wake([session, session])
    await scene.until("ok")
    assert await scene.status("/stuckz") == (200, "ok")
    await scene.succeeded(turn)
    await scene.worker.wake([session])
    assert scene.figure("longshift_claims_total", result="won") == 1
    assert scene.figure("longshift_claims_total", result="lost") == 1
    assert scene.figure("longshift_wakeup_to_start_seconds_count") == 1
    assert (scene.figure("longshift_ready_to_claim_seconds_sum") or 0) >= SOON.total_seconds()
    assert scene.figure("longshift_journal_batch_rows_sum", kind="start") == 1
    assert scene.figure("longshift_journal_batch_seconds_count", kind="finish") == 1
    assert scene.figure("longshift_journal_open") == 1


async def test_a_worker_says_what_it_is_missing_and_that_it_drains(scene: Scene, tmp_path: Path) -> None:
    await scene.until("ok")
    assert {scene.figure("longshift_worker_ready", dependency=name) for name in READY} == {1}
    (tmp_path / ".incoming").rename(tmp_path / "elsewhere")

    async def unready() -> bool:
        return await scene.status("/readyz") == (503, "unavailable")

    assert await wait_until(unready, description="the worker misses its store")
    await scene.until("unready")
    row = await scene.stage.one("SELECT complaint FROM workers")
    assert row["complaint"] == "no answer from artifacts"
    assert scene.figure("longshift_worker_ready", dependency="artifacts") == 0

    await scene.worker.drain()
    assert await scene.status("/readyz") == (503, "draining")


async def test_a_turn_that_makes_no_progress_is_named_until_it_does(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshift.stuck.SLACK", timedelta(0))
    turn = await scene.submit("pausing")
    await scene.until("stuck")
    row = await scene.stage.one("SELECT complaint FROM workers")
    assert row["complaint"].startswith(f"{show_id(Prefix.TURN, turn)} has made no progress for ")

    released.set()
    await scene.succeeded(turn)
    await scene.until("ok")


async def test_a_plain_step_that_waits_for_a_thread_has_no_deadline_of_its_own(scene: Scene) -> None:
    turns = [await scene.submit("threaded") for _ in range(2)]

    def waiting() -> list[bool]:
        return sorted(turn.waits_for_thread for turn in map(scene.worker._vitals._silence, scene.worker.runs))

    async def one_has_it() -> bool:
        return waiting() == [False, True]

    assert await wait_until(one_has_it, description="one of them has the thread")
    released.set()
    for turn in turns:
        await scene.succeeded(turn)


READY = ("postgres", "redis", "artifacts", "heartbeat", "loop")
