"""What is counted of turns, steps and tools, and which turn a log line is about."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client.samples import Sample

from longshift import Absent, Retry, ToolCall, Turn, agent, step, telemetry, tool
from longshift.agent import Agent
from longshift.clock import SYSTEM
from longshift.metrics import Metrics, TurnMetrics
from longshift.model import Prefix, TurnStatus, new_id, show_id
from longshift.observing import Observers
from longshift.testing import Ledger, Result
from longshift.testing.bench import as_sent, new_record, rehearse
from longshift.testing.world import Faults, Time, World
from longshift.tracing import OFF
from longshift_api.problems import Outermost

logger = logging.getLogger("a.users.agent")


class Watched:
    """Runs turns as a worker with metrics would."""

    def __init__(self) -> None:
        self.registry = (metrics := Metrics()).registry
        self.observers = Observers(OFF, TurnMetrics(metrics))

    def run(self, agent: Agent[Any, Any], *, ledger: Ledger | None = None, **faults: Any) -> Result[Any]:
        now = SYSTEM.now()
        record = new_record(
            agent, as_sent(agent, None), session_id=new_id(), metadata={}, now=now, until=now + timedelta(days=7)
        )
        world = World(record, [], {}, Time(SYSTEM), Faults(**faults), ledger=ledger)
        world.observe = self.observers.attempt
        return asyncio.run(rehearse(agent, world, fake={}))

    def counts(self, name: str) -> dict[tuple[str, ...], float]:
        """By the values of the labels, in the order of their names, without the agent's."""
        return {
            tuple(value for label, value in sorted(sample.labels.items()) if label != "agent"): sample.value
            for sample in self._samples()
            if sample.name == name
        }

    def _samples(self) -> Iterator[Sample]:
        for family in self.registry.collect():
            yield from family.samples


@pytest.fixture
def watched() -> Watched:
    return Watched()


@step
async def quick(n: int) -> int:
    return n


def test_a_replayed_step_is_not_counted_again(watched: Watched) -> None:
    @agent("twice")
    async def twice(turn: Turn, _: None) -> int:
        first = await quick(1)
        await turn.sleep(timedelta(hours=1))
        return first + await quick(2)

    result = watched.run(twice)

    assert result.output == 3
    assert watched.counts("longshift_step_seconds_count") == {("step", "completed"): 2}
    assert watched.counts("longshift_attempt_seconds_count") == {("waiting",): 1, ("ended",): 1}
    assert watched.counts("longshift_turns_ended_total") == {("succeeded",): 1}
    assert watched.counts("longshift_turn_seconds_count") == {(): 1}


def test_an_attempt_that_dies_is_lost(watched: Watched) -> None:
    @agent("mortal")
    async def mortal(turn: Turn, _: None) -> int:
        return await quick(1)

    watched.run(mortal, crash_at="before step.completed quick")

    assert watched.counts("longshift_attempt_seconds_count") == {("lost",): 1, ("ended",): 1}
    assert watched.counts("longshift_step_seconds_count") == {("step", "completed"): 1}


def test_tries_and_failures_of_a_step_are_counted_and_an_interrupted_one_is_not(watched: Watched) -> None:
    @step(retry=Retry(attempts=3, first=timedelta(0)))
    async def hopeless() -> None:
        raise OSError("no")

    @step
    async def slow() -> None:
        await asyncio.Event().wait()

    @agent("tries")
    async def tries(turn: Turn, _: None) -> None:
        await turn.race(slow(), quick(1))
        await hopeless()

    assert watched.run(tries).status is TurnStatus.FAILED
    assert watched.counts("longshift_step_seconds_count") == {("step", "completed"): 1, ("step", "failed"): 1}
    assert watched.counts("longshift_step_retries_total") == {("step",): 2}
    assert watched.counts("longshift_turns_ended_total") == {("failed",): 1}


def test_calls_of_tools_are_counted_by_what_the_ledger_says(watched: Watched) -> None:
    failures = [OSError("again")]

    @tool(effect="write", retry=Retry(attempts=2, first=timedelta(0)), dedupe="session")
    async def book(call: ToolCall) -> str:
        if failures:
            raise failures.pop()
        return "booked"

    @tool(effect="read")
    async def read(call: ToolCall) -> str:
        raise ValueError("gone")

    async def unknown(call: ToolCall) -> Absent:
        raise OSError("nobody knows")

    @tool(effect="irreversible", reconcile=unknown)
    async def pay(call: ToolCall) -> str:
        raise OSError("lost on the way")

    @agent("shop")
    async def shop(turn: Turn, _: None) -> None:
        await book()
        await book()
        for broken in (read, pay):
            try:
                await broken()
            except Exception:
                await quick(1)

    watched.run(shop)

    assert watched.counts("longshift_tool_calls_total") == {
        ("write", "done"): 1,
        ("write", "replayed"): 1,
        ("read", "failed"): 1,
        ("irreversible", "unknown"): 1,
    }
    assert watched.counts("longshift_step_seconds_count")["tool", "completed"] == 2


# -- logs


@pytest.fixture
def lines() -> Iterator[Any]:
    """What a process has logged, once it is asked for."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    telemetry.setup(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def shout(word: str) -> str:
    logger.info("in a thread")
    return word.upper()


def test_lines_of_agents_and_steps_say_which_turn_they_are_of(watched: Watched, lines: Any) -> None:
    @step
    async def whisper(word: str) -> str:
        logger.info("in the loop", extra={"word": word, "attempt": "mine"})
        return word

    @agent("talker")
    async def talker(turn: Turn, _: None) -> str:
        logger.info("in the agent")
        asyncio.get_running_loop().call_soon(logger.info, "in a callback")
        words = await turn.gather(whisper("b"), turn.step("shout", shout, "a"))
        return "".join(words)

    result = watched.run(talker)
    logger.info("outside")

    said = {line["message"]: line for line in lines()}
    turn_id = show_id(Prefix.TURN, result.events[0].turn_id or new_id())
    session_id = show_id(Prefix.SESSION, result.events[0].session_id)
    for message in ("in the agent", "in a callback", "in a thread", "in the loop"):
        assert (said[message]["turn_id"], said[message]["session_id"]) == (turn_id, session_id)
    assert [said[message]["attempt"] for message in ("in a thread", "in the loop")] == [1, "mine"]
    assert "turn_id" not in said["outside"]


def test_a_plain_agent_in_its_thread_says_it_too(watched: Watched, lines: Any) -> None:
    aloud = step(shout)

    @agent("blocking")
    def blocking(turn: Turn, _: None) -> str:
        logger.info("in the agent")
        return aloud("a")

    watched.run(blocking)

    assert ["turn_id" in line for line in lines() if line["message"].startswith("in ")] == [True, True]


async def test_lines_of_a_request_say_which_request_it_is(lines: Any) -> None:
    async def app(*_: object) -> None:
        logger.info("in a request")

    async def nobody(*_: object) -> Any:
        raise AssertionError

    await Outermost(app)({"type": "http", "headers": [(b"x-request-id", b"mine")]}, nobody, nobody)

    assert lines()[0]["request_id"] == "mine"


def test_ids_are_shown_as_the_api_shows_them(lines: Any) -> None:
    one = new_id()
    bare = {
        "turn_id": one,
        "session_id": one.hex,
        "worker_id": "somewhere",
        "word": one.hex,
        "artifact_id": f"art_{one.hex}",
    }

    logger.info("something", extra=bare)

    line = lines()[0]
    assert (line["turn_id"], line["session_id"], line["artifact_id"]) == (
        f"turn_{one.hex}",
        f"ses_{one.hex}",
        f"art_{one.hex}",
    )
    assert (line["worker_id"], line["word"]) == ("somewhere", one.hex)
