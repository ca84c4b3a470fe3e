"""``longshift.testing``: what users test their agents with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from longshift import Artifact, InvalidInput, NotFound, Passage, Retry, StepFailed, Turn, agent, step
from longshift.clock import Clock
from longshift.events import Event
from longshift.testing import arun, crash_points, run

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Question(BaseModel):
    urls: list[str]


class Page(BaseModel):
    url: str
    text: str


@step(retry=Retry(attempts=3))
async def fetch(url: str) -> Page:
    raise OSError(f"no network for {url}")


def shorten(text: str) -> str:
    return text[:3]


@agent("summary")
async def summary(turn: Turn, question: Question) -> list[str]:
    pages = await turn.gather(*(fetch(url) for url in question.urls))
    return [await turn.step("shorten", shorten, page.text) for page in pages]


ASKED = Question(urls=["a", "b"])
PAGE = Page(url="x", text="something long")


@pytest.mark.parametrize(
    "fake",
    [
        {fetch: PAGE},
        {"fetch": PAGE},
        {fetch: lambda url: Page(url=url, text="something")},
    ],
    ids=["by function", "by name", "by another function"],
)
def test_a_step_can_be_faked(fake: dict[Callable[..., Any] | str, Any]) -> None:
    result = run(summary, ASKED, fake=fake)
    assert result.output == ["som", "som"]
    assert result.calls == {"fetch": 2, "shorten": 2}


def test_a_fake_can_be_async_and_stand_for_a_plain_function() -> None:
    async def other(text: str) -> str:
        await asyncio.sleep(0)
        return text.upper()

    assert run(summary, ASKED, fake={fetch: PAGE, shorten: other}).output == ["SOMETHING LONG"] * 2


def test_a_fake_can_be_an_error_which_is_retried_like_a_real_one() -> None:
    result = run(summary, ASKED, fake={fetch: OSError("down")})
    assert result.status == "failed"
    assert result.error is not None
    assert result.error["message"] == "step 'fetch' failed: OSError: down"
    assert result.calls == {"fetch": 6}


def test_asking_a_failed_turn_for_its_output_says_why_it_failed() -> None:
    with pytest.raises(AssertionError, match=r"the turn has failed: .*no network for a"):
        run(summary, ASKED).output  # noqa: B018


@pytest.mark.parametrize("crash_after", crash_points(summary, ASKED, fake={fetch: PAGE}))
def test_every_crash_point_is_a_parameter(crash_after: int) -> None:
    result = run(summary, ASKED, fake={fetch: PAGE}, crash_after=crash_after)
    assert result.output == ["som", "som"]
    assert result.attempts == (1 if crash_after == 6 else 2)


def test_the_input_may_be_what_the_agent_takes_or_what_a_client_sends() -> None:
    for sent in (ASKED, {"urls": ["a", "b"]}):
        assert run(summary, sent, fake={fetch: PAGE}).output == ["som", "som"]


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput, match="does not fit agent 'summary'"):
        run(summary, {"url": "a"})


def test_sleeps_and_pauses_take_no_time() -> None:
    @step(retry=Retry(attempts=5, first=timedelta(hours=1)))
    async def unlucky() -> None:
        raise OSError("again")

    @agent("patient")
    async def patient(turn: Turn, _: None) -> float:
        begin = turn.now()
        await turn.sleep(timedelta(days=2))
        await asyncio.gather(turn.sleep(3600), turn.sleep(7200))
        with pytest.raises(StepFailed):
            await unlucky()
        return (turn.now() - begin).total_seconds()

    result = run(patient, None, clock=Clock(now=lambda: NOON))
    assert result.output >= 2 * 86_400 + 3600
    assert result.attempts >= 2  # pauses of more than some seconds leave the worker, too
    assert result.events[0].created_at == NOON


def test_a_turn_that_sleeps_past_its_deadline_expires() -> None:
    @agent("late")
    async def late(turn: Turn, _: None) -> None:
        await turn.sleep(timedelta(days=8))

    result = run(late, None)
    assert result.status == "expired"
    assert result.events[-1].kind == "turn.expired"


def test_turns_that_share_a_log_share_a_session() -> None:
    @agent("counter")
    async def counter(turn: Turn, word: str) -> int:
        await turn.say(f"heard {word}", role="system")
        await turn.state.set("count", turn.state.get("count", 0) + 1)
        said.append([message["content"] for message in turn.history])
        return int(turn.state["count"])

    said: list[Any] = []
    log: list[Event] = []
    assert [run(counter, word, log=log, crash_after=2).output for word in ("one", "two")] == [1, 2]
    assert said[-1] == ["one", "heard one", 1, "two", "heard two"]
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    assert len({event.session_id for event in log}) == 1


def test_artifacts_can_be_read_and_kept() -> None:
    @agent("copying")
    async def copying(turn: Turn, source: str) -> Artifact:
        return await turn.artifact("copy", await turn.read(source) * 2)

    cellar = {"art_" + "0" * 32: b"bytes"}
    result = run(copying, "art_" + "0" * 32, artifacts=cellar)
    assert result.artifacts == {"copy": b"bytesbytes"}
    assert cellar[result.output.id] == b"bytesbytes"


def test_an_artifact_that_is_not_there_is_not_found() -> None:
    @agent("reading")
    async def reading(turn: Turn, source: str) -> str:
        with pytest.raises(NotFound, match=source):
            await turn.read(source)
        return "not there"

    assert run(reading, "art_" + "1" * 32).output == "not there"


def test_recall_finds_what_was_indexed_best_first() -> None:
    @agent("recalling")
    async def recalling(turn: Turn, _: None) -> list[Passage]:
        await turn.index("a", ["a lease belongs to a worker", "an epoch grows"])
        await turn.index("b", ["workers hold leases; each lease has an epoch"])
        return await turn.recall("Which worker holds the lease?") + await turn.recall("epochs", sources=["a"])

    found = [(p.source, p.ordinal) for p in run(recalling, None).output]
    assert found == [("b", 0), ("a", 0), ("a", 1)]


def test_records_that_a_replay_did_not_ask_for_are_told() -> None:
    @agent("moody")
    async def moody(turn: Turn, _: None) -> str:
        if turn.attempt == 1:
            await turn.step("first", shorten, "x")
        await turn.sleep(3600)
        return "done"

    assert run(moody, None).unused == ("first#0",)


def test_metadata_and_ids_are_there() -> None:
    @agent("looking")
    async def looking(turn: Turn, _: None) -> list[str]:
        return [turn.metadata["customer"], turn.id[:5], turn.session_id[:4]]

    assert run(looking, None, metadata={"customer": "42"}).output == ["42", "turn_", "ses_"]


async def test_there_is_a_form_for_tests_with_an_event_loop() -> None:
    result = await arun(summary, ASKED, fake={fetch: PAGE})
    assert result.output == ["som", "som"]
