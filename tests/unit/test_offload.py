"""Large values: what is recorded of them is small, and what comes back is what was there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshift import Turn, agent, step, tool
from longshift.contract import Artifact
from longshift.errors import ArtifactCorrupt, NotFound, Unavailable
from longshift.events import Context, Event, Kind, encode, fold, storable
from longshift.model import CallStatus, TurnStatus
from longshift.offload import PREVIEW, PREVIEW_BYTES, Laid, Pointer, preview_of, size_of
from longshift.testing import Ledger, Scenario, named_crash_points, run, torture
from longshift.testing.outside import Outside
from longshift.testing.waiting import wait_until

KB, MB = 1024, 1024 * 1024
SIZE = 5 * MB
SCRIPTS = st.characters() | st.sampled_from('\x00\x1f"\\\ud800\U0001f600é漢')


def made(kind: str, size: int = SIZE) -> str:
    """A text of about ``size`` bytes that is no repetition of itself."""
    return "".join(f"{kind} {n} \U0001f600\n" for n in range(size // 20))


def recorded(events: tuple[Event, ...], kind: Kind) -> list[Event]:
    return [event for event in events if event.kind == kind]


# -- the pointer


@given(st.text(SCRIPTS, max_size=3 * PREVIEW))
def test_a_preview_of_a_string_is_its_own_beginning(value: str) -> None:
    preview = preview_of(encode(value))
    assert storable(value).startswith(preview)
    assert len(preview) <= PREVIEW
    assert size_of(json.dumps(preview, ensure_ascii=False)) - 2 <= PREVIEW_BYTES
    if len(value) <= PREVIEW and size_of(encode(value)) <= PREVIEW_BYTES:
        assert preview == storable(value)


@given(st.lists(st.text(SCRIPTS, max_size=30), max_size=30))
def test_a_preview_of_anything_else_is_the_beginning_of_its_json(value: list[str]) -> None:
    preview = preview_of(encode(value))
    assert encode(value).startswith(preview)
    assert len(preview) <= PREVIEW


def test_an_escaped_pair_is_one_character_of_a_preview_and_never_cut() -> None:
    escaped = '"' + "\\ud83d\\ude00" * 150 + '"'
    assert preview_of(escaped) == "\U0001f600" * 100
    assert preview_of('"a\\ud83d') == "a\ufffd"
    assert preview_of('"\\u0000\\n\\\\u0000"') == "\u2400\n\\u0000"


@given(st.text(SCRIPTS, min_size=1, max_size=2000), st.text(st.characters(codec="ascii"), max_size=128))
def test_what_an_event_says_of_a_large_value_is_below_1_kb(value: str, name: str) -> None:
    pointer = Pointer(UUID(int=2**128 - 1), 2**40, "f" * 64, preview_of(encode(value)))
    facts = {"digest": "f" * 16, "at": "2026-01-01T00:00:00.000000+00:00", "ms": 86_400_000, "call": "call_" + "f" * 32}
    payload = Laid("", pointer).within({"name": name.replace('"', "").replace("\\", ""), **facts}, "result")
    assert Pointer.of(json.loads(payload)["artifact"]) == pointer
    context = fold([])
    assert len(encode({**facts, "artifact": pointer.facts}).encode()) < KB
    assert context == Context()


# -- a whole turn


@step
async def fetch(kind: str) -> str:
    return made(kind)


@agent("bulky")
async def bulky(turn: Turn, given: str) -> dict[str, Any]:
    """Large: its input, a step, a message, its output; and it shows the context in which it ran."""
    page = await fetch("page")
    await turn.say(page)
    await turn.sleep(86_400)
    return {"page": page, "given": given, "history": list(turn.history)}


def test_a_large_value_adds_less_than_1_kb_to_log_and_context_and_comes_back_identical() -> None:
    given = made("input")
    log: list[Event] = []
    result = run(bulky, given, log=log)

    assert (result.output["page"], result.output["given"]) == (made("page"), given)
    assert max(len(encode(dict(event.payload)).encode()) for event in log) < KB
    assert max(map(size_of, fold(log).messages)) < KB
    assert fold(log).size < 3 * KB
    assert result.output["history"] == fold(log[:-1]).history
    assert result.output["history"][1]["content"] == {
        "$artifact": f"art_{recorded(result.events, Kind.MESSAGE_SAID)[0].payload['artifact']['id']}",
        "size": size_of(encode(made("page"))),
        "preview": made("page")[:PREVIEW],
    }


@pytest.mark.parametrize("point", named_crash_points(bulky, "input", fake={fetch: "page"}))
def test_a_crash_anywhere_changes_nothing(point: str) -> None:
    log: list[Event] = []
    page, given = made("page", 40 * KB), made("input", 40 * KB)
    result = run(bulky, given, log=log, crash_at=point, fake={fetch: page})
    assert (result.output["page"], result.output["given"]) == (page, given)
    assert result.output["history"] == fold([event for event in log if event.kind != Kind.TURN_SUCCEEDED]).history


def test_a_turn_with_large_values_bears_every_fault() -> None:
    @agent("smaller")
    async def smaller(turn: Turn, given: str) -> str:
        await turn.say(given)
        return await turn.step("work", lambda: made("page", 100 * KB)) + await pay()

    @tool(effect="irreversible", reconcile=lambda call: None)
    async def pay() -> str:
        return made("paid", 100 * KB)

    report = torture(lambda: Scenario(smaller, made("input", 100 * KB)))
    assert not report.violations, str(report)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["say", "step", "both"]), st.integers(0, 40), st.booleans()), max_size=6))
def test_the_context_that_an_agent_sees_is_the_fold_whatever_is_large(program: list[tuple[str, int, bool]]) -> None:
    @agent("various")
    async def various(turn: Turn, given: str) -> list[Any]:
        async def one(what: str, size: int) -> None:
            value = {"of": what, "text": "é\x00\U0001f600" * (size * 200)}
            if what != "say":
                value = await turn.step("work", lambda: value)
            if what != "step":
                await turn.say(value)

        for what, size, beside in program:
            if beside:
                await turn.gather(one(what, size), one(what, 40 - size))
            else:
                await one(what, size)
        await turn.sleep(86_400)
        return list(turn.history)

    log: list[Event] = []
    for size in (10, 40_000):
        result = run(various, "x" * size, log=log, crash_after=3)
        assert result.output == fold([e for e in log if e is not log[-1]]).history
        assert max(len(encode(dict(event.payload)).encode()) for event in log[:-1]) <= Outside.inline + KB


def test_a_message_that_takes_its_time_to_be_stored_joins_the_history_where_the_log_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @agent("chatty")
    async def chatty(turn: Turn, _: None) -> list[Any]:
        await turn.gather(turn.say(made("large", 40 * KB)), turn.say("small"))
        return list(turn.history)

    put = Outside.put_artifact

    async def slowly(port: Outside, artifact_id: UUID, **options: Any) -> Artifact:
        if options["name"] == "content.json":
            await wait_until(lambda: len(port.world.events) == 2, description="the other message is recorded")
        return await put(port, artifact_id, **options)

    monkeypatch.setattr(Outside, "put_artifact", slowly)
    result = run(chatty, None)
    assert result.output == fold(result.events[:-1]).history
    assert [message["content"] == "small" for message in result.output] == [False, True, False]


def test_a_repetition_with_another_result_has_an_artifact_of_its_own() -> None:
    """A pointer to what a dead worker stored before would have the wrong bytes."""

    @agent("moody")
    async def moody(turn: Turn, _: None) -> str:
        def roll() -> str:
            rolled.append(made(f"roll {len(rolled)}", 50 * KB))
            return rolled[-1]

        return await turn.step("roll", roll)

    rolled: list[str] = []
    shelf: dict[str, bytes] = {}
    result = run(moody, None, artifacts=shelf, crash_at="before step.completed roll")
    assert (len(rolled), result.output) == (2, rolled[1])

    rolled.clear()
    again: dict[str, bytes] = {}
    run(moody, None, artifacts=again, fake={"roll": made("same", 50 * KB)}, crash_at="before step.completed roll")
    assert len(again) == 2  # the step's result, stored twice under one id, and the output


# -- tools, children, retries


def test_the_record_of_a_tools_step_shares_the_artifact_of_the_ledger() -> None:
    @tool(effect="write")
    async def reserve() -> str:
        calls.append(1)
        return made("seat", 50 * KB)

    @agent("clerk")
    async def clerk(turn: Turn, _: None) -> int:
        return len(await reserve())

    calls: list[int] = []
    for point in (None, "after ledger.end reserve", "after step.completed reserve"):
        calls.clear()
        result = run(clerk, None, crash_at=point)
        [call], [done] = result.tool_calls, recorded(result.events, Kind.STEP_COMPLETED)
        assert (len(calls), call.status, call.result, result.output) == (
            1,
            CallStatus.DONE,
            None,
            len(made("seat", 50 * KB)),
        )
        assert call.artifact_id is not None
        assert done.payload["artifact"]["id"] == call.artifact_id.hex
        assert len(result.artifacts) == 1


def test_large_inputs_and_outputs_of_children_are_passed_by_pointer() -> None:
    @agent("echo")
    async def echo(turn: Turn, text: str) -> str:
        return text

    @agent("parent")
    async def parent(turn: Turn, text: str) -> bool:
        child = await turn.spawn(echo, text + "!")
        return await child == text + "!"

    for crash_after in range(1, 5):
        result = run(parent, made("input", 100 * KB), crash_after=crash_after)
        assert result.output is True
        assert max(len(encode(dict(event.payload)).encode()) for event in result.events) < KB


def test_a_retry_goes_on_with_the_pointers_of_the_turn_before() -> None:
    @agent("failing")
    async def failing(turn: Turn, text: str) -> str:
        page = await fetch("page")
        return await turn.step("rest", lambda: page[-5:] + text[-5:])

    log: list[Event] = []
    given = made("input", 100 * KB)
    broken = run(failing, given, log=log, fake={"rest": ValueError("not now")})
    result = run(failing, given, log=log, retry=broken)
    assert result.output == made("page")[-5:] + given[-5:]
    assert result.calls["fetch"] == 0


# -- the store is away


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Counter[str]]:
    """The store is away for so many puts and gets, counted; what is stored before does not count."""
    put, get = Outside.put_artifact, Outside.get_artifact
    asked: Counter[str] = Counter()

    def set_up(times: int) -> Counter[str]:
        async def putting(port: Outside, artifact_id: UUID, **options: Any) -> Artifact:
            asked["put"] += 1
            if asked["put"] <= times:
                raise Unavailable("the store is away")
            return await put(port, artifact_id, **options)

        async def getting(port: Outside, artifact_id: UUID) -> bytes:
            asked["get"] += 1
            if asked["get"] <= times:
                raise Unavailable("the store is away")
            return await get(port, artifact_id)

        monkeypatch.setattr(Outside, "put_artifact", putting)
        monkeypatch.setattr(Outside, "get_artifact", getting)
        return asked

    return set_up


def three(size: int) -> Any:
    @agent("three")
    async def three(turn: Turn, _: None) -> str:
        page: str = await turn.step("work", lambda: made("page", size))
        await turn.say(page)
        await turn.sleep(86_400)
        return page

    return three


def test_what_fits_into_an_event_is_recorded_there_while_the_store_is_away(away: Callable[[int], Counter[str]]) -> None:
    asked = away(1_000_000)
    result = run(three(100 * KB), None)
    assert (result.status, result.calls["work"], asked["put"]) == (TurnStatus.SUCCEEDED, 1, 3)
    assert not [event for event in result.events if "artifact" in event.payload]


def test_what_does_not_fit_waits_for_the_store_and_no_step_runs_again(away: Callable[[int], Counter[str]]) -> None:
    asked = away(7)
    result = run(three(3 * MB), None)
    assert (result.status, result.calls["work"]) == (TurnStatus.SUCCEEDED, 1)
    assert asked["put"] == 7 + 3
    [done] = recorded(result.events, Kind.STEP_COMPLETED)
    assert "attempts" not in done.payload


def test_that_a_call_is_done_stands_in_the_ledger_while_the_store_is_away(away: Callable[[int], Counter[str]]) -> None:
    @tool(effect="irreversible")
    async def pay() -> str:
        calls.append(1)
        return made("paid", 2 * MB)

    @agent("payer")
    async def payer(turn: Turn, _: None) -> int:
        return len(await pay())

    calls: list[int] = []
    away(4)
    ledger = Ledger()
    result = run(payer, None, ledger=ledger, crash_at="after ledger.end pay")
    [call] = ledger
    assert (result.output, len(calls)) == (len(made("paid", 2 * MB)), 1)
    assert (call.status, call.artifact_id, call.result) == (CallStatus.DONE, None, made("paid", 2 * MB))


# -- values that are lost, or too large


@pytest.mark.parametrize("error", [NotFound("there is no such artifact"), ArtifactCorrupt("other bytes"), None])
def test_a_lost_result_fails_the_turn_whatever_the_agent_makes_of_it(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @agent("careless")
    async def careless(turn: Turn, _: None) -> str:
        try:
            page = await turn.step("work", lambda: made("page", 50 * KB))
        except BaseException:
            page = "another way"
        await turn.sleep(86_400)
        return page[:3]

    async def lose(port: Outside, artifact_id: UUID) -> bytes:
        if error is None:
            return b'"other bytes"'  # of which the store says that they are right
        raise error

    monkeypatch.setattr(Outside, "get_artifact", lose)
    result = run(careless, None)
    assert result.error is not None
    assert (result.error["code"], result.error["artifact"][:4], result.attempts) == ("value_lost", "art_", 2)
    assert "Restore it from a backup" in result.error["message"]


@pytest.mark.parametrize("what", ["step", "say", "output", "spawn", "tool"])
def test_what_is_larger_than_a_value_may_be_is_refused_with_a_way_out(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @tool(effect="write")
    async def reserve() -> str:
        return "é" * 60_000

    @agent("echo")
    async def echo(turn: Turn, text: str) -> str:
        return text

    @agent("giving")
    async def giving(turn: Turn, what: str) -> str:
        large = "é" * 60_000
        match what:
            case "step":
                await turn.step("give", lambda: large)
            case "say":
                await turn.say(large)
            case "spawn":
                await turn.spawn(echo, large)
            case "tool":
                await reserve()
        return large

    monkeypatch.setattr(Outside, "max_value", 100_000)
    result = run(giving, what)
    assert result.error is not None
    assert "120,0" in result.error["message"]  # bytes, not characters
    assert "more than a value may have (100,000, LONGSHIFT_MAX_VALUE)" in result.error["message"]
    assert "turn.artifact" in result.error["message"]


def test_the_threshold_is_in_bytes_of_json() -> None:
    @agent("exact")
    async def exact(turn: Turn, n: int) -> str:
        return "é" * n

    half = (Outside.inline - 2) // 2
    assert "output" in run(exact, half).events[-1].payload
    assert "artifact" in run(exact, half + 1).events[-1].payload


def test_what_is_laid_out_is_as_deep_as_what_is_recorded() -> None:
    @agent("deep")
    async def deep(turn: Turn, _: None) -> Any:
        value: Any = "x" * 40_000
        for _n in range(185):
            value = [value]
        await turn.say(value)
        return await turn.step("dig", lambda: value)

    result = run(deep, None)
    assert result.status is TurnStatus.SUCCEEDED
    assert len([event for event in result.events if "artifact" in event.payload]) == 3


def test_a_lost_input_fails_the_turn() -> None:
    shelf: dict[str, bytes] = {}

    @agent("two")
    async def two(turn: Turn, given: str) -> int:
        shelf.clear()
        await turn.sleep(86_400)
        return len(given)

    result = run(two, made("input", 50 * KB), artifacts=shelf)
    assert result.error is not None
    assert (result.error["code"], result.attempts) == ("value_lost", 2)
