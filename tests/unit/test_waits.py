"""Waits for what others bring, with the agent's own eyes: ``longshift.testing`` runs it without a server."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from longshift import Agent, ChildFailed, InvalidInput, StepFailed, Turn, UsageError, Verdict, WaitTimeout, agent, step
from longshift.clock import SYSTEM
from longshift.model import TurnStatus, new_id
from longshift.testing import Result, Scenario, crash_points, named_crash_points, run, torture
from longshift.testing.bench import new_record, rehearse
from longshift.testing.world import Post, Time, World

DAY = timedelta(days=1)


class Review(BaseModel):
    stars: int
    text: str = ""


worlds: list[World] = []


def _watched(watched: Agent[None, Any], **others: Any) -> tuple[Result[Any], World]:
    """A run whose agent, and whose test, can look at what is outside."""
    now = SYSTEM.now()
    record = new_record(watched, None, session_id=new_id(), metadata={}, now=now, until=now + 9 * DAY)
    world = World(record, [], {}, Time(SYSTEM), post=Post(**others))
    worlds.append(world)
    return asyncio.run(rehearse(watched, world, fake={})), world


@step
async def note(text: str) -> str:
    return f"noted {text}"


# ----------------------------------------------------------------------------------------------------------- signals


@agent("listener")
async def listener(turn: Turn, count: int) -> list[Any]:
    return [await turn.wait_for("news") for _ in range(count)]


def test_signals_that_came_first_are_kept_and_taken_oldest_first() -> None:
    result = run(listener, 2, signals={"news": ["a", "b", "c"], "other": [1]})

    assert result.output == ["a", "b"]
    assert result.unread == {"news": ["c"], "other": [1]}


def test_a_wait_ends_without_a_signal_when_its_time_is_over() -> None:
    @agent("impatient")
    async def impatient(turn: Turn, _: None) -> str:
        try:
            return str(await turn.wait_for("news", timeout=DAY))
        except WaitTimeout as error:
            return str(error)

    result = run(impatient, None)

    assert result.output == "no signal 'news' came within 1 day, 0:00:00"
    assert result.attempts == 2, "it left its worker"


def test_a_turn_that_nobody_signals_expires() -> None:
    result = run(listener, 1)

    assert result.status is TurnStatus.EXPIRED
    assert "nothing brought signal news" in str(result.error)


def test_it_expires_too_where_only_its_tasks_wait() -> None:
    @agent("tasks")
    async def tasks(turn: Turn, _: None) -> list[Any]:
        return list(await asyncio.gather(turn.wait_for("news"), turn.approval("go")))

    assert run(tasks, None, signals={"news": [1]}, approve={"go": True}).output[0] == 1
    assert run(tasks, None).status is TurnStatus.EXPIRED


def test_a_payload_is_read_as_the_type_that_is_asked_for() -> None:
    @agent("typed")
    async def typed(turn: Turn, _: None) -> int:
        review = await turn.wait_for("review", type=Review)
        return review.stars

    assert run(typed, None, signals={"review": [{"stars": 4}]}).output == 4
    misfit = run(typed, None, signals={"review": [{"stars": "many"}]})
    assert misfit.error is not None
    assert misfit.error["code"] == InvalidInput.code
    assert misfit.unread == {}, "it is consumed, or the session would never get past it"


def test_branches_that_wait_for_one_name_get_a_signal_each() -> None:
    @agent("pair")
    async def pair(turn: Turn, _: None) -> list[Any]:
        return await turn.gather(turn.wait_for("news"), turn.wait_for("news"))

    assert run(pair, None, signals={"news": [1, 2, 3]}).output == [1, 2]
    assert run(pair, None, signals={"news": [1]}).status is TurnStatus.EXPIRED


def test_a_step_cannot_wait() -> None:
    @agent("wrong")
    async def wrong(turn: Turn, _: None) -> None:
        async def inside() -> None:
            await turn.wait_for("news")

        await turn.step("inside", inside)

    failure = run(wrong, None, signals={"news": [1]}).error
    assert failure is not None
    assert "a step cannot use wait_for()" in failure["message"]


def test_a_plain_agent_waits_with_sync() -> None:
    @agent("plain waiter")
    def plain(turn: Turn, _: None) -> list[Any]:
        return [turn.sync(turn.wait_for("news")), turn.sync(turn.approval("go")).granted]

    assert run(plain, None, signals={"news": [7]}, approve={"go": True}).output == [7, True]


# --------------------------------------------------------------------------------------------------------- approvals


@agent("publisher")
async def publisher(turn: Turn, draft: str) -> dict[str, Any]:
    verdict = await turn.approval("publish", show={"draft": draft}, timeout=DAY)
    return verdict.model_dump()


def test_an_approval_is_asked_while_the_turn_has_left_its_worker() -> None:
    said = Verdict(granted=True, comment="fine", by="key_1")

    result = run(publisher, "text", approve={"publish": said})

    assert result.output == said.model_dump()
    assert result.attempts == 2
    begun = next(event for event in result.events if event.kind == "wait.begun")
    assert begun.payload["show"] == {"draft": "text"}


def test_an_approval_may_be_denied_or_come_too_late() -> None:
    assert not run(publisher, "text", approve={"publish": False}).output["granted"]
    late = run(publisher, "text").output
    assert (late["granted"], late["timed_out"]) == (False, True)


@pytest.mark.parametrize("stops", [True, False])
def test_an_approval_may_stop_the_deadline(stops: bool) -> None:
    @agent("slow")
    async def slow(turn: Turn, _: None) -> bool:
        verdict = await turn.approval("publish", timeout=2 * DAY, stops_deadline=stops)
        await turn.sleep(DAY / 2)
        return verdict.timed_out

    result = run(slow, None, deadline=DAY)

    assert result.status is (TurnStatus.SUCCEEDED if stops else TurnStatus.EXPIRED)


def test_an_approval_that_stops_the_deadline_needs_a_timeout() -> None:
    @agent("endless")
    async def endless(turn: Turn, _: None) -> bool:
        return (await turn.approval("publish", stops_deadline=True)).granted

    failure = run(endless, None).error
    assert failure is not None
    assert failure["code"] == UsageError.code
    assert "needs a timeout" in failure["message"]


# ---------------------------------------------------------------------------------------------------------- children


@agent("child")
async def child(turn: Turn, n: int) -> Review:
    await turn.sleep(DAY)
    if n < 0:
        raise ValueError("no stars below zero")
    return Review(stars=n, text=await note(str(n)))


@agent("parent")
async def parent(turn: Turn, numbers: list[int]) -> list[int]:
    children = [await turn.spawn(child, n) for n in numbers]
    return [review.stars for review in await turn.gather(*children)]


def test_children_run_as_turns_of_their_own_and_give_what_they_return() -> None:
    result = run(parent, [3, 4])

    assert result.output == [3, 4]
    assert [event.kind for event in result.events].count("value.recorded") == 2


def test_children_may_be_fakes() -> None:
    assert run(parent, [1], fake={child: Review(stars=9)}).output == [9]
    assert run(parent, [1], fake={"child": lambda n: Review(stars=n + 1)}).output == [2]


def test_a_child_without_a_result_raises() -> None:
    @agent("careful")
    async def careful(turn: Turn, n: int) -> str:
        try:
            await (await turn.spawn("child", n))
        except ChildFailed as error:
            return f"{error.status} {(error.error or {})['message']}"
        return "ended"

    assert run(careful, 1, fake={child: ValueError("no way")}).output == "failed no way"
    assert run(parent, [-1]).status is TurnStatus.FAILED


@agent("doubtful")
async def doubtful(turn: Turn, _: None) -> list[Any]:
    one = await turn.spawn(child, 5)
    kin = worlds[-1].post.children
    ended = dict(kin)
    kin.clear()  # it is still running

    async def later() -> Any:
        await turn.sleep(0.1)
        kin.update(ended)
        return Review(stars=await turn.wait_for("news", timeout=DAY / 2))  # looks for all that is waited for

    return [review.stars for review in await turn.gather(one, one, later())]


def test_a_child_may_be_awaited_twice_at_once() -> None:
    result, _ = _watched(doubtful, signals={"news": [1]})

    assert result.output == [5, 5, 1]


# -------------------------------------------------------------------------------------------------------------- races


@agent("racer")
async def racer(turn: Turn, _: None) -> list[Any]:
    first = await turn.race(turn.wait_for("a"), turn.wait_for("b"))
    second = await turn.race(turn.wait_for("b"), turn.sleep(DAY))
    return [*first, *second]


def test_a_race_is_won_by_one_branch_and_consumes_one_signal() -> None:
    result = run(racer, None, signals={"a": [1], "b": [2]})

    assert result.output == [0, 1, 0, 2], "what the loser of the first race could have had is there for the second"
    assert result.unread == {}


def test_a_race_against_time_is_lost_by_a_signal_that_does_not_come() -> None:
    result = run(racer, None, signals={"b": [2]})

    assert result.output == [1, 2, 1, None]


@pytest.mark.parametrize("crash", range(1, 12))
def test_a_race_has_one_winner_whatever_crashes(crash: int) -> None:
    undisturbed = run(racer, None, signals={"a": [1], "b": [2, 3]})
    assert crash in crash_points(racer, None, signals={"a": [1], "b": [2, 3]}) or crash > len(undisturbed.events)

    result = run(racer, None, signals={"a": [1], "b": [2, 3]}, crash_after=min(crash, len(undisturbed.events)))

    assert (result.output, result.unread) == (undisturbed.output, undisturbed.unread)
    assert result.unused == ()


def test_a_loser_that_goes_on_after_its_wait_has_consumed_its_signal() -> None:
    @agent("late loser")
    async def late_loser(turn: Turn, _: None) -> int:
        async def slow() -> None:
            await turn.wait_for("a")
            await note("on its way")
            await turn.sleep(2 * DAY)

        return (await turn.race(slow(), turn.sleep(DAY)))[0]

    result = run(late_loser, None, signals={"a": [1]})

    assert (result.output, result.unread) == (1, {})


def test_a_race_inside_a_losing_branch_gives_its_signal_back() -> None:
    @agent("nested")
    async def nested(turn: Turn, _: None) -> list[Any]:
        async def inner() -> tuple[int, Any]:
            place, value = await turn.gather(turn.wait_for("a"), turn.wait_for("never"))
            return place, value

        won = await turn.race(inner(), turn.sleep(DAY))
        return [won[0], await turn.wait_for("a")]

    result = run(nested, None, signals={"a": ["kept"]})

    assert result.output == [1, "kept"]


def test_the_first_branch_to_fail_wins_as_well() -> None:
    @agent("failing racer")
    async def failing(turn: Turn, _: None) -> str:
        async def fails() -> None:
            await turn.step("no way", _raise)

        try:
            await turn.race(turn.wait_for("never"), fails())
        except StepFailed as error:
            return error.error_message
        return "won"

    for point in [None, *crash_points(failing, None)]:
        result = run(failing, None, crash_after=point)
        assert (result.output, result.calls["no way"]) == ("no way", 1)


async def _raise() -> None:
    raise ValueError("no way")


def test_steps_race_too_and_losers_are_cancelled() -> None:
    ended: list[str] = []

    async def quick() -> str:
        return "quick"

    async def never() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("never")
        return "never"

    @agent("steps")
    async def steps(turn: Turn, _: None) -> list[Any]:
        return list(await turn.race(turn.step("never", never), turn.step("quick", quick)))

    result = run(steps, None)

    assert (result.output, ended) == ([1, "quick"], ["never"])


def test_a_signal_that_waits_to_be_recorded_goes_to_no_other_branch() -> None:
    @agent("greedy")
    async def greedy(turn: Turn, _: None) -> list[Any]:
        async def later() -> Any:
            await note("later")
            return await turn.wait_for("a")

        won, _ = await turn.race(turn.gather(turn.wait_for("a"), later()), turn.sleep(DAY))
        return [won, await turn.wait_for("a")]

    assert run(greedy, None, signals={"a": [1]}).output == [1, 1]


@agent("undecided")
async def undecided(turn: Turn, _: None) -> int:
    place, _ = await turn.race(turn.approval("publish", timeout=2 * DAY), turn.sleep(DAY))
    await note(f"{len(worlds[-1].post.asked)} open")
    return place


@agent("unanswered")
async def unanswered(turn: Turn, _: None) -> int:
    await turn.approval("publish", timeout=DAY)
    await note(f"{len(worlds[-1].post.asked)} open")
    return 1


@pytest.mark.parametrize("asking", [undecided, unanswered], ids=["lost a race", "timed out"])
def test_an_approval_takes_no_answer_once_its_turn_has_gone_on(asking: Agent[None, int]) -> None:
    result, world = _watched(asking)

    assert result.output == 1
    assert [e.payload["result"] for e in result.events if e.kind == "step.completed"] == ["noted 0 open"]
    assert list(world.post.decided.values()) == [None]


# ----------------------------------------------------------------------------------------------------------- everything


@agent("everything")
async def everything(turn: Turn, topic: str) -> list[Any]:
    first = await turn.wait_for("first", timeout=DAY)
    kin = [await turn.spawn(child, n) for n in (1, 2)]
    verdict, news, stars = await turn.gather(
        turn.approval("publish", show=topic, timeout=DAY), turn.wait_for("news"), turn.gather(*kin)
    )
    won = await turn.race(turn.wait_for("more"), turn.wait_for("never"), turn.sleep(DAY))
    try:
        await turn.wait_for("never", timeout=DAY)
    except WaitTimeout:
        await note("nothing came")
    return [first, verdict.granted, news, [each.stars for each in stars], won, await note(topic)]


OTHERS: dict[str, Any] = {
    "signals": {"first": ["f"], "news": ["n"], "more": ["m", "left"]},
    "approve": {"publish": True},
}


def test_waits_survive_a_crash_at_every_point() -> None:
    report = torture(lambda: Scenario(everything, "wombats", **OTHERS))

    assert report.violations == [], report.summary


def test_every_crash_leaves_the_same_signals() -> None:
    undisturbed = run(everything, "wombats", **OTHERS)
    assert undisturbed.output == ["f", True, "n", [1, 2], [0, "m"], "noted wombats"]

    for point in named_crash_points(everything, "wombats", **OTHERS):
        result = run(everything, "wombats", crash_at=point, **OTHERS)
        assert (result.output, result.unread) == (undisturbed.output, {"more": ["left"]}), point
        assert result.late == (), point


# ------------------------------------------------------------------------------------------------------------- retries


def test_a_retry_keeps_what_came_and_waits_again_for_what_did_not() -> None:
    @agent("strict")
    async def strict(turn: Turn, _: None) -> list[Any]:
        got = await turn.wait_for("a")
        verdict = await turn.approval("publish", timeout=DAY)
        if verdict.timed_out:
            raise ValueError("nobody answered")
        return [got, verdict.granted, await turn.wait_for("b", timeout=DAY)]

    log: list[Any] = []
    unanswered = run(strict, None, log=log, signals={"a": [1]})
    unsignalled = run(strict, None, log=log, retry=unanswered, approve={"publish": True})
    result = run(strict, None, log=log, retry=unsignalled, signals={"a": ["not again"], "b": [2]})

    assert (unanswered.status, unsignalled.status) == (TurnStatus.FAILED, TurnStatus.FAILED)
    assert (result.output, result.unread) == ([1, True, 2], {"a": ["not again"]})


def test_a_retry_waits_for_another_signal_if_the_agent_could_not_read_the_first() -> None:
    @agent("reviewed")
    async def reviewed(turn: Turn, _: None) -> int:
        return (await turn.wait_for("review", type=Review)).stars

    log: list[Any] = []
    failed = run(reviewed, None, log=log, signals={"review": [{"stars": "many"}]})
    result = run(reviewed, None, log=log, retry=failed, signals={"review": [{"stars": 4}]})

    assert failed.error is not None
    assert failed.error["message"].startswith("the payload of signal 'review' does not fit: stars: Input should be")
    assert result.output == 4


def test_a_retry_asks_again_what_nobody_had_answered_when_its_turn_ended() -> None:
    log: list[Any] = []
    expired = run(publisher, "text", log=log, deadline=DAY / 2)
    result = run(publisher, "text", log=log, retry=expired, approve={"publish": True})

    assert (expired.status, result.output["granted"]) == (TurnStatus.EXPIRED, True)
    asked = [event.payload["id"] for event in log if event.kind == "wait.begun"]
    assert len(set(asked)) == 2, "the first one was closed with its turn"


def test_a_retry_retries_the_children_that_failed_and_no_others() -> None:
    @agent("family")
    async def family(turn: Turn, _: None) -> list[Any]:
        good, bad = [await turn.spawn(name, name) for name in ("good", "bad")]
        return [await good, await bad]

    def runs(name: str, counts: list[str], result: Any) -> Any:
        def fake(_: Any) -> Any:
            counts.append(name)
            return result

        return fake

    log: list[Any] = []
    ran: list[str] = []
    failed = run(family, None, log=log, fake={"good": runs("good", ran, 1), "bad": runs("bad", ran, ValueError("no"))})
    fakes: dict[Any, Any] = {"good": runs("good", ran, 1), "bad": runs("bad", ran, 2)}
    result = run(family, None, log=log, retry=failed, fake=fakes)

    assert (failed.status, result.output) == (TurnStatus.FAILED, [1, 2])
    assert ran == ["good", "bad", "bad"]


def test_a_retry_does_not_wait_again_where_the_agent_went_on_without() -> None:
    @agent("patient")
    async def patient(turn: Turn, _: None) -> str:
        try:
            return str(await turn.wait_for("a", timeout=DAY))
        except WaitTimeout:
            await note("gone on")
        await turn.wait_for("b", timeout=DAY)
        return "ended without a"

    log: list[Any] = []
    failed = run(patient, None, log=log)
    result = run(patient, None, log=log, retry=failed, signals={"a": [1], "b": [2]})

    assert (result.output, result.unread) == ("ended without a", {"a": [1]})
