"""``longshift.testing``: workers that die or stop at a point by name, and wake-ups that come twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshift import Retry, StepFailed, Turn, UsageError, agent, step
from longshift.errors import LeaseLost, TurnEvicted
from longshift.testing import named_crash_points, run
from longshift.testing.points import points_of
from tests.unit import programs


@step
async def read(url: str) -> str:
    return url.upper()


@step
async def fail() -> None:
    raise ValueError("no")


@agent("everything")
async def everything(turn: Turn, url: str) -> dict[str, Any]:
    """Has an event of every kind, or nearly."""
    first = await read(url)
    again = await read(first)
    pair = await turn.gather(read("a"), read("b"))
    with pytest.raises(StepFailed):
        await fail()
    await turn.sleep(0.5)
    await turn.sleep(60)
    await turn.state.set("seen", again)
    await turn.state.set("seen", pair)
    await turn.say("hello")
    page = await turn.artifact("page", first)
    return {"again": again, "pair": pair, "page": page.sha256, "seen": turn.state["seen"], "id": len(str(turn.uuid()))}


NAMES = [
    "turn.started",
    "step.completed read",
    "step.completed read#2",
    "step.completed 0.0/read",
    "step.completed 0.1/read",
    "step.failed fail",
    "wait.begun $sleep",
    "wait.begun $sleep#2",
    "turn.waiting",
    "turn.started#2",
    "state.changed $state",
    "state.changed $state#2",
    "message.said $say",
    "step.completed $artifact",
    "turn.succeeded",
]
POINTS = [f"{side} {name}" for name in NAMES for side in ("before", "after")]
OUTPUT = run(everything, "x").output


def test_points_are_named_by_event_and_step_the_same_in_every_run() -> None:
    assert named_crash_points(everything, "x") == POINTS
    assert named_crash_points(everything, "x") == POINTS


@pytest.mark.parametrize("point", POINTS)
def test_a_turn_whose_worker_dies_at_a_point_ends_as_if_nothing_had_happened(point: str) -> None:
    result = run(everything, "x", crash_at=point)
    assert result.output == OUTPUT
    assert result.attempts == 3 - (point in ("before turn.started", "before turn.started#2", "after turn.succeeded"))
    assert result.unused == ()
    assert (result.refused, result.late) == ((), ())


@pytest.mark.parametrize("point", ["before step.completed read", "after step.completed read"])
def test_before_a_record_the_step_runs_again_and_after_it_never(point: str) -> None:
    result = run(everything, "x", crash_at=point)
    assert result.calls["read"] == (5 if point.startswith("before") else 4)


@pytest.mark.parametrize("point", POINTS)
def test_a_stale_writer_is_refused_its_next_record_and_does_nothing_more(point: str) -> None:
    result = run(everything, "x", pause_at=point)
    assert result.output == OUTPUT
    assert [event.seq for event in result.events] == list(range(1, len(result.events) + 1))
    keys = Counter(event.key for event in result.events if event.key is not None)
    assert max(keys.values()) == 1
    assert result.late == ()
    side, _, name = point.partition(" ")
    nothing_left = side == "after" and name in ("turn.waiting", "turn.succeeded")
    assert bool(result.refused) is not nothing_left
    if side == "before":
        assert result.refused[0] == name
    assert len(result.refused) <= 2  # two branches of one worker may each have tried


def test_a_stale_writer_gets_lease_lost_and_then_refusals_for_every_call() -> None:
    caught: list[BaseException] = []

    @agent("stubborn")
    async def stubborn(turn: Turn, _: None) -> str:
        for url in ("a", "b", "c"):
            try:
                await read(url)
            except BaseException as error:
                caught.append(error)
        return "done"

    result = run(stubborn, None, pause_at="before step.completed read#2")
    assert result.output == "done"
    assert [type(error) for error in caught] == [LeaseLost, TurnEvicted]
    assert result.calls == {"read": 4}  # two by the first worker, two by the second: the first result was recorded
    assert result.late == ()


def test_a_step_that_pauses_between_two_tries_is_not_tried_again_by_a_stale_writer() -> None:
    tries: list[int] = []

    @step(retry=Retry(attempts=2))
    async def flaky(turn: Turn) -> str:
        tries.append(turn.attempt)
        if len(tries) == 1:
            raise OSError("not yet")
        return "at last"

    @agent("trying")
    async def trying(turn: Turn, _: None) -> list[str]:
        return await turn.gather(flaky(turn), read("a"))

    result = run(trying, None, pause_at="before step.completed 0.1/read")
    assert result.output == ["at last", "A"]
    assert tries == [1, 2]
    assert result.late == ()


def test_a_plain_agent_in_its_thread_is_refused_as_well() -> None:
    caught: list[BaseException] = []

    @step
    def count(n: int) -> int:
        return n + 1

    @agent("plain")
    def plain(turn: Turn, n: int) -> int:
        try:
            return count(count(n))
        except BaseException as error:
            caught.append(error)
            raise

    result = run(plain, 1, pause_at="after step.completed count")
    assert result.output == 3
    assert result.refused == ("step.completed count#2",)
    [error] = caught  # its thread is let go, or the answer reaches it: whichever is first, it goes no further
    assert type(error) in (TurnEvicted, LeaseLost)


def test_branches_of_a_stopped_worker_stand_still_too() -> None:
    begun: list[str] = []

    @step
    async def work(turn: Turn, name: str) -> None:
        begun.append(f"{name} {turn.attempt}")

    @agent("branches")
    async def branches(turn: Turn, _: None) -> None:
        async def later() -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            await work(turn, "b")

        await turn.gather(work(turn, "a"), later())

    result = run(branches, None, pause_at="before step.completed 0.0/work")
    assert result.status == "succeeded"
    assert begun == ["a 1", "a 2", "b 2"]


def test_a_worker_stopped_right_after_its_start_finds_all_that_was_recorded_meanwhile() -> None:
    result = run(everything, "x", pause_at="after turn.started#2")
    assert result.refused == ("turn.succeeded",)


def test_epochs_grow_from_worker_to_worker_and_from_turn_to_turn() -> None:
    log: list[Any] = []
    for _ in range(2):
        run(everything, "x", log=log, crash_at="after step.completed read")
    assert [event.epoch for event in log] == sorted(event.epoch for event in log)
    assert len({event.epoch for event in log}) == 6


def test_a_wake_up_that_comes_twice_is_refused_while_the_turn_runs_and_after_its_end() -> None:
    result = run(everything, "x", deliver_twice=True)
    assert result.output == OUTPUT
    assert result.refused == (*["wake-up while it runs"] * len(NAMES), "wake-up after the end")
    assert (result.attempts, result.late) == (2, ())
    assert result.calls == {"read": 4, "fail": 1}


@pytest.mark.parametrize("fault", ["crash_at", "pause_at"])
def test_a_point_that_the_turn_does_not_have_is_an_error_that_lists_those_it_has(fault: str) -> None:
    options: dict[str, Any] = {fault: "before step.completed reed"}
    with pytest.raises(UsageError, match=r"no point 'before step\.completed reed'.*\n    before turn\.started\n"):
        run(everything, "x", **options)


@pytest.mark.parametrize("point", ["", "before", "charge", "during turn.started"])
def test_a_point_of_another_form_is_an_error_before_anything_runs(point: str) -> None:
    with pytest.raises(UsageError, match="is no crash point: write 'before' or 'after'"):
        run(everything, {"not": "read"}, crash_at=point)


def test_two_faults_in_one_run_are_refused() -> None:
    with pytest.raises(UsageError, match="a run has one fault"):
        run(everything, "x", crash_after=1, pause_at="before turn.started")


@settings(max_examples=80)
@given(programs.programs, st.sampled_from(["crash_at", "pause_at"]), st.data())
def test_any_agent_survives_a_crash_and_a_pause_at_any_of_its_points(
    program: list[Any], fault: str, data: st.DataObject
) -> None:
    programs.forget()
    undisturbed = run(programs.interpreter, program, **programs.OTHERS)
    options: dict[str, Any] = {fault: data.draw(st.sampled_from(points_of(undisturbed.events)))}
    programs.forget()
    result = run(programs.interpreter, program, **options, **programs.OTHERS)
    assert result.output == undisturbed.output
    assert (result.unused, result.late) == ((), ())
    assert [event.seq for event in result.events] == list(range(1, len(result.events) + 1))
    recorded = Counter(event.key for event in result.events if event.key is not None)
    assert recorded == Counter(event.key for event in undisturbed.events if event.key is not None)


def test_importing_the_kit_starts_nothing_and_loads_no_celery() -> None:
    code = "import sys, longshift.testing; print([m for m in ('celery', 'httpx', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
