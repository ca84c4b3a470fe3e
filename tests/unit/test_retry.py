"""A turn that failed, tried again: what was recorded is not done again, what failed is."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from longshift import StepFailed, Turn, UsageError, agent, step
from longshift.chain import carried
from longshift.events import Event, Kind, fold
from longshift.model import TurnStatus
from longshift.testing import crash_points, run
from longshift.testing.bench import Result

broken = True
done: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _broken() -> None:
    global broken
    broken = True
    done.clear()


def mend() -> None:
    global broken
    broken = False


@step
async def costly(what: str) -> str:
    done[what] += 1
    return what.upper()


@step
async def fragile(what: str) -> str:
    done[what] += 1
    if broken:
        raise OSError(f"{what} does not work")
    return what.upper()


@agent("journey", version="1")
async def journey(turn: Turn, name: str) -> list[Any]:
    begun = turn.now()
    await turn.say(f"hello {name}", role="system")
    await turn.state.set("count", turn.state.get("count", 0) + 1)
    parts = await turn.gather(costly("left"), costly("right"))
    await turn.sleep(timedelta(hours=1))
    ticket = turn.uuid()
    arrived = await fragile("last")
    return [*parts, arrived, str(ticket), (turn.now() - begun) > timedelta(hours=1), turn.state["count"]]


def failed(log: list[Event]) -> Result[Any]:
    result = run(journey, "Ann", log=log)
    assert result.status is TurnStatus.FAILED
    return result


def test_a_retry_goes_on_from_the_last_step() -> None:
    log: list[Event] = []
    first = failed(log)
    mend()

    second = run(journey, "Ann", log=log, retry=first)

    assert second.output[:3] == ["LEFT", "RIGHT", "LAST"]
    assert done == {"left": 1, "right": 1, "last": 2}
    assert second.output[4:] == [True, 1]
    assert second.unused == ()
    assert [event.key for event in second.events if event.key is not None] == ["fragile#0"]


def test_the_session_remembers_one_question_and_what_was_said_once() -> None:
    log: list[Event] = []
    first = failed(log)
    mend()
    second = run(journey, "Ann", log=log, retry=first)

    context = fold(log)

    assert [(message["role"], message["content"]) for message in context.history] == [
        ("user", "Ann"),
        ("system", "hello Ann"),
        ("assistant", second.output),
    ]
    assert context.state == {"count": 1}


def test_what_an_agent_sees_in_a_retry_is_the_fold() -> None:
    @agent("looker")
    async def looker(turn: Turn, name: str) -> list[Any]:
        await turn.say("before")
        seen = [message["content"] for message in turn.history]
        await fragile("x")
        return seen

    log: list[Event] = []
    first = run(looker, "Ann", log=log)
    mend()

    assert run(looker, "Ann", log=log, retry=first).output == ["Ann", "before"]


def test_a_retry_may_fail_and_be_retried() -> None:
    log: list[Event] = []
    second = run(journey, "Ann", log=log, retry=failed(log))
    assert second.status is TurnStatus.FAILED
    mend()

    third = run(journey, "Ann", log=log, retry=second)

    assert third.status is TurnStatus.SUCCEEDED
    assert done == {"left": 1, "right": 1, "last": 3}


def test_a_retry_survives_a_crash_after_any_event() -> None:
    log: list[Event] = []
    first = failed(log)
    mend()
    undisturbed = run(journey, "Ann", log=[*log], retry=first)
    for point in crash_points(journey, "Ann", log=[*log], retry=first):
        again = run(journey, "Ann", log=[*log], retry=first, crash_after=point)
        assert again.output == undisturbed.output
    assert done["left"] == done["right"] == 1


def test_a_turn_that_succeeded_is_not_retried() -> None:
    mend()
    log: list[Event] = []
    result = run(journey, "Ann", log=log)

    with pytest.raises(UsageError, match="it has succeeded"):
        run(journey, "Ann", log=log, retry=result)


@agent("careful")
async def careful(turn: Turn, name: str) -> str:
    async def guarded() -> str:
        try:
            return await fragile("first choice")
        except StepFailed:
            return await costly("second choice")

    async def alone(what: str) -> str:
        try:
            return await fragile(what)
        except StepFailed:
            return "nothing"

    got, _ = await turn.gather(guarded(), alone("beside"))
    await turn.gather(alone("in passing"))
    await costly("after")
    return got + await fragile("the end")


def test_failures_that_the_agent_got_over_stand() -> None:
    """Else it would take another way than the one whose steps are recorded."""
    log: list[Event] = []
    first = run(careful, "Ann", log=log)
    mend()

    second = run(careful, "Ann", log=log, retry=first)

    assert second.output == "SECOND CHOICETHE END"
    assert second.unused == ()
    assert {name: n for name, n in done.items() if n > 1} == {"the end": 2}


# -- the rule itself


def log_of(*kinds_and_keys: tuple[Kind, str], **payload: Any) -> list[Event]:
    turn, session = uuid4(), uuid4()
    now = run(journey, "x").events[0].created_at
    return [
        Event(session, seq, uuid4(), 1, turn, kind, key, payload, now)
        for seq, (kind, key) in enumerate(kinds_and_keys, 1)
    ]


@pytest.mark.parametrize(
    ("failed_in", "later", "stands"),
    [
        ("", "", True),
        ("0.0/", "0.0/", True),
        ("0.0/", "0.1/", False),  # beside it
        ("0.0/", "", True),
        ("0.0/", "1.0/", True),  # a later gather
        ("1.0/", "0.0/", False),
        ("0.0/2.1/", "0.0/3.0/", True),
        ("0.0/2.1/", "0.1/3.0/", False),
        ("~0/", "~1/", False),  # tasks run side by side
        ("~0/", "", True),
        ("", "0.0/", True),
        ("10.0/", "9.0/", False),
    ],
)
def test_a_failure_stands_if_the_agent_went_on_after_it(failed_in: str, later: str, stands: bool) -> None:
    events = log_of((Kind.STEP_FAILED, f"{failed_in}a#0"), (Kind.STEP_COMPLETED, f"{later}b#0"))

    assert carried(events, turn_id=uuid4()) == (events if stands else events[1:])


def test_a_turn_keeps_its_own_failures() -> None:
    events = log_of((Kind.STEP_FAILED, "a#0"))

    assert carried(events, turn_id=events[0].turn_id or uuid4()) == events


@pytest.mark.parametrize(("reason", "kept"), [("timeout", 0), ("signal", 2)])
def test_waits_that_timed_out_are_waited_again(reason: str, kept: int) -> None:
    events = log_of((Kind.WAIT_BEGUN, "$wait#0"), (Kind.WAIT_ENDED, "$wait#0"), reason=reason)

    assert len(carried(events, turn_id=uuid4())) == kept
