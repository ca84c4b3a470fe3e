"""Calls of tools under every fault: read as often as needed, written once by key, never called twice if irreversible."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from longshift import (
    Absent,
    Done,
    NotDone,
    OutcomeUnknown,
    Retry,
    StepFailed,
    ToolCall,
    Turn,
    Unknown,
    agent,
    cancelled,
    tool,
)
from longshift.agent import Agent
from longshift.clock import SYSTEM
from longshift.errors import LeaseLost, TurnEvicted
from longshift.model import CallStatus, Effect, Json, Settlement
from longshift.place import current
from longshift.testing import Effects, Ledger, Report, Result, Scenario, named_crash_points, run, torture
from longshift.testing.bench import Rehearsal
from longshift.testing.outside import Outside
from longshift.testing.world import Fault

SHORT = timedelta(seconds=10)
"""Timeout of an irreversible tool: so long, and the time-to-live of a lease after it, nobody believes that it is absent."""


def alive() -> bool:
    """Whether the worker that this code runs in is: in the test world the code of a dead one goes on for a moment."""
    execution = current()
    return not (isinstance(execution, Rehearsal) and execution.outside.dead)


@dataclass
class Outer:
    """The world at the other end."""

    reads: int = 0
    orders: dict[str, int] = field(default_factory=dict)  # by key: this service is idempotent
    keys: set[str] = field(default_factory=set)
    letters: list[str] = field(default_factory=list)  # this one is not

    def agent(self, *, reconciled: bool = True) -> Agent[int, list[Json]]:
        """Acts once with each effect; of two letters with the same text it sends one."""

        @tool(effect="read")
        async def price(item: int) -> int:
            self.reads += 1
            return 2 * item

        @tool(effect="write")
        async def order(call: ToolCall, item: int) -> int:
            self.keys.add(call.key)
            if alive():
                self.orders.setdefault(call.key, item)
            return item

        async def was_sent(call: ToolCall, text: str) -> Done[int] | Absent:
            return Done(1) if call.key in self.letters else Absent()

        @tool(effect="irreversible", timeout=SHORT, reconcile=was_sent if reconciled else None)
        async def send(call: ToolCall, text: str) -> int:
            if alive():
                self.letters.append(call.key)
            return 1

        @agent("clerk")
        async def clerk(turn: Turn, item: int) -> list[Json]:
            cost = await price(item)
            await order(item)
            try:
                sent: Json = await send(f"it costs {cost}")
                sent += await send(text=f"it costs {cost}")
            except OutcomeUnknown as error:
                sent = error.call
            return [cost, sent]

        return clerk


POINTS = named_crash_points(Outer().agent(), 7)
BEFORE_THE_CALL = {f"{side} {name} send" for name in ("ledger.begin", "tool.started") for side in ("before", "after")}


def test_the_points_of_a_tool_are_those_of_the_ledger_too() -> None:
    of_send = [point for point in POINTS if point.endswith(" send")]
    assert of_send == [
        "before ledger.begin send",
        "after ledger.begin send",
        "before tool.started send",
        "after tool.started send",
        "before ledger.end send",
        "after ledger.end send",
        "before step.completed send",
        "after step.completed send",
    ]


@pytest.mark.parametrize("point", POINTS)
def test_each_effect_happens_once_wherever_a_worker_dies(point: str) -> None:
    outer = Outer()
    result = run(outer.agent(), 7, crash_at=point)

    assert result.output == [14, 2]
    assert len(outer.letters) == 1
    assert result.calls["send"] == 1
    assert (len(outer.orders), len(outer.keys)) == (1, 1)
    assert outer.reads in (1, 2)
    assert {call.status for call in result.tool_calls} == {CallStatus.DONE}


@pytest.mark.parametrize("point", POINTS)
def test_each_effect_happens_once_wherever_a_worker_is_stopped_and_replaced(point: str) -> None:
    outer = Outer()
    result = run(outer.agent(), 7, pause_at=point)

    assert result.output == [14, 2]
    assert len(outer.letters) == 1
    assert (len(outer.orders), len(outer.keys)) == (1, 1)
    assert result.late == ()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("fault", ["crash_at", "pause_at"])
def test_what_nobody_can_find_out_is_in_doubt_and_is_not_called_again(fault: str, point: str) -> None:
    outer = Outer()
    result = run(outer.agent(reconciled=False), 7, **{fault: point})  # type: ignore[arg-type]

    assert len(outer.letters) <= 1
    if result.output == [14, 2]:
        assert len(outer.letters) == 1
    else:
        [call] = [call for call in result.tool_calls if call.effect is Effect.IRREVERSIBLE]
        doubted = (
            point.endswith("send") and "step.completed" not in point and not point.startswith("before ledger.begin")
        )
        assert doubted, "only a call that was begun, and of which no outcome was recorded, is in doubt"
        assert result.output[1] == f"call_{call.id.hex}"
        late = CallStatus.DONE if outer.letters else CallStatus.FAILED  # who was stopped says it when it goes on
        assert call.status is (late if fault == "pause_at" else CallStatus.UNKNOWN)


def test_a_stopped_worker_says_in_the_ledger_what_it_did() -> None:
    outer = Outer()
    result = run(outer.agent(reconciled=False), 7, pause_at="before ledger.end send")

    assert result.output[1] != 2  # nobody could wait for it
    assert (len(outer.letters), result.tool_calls[-1].status) == (1, CallStatus.DONE)


def test_a_turn_that_leaves_right_before_an_irreversible_call_says_that_it_was_not_made() -> None:
    outer = Outer()
    result = run(outer.agent(), 7, pause_at="before tool.started send")

    assert result.refused == ("tool.started send",)
    assert len(outer.letters) == 1
    [call] = [call for call in result.tool_calls if call.tool == "send"]
    assert (call.status, call.epoch) == (CallStatus.DONE, 2)


def test_a_call_that_runs_on_while_its_worker_is_stopped_is_not_made_by_another() -> None:
    outer = Outer()

    async def was_sent(call: ToolCall) -> Done[str] | Absent:
        return Done("sent") if outer.letters else Absent()

    @tool(effect="irreversible", timeout=SHORT, reconcile=was_sent)
    async def send(call: ToolCall) -> str:
        await asyncio.sleep(0.02)
        outer.letters.append(call.key)
        return "sent"

    @agent("busy")
    async def busy(turn: Turn, _: Any) -> list[str]:
        return await turn.gather(send(), turn.step("other", str, 1))

    result = run(busy, None, pause_at="before step.completed 0.1/other")
    assert (result.output, len(outer.letters)) == (["sent", "1"], 1)


def test_torture_finds_nothing_and_watches_irreversible_tools_by_itself() -> None:
    def scenario(*, lying: bool = False) -> Scenario:
        outer, mail = Outer(), Effects()

        async def was_sent(call: ToolCall, text: str) -> Done[int] | Absent:
            return Done(1) if call.key in outer.letters and not lying else Absent()

        @tool(effect="irreversible", timeout=SHORT, reconcile=was_sent)
        async def send(call: ToolCall, text: str) -> int:
            outer.letters.append(call.key)
            mail.add("letter")
            return 1

        @agent("clerk")
        async def clerk(turn: Turn, text: str) -> int:
            return await send(text)

        return Scenario(clerk, "hello", effects=mail)

    assert torture(scenario).violations == []
    found = breaches(torture(lambda: scenario(lying=True)))
    assert (Fault.CRASH, "before ledger.end send", "double letter") in found
    assert (Fault.CRASH, "before ledger.end send", "repeated send") in found


def test_torture_tells_what_is_left_in_doubt_and_blames_the_agent_only_for_more_than_that() -> None:
    def scenario(*, stubborn: bool = False) -> Scenario:
        mail = Effects()

        @tool(effect="irreversible", timeout=SHORT)
        async def send(text: str) -> None:
            mail.add("letter")

        @agent("clerk")
        async def clerk(turn: Turn, text: str) -> None:
            try:
                await send(text)
            except OutcomeUnknown:
                if stubborn:
                    await send(f"{text}, once more")
                raise

        return Scenario(clerk, "hello", effects=mail)

    report = torture(scenario)
    assert report.violations == []
    doubted = {row.point for row in report.rows if "send in doubt" in row.happened}
    assert "before ledger.end send" in doubted
    assert (Fault.CRASH, "before ledger.end send", "double letter") in breaches(
        torture(lambda: scenario(stubborn=True))
    )


def breaches(report: Report) -> set[tuple[Fault, str, str]]:
    return {(row.fault, row.point, str(violation)) for row, violation in report.violations}


# -- keys and repetitions


def ask(*calls: tuple[str, Json], dedupe: Any = None, effect: Any = "write", made: list[str]) -> Agent[Any, list[Json]]:
    """An agent whose model calls ``note`` with each (id, text)."""

    @tool(effect=effect, dedupe=dedupe)
    async def note(call: ToolCall, text: str) -> str:
        made.append(call.key)
        return f"noted {text}"

    @agent("model")
    async def model(turn: Turn, _: Any) -> list[Json]:
        return [await note.call({"text": text}, id) for id, text in calls]  # noqa: A001

    return model


def test_a_model_that_repeats_a_call_gets_the_stored_result_and_is_told() -> None:
    made: list[str] = []
    repeating = ask(("1", "a"), ("2", "a"), ("3", "b"), dedupe="turn", made=made)
    for crash in (None, "after step.completed note#2", "before step.completed note#2"):
        made.clear()
        first, second, third = run(repeating, None, crash_at=crash).output
        assert (first, third) == ("noted a", "noted b")
        assert second["result"] == "noted a"
        assert second["note"].startswith("not repeated: done at 20")
        assert len(made) == len(set(made)) == 2


def test_by_default_a_repeated_call_is_another_call_unless_it_is_irreversible() -> None:
    made: list[str] = []
    assert run(ask(("1", "a"), ("2", "a"), made=made), None).output == ["noted a", "noted a"]
    assert len(set(made)) == 2
    made.clear()
    assert len(run(ask(("1", "a"), ("2", "a"), effect="irreversible", made=made), None).output) == 2
    assert len(made) == 1


def test_a_call_after_a_crash_is_not_told_to_be_a_repetition() -> None:
    made: list[str] = []
    result = run(ask(("1", "a"), dedupe="turn", made=made), None, crash_at="after ledger.end note")
    assert result.output == ["noted a"]
    assert len(made) == 1


@pytest.mark.parametrize("point", ["after ledger.begin note", "before ledger.end note", "after ledger.end note"])
def test_the_key_handed_to_the_tool_is_the_same_on_every_attempt(point: str) -> None:
    made: list[str] = []
    run(ask(("1", "a"), made=made), None, crash_at=point)
    assert len(set(made)) == 1


def test_within_a_session_a_call_of_an_earlier_turn_counts() -> None:
    made: list[str] = []
    log: list[Any] = []
    ledger = Ledger()
    noting = ask(("1", "a"), dedupe="session", made=made)
    assert run(noting, None, log=log, ledger=ledger).output == ["noted a"]
    [again] = run(noting, None, log=log, ledger=ledger).output
    assert again["result"] == "noted a"
    assert len(made) == 1
    assert len(ledger) == 1


@pytest.mark.parametrize("effect", ["write", "irreversible"])
def test_two_branches_that_make_the_same_call_make_it_once(effect: Any) -> None:
    made: list[str] = []

    @tool(effect=effect, dedupe="turn")
    async def note(call: ToolCall, text: str) -> str:
        made.append(call.key)
        await asyncio.sleep(0.01)
        return text

    @agent("double")
    async def double(turn: Turn, _: Any) -> list[str]:
        return await turn.gather(*(note("a") for _ in range(5)))

    assert run(double, None).output == ["a"] * 5
    assert len(made) == 1


def test_arguments_for_which_nothing_is_recorded_yet_may_not_change_at_the_place_of_an_irreversible_call() -> None:
    outer = Outer()
    clerk = diverging(outer, lambda turn: f"attempt {turn.attempt}")
    for point in ("after tool.started send", "before ledger.end send", "after step.completed send"):
        outer.letters.clear()
        result = run(clerk, None, crash_at=point)
        assert result.error is not None
        assert result.error["code"] == "diverged"
        assert "bring the code between its steps back" in result.error["message"]
        assert len(outer.letters) <= 1
    assert run(clerk, None, crash_at="before tool.started send").status == "succeeded"


def test_a_turn_whose_calls_diverge_fails_whatever_its_agent_makes_of_that() -> None:
    @tool(effect="write")
    async def note(text: str) -> str:
        return text

    @agent("stubborn")
    async def stubborn(turn: Turn, _: Any) -> str:
        try:
            return await note(f"attempt {turn.attempt}")
        except BaseException:  # as nobody should
            return "nothing happened"

    result = run(stubborn, None, crash_at="after step.completed note")
    assert result.error is not None
    assert (result.error["code"], result.error["step"]) == ("diverged", "note")
    assert [event.kind for event in result.events][-2:] == ["turn.diverged", "turn.failed"]


def test_a_read_whose_arguments_have_changed_keeps_its_record_as_any_step_does() -> None:
    @tool(effect="read")
    async def look(text: str) -> str:
        return text

    @agent("looking")
    async def looking(turn: Turn, _: Any) -> str:
        return await look(f"attempt {turn.attempt}")

    result = run(looking, None, crash_at="after step.completed look")
    assert result.output == "attempt 1"
    assert "turn.diverged" in [event.kind for event in result.events]


def test_a_call_that_certainly_did_not_happen_may_be_made_with_other_arguments() -> None:
    sent: list[str] = []

    @tool(effect="irreversible")
    async def send(to: str) -> str:
        if to == "nobody":
            raise NotDone("no such address")
        sent.append(to)
        return to

    def clerk(to: str) -> Agent[Any, str]:
        @agent("clerk")
        async def clerk(turn: Turn, _: Any) -> str:
            return await send(to)

        return clerk

    log: list[Any] = []
    ledger = Ledger()
    failed = run(clerk("nobody"), None, log=log, ledger=ledger)
    fixed = run(clerk("Ann"), None, log=log, ledger=ledger, retry=failed)

    assert (failed.status, fixed.output, sent) == ("failed", "Ann", ["Ann"])


def diverging(outer: Outer, text: Callable[[Turn], str]) -> Agent[Any, str]:
    @tool(effect="irreversible", timeout=SHORT)
    async def send(call: ToolCall, text: str) -> str:
        outer.letters.append(call.key)
        return text

    @agent("clerk")
    async def clerk(turn: Turn, _: Any) -> str:
        try:
            return await send(text(turn))
        except Exception as error:  # as a framework would
            return f"{error}"

    return clerk


# -- failures


def failing(*errors: BaseException | None, **options: Any) -> tuple[Agent[Any, Json], list[int]]:
    """An agent with a tool of which the first calls raise ``errors``, one after another; and the attempts of its calls."""
    attempts: list[int] = []

    @tool(**options)
    async def act(call: ToolCall) -> str:
        attempts.append(call.attempt)
        error = errors[len(attempts) - 1] if len(attempts) <= len(errors) else None
        if error is not None:
            raise error
        return "done"

    @agent("acting")
    async def acting(turn: Turn, _: Any) -> Json:
        return await act()

    return acting, attempts


FAST = Retry(attempts=3, first=timedelta(milliseconds=1))


def status(result: Result[Any]) -> tuple[str, int]:
    [call] = result.tool_calls
    return str(call.status), call.attempts


def test_a_write_is_tried_again_and_fails_with_its_last_error() -> None:
    acting, attempts = failing(OSError("1"), OSError("2"), effect="write", retry=FAST)
    result = run(acting, None)
    assert (result.output, attempts, status(result)) == ("done", [1, 2, 3], ("done", 3))

    acting, attempts = failing(*map(OSError, "123"), effect="write", retry=FAST)
    result = run(acting, None)
    assert result.error is not None
    assert (result.error["code"], attempts, status(result)) == ("step_failed", [1, 2, 3], ("failed", 3))
    assert result.tool_calls[0].error == {"type": "OSError", "message": "3"}


def test_an_irreversible_call_is_tried_again_only_if_it_says_that_it_has_done_nothing() -> None:
    acting, attempts = failing(NotDone("busy"), effect="irreversible", retry=FAST)
    assert (run(acting, None).output, attempts) == ("done", [1, 2])

    acting, attempts = failing(OSError("reset"), effect="irreversible", retry=FAST)
    result = run(acting, None)
    assert result.error is not None
    assert (result.error["code"], attempts, status(result)) == ("outcome_unknown", [1], ("unknown", 1))
    assert result.tool_calls[0].error == {"type": "OSError", "message": "reset"}


@pytest.mark.parametrize("point", ["before ledger.end act", "after ledger.end act", "after step.failed act"])
def test_a_doubt_is_the_same_on_every_replay(point: str) -> None:
    seen: list[tuple[str, str]] = []

    @tool(effect="irreversible")
    async def act() -> None:
        raise OSError("reset")

    @agent("asking")
    async def asking(turn: Turn, _: Any) -> str:
        try:
            await act()
        except OutcomeUnknown as error:
            seen.append((error.call, error.step))
            return error.call
        return ""

    result = run(asking, None, crash_at=point)
    assert result.output.startswith("call_")
    assert set(seen) == {(result.output, "act")}
    assert result.calls["act"] == 1


@pytest.mark.parametrize(
    ("answer", "output", "calls"),
    [
        (Done("found"), "found", [1]),
        (Absent(), "done", [1, 2]),
        (Unknown("no idea"), None, [1]),
        ("nonsense", None, [1]),
        (OSError("away"), None, [1]),
    ],
)
def test_a_broken_call_is_what_reconcile_says(answer: Any, output: str | None, calls: list[int]) -> None:
    def reconcile(call: ToolCall) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    acting, attempts = failing(OSError("reset"), effect="irreversible", retry=FAST, reconcile=reconcile)
    result = run(acting, None)

    assert attempts == calls
    if output is not None:
        assert result.output == output
    else:
        assert result.error is not None
        assert result.error["code"] == "outcome_unknown"


@pytest.mark.parametrize("arrives", [True, False])
def test_what_a_call_that_timed_out_has_sent_may_still_arrive(arrives: bool) -> None:
    asked: list[str] = []
    made: list[int] = []

    async def was_sent(call: ToolCall) -> Done[str] | Absent:
        asked.append(call.key)
        return Done("arrived") if arrives and len(asked) > 2 else Absent()

    @tool(effect="irreversible", timeout=timedelta(milliseconds=5), reconcile=was_sent, retry=FAST)
    async def send(call: ToolCall) -> str:
        made.append(call.attempt)
        if len(made) == 1:
            await asyncio.Event().wait()
        return "again"

    @agent("waiting")
    async def waiting(turn: Turn, _: Any) -> str:
        return await send()

    result = run(waiting, None)
    assert result.output == ("arrived" if arrives else "again")
    assert len(made) == (1 if arrives else 2)
    assert len(asked) > 2  # not believed at once


def test_a_thread_that_was_left_behind_is_in_doubt_whatever_reconcile_says() -> None:
    told: list[bool] = []
    go = threading.Event()

    @tool(effect="irreversible", timeout=timedelta(milliseconds=20), reconcile=lambda call: Absent(), retry=FAST)
    def act() -> None:
        go.wait(10)
        told.append(cancelled())

    @agent("waiting")
    async def waiting(turn: Turn, _: Any) -> str:
        try:
            await turn.step("act", act)
        except OutcomeUnknown as error:
            go.set()
            return error.error_type
        return ""

    result = run(waiting, None)
    assert (result.output, result.calls["act"]) == ("TimeoutError", 1)


def test_what_an_operator_settles_is_what_the_next_call_gets() -> None:
    for outcome, output in (
        (Settlement.DONE, "by hand"),
        (Settlement.NOT_DONE, "done"),
        (Settlement.GIVE_UP, "OutcomeUnknown: step 'act' failed: OSError: given up by an operator: why"),
    ):
        acting, attempts = failing(OSError("reset"), effect="irreversible", dedupe="session")
        ledger, log = Ledger(), []  # type: ignore[var-annotated]
        run(acting, None, ledger=ledger, log=log)
        ledger.settle(next(iter(ledger)).id, outcome, result="by hand", note="why", now=SYSTEM.now())

        result = run(acting, None, ledger=ledger, log=log)

        assert (result.value or f"OutcomeUnknown: {(result.error or {})['message']}") == output
        assert len(attempts) == (2 if outcome is Settlement.NOT_DONE else 1)


def test_a_result_that_cannot_be_recorded_leaves_an_irreversible_call_in_doubt() -> None:
    @tool(effect="irreversible")
    async def act() -> Any:
        return object()

    @agent("acting")
    async def acting(turn: Turn, _: Any) -> None:
        await act()

    result = run(acting, None)
    assert status(result) == ("unknown", 1)
    assert "cannot be recorded as JSON" in str(result.tool_calls[0].error)


def test_a_large_result_is_kept_as_an_artifact_and_found_again() -> None:
    size = Outside.inline + 1

    @tool(effect="read", dedupe="turn")
    async def load() -> str:
        return "x" * size

    @agent("loading")
    async def loading(turn: Turn, _: Any) -> list[int]:
        return [len(await load()), len(await load())]

    result = run(loading, None, crash_at="after ledger.end load")
    assert result.output == [size, size]
    assert result.calls["load"] == 1
    [call] = result.tool_calls
    assert (call.result, len(result.artifacts["load.json"])) == (None, size + 2)


def test_a_fake_may_have_the_call_and_a_fake_may_be_a_result() -> None:
    made: list[str] = []
    noting = ask(("1", "a"), made=made)
    keys: list[str] = []

    def fake(call: ToolCall, text: str) -> str:
        keys.append(call.key)
        return text.upper()

    assert run(noting, None, fake={"note": fake}).output == ["A"]
    assert run(noting, None, fake={"note": "x"}).output == ["x"]
    assert run(noting, None, fake={"note": OSError("no")}).error is not None
    assert made == []
    assert keys[0].startswith("call_")


def test_an_irreversible_call_goes_on_when_its_turn_is_cancelled() -> None:
    letters: list[str] = []

    @agent("impatient")
    async def impatient(turn: Turn, _: Any) -> str:
        begun, left = asyncio.Event(), asyncio.Event()

        @tool(effect="irreversible")
        async def send() -> str:
            begun.set()
            await left.wait()
            letters.append("sent" if not cancelled() else "given up")
            return "sent"

        task = asyncio.create_task(send())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left.set()
        return "not sent yet" if not letters else "sent before"

    result = run(impatient, None)
    assert (result.output, letters, status(result)) == ("not sent yet", ["sent"], ("done", 1))


def test_the_errors_of_a_turn_that_leaves_are_no_failures_of_the_tool() -> None:
    acting, attempts = failing(effect="irreversible")
    result = run(acting, None, pause_at="after ledger.begin act")
    assert (result.output if result.value else result.error) is not None
    assert not {LeaseLost.__name__, TurnEvicted.__name__} & {
        str((c.error or {}).get("type")) for c in result.tool_calls
    }
    assert len(attempts) <= 1


def test_a_step_that_failed_is_a_step_failed_for_a_tool_too() -> None:
    acting, _ = failing(ValueError("no"), effect="read")

    @agent("catching")
    async def catching(turn: Turn, _: Any) -> str:
        try:
            return str(await acting.function(turn, None))
        except StepFailed as error:
            return error.error_message

    assert run(catching, None, crash_at="after step.failed act").output == "no"
    assert Counter(run(catching, None).calls) == {"act": 1}
