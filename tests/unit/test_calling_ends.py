"""Irreversible calls whose end is hard to tell: answers that make no sense, records that fail, threads that begin too late,
starters that die while they are asked about. None of them is made twice."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from longshift import Absent, Done, NotDone, OutcomeUnknown, StepFailed, ToolCall, Turn, Unknown, agent, tool
from longshift.agent import Agent
from longshift.clock import SYSTEM
from longshift.errors import ConfigError
from longshift.model import CallOutcome, CallStatus, Json, NewCall
from longshift.place import current
from longshift.stepping import Stepper
from longshift.testing import Ledger, run
from longshift.testing.bench import Rehearsal
from longshift.testing.outside import Outside
from longshift.underway import UnderWay

SHORT = timedelta(seconds=10)


def insisting(pay: Callable[[], Any], *, times: int = 2) -> Agent[Any, list[str]]:
    """An agent that makes the same call again when it has failed."""

    @agent("insisting")
    async def insisting(turn: Turn, _: Any) -> list[str]:
        said: list[str] = []
        for _ in range(times):
            try:
                said.append(f"paid {await pay()}")
            except StepFailed as error:
                said.append(type(error).__name__)
        return said

    return insisting


def pay_as_step(pay: Callable[[], Any]) -> Any:
    execution = current()
    assert execution is not None
    return Turn(execution).step("pay", pay)


@pytest.mark.parametrize("answer", [Done("no number"), Done(object()), Unknown(ValueError("?")), "absent"])  # type: ignore[arg-type]
@pytest.mark.parametrize("name", ["pay", "p" * 128])
def test_an_answer_of_reconcile_that_makes_no_sense_leaves_the_call_in_doubt(answer: Any, name: str) -> None:
    calls: list[int] = []

    @tool(effect="irreversible", name=name, timeout=SHORT, reconcile=lambda call: answer)
    async def pay() -> int:
        calls.append(1)
        raise OSError("reset")

    result = run(insisting(pay), None)

    assert (result.output, calls) == (["OutcomeUnknown"] * 2, [1])
    assert [call.status for call in result.tool_calls] == [CallStatus.UNKNOWN]


def test_a_result_that_cannot_be_laid_out_leaves_the_call_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def put(*_: Any, **__: Any) -> Any:
        raise ConfigError("the bucket is gone")

    calls: list[int] = []
    monkeypatch.setattr(Outside, "put_artifact", put)

    @tool(effect="irreversible", timeout=SHORT)
    async def pay() -> str:
        calls.append(1)
        return "x" * (Outside.inline + 1)

    result = run(insisting(pay), None)

    assert (result.output, calls) == (["OutcomeUnknown"] * 2, [1])


def test_a_call_whose_end_was_refused_by_the_ledger_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    end, refuse = Outside.end_call, True

    async def refused(port: Outside, call: NewCall, outcome: CallOutcome, *, epoch: int | None = None) -> Any:
        if refuse:
            raise RuntimeError("the ledger is broken")
        return await end(port, call, outcome, epoch=epoch)

    monkeypatch.setattr(Outside, "end_call", refused)

    @tool(effect="irreversible", timeout=SHORT)
    async def pay() -> int:
        calls.append(1)
        return 1

    @agent("again")
    async def again(turn: Turn, _: Any) -> str:
        nonlocal refuse
        with pytest.raises(StepFailed):
            await pay()
        refuse = False
        try:
            return str(await pay())
        except OutcomeUnknown as error:
            return error.call

    result = run(again, None)

    [call] = result.tool_calls
    assert (calls, call.status) == ([1], CallStatus.UNKNOWN)


def test_a_thread_that_begins_when_nobody_waits_for_it_any_more_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    go, over = threading.Event(), threading.Event()
    timed = Stepper._timed

    def held_up(stepper: Stepper, call: Callable[[], Any], **more: Any) -> Any:
        def late() -> Any:
            if not go.is_set():
                go.wait(10)
                try:
                    return call()
                finally:
                    over.set()
            return call()

        return timed(stepper, late, **more)

    monkeypatch.setattr(Stepper, "_timed", held_up)

    @tool(effect="irreversible", timeout=timedelta(milliseconds=20), dedupe="turn")
    def pay() -> str:
        calls.append("made")
        return "paid"

    @agent("patient")
    async def patient(turn: Turn, _: Json) -> str:
        with pytest.raises(StepFailed):
            await turn.step("pay", pay)
        go.set()
        await turn.step("wait", over.wait, 10)
        return str(await turn.step("pay", pay))

    result = run(patient, None)

    assert (result.output, calls) == ("paid", ["made"])


@pytest.mark.parametrize(("error", "code"), [(NotDone("refused"), None), (OSError("reset"), "diverged")])
def test_a_mended_agent_may_call_with_other_arguments_only_if_nothing_has_happened(
    error: Exception, code: str | None
) -> None:
    amounts: list[int] = []
    wrong = True

    @tool(effect="irreversible", timeout=SHORT)
    async def pay(amount: int) -> int:
        amounts.append(amount)
        if wrong:
            raise error
        return amount

    @agent("payer")
    async def payer(turn: Turn, _: Any) -> int:
        return await pay(-5 if wrong else 5)

    ledger, log = Ledger(), []  # type: ignore[var-annotated]
    first = run(payer, None, ledger=ledger, log=log)
    wrong = False
    second = run(payer, None, ledger=ledger, log=log, retry=first)

    assert (second.error or {}).get("code") == code
    assert amounts == ([-5, 5] if code is None else [-5])


def test_a_call_whose_thread_still_runs_is_not_made_again_however_long_ago_it_began() -> None:
    calls: list[int] = []
    go = threading.Event()

    @tool(effect="irreversible", timeout=timedelta(milliseconds=20), reconcile=lambda call: Absent())
    def pay() -> None:
        calls.append(1)
        go.wait(10)

    @agent("patient")
    async def patient(turn: Turn, _: Json) -> int:
        for _ in range(2):
            with pytest.raises(OutcomeUnknown):
                await turn.step("pay", pay)
        go.set()
        return len(calls)

    assert run(patient, None).output == 1


def test_a_thread_that_says_itself_that_it_took_too_long_has_ended_and_is_asked_about() -> None:
    calls: list[int] = []

    @tool(effect="irreversible", timeout=SHORT, reconcile=lambda call: Done("paid"))
    def pay() -> str:
        calls.append(1)
        raise TimeoutError("timed out")

    result = run(insisting(lambda: pay_as_step(pay), times=1), None)

    assert (result.output, calls) == (["paid paid"], [1])


def test_a_call_that_timed_out_is_not_made_again_though_the_branch_that_asked_what_became_of_it_is_gone() -> None:
    calls: list[int] = []
    asked: list[int] = []
    waiting: list[asyncio.Task[None]] = []

    async def what(call: ToolCall) -> Absent | Unknown:
        asked.append(1)
        waiting[0].cancel()
        return Absent() if len(asked) == 1 else Unknown()

    @tool(effect="irreversible", timeout=SHORT, reconcile=what)
    async def pay() -> None:
        calls.append(1)
        raise TimeoutError

    @agent("impatient")
    async def impatient(turn: Turn, _: Json) -> str:
        waiting.append(asyncio.create_task(pay()))
        await asyncio.wait(waiting)
        with pytest.raises(OutcomeUnknown) as caught:
            await pay()
        return caught.value.error_type

    result = run(impatient, None)

    assert (result.output, calls) == ("TimeoutError", [1])


async def test_that_nobody_hears_how_a_call_ended_is_nobodys_error() -> None:
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    go = asyncio.Event()

    async def call() -> None:
        await go.wait()
        raise OSError("reset")

    underway = UnderWay(SYSTEM)
    waiting = asyncio.create_task(underway.keep(call(), name="call"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    go.set()
    await underway.idle()
    del waiting  # its traceback has the task
    gc.collect()

    assert told == []


def test_that_a_call_is_absent_counts_only_if_its_starter_was_gone_before() -> None:
    letters: list[str] = []

    async def was_sent(call: ToolCall) -> Done[str] | Absent:
        found = Done("sent") if letters else Absent()
        execution = current()
        assert isinstance(execution, Rehearsal)
        if not letters:  # what was on its way arrives, and its sender dies
            letters.append("of the first")
            for worker in execution.outside.world.workers.values():
                worker.dead = worker is not execution.outside
        return found

    @tool(effect="irreversible", timeout=SHORT, reconcile=was_sent)
    async def send() -> str:
        letters.append("another")
        return "sent"

    @agent("sender")
    async def sender(turn: Turn, _: Json) -> str:
        return await send()

    result = run(sender, None, pause_at="after tool.started send")

    assert (result.output, letters) == ("sent", ["of the first"])
