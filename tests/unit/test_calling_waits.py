"""Tools and waits: approvals before a call, waiting until a doubt is settled, branches that lose a race."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from longshift import (
    Absent,
    Approval,
    Done,
    NotDone,
    OutcomeUnknown,
    StepFailed,
    ToolDenied,
    Turn,
    Unknown,
    UsageError,
    WaitTimeout,
    agent,
    tool,
)
from longshift.agent import Agent
from longshift.contract import Verdict
from longshift.model import Json
from longshift.testing import Scenario, named_crash_points, run, torture
from longshift.testing.outside import Outside


def paying(**options: Any) -> tuple[Agent[int, str], list[int]]:
    """An agent that pays once, and says how that went; and what was paid."""
    paid: list[int] = []

    @tool(effect="write", **options)
    async def pay(amount: int) -> str:
        paid.append(amount)
        return f"paid {amount}"

    @agent("buyer")
    async def buyer(turn: Turn, amount: int) -> str:
        try:
            return await pay(amount)
        except ToolDenied as error:
            return error.error_message

    return buyer, paid


def test_a_tool_that_needs_an_approval_is_called_when_it_is_granted() -> None:
    buyer, paid = paying(approval=True)
    result = run(buyer, 5, approve={"pay": True})

    assert (result.output, paid) == ("paid 5", [5])
    [asked] = [event for event in result.events if event.kind == "wait.begun"]
    assert (asked.payload["approval"], asked.payload["show"]) == ("pay", {"amount": 5})


@pytest.mark.parametrize(
    ("options", "answers", "said"),
    [
        ({"approval": True}, {"pay": Verdict(granted=False, comment="too much")}, "denied: too much"),
        ({"approval": True}, {"pay": False}, "denied: without a comment"),
        ({"approval": timedelta(days=1)}, {}, "nobody approved it in time"),
        ({"approval": Approval(timedelta(days=30), stops_deadline=True)}, {}, "nobody approved it in time"),
    ],
)
def test_a_tool_that_is_not_approved_is_not_called_now_or_on_any_replay(options: Any, answers: Any, said: str) -> None:
    buyer, paid = paying(**options)
    for point in (None, *named_crash_points(buyer, 5, approve=answers)):
        result = run(buyer, 5, approve=answers, crash_at=point)
        assert (result.output, paid, result.tool_calls) == (said, [], ())


def test_an_approval_that_stops_the_deadline_needs_a_timeout() -> None:
    with pytest.raises(UsageError, match="needs a timeout"):
        Approval(stops_deadline=True)


def test_an_approval_of_other_arguments_does_not_count() -> None:
    paid: list[int] = []

    @tool(effect="write", approval=True)
    async def pay(amount: int) -> None:
        paid.append(amount)

    @agent("buyer")
    async def buyer(turn: Turn, _: None) -> None:
        await pay(5 if turn.attempt < 3 else 500)  # its first attempt asks, the second one has the answer, and dies

    result = run(buyer, None, approve={"pay": True}, crash_at="before ledger.begin pay")
    asked = [event.payload["show"]["amount"] for event in result.events if event.kind == "wait.begun"]
    assert (asked, paid) == ([5, 500], [500])


def test_a_denial_is_told_as_the_failure_of_its_step() -> None:
    buyer, _ = paying(approval=True)
    [failed] = [event for event in run(buyer, 5, approve={"pay": False}).events if event.kind == "step.failed"]
    assert failed.payload["error"]["code"] == "tool_denied"
    assert issubclass(ToolDenied, StepFailed)


def settling(*, timeout: timedelta | None = None, result: Any = None) -> Agent[Any, Json]:
    """An agent whose call is in doubt, and that waits until it is not."""

    @tool(effect="irreversible")
    async def act() -> Json:
        if result is not None:
            return result
        raise OSError("reset")

    @agent("waiter")
    async def waiter(turn: Turn, _: Any) -> Json:
        try:
            return await act()
        except OutcomeUnknown as error:
            try:
                return await turn.settled(error, timeout=timeout)
            except (NotDone, OutcomeUnknown, WaitTimeout) as settled:
                return f"{type(settled).__name__}: {settled}"

    return waiter


@pytest.mark.parametrize(
    ("found", "output"),
    [
        (Done({"no": 7}), {"no": 7}),
        (Absent(), "NotDone: reset"),
        (Unknown("the books are lost"), "OutcomeUnknown: step 'act' failed: OSError: given up: the books are lost"),
    ],
)
def test_an_agent_may_wait_until_a_doubt_is_settled_and_leaves_its_worker_meanwhile(found: Any, output: Json) -> None:
    waiter = settling()
    undisturbed = run(waiter, None, settle={"act": found})
    assert (undisturbed.output, undisturbed.attempts) == (output, 2)
    for point in undisturbed.points:
        again = run(waiter, None, settle={"act": found}, crash_at=point).output
        assert again == output or str(again).split(":")[0] == str(output).split(":")[0]  # who doubts, words it


def test_who_waits_for_a_doubt_to_be_settled_need_not_wait_for_ever() -> None:
    assert "nobody has settled call_" in str(run(settling(timeout=timedelta(days=1)), None).output)
    expired = run(settling(), None)
    assert "nothing brought call" in str(expired.error)


def test_what_a_stopped_worker_says_late_is_what_the_agent_gets() -> None:
    waiter = settling(result="x" * (Outside.inline + 1))
    result = run(waiter, None, pause_at="before ledger.end act", settle={"act": Unknown()})
    # nobody is left who could say it in time: in this world the stopped one goes on when all is over
    assert str(result.output).startswith("OutcomeUnknown")
    assert result.calls["act"] == 1


def test_a_call_whose_branch_has_lost_a_race_before_it_began_is_not_made() -> None:
    sent: list[str] = []

    @tool(effect="irreversible")
    async def send() -> str:
        sent.append("sent")
        return "sent"

    @agent("racing")
    async def racing(turn: Turn, _: Any) -> Json:
        async def at_once() -> str:
            return "won"

        return await turn.race(send(), at_once())

    result = run(racing, None)
    assert (result.output, sent) == ([1, "won"], [])
    assert {call.status for call in result.tool_calls} <= {"failed"}


def test_an_agent_that_asks_calls_and_settles_keeps_every_promise() -> None:
    def scenario() -> Scenario:
        attempts: list[int] = []

        @tool(effect="irreversible", approval=True, reconcile=lambda call, text: Unknown())
        async def send(text: str) -> str:
            attempts.append(1)
            raise OSError("reset")

        @agent("careful")
        async def careful(turn: Turn, _: Any) -> Json:
            try:
                return await send("hello")
            except OutcomeUnknown as error:
                return await turn.settled(error)

        return Scenario(careful, approve={"send": True}, settle={"send": Done("found")})

    assert torture(scenario).violations == []


async def test_settling_is_a_wait_and_not_for_the_inside_of_a_step() -> None:
    @agent("inside")
    async def inside(turn: Turn, _: Any) -> None:
        async def wait() -> None:
            await turn.settled(OutcomeUnknown("act", error_type="", error_message="", call="call_1"))

        await turn.step("wait", wait)

    result = await asyncio.to_thread(run, inside, None)
    assert "a step cannot use settled()" in str(result.error)
