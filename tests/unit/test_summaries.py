"""Summaries under every crash: what an agent sees is the fold of the log, and what leaves the context can be recalled."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshift import Agent, Budget, Passage, Turn, UsageError, agent
from longshift.additions import Additions
from longshift.events import Context, Event, Kind, NewEvent, fold, include
from longshift.model import Json, new_id
from longshift.testing import Result, crash_points, named_crash_points, run
from longshift.testing.bench import Rehearsal
from longshift.testing.outside import Outside
from longshift.tokens import Characters, Gauge

BUDGET = Budget(400)
LINE = "The quick brown fox number {n} jumps over a lazy dog and reads the news of day {n}. "


def words(n: int) -> str:
    return LINE.format(n=n) * 2


@agent("talker", budget=BUDGET)
async def talker(turn: Turn, n: int) -> list[dict[str, Json]]:
    """Says something, and returns what it was shown, as its context has it."""
    seen = list(turn._execution.context.messages)
    await turn.say(words(n))
    assert turn._execution.context == _of_log(turn)
    return [json.loads(message) for message in seen]


def _of_log(turn: Turn) -> Context:
    """The fold of the log as it is now, as the context has it: its place aside."""
    execution = turn._execution
    assert isinstance(execution, Rehearsal)
    folded = fold(execution.outside.world.log)
    context = execution.context
    return Context(context.seq, context.event_id, folded.messages, folded.remembered)


def tokens_of(messages: Sequence[str]) -> int:
    return sum(asyncio.run(Gauge(None).count(messages)))


def summaries(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.kind == Kind.CONTEXT_SUMMARIZED]


def test_a_session_stays_within_its_budget_and_nothing_is_lost() -> None:
    log: list[Event] = []
    passages: list[Passage] = []
    for n in range(30):
        result = run(echo, words(n), log=log, passages=passages)
        assert result.status == "succeeded"
        assert tokens_of(fold(log).messages) <= BUDGET.tokens
    context = fold(log)
    assert context.history[0]["role"] == "system"
    assert context.history[0]["summary_of"] + len(context.messages) - 1 == 60
    found = {(p.ordinal, p.text.partition(": ")[2]) for p in passages}
    left = [fold_without_summaries(log).history[n]["content"] for n in range(context.history[0]["summary_of"])]
    assert found == {(n * 1024, text.strip()) for n, text in enumerate(left)}


@agent("echo", budget=BUDGET)
async def echo(turn: Turn, text: str) -> str:
    return text


def fold_without_summaries(log: Sequence[Event]) -> Context:
    return fold([event for event in log if event.kind != Kind.CONTEXT_SUMMARIZED])


def session_that_is_full() -> tuple[list[Event], list[Passage]]:
    log: list[Event] = []
    passages: list[Passage] = []
    while tokens_of(fold(log).messages) <= BUDGET.full:
        run(echo, words(len(log)), log=log, passages=passages)
    return log, passages


FULL = session_that_is_full()


def points(agent: Agent[Any, Any], value: object) -> list[str]:
    log, passages = FULL
    return named_crash_points(agent, value, log=[*log], passages=[*passages])


def check_whole(log: Sequence[Event], passages: Sequence[Passage]) -> None:
    """Every message is in the context or can be recalled, once."""
    context, everything = fold(log), fold_without_summaries(log)
    stands_for = context.history[0].get("summary_of", 0)
    rest = context.messages[1:] if stands_for else context.messages
    assert everything.messages[stands_for:] == rest
    assert Counter(p.ordinal // 1024 for p in passages if p.source == "history").keys() >= set(range(stands_for))
    assert len({(p.session_id, p.source, p.ordinal) for p in passages}) == len(passages)


@pytest.mark.parametrize("point", points(talker, 7))
def test_a_crash_anywhere_leaves_the_context_the_fold_of_the_log(point: str) -> None:
    log, passages = [*FULL[0]], [*FULL[1]]
    undisturbed = run(talker, 7, log=[*log], passages=[*passages]).output
    result = run(talker, 7, log=log, passages=passages, crash_at=point)
    assert content_of(result.output) == content_of(undisturbed)
    assert result.output[0]["summary_of"] > 1
    assert len(summaries(result.events)) == 1
    assert result.unused == ()
    check_whole(log, passages)


def content_of(messages: Sequence[Mapping[str, Json]]) -> list[Json]:
    return [message["content"] for message in messages]


@pytest.mark.parametrize("point", [p for p in points(talker, 7) if p.startswith("before")])
def test_a_worker_that_is_stopped_and_wakes_up_later_changes_nothing(point: str) -> None:
    log, passages = [*FULL[0]], [*FULL[1]]
    result = run(talker, 7, log=log, passages=passages, pause_at=point)
    assert len(summaries(result.events)) == 1
    check_whole(log, passages)


@agent("branches", budget=Budget(400, keep=100))
async def branches(turn: Turn, _: None) -> list[Json]:
    """Branches that say things while others summarize."""

    async def talking(name: str) -> None:
        for n in range(4):
            await turn.say(f"{name} {words(n)}")

    async def summing() -> None:
        await turn.say("before the summary")
        await turn.summarize()
        await turn.say("after the summary")
        await turn.summarize()

    await turn.gather(talking("a"), summing(), talking("b"), summing())
    assert turn._execution.whole_context() == _of_log(turn)
    await turn.say("the end")
    assert turn._execution.context == _of_log(turn)
    return [message["content"] for message in turn.history]


@pytest.mark.parametrize("number", crash_points(branches, None, log=[*FULL[0]], passages=[*FULL[1]]))
def test_branches_that_say_things_while_others_summarize_see_the_fold(number: int) -> None:
    log, passages = [*FULL[0]], [*FULL[1]]
    result = run(branches, None, log=log, passages=passages, crash_after=number)
    assert result.status == "succeeded", result.error
    check_whole(log, passages)


@agent("loser")
async def loser(turn: Turn, _: None) -> list[Json]:
    async def losing() -> None:
        await turn.say("said by who lost")
        await turn.sleep(1000)

    async def winning() -> None:
        await turn.sleep(10)

    await turn.race(losing(), winning())
    await turn.say("after the race")
    await turn.sleep(5)
    assert turn._execution.context == _of_log(turn)
    return [message["content"] for message in turn.history]


@pytest.mark.parametrize("number", crash_points(loser, None))
def test_what_a_branch_said_that_lost_its_race_stays_in_the_context(number: int) -> None:
    assert run(loser, None, crash_after=number).output == [None, "said by who lost", "after the race"]


@pytest.mark.parametrize("kind", [Kind.MESSAGE_SAID, Kind.CONTEXT_SUMMARIZED])
def test_what_was_recorded_while_its_branch_was_cancelled_is_in_the_context(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A summary that the log has and the turn does not know of would make its next one replace what it never saw."""

    @agent("hasty", budget=Budget(400, keep=100))
    async def hasty(turn: Turn, _: None) -> None:
        async def losing() -> None:
            await turn.say(words(1))
            await turn.say(words(2))
            await turn.summarize()
            await turn.sleep(1000)

        async def winning() -> None:
            recorded.clear()
            await recorded.wait()

        await turn.race(losing(), winning())
        assert turn._execution.context == _of_log(turn)
        for n in range(3):
            await turn.say(words(n))
        await turn.summarize()
        assert turn._execution.context == _of_log(turn)

    append, recorded = Outside.append, asyncio.Event()

    async def slow(self: Outside, events: Sequence[NewEvent]) -> None:
        """The log has them for a while before the turn hears of it."""
        await append(self, events)
        if events[0].kind == kind:
            recorded.set()
        for _ in range(10):
            await asyncio.sleep(0)

    monkeypatch.setattr(Outside, "append", slow)
    log, passages = [*FULL[0]], [*FULL[1]]
    result = run(hasty, None, log=log, passages=passages)
    assert result.status == "succeeded", result.error
    check_whole(log, passages)


def test_a_retry_goes_on_from_a_summary_that_was_recorded() -> None:
    log, passages = [*FULL[0]], [*FULL[1]]
    failing = run(fragile, True, log=log, passages=passages)
    assert failing.status == "failed"
    assert len(summaries(log)) == 1
    retried = run(fragile, False, log=log, passages=passages, retry=failing)
    assert retried.status == "succeeded"
    assert len(summaries(log)) == 1
    check_whole(log, passages)


@agent("fragile", budget=BUDGET)
async def fragile(turn: Turn, _: bool) -> str:
    assert turn._execution.whole_context() == _of_log(turn)
    await turn.say("nearly done")
    if turn._execution.record.retry_of is None:
        raise ValueError("the first one fails")
    await turn.say("done")
    assert turn._execution.context == _of_log(turn)
    return "done"


def without_event(log: Sequence[Event], left_out: Event) -> list[Event]:
    kept = [event for event in log if event.seq != left_out.seq]
    return [replace(event, seq=seq) for seq, event in enumerate(kept, start=1)]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_summary_whose_messages_are_gone_is_made_again(number: int) -> None:
    """Its turn failed between the step and the event; meanwhile another turn has summarized the same messages."""
    log, passages = [*FULL[0]], [*FULL[1]]
    failing = run(fragile, True, log=log, passages=passages)
    log = without_event(log, summaries(log)[0])
    run(talker, 3, log=log, passages=passages)
    for n in range(4):
        run(plain, words(n), log=log)
    assert len(summaries(log)) == 1
    retried = run(fragile, False, log=log, passages=passages, retry=failing, crash_after=number)
    assert retried.status == "succeeded", retried.error
    assert len(summaries(log)) == 2
    assert retried.unused == ()
    assert [event.payload["name"] for event in retried.events if event.kind == Kind.STEP_COMPLETED] == ["$summarize"]
    check_whole(log, passages)


@agent("plain")
async def plain(turn: Turn, text: str) -> str:
    return text


def test_a_budget_that_came_later_does_not_change_the_start_of_a_running_turn() -> None:
    """Deployed while a turn runs: the replay sees at its beginning what the first attempt saw."""
    seen: list[int] = []

    async def body(turn: Turn, _: None) -> str:
        seen.append(len(turn.history))
        await turn.say("one")
        if turn.attempt == 1:
            object.__setattr__(growing, "budget", BUDGET)
        await turn.sleep(3600)
        return "done"

    growing: Agent[None, str] = agent("growing")(body)
    log, passages = [*FULL[0]], [*FULL[1]]
    assert run(growing, None, log=log, passages=passages).output == "done"
    assert seen[0] == seen[1]
    assert summaries(log) == []


def test_a_turn_without_a_budget_summarizes_on_demand() -> None:
    @agent("asks")
    async def asks(turn: Turn, _: None) -> tuple[bool, bool]:
        before = await turn.summarize()
        for n in range(200):
            await turn.say(words(n))
        return before, await turn.summarize()

    log: list[Event] = []
    assert run(asks, None, log=log).output == (False, True)
    assert 3000 < tokens_of(fold(log).messages) < 6000


def test_a_step_cannot_summarize() -> None:
    @agent("wrong")
    async def wrong(turn: Turn, _: None) -> bool:
        return await turn.step("inside", turn.summarize)

    result = run(wrong, None)
    assert result.error is not None
    assert "a step cannot use summarize()" in result.error["message"]


# -- the summarizer of an agent's author


def asking(summarize: Any, **more: Any) -> Agent[str, list[Json]]:
    @agent("asking", budget=Budget(400, summarize, **more))
    async def asking(turn: Turn, text: str) -> list[Json]:
        return [message["content"] for message in turn.history]

    return asking


def ask(agent: Agent[str, list[Json]]) -> Result[list[Json]]:
    return run(agent, "now", log=[*FULL[0]], passages=[*FULL[1]])


@pytest.mark.parametrize("plain", [True, False])
def test_a_summarizer_is_given_what_leaves_and_how_long_it_may_be(plain: bool) -> None:
    given: list[tuple[int, int]] = []

    def short(messages: Sequence[Mapping[str, Json]], tokens: int) -> str:
        given.append((len(messages), tokens))
        return f"{len(messages)} messages"

    async def asynchronous(messages: Sequence[Mapping[str, Json]], tokens: int) -> str:
        return short(messages, tokens)

    result = ask(asking(short if plain else asynchronous))
    [summary] = summaries(result.events)
    assert result.output[0] == f"{summary.payload['replaces']} messages"
    assert given == [(summary.payload["replaces"], 50)]


@pytest.mark.parametrize(
    "answer", ["much too long " * 200, "", 7, ValueError("no")], ids=["long", "empty", "7", "error"]
)
def test_a_summarizer_that_fails_is_replaced_for_once(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    async def wrong(messages: Sequence[Mapping[str, Json]], tokens: int) -> object:
        calls.append(tokens)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with caplog.at_level(logging.WARNING):
        result = ask(asking(wrong))
    assert str(result.output[0]).startswith("Summary of the first ")
    assert len(calls) == 2
    assert [r.message for r in caplog.records] == ["a summarizer failed"] * 2


@pytest.mark.parametrize("built_in", [True, False])
def test_a_summary_fits_into_an_event_however_large_the_budget(built_in: bool) -> None:
    """A turn could not record it, nor could any later one: each would fail at its start."""

    def long(messages: Sequence[Mapping[str, Json]], tokens: int) -> str:
        return "字" * tokens * 4

    @agent("large", budget=Budget(2_000_000, None if built_in else long, keep=100))
    async def large(turn: Turn, _: None) -> bool:
        return await turn.summarize()

    said = {"role": "user", "content": "文" * 380}
    log = [message(seq, said) for seq in range(1, 1201)]
    result = run(large, None, log=log)
    assert result.output is True, result.error
    assert 100_000 < len(summaries(log)[0].payload["content"].encode()) < 600_000


def message(seq: int, payload: Mapping[str, Json]) -> Event:
    return replace(FULL[0][0], seq=seq, id=new_id(), kind=Kind.MESSAGE_SAID, key=None, payload=payload)


def test_a_summary_is_storable() -> None:
    result = ask(asking(lambda messages, tokens: "nul \0 and half \ud800"))
    assert result.output[0] == "nul \u2400 and half \ufffd"


@pytest.mark.parametrize(("tokens", "keep"), [(10, None), (1000, 900), (1000, 0)])
def test_a_budget_that_cannot_work_is_refused(tokens: int, keep: int | None) -> None:
    with pytest.raises(UsageError):
        Budget(tokens, keep=keep)


# -- what is offloaded counts as what is shown


def test_a_message_in_the_cold_tier_counts_as_what_is_shown_of_it() -> None:
    pointer = {"id": new_id().hex, "size": 5_000_000, "sha256": "0" * 64, "preview": "name,age\nAda,36"}
    context = Context()
    include(context, Kind.MESSAGE_SAID, {"role": "tool", "artifact": pointer}, turn_id=None)
    assert tokens_of(context.messages) < 60


# -- additions, whatever the order of the replay

says = st.builds(lambda text: (Kind.MESSAGE_SAID, {"role": "user", "content": text}), st.text(max_size=3))
sets = st.builds(lambda value: (Kind.STATE_CHANGED, {"set": {"x": value}}), st.integers())
sums = st.builds(
    lambda n: (Kind.CONTEXT_SUMMARIZED, {"replaces": n, "role": "system", "content": "s"}), st.integers(1, 5)
)


@given(
    st.lists(says | sets | sums, max_size=10), st.randoms(use_true_random=False), st.integers(0, 10), st.integers(0, 4)
)
def test_additions_give_the_fold_in_any_order_of_replay(facts: list[Any], random: Any, cut: int, before: int) -> None:
    context = Context(messages=[json.dumps({"role": "user", "content": n, "turn_id": None}) for n in range(before)])
    expected = context.copy()
    turn = new_id()
    for kind, payload in facts:
        include(expected, kind, payload, turn_id=turn)
    numbered = [(order, kind, payload) for order, (kind, payload) in enumerate(facts, start=1)]
    random.shuffle(numbered)
    additions = Additions(context, turn_id=turn)
    for order, kind, payload in numbered[:cut]:
        additions.apply(kind, payload, order=order)
    assert additions.whole(numbered[cut:]) == expected
    for order, kind, payload in numbered[cut:]:
        additions.apply(kind, payload, order=order)
    assert context == expected
    assert additions.whole([]) == expected


def test_the_estimate_is_what_the_tests_count_with() -> None:
    assert isinstance(Gauge(None)._counter, Characters)


def test_a_plain_agent_has_a_budget_too() -> None:
    @agent("plain-def", budget=BUDGET)
    def plain_def(turn: Turn, text: str) -> tuple[bool, bool]:
        shown = "summary_of" in turn.history[0]
        for n in range(5):
            turn.sync(turn.say(words(n)))
        return shown, turn.sync(turn.summarize())

    log, passages = [*FULL[0]], [*FULL[1]]
    assert run(plain_def, "now", log=log, passages=passages).output == (True, True)
    check_whole(log, passages)


def test_what_left_the_context_is_recalled_in_its_session_and_its_tenant() -> None:
    @agent("asks-back")
    async def asks_back(turn: Turn, scope: Any) -> list[Passage]:
        return await turn.recall("news of day 1", scope=scope, sources=["history"], limit=3)

    log, passages = [*FULL[0]], [*FULL[1]]
    run(echo, words(7), log=log, passages=passages)
    here = run(asks_back, "session", log=log, passages=passages).output
    elsewhere = run(asks_back, "tenant", passages=passages).output
    assert here
    assert [p.text for p in here] == [p.text for p in elsewhere]
    assert len({p.session_id for p in here}) == 1
    assert run(asks_back, "session", passages=passages).output == []
    wrong = run(asks_back, "world", passages=passages)
    assert wrong.error is not None
    assert "it is 'session' or 'tenant'" in wrong.error["message"]


def test_the_source_of_messages_is_reserved() -> None:
    @agent("indexes")
    async def indexes(turn: Turn, _: None) -> int:
        return await turn.index("history", ["mine"])

    result = run(indexes, None)
    assert result.error is not None
    assert "choose another name" in result.error["message"]
