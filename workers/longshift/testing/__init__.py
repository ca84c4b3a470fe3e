"""Runs an agent without any server, to test it: its log is a list, its sleeps take no time, its worker dies anywhere.

    @pytest.mark.parametrize("crash_after", crash_points(triage, question))
    def test_triage_survives(crash_after: int) -> None:
        result = run(triage, question, crash_after=crash_after)
        assert result.output == expected
        assert result.calls["read"] == 1

The code that replays, counts and records is the worker's own (``longshift.attempt``, ``longshift.execution``); what
differs is the outside: a list for the log, a dict for artifacts, counted words for full-text search.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

from longshift.agent import Agent
from longshift.clock import SYSTEM, Clock
from longshift.events import Event
from longshift.model import Json, new_id
from longshift.testing.bench import Bench, Fakes, Result, as_sent, named, new_record
from longshift.testing.outside import Delta, Outside, Time

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741


def run(
    agent: Agent[I, O],
    input: I | Json,  # noqa: A002
    *,
    fake: Fakes | None = None,
    crash_after: int | None = None,
    log: list[Event] | None = None,
    artifacts: MutableMapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    clock: Clock = SYSTEM,
    deadline: timedelta = timedelta(days=7),
) -> Result[O]:
    """Run one turn of ``agent``.

    Args:
        agent: what ``@agent`` made.
        input: as the agent takes it, or the JSON that a client would send.
        fake: for steps, by function or name: the result, an exception to raise, or a function to call instead.
        crash_after: the worker dies when this many events of the turn have become durable, and another one goes on from
            the log. In one process: ``finally`` blocks run, but nothing durable can be done in them.
        log: the session so far, from earlier runs; the turn's events are added to it. Default: a new session.
        artifacts: bytes by ``art_...`` id, to read; what the turn keeps is added.
        metadata: of the turn.
        clock: where its time starts and how it flows; sleeps and back-off jump ahead of it.
        deadline: a turn that sleeps past it expires.

    Raises:
        InvalidInput: the input does not fit the agent.
    """
    return asyncio.run(
        arun(
            agent,
            input,
            fake=fake,
            crash_after=crash_after,
            log=log,
            artifacts=artifacts,
            metadata=metadata,
            clock=clock,
            deadline=deadline,
        )
    )


async def arun(
    agent: Agent[I, O],
    input: I | Json,  # noqa: A002
    *,
    fake: Fakes | None = None,
    crash_after: int | None = None,
    log: list[Event] | None = None,
    artifacts: MutableMapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    clock: Clock = SYSTEM,
    deadline: timedelta = timedelta(days=7),
) -> Result[O]:
    """``run`` for a test that has an event loop."""
    sent = as_sent(agent, input)
    agent.read_input(sent)
    time = Time(clock)
    log = log if log is not None else []
    now = time.clock.now()
    record = new_record(
        agent,
        sent,
        session_id=log[0].session_id if log else new_id(),
        metadata=metadata or {},
        now=now,
        until=now + deadline,
    )
    with ThreadPoolExecutor(8, "step") as steps, ThreadPoolExecutor(8, "agent") as agents:
        outside = Outside(record, log, artifacts if artifacts is not None else {}, time, steps, crash_after)
        bench = Bench(agent, outside, agents, named(fake or {}))
        while not bench.ended:
            await bench.attempt()
    return bench.result()


def crash_points(agent: Agent[I, O], input: I | Json, **options: Any) -> range:  # noqa: A002
    """Every value of ``crash_after`` that makes a difference: one for each event of an undisturbed run."""
    return range(1, len(run(agent, input, **options).events) + 1)


__all__ = ["Delta", "Result", "arun", "crash_points", "run"]
