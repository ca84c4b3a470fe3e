"""Tries of a step: when the next one comes, what ends one, and what a plain step can know of it."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any

import httpx
import pytest

from longshift import Retry, StepFailed, StepTimeout, Turn, UsageError, agent, cancelled, emit, step
from longshift.clock import Clock
from longshift.events import Kind
from longshift.steps import retry_after
from longshift.testing import named_crash_points, run

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
BLINK = timedelta(milliseconds=20)


class Busy(Exception):
    def __init__(self, when: object) -> None:
        super().__init__("come again later")
        self.retry_after = when


def refused(header: str) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://127.0.0.1/")
    response = httpx.Response(429, headers={"Retry-After": header}, request=request)
    return httpx.HTTPStatusError("too many requests", request=request, response=response)


# -- when the next try comes


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Busy(7), 7),
        (Busy(1.5), 1.5),
        (Busy(timedelta(minutes=2)), 120),
        (Busy(NOON + timedelta(seconds=30)), 30),
        (Busy((NOON + timedelta(seconds=30)).astimezone(timezone(timedelta(hours=3)))), 30),
        (Busy(NOON - timedelta(seconds=30)), 0),
        (Busy(timedelta(days=400)), 86_400),
        (refused("12"), 12),
        (refused("Sun, 01 Mar 2026 12:00:45 GMT"), 45),
    ],
)
def test_an_error_says_when_to_come_again(error: Exception, seconds: float) -> None:
    assert retry_after(error, now=NOON) == seconds
    retry = Retry(attempts=2, first=timedelta(0))
    assert retry.pause(1, random=Random(1), error=error, now=NOON) == seconds


@pytest.mark.parametrize(
    "error",
    [Busy(None), Busy("soon"), Busy(True), Busy(float("nan")), refused("-3"), refused("when I am back"), OSError()],
)
def test_what_an_error_does_not_say_well_is_left_to_the_policy(error: Exception) -> None:
    assert retry_after(error, now=NOON) is None
    assert Retry(first=timedelta(0)).pause(1, random=Random(1), error=error, now=NOON) == 0


def test_however_many_tries_there_were_a_pause_has_its_longest() -> None:
    assert 0 <= Retry(attempts=10_000, longest=timedelta(seconds=1)).pause(9_999, random=Random(1)) <= 1


def test_a_long_pause_leaves_the_worker_and_the_tries_are_still_counted() -> None:
    tries = []

    @step(retry=Retry(attempts=4))
    async def limited() -> str:
        tries.append(1)
        if len(tries) < 4:
            raise Busy(timedelta(hours=1))
        return "served"

    @agent("client")
    async def client(turn: Turn, _: None) -> str:
        return await limited()

    result = run(client, None)

    assert result.output == "served"
    assert len(tries) == 4
    assert result.attempts == 4
    retrying = [event for event in result.events if event.kind == Kind.STEP_RETRYING]
    assert [event.payload["attempt"] for event in retrying] == [1, 2, 3]
    assert retrying[0].payload["error"] == {"type": "Busy", "message": "come again later"}
    (done,) = [event for event in result.events if event.kind == Kind.STEP_COMPLETED]
    assert done.payload["attempts"] == 4
    assert result.events[-1].created_at - result.events[0].created_at >= timedelta(hours=3)


@step(retry=Retry(attempts=3))
async def hopeless() -> str:
    raise Busy(60)


@agent("hopeful")
async def hopeful(turn: Turn, _: None) -> str:
    try:
        return await hopeless()
    except StepFailed as error:
        return error.error_message


@pytest.mark.parametrize("point", named_crash_points(hopeful, None))
def test_a_crash_gives_a_step_no_further_try_once_the_pause_is_recorded(point: str) -> None:
    result = run(hopeful, None, crash_at=point)

    assert result.output == "come again later"
    unrecorded = point.startswith("before step.") or point == "before turn.started"
    assert result.calls["hopeless"] == 3 + (unrecorded and "turn.started" not in point)


def test_short_pauses_stay_on_the_worker() -> None:
    @step(retry=Retry(attempts=3, first=timedelta(seconds=4), longest=timedelta(seconds=4)))
    async def unlucky() -> None:
        raise OSError("again")

    @agent("patient")
    async def patient(turn: Turn, _: None) -> None:
        await unlucky()

    result = run(patient, None)

    assert result.calls["unlucky"] == 3
    assert result.attempts == 1


# -- what ends a try


def test_a_try_that_shows_no_progress_is_ended_long_before_its_time_limit() -> None:
    @step(timeout=timedelta(hours=1), progress=BLINK)
    async def stuck() -> None:
        emit("begun")
        await asyncio.get_running_loop().create_future()

    @agent("waiter")
    async def waiter(turn: Turn, _: None) -> str:
        with pytest.raises(StepTimeout) as caught:
            await stuck()
        return caught.value.error_message

    assert run(waiter, None).output == "no progress for 0.02 s"


@pytest.mark.parametrize("threaded", [False, True])
def test_each_sign_of_progress_gives_a_try_more_time(threaded: bool) -> None:
    """By a clock that only the step moves: after each move it is almost too late, and without the signs far too late."""
    seconds = [0.0]
    enough = threading.Event()

    def work() -> None:
        seconds[0] += 0.9 * BLINK.total_seconds()
        emit("on it")

    def plain() -> str:
        for _ in range(5):
            work()
            enough.wait(2 * BLINK.total_seconds())
        return "done"

    async def loop() -> str:
        for _ in range(5):
            work()
            await asyncio.sleep(2 * BLINK.total_seconds())
        return "done"

    @agent("worker")
    async def worker(turn: Turn, _: None) -> str:
        function: Any = plain if threaded else loop
        return str(await turn.step("work", step(progress=BLINK)(function)))

    assert run(worker, None, clock=Clock(monotonic=lambda: seconds[0])).output == "done"


@pytest.mark.parametrize("limits", [{"timeout": BLINK}, {"progress": BLINK}])
def test_a_plain_step_that_nobody_waits_for_any_more_can_know_it(limits: dict[str, Any]) -> None:
    known = threading.Event()

    @step(**limits)
    def blocking() -> None:
        assert not cancelled()
        while not cancelled():
            known.wait(0.001)
        known.set()

    @agent("waiter")
    async def waiter(turn: Turn, _: None) -> str:
        with pytest.raises(StepTimeout):
            await turn.step("blocking", blocking)
        return "went on"

    assert run(waiter, None).output == "went on"
    assert known.is_set()  # the pool of threads was closed only when it had ended


def test_outside_a_step_nothing_is_cancelled() -> None:
    assert not cancelled()


@pytest.mark.parametrize("limit", ["timeout", "progress"])
def test_a_limit_that_leaves_no_time_is_refused(limit: str) -> None:
    async def nothing() -> None: ...

    limits: dict[str, Any] = {limit: timedelta(0)}
    with pytest.raises(UsageError, match=f"{limit}=0:00:00 leaves it no time"):
        step(**limits)(nothing)
