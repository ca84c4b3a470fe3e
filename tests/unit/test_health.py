"""Questions to what a process needs, and whether its loop turns."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

import pytest

from longshift.clock import Clock
from longshift.errors import Unavailable
from longshift.health import Check, Probes, Pulse, in_loop, live

LIMIT = timedelta(seconds=30)


class Dependency:
    """Answers, fails or hangs."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None
        self.hangs: asyncio.Event | None = None

    async def check(self) -> None:
        self.asked += 1
        if self.hangs is not None:
            await self.hangs.wait()
        if self.error is not None:
            raise self.error


class Time:
    def __init__(self) -> None:
        self.ticks = 100.0
        self.clock = Clock(monotonic=lambda: self.ticks)


async def test_an_answer_holds_for_a_second() -> None:
    time, redis = Time(), Dependency()
    probes = Probes({"redis": redis.check}, clock=time.clock)

    for wait, asked in ((0, 1), (0.9, 1), (0.2, 2)):
        time.ticks += wait
        assert await probes.ask() == {"redis": Check(True)}
        assert redis.asked == asked


async def test_questions_to_a_dependency_that_hangs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longshift.health.PATIENCE", timedelta(0))
    time, redis = Time(), Dependency()
    redis.hangs = asyncio.Event()
    probes = Probes({"redis": redis.check}, clock=time.clock)
    for _ in range(3):
        time.ticks += 2
        [check] = (await probes.ask()).values()
        assert not check.ok

    assert redis.asked == 1
    await probes.close()


async def test_a_failure_is_logged_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    time, redis = Time(), Dependency()
    probes = Probes({"redis": redis.check}, clock=time.clock)
    for error in (None, Unavailable("refused"), Unavailable("refused"), RuntimeError("odd"), None):
        redis.error = error
        time.ticks += 2
        seen = (await probes.ask("redis"))["redis"]
        assert seen.ok is (error is None)

    messages = [record.message for record in caplog.records]
    assert messages == ["a dependency does not answer", "a probe failed", "a dependency answers again"]


async def test_a_loop_that_does_not_turn_is_seen_from_a_thread() -> None:
    time = Time()
    pulse = Pulse(time.clock)
    assert live(pulse, clock=time.clock, limit=LIMIT).status == 200

    time.ticks += 31
    page = live(pulse, clock=time.clock, limit=LIMIT)
    assert (page.status, page.body["detail"]) == (503, "the event loop has not turned for 31 s")


async def test_who_asks_a_loop_that_does_not_turn_waits_no_longer_than_it_wants() -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    async def answer() -> str:
        asked.set()
        return "here"

    assert await asyncio.to_thread(in_loop, loop, answer, within=LIMIT) == "here"
    assert in_loop(loop, answer, within=timedelta(0)) is None, "this very thread should run it"
    await asyncio.sleep(0)
    other = asyncio.new_event_loop()
    other.close()
    assert in_loop(other, answer, within=LIMIT) is None
