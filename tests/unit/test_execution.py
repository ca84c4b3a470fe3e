"""An attempt at a turn: what it promises to agents, tried with agents made up at random and with hostile ones."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from pydantic import BaseModel, Field

from longshift import Retry, StepFailed, StepTimeout, Turn, UsageError, agent, attempt, emit, step
from longshift.clock import SYSTEM
from longshift.errors import TurnEvicted
from longshift.events import DEEPEST, Context, Event, Kind, encode, fold
from longshift.testing import Result, crash_points, run
from longshift.testing.bench import new_record
from longshift.testing.outside import Outside
from longshift.testing.world import Time, World
from tests.unit import programs
from tests.unit.programs import interpreter

DAY = timedelta(days=1)


def kinds(result: Result[Any]) -> Counter[str]:
    return Counter(str(event.kind) for event in result.events)


# -- any agent, any crash


NESTED: list[Any] = [  # the tasks between do nothing durable before their children do
    {
        "do": "tasks",
        "parts": [
            [{"do": "group", "parts": [[{"do": "artifact"}, {"do": "work"}]]}, {"do": "flaky"}],
            [{"do": "now"}, {"do": "tasks", "parts": [[{"do": "flaky"}]]}],
        ],
    }
]


@settings(max_examples=40)
@given(programs.programs)
@example(NESTED)
def test_a_crash_after_any_event_changes_nothing(program: list[Any]) -> None:
    programs.forget()
    undisturbed = run(interpreter, program, **programs.OTHERS)
    expected = undisturbed.output
    for crash_after in range(1, len(undisturbed.events) + 1):
        programs.forget()
        log: list[Event] = []
        result = run(interpreter, program, crash_after=crash_after, log=log, **programs.OTHERS)
        assert result.output == expected
        assert result.unused == ()
        assert Counter(kinds(result)) - Counter({Kind.TURN_STARTED: 99, Kind.TURN_WAITING: 99}) == kinds(
            undisturbed
        ) - Counter({Kind.TURN_STARTED: 99, Kind.TURN_WAITING: 99})
        assert_recorded_steps_ran_once(result.events, crash_after)
        assert {place: values for place, values in programs.seen.items() if len(values) > 1} == {}
        recorded = [(e.key, e.kind == Kind.WAIT_ENDED) for e in result.events if e.key]
        assert len(set(recorded)) == len(recorded)
        assert result.late == ()


def assert_recorded_steps_ran_once(events: tuple[Event, ...], crash_after: int) -> None:
    """Those recorded before the crash: what was running in it may run again."""
    for event in events[:crash_after]:
        if event.kind == Kind.STEP_COMPLETED and isinstance(event.payload["result"], str):
            place = event.payload["result"].split()[-1]
            assert programs.ran[place] == event.payload.get("attempts", 1)


@settings(max_examples=40)
@given(programs.programs)
def test_the_context_that_an_agent_leaves_is_the_fold_of_its_log(program: list[Any]) -> None:
    @agent("watching")
    async def watching(turn: Turn, program: list[Any]) -> dict[str, Any]:
        await programs.interpret(turn, program, "")
        await turn.sleep(DAY)  # at the latest now the turn is replayed
        return {"state": dict(turn.state), "history": list(turn.history)}

    programs.forget()
    result = run(watching, program, **programs.OTHERS)
    before_the_end = fold(result.events[:-1])
    assert result.output == {"state": before_the_end.state, "history": before_the_end.history}


@pytest.mark.parametrize("crash_after", range(1, 14))
def test_an_agent_that_is_not_async_survives_a_crash_anywhere(crash_after: int) -> None:
    @step
    def double(n: int) -> int:
        return 2 * n

    @step
    async def triple(n: int) -> int:
        return 3 * n

    @agent("plain")
    def plain(turn: Turn, n: int) -> list[int]:
        seen.add((turn.now().isoformat() > "", turn.uuid(), turn.random.random()))
        doubled = [double(i) for i in range(n)]
        turn.sync(turn.sleep(DAY))
        turn.sync(turn.state.set("doubled", doubled))
        tripled = turn.sync(turn.gather(*(triple(i) for i in range(n))))
        return [*doubled, *tripled, turn.sync(triple(7)), *turn.state["doubled"]]

    seen: set[tuple[bool, UUID, float]] = set()
    result = run(plain, 3, crash_after=crash_after)
    assert result.output == [0, 2, 4, 0, 3, 6, 21, 0, 2, 4]
    assert len(seen) == 1
    assert result.attempts == (3 if crash_after < 13 else 2)


def test_tasks_of_an_agent_that_is_not_async_are_branches_too() -> None:
    @step
    async def late(n: int) -> int:
        await asyncio.sleep(0.001 * (3 - n))
        return n

    async def both() -> list[int]:
        return list(await asyncio.gather(late(1), late(2)))

    @agent("plain")
    def plain(turn: Turn, _: None) -> list[int]:
        found = turn.sync(both())
        turn.sync(turn.sleep(DAY))
        return found

    result = run(plain, None)
    assert result.output == [1, 2]
    assert sorted(e.key or "" for e in result.events if e.kind == Kind.STEP_COMPLETED) == ["~0/late#0", "~1/late#0"]


# -- what steps return


class Colour(BaseModel):
    name: str = Field(alias="colourName")
    parts: dict[str, float] = {}


@dataclass
class Point:
    x: int
    y: Decimal


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Colour, Colour(colourName="red", parts={"r": 1.0, "a": 0.5})),
        (list[Colour], [Colour(colourName="red")]),
        (Point, Point(1, Decimal("0.10"))),
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),
        (date, date(2026, 1, 2)),
        (timedelta, timedelta(microseconds=7)),
        (Decimal, Decimal("1.2300")),
        (bytes, bytes(range(256))),
        (list[bytes], [b"\xff\x00"]),
        (tuple[int, str], (1, "x")),
        (set[int], {3, 1, 2}),
        (None, None),
        (float, float("inf")),
        (float, -0.0),
        (int, 10**30),
        (UUID, UUID(int=5)),
        (dict[str, int], {"z": 1, "a": 2, "m": 3}),
        (dict[int, str], {2: "b", 1: "a"}),
        (str, "caf\u00e9 \U0001f600 \\u0000"),
        (Any, {"z": [1, 2.5, None, True]}),
    ],
    ids=str,
)
def test_a_result_is_the_same_on_a_replay(annotation: Any, value: Any) -> None:
    async def give() -> Any:
        return value

    give.__annotations__["return"] = annotation

    @agent("giving")
    async def giving(turn: Turn, _: None) -> None:
        seen.append(await turn.step("give", give))
        await turn.sleep(DAY)

    seen: list[Any] = []
    assert run(giving, None).calls == {"give": 1}
    assert seen == [value, value]
    assert [type(each) for each in seen] == [type(value)] * 2
    if isinstance(value, dict):
        assert list(seen[1]) == list(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "returned a object that cannot be recorded as JSON: annotate the return type"),
        (lambda: 1, "cannot be recorded as JSON"),
    ],
    ids=["object", "function"],
)
def test_a_result_that_cannot_be_recorded_fails_the_step_and_says_why(value: Any, text: str) -> None:
    async def give() -> Any:
        return value

    @agent("giving")
    async def giving(turn: Turn, _: None) -> str:
        with pytest.raises(StepFailed, match=text) as caught:
            await turn.step("give", give)
        await turn.sleep(DAY)
        return str(caught.value)

    result = run(giving, None)
    assert result.output.startswith("step 'give' failed")
    assert kinds(result)[Kind.STEP_FAILED] == 1
    assert result.calls == {"give": 1}


def test_a_result_that_could_not_be_read_back_is_not_recorded() -> None:
    async def give() -> Annotated[int, Field(gt=0)]:
        return -1

    @agent("giving")
    async def giving(turn: Turn, _: None) -> None:
        await turn.step("give", give)

    result = run(giving, None)
    assert result.error is not None
    assert "step 'give' failed" in result.error["message"]
    assert kinds(result)[Kind.STEP_COMPLETED] == 0


@agent("many digits")
async def many_digits(turn: Turn, digits: int) -> Any:
    return 10**digits


def test_an_output_that_could_not_be_read_back_fails_its_turn_only() -> None:
    assert run(many_digits, 100).status == "succeeded"
    assert "4300" in str(run(many_digits, 5000).error)


def test_an_input_as_deep_as_may_be_submitted_can_be_started() -> None:
    value: Any = 1
    for _ in range(DEEPEST):
        value = [value]
    assert encode(value)
    now = SYSTEM.now()
    record = new_record(many_digits, value, session_id=UUID(int=1), metadata={}, now=now, until=now + DAY)
    started = attempt.begun(record, many_digits, now=now)
    assert json.loads(started.payload)["input"] == value


def test_a_result_without_an_annotation_is_plain_json_from_the_first_run_on() -> None:
    async def give():  # type: ignore[no-untyped-def]
        return (1, 2)

    @agent("giving")
    async def giving(turn: Turn, _: None) -> None:
        seen.append(await turn.step("give", give))
        await turn.sleep(DAY)

    seen: list[Any] = []
    assert run(giving, None).status == "succeeded"
    assert seen == [[1, 2], [1, 2]]


# -- failures


def test_a_failed_step_is_the_same_error_live_and_replayed() -> None:
    @step(timeout=timedelta(milliseconds=5))
    async def hang() -> None:
        await asyncio.sleep(60)

    @step
    async def burst() -> None:
        raise ValueError("caf\u00e9 " + "x" * 5000)

    @agent("failing")
    async def failing(turn: Turn, _: None) -> None:
        for each in (hang, burst):
            with pytest.raises(StepFailed) as caught:
                await each()
            seen.append((type(caught.value), str(caught.value), vars(caught.value)))
        await turn.sleep(DAY)

    seen: list[Any] = []
    run(failing, None).output  # noqa: B018
    assert seen[:2] == seen[2:]
    assert [each[0] for each in seen[:2]] == [StepTimeout, StepFailed]
    assert "no result within 0.005 s" in seen[0][1]


def cancel_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ending", [sys.exit, cancel_itself, interrupt])
def test_code_that_ends_its_process_or_task_fails_its_turn_only(ending: Any) -> None:
    @agent("ending")
    async def ending_agent(turn: Turn, _: None) -> None:
        ending()
        await asyncio.sleep(1)

    assert run(ending_agent, None).status == "failed"


@pytest.mark.parametrize("ending", [sys.exit, interrupt])
def test_a_task_of_the_agent_that_exits_fails_like_any_other(ending: Any) -> None:
    """asyncio lets these two through to whoever runs the loop: the worker would be gone."""

    async def end() -> None:
        await asyncio.sleep(0)
        ending()

    @agent("ending")
    async def ending_agent(turn: Turn, _: None) -> str:
        error = (await asyncio.gather(asyncio.create_task(end()), return_exceptions=True))[0]
        return str(error)

    assert run(ending_agent, None).output in ("called sys.exit(None)", "raised KeyboardInterrupt")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_a_step_that_exits_or_cancels_itself_has_failed(error: BaseException) -> None:
    @step
    async def end() -> None:
        raise error

    @agent("ending")
    async def ending(turn: Turn, _: None) -> str:
        try:
            await end()
        except StepFailed as failure:
            return failure.error_message
        return "not failed"

    assert run(ending, None).output in ("called sys.exit(3)", "raised KeyboardInterrupt", "cancelled by its own code")


def test_the_first_failed_branch_in_the_order_given_is_raised_after_all_have_ended() -> None:
    @step
    async def wait_and_fail(n: int) -> None:
        await asyncio.sleep(0.002 * (3 - n))
        raise ValueError(f"branch {n}")

    @agent("failing")
    async def failing(turn: Turn, _: None) -> str:
        try:
            await turn.gather(*(wait_and_fail(n) for n in range(3)))
        except StepFailed as error:
            return error.error_message
        return "not failed"

    result = run(failing, None)
    assert result.output == "branch 0"
    assert kinds(result)[Kind.STEP_FAILED] == 3


def test_a_plain_step_in_an_async_agent_is_refused_with_what_to_write() -> None:
    @step
    def plain(n: int) -> int:
        return n

    @agent("wrong")
    async def wrong(turn: Turn, _: None) -> int:
        return plain(1)

    result = run(wrong, None)
    assert result.error is not None
    assert result.error["code"] == "usage"
    assert "`await turn.step('plain', plain, ...)`" in result.error["message"]


# -- leaving


def test_steps_are_refused_while_the_turn_leaves() -> None:
    @step
    async def work(n: int) -> int:
        return n

    @agent("stubborn")
    async def stubborn(turn: Turn, _: None) -> str:
        try:
            await turn.sleep(DAY)
        finally:
            for call in (lambda: work(1), lambda: turn.say("x"), lambda: turn.state.set("x", 1), lambda: turn.sleep(1)):
                try:
                    await call()
                    tried.append("done")
                except TurnEvicted:
                    tried.append("refused")
        return "ended"

    tried: list[str] = []
    result = run(stubborn, None)
    assert result.output == "ended"
    assert tried == ["refused"] * 4 + ["done"] * 4
    assert result.calls == {"work": 1}


@pytest.mark.parametrize("caught", [Exception, BaseException, asyncio.CancelledError], ids=lambda c: c.__name__)
def test_an_agent_that_catches_its_eviction_gives_no_false_result(caught: type[BaseException]) -> None:
    @agent("framework")
    async def framework(turn: Turn, _: None) -> str:
        try:
            await turn.sleep(DAY)
        except caught:
            return "false"
        return "true"

    assert run(framework, None).output == "true"


@pytest.mark.parametrize("caught", [Exception, BaseException], ids=lambda c: c.__name__)
@pytest.mark.parametrize("crash_after", range(1, 4))
def test_a_step_that_catches_the_crash_records_no_false_result(caught: type[BaseException], crash_after: int) -> None:
    @step
    async def call_model() -> str:
        try:
            await asyncio.sleep(0.005)
        except caught:
            return "false"
        return "true"

    @step
    async def other() -> None: ...

    @agent("framework")
    async def framework(turn: Turn, _: None) -> str:
        answer, _none = await turn.gather(call_model(), other())
        return str(answer)

    assert run(framework, None, crash_after=crash_after).output == "true"


@pytest.mark.parametrize("caught", [Exception, BaseException], ids=lambda c: c.__name__)
async def test_a_step_that_catches_its_interruption_records_nothing(caught: type[BaseException]) -> None:
    @step(retry=Retry(attempts=3))
    async def call_model() -> str:
        running.set()
        try:
            await asyncio.sleep(60)
        except caught:
            return "false"
        except BaseException:
            raise ValueError("the tool was cancelled") from None
        return "true"

    @agent("framework")
    async def framework(turn: Turn, _: None) -> str:
        return await call_model()

    running = asyncio.Event()
    now = datetime.now(UTC)
    record = new_record(framework, None, session_id=UUID(int=1), metadata={}, now=now, until=now + DAY)
    with ThreadPoolExecutor(1) as threads:
        world = World(record, [], {}, Time(SYSTEM))
        outside = Outside(world, epoch=1, threads=threads)
        execution = attempt.resumed(record, [], before=Context(), port=outside, now=now)
        task = asyncio.create_task(attempt.call(framework, execution, threads=threads))
        await running.wait()
        await attempt.unwind(task, execution)
    assert task.done()
    assert world.events == []


def test_a_turn_stays_for_short_waits_and_leaves_for_long_ones() -> None:
    @agent("sleeping")
    async def sleeping(turn: Turn, seconds: float) -> None:
        await turn.gather(turn.sleep(seconds), turn.sleep(2 * seconds))

    assert run(sleeping, 0.5).attempts == 1
    assert run(sleeping, 60).attempts == 3


def test_a_turn_does_not_leave_while_one_branch_works() -> None:
    @step
    async def work() -> int:
        await asyncio.sleep(0.02)
        return attempts[-1]

    async def note(turn: Turn) -> int:
        attempts.append(turn.attempt)
        return await work()

    @agent("mixed")
    async def mixed(turn: Turn, _: None) -> int:
        _none, first = await turn.gather(turn.sleep(DAY), note(turn))
        return int(first or 0)

    attempts: list[int] = []
    assert run(mixed, None).output == 1


def test_branches_are_counted_right_when_a_gather_is_cancelled() -> None:
    @agent("hasty")
    async def hasty(turn: Turn, _: None) -> str:
        for seconds in (0.0, 0.01):
            try:
                async with asyncio.timeout(seconds):
                    await turn.gather(asyncio.sleep(60), asyncio.sleep(60))
            except TimeoutError:
                pass
        await turn.sleep(DAY)
        return "left and came back"

    assert run(hasty, None).attempts == 2


# -- the same on every replay


def test_what_a_step_does_inside_does_not_move_the_numbers_of_its_branch() -> None:
    @step(retry=Retry(attempts=3))
    async def draw(turn: Turn) -> str:
        drawn.append((turn.uuid(), turn.random.random()))
        await turn.gather(asyncio.sleep(0), asyncio.sleep(0))
        if len(drawn) < 2:
            raise OSError("again")
        return "drawn"

    @agent("drawing")
    async def drawing(turn: Turn, _: None) -> None:
        await draw(turn)
        seen.append((turn.uuid(), turn.random.random(), *await turn.gather(tell(turn))))
        await turn.sleep(DAY)

    async def tell(turn: Turn) -> UUID:
        return turn.uuid()

    drawn: list[Any] = []
    seen: list[Any] = []
    run(drawing, None).output  # noqa: B018
    assert seen[0] == seen[1]
    assert drawn[0] == drawn[1], "each try of a step has the same numbers: its effects can be told apart by them"
    assert drawn[0][0] != seen[0][0]


def test_a_step_inside_a_step_is_part_of_it() -> None:
    @step
    async def inner(n: int) -> int:
        return n

    @step
    async def outer(turn: Turn) -> int:
        return await inner(1) + await turn.step("inner", inner, 2)

    @agent("nested")
    async def nested(turn: Turn, _: None) -> list[int]:
        values = [await outer(turn), await inner(2), await turn.step("inner", inner, 5)]
        await turn.sleep(DAY)
        return values

    result = run(nested, None)
    assert result.output == [3, 2, 5]
    assert [e.key for e in result.events if e.kind == Kind.STEP_COMPLETED] == ["outer#0", "inner#0", "inner#1"]


def test_a_recorded_step_wins_over_changed_arguments_and_the_change_is_recorded_once() -> None:
    @step
    async def ask(attempt: int) -> int:
        return attempt

    @agent("changing")
    async def changing(turn: Turn, _: None) -> int:
        answer = await ask(turn.attempt)
        await turn.sleep(DAY)
        await turn.sleep(DAY)
        return answer

    result = run(changing, None)
    assert result.output == 1
    assert result.attempts == 3
    assert kinds(result)[Kind.TURN_DIVERGED] == 1


def test_a_task_started_before_a_recorded_step_keeps_its_place() -> None:
    @step
    async def work(n: int) -> int:
        await asyncio.sleep(0.001)
        return n

    async def waiting(event: asyncio.Event, n: int) -> int:
        await event.wait()
        return await work(n)

    @agent("spawning")
    async def spawning(turn: Turn, _: None) -> list[int]:
        event = asyncio.Event()
        late = asyncio.create_task(waiting(event, 1))
        soon = asyncio.create_task(work(2))
        await work(3)
        event.set()
        gathered = await turn.gather(work(4))
        values = [await late, await soon, *gathered]
        await turn.sleep(DAY)
        return values

    result = run(spawning, None)
    assert result.output == [1, 2, 4]
    assert result.calls == {"work": 4}
    assert kinds(result)[Kind.TURN_DIVERGED] == 0


def test_state_is_as_json_has_it_and_changes_only_by_set() -> None:
    @agent("remembering")
    async def remembering(turn: Turn, _: None) -> Any:
        value: dict[Any, Any] = {1: (2, 3)}
        await turn.state.set("x", value)
        value[1] = "changed later"
        turn.state["x"]["1"].append("in place")
        seen.append(turn.state["x"])
        await turn.sleep(DAY)
        return turn.state["x"]

    seen: list[Any] = []
    assert run(remembering, None).output == {"1": [2, 3]}
    assert seen == [{"1": [2, 3]}] * 2


def test_a_step_cannot_speak_or_sleep_for_the_agent() -> None:
    @step
    async def talk(turn: Turn) -> None:
        await turn.say("x")

    @agent("talking")
    async def talking(turn: Turn, _: None) -> None:
        await talk(turn)

    error = run(talking, None).error
    assert error is not None
    assert "a step cannot use say(): call it in the agent, between steps" in error["message"]


def test_now_moves_with_steps_and_past_a_gather() -> None:
    @agent("timing")
    async def timing(turn: Turn, _: None) -> list[float]:
        times = [turn.now()]
        await turn.sleep(60)
        times.append(turn.now())
        await turn.gather(turn.sleep(600), turn.sleep(60))
        times.append(turn.now())
        return [round((later - times[0]).total_seconds()) for later in times[1:]]

    assert run(timing, None).output == [60, 660]


def test_builtins_and_callables_can_be_steps() -> None:
    class Fetcher:
        async def __call__(self, n: int) -> int:
            return n + 1

    @agent("using")
    async def using(turn: Turn, _: None) -> list[int]:
        return [await turn.step("max", max, 1, 2), await turn.step("fetch", Fetcher(), 4)]

    assert run(using, None).output == [2, 5]


def test_a_delta_says_which_try_of_which_step_it_is_from() -> None:
    @step(retry=Retry(attempts=2))
    async def speak() -> None:
        emit("trying")
        if len(tries) < 1:
            tries.append(1)
            raise OSError("again")

    @agent("speaking")
    async def speaking(turn: Turn, _: None) -> None:
        emit("starting")
        await speak()

    tries: list[int] = []
    shown = [(d.text, d.step, d.attempt) for d in run(speaking, None).deltas]
    assert shown == [("starting", "", 0), ("trying", "speak", 1), ("trying", "speak", 2)]


def test_a_step_is_a_plain_function_outside_a_turn() -> None:
    @step
    def double(n: int) -> int:
        return 2 * n

    assert double(4) == 8


def test_a_turn_cannot_be_used_outside_its_agent() -> None:
    @agent("leaking")
    async def leaking(turn: Turn, _: None) -> None:
        leaked.append(turn)

    leaked: list[Turn] = []
    run(leaking, None)
    with pytest.raises(UsageError, match="not running here"):
        leaked[0].now()


def test_crash_points_are_the_events_of_an_undisturbed_run() -> None:
    assert list(crash_points(interpreter, [{"do": "work"}])) == [1, 2, 3]


def test_the_time_of_a_plain_step_begins_when_it_has_a_thread() -> None:
    """More steps than threads: the last ones wait longer for a thread than their own time limit."""

    def slow() -> str:
        time.sleep(0.2)
        return "done"

    limited = step(timeout=timedelta(seconds=0.5))(slow)

    @agent("queue")
    async def queue(turn: Turn, _: None) -> list[str]:
        return await turn.gather(*(turn.step("slow", limited) for _ in range(32)))

    assert run(queue, None).output == ["done"] * 32
