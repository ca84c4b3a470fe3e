"""Runs an agent without any server, to test it: its log is a list, its sleeps take no time, its worker dies anywhere.

    @pytest.mark.parametrize("point", named_crash_points(triage, question))
    def test_triage_survives(point: str) -> None:
        result = run(triage, question, crash_at=point)
        assert result.output == expected
        assert result.calls["read"] == 1

``torture`` does that for every point and every fault, and says what went wrong. The code that replays, counts and records
is the worker's own (``longshift.attempt``, ``longshift.execution``); what differs is the outside: a list under a fence
for the log, a dict for artifacts, counted words for full-text search.

Real processes are in ``longshift.testing.fleet`` (start, kill, pause, drain), a proxy that drops and doubles wake-ups in
``longshift.testing.meddler``, and ``wait_until`` in ``longshift.testing.waiting``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from longshift.agent import Agent
from longshift.clock import SYSTEM, Clock
from longshift.contract import Passage, Verdict
from longshift.events import Event
from longshift.model import Json, new_id
from longshift.observing import Observers
from longshift.testing.bench import Fakes, Result, as_sent, new_record, rehearse, retried
from longshift.testing.ledger import Ledger
from longshift.testing.outside import submitted
from longshift.testing.scenario import Effects, Scenario
from longshift.testing.tormentor import Report, torture
from longshift.testing.world import Delta, Faults, Post, Time, World
from longshift.tooling import Absent, Done, Unknown
from longshift.tracing import OFF, Traces

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741


def run(
    agent: Agent[I, O],
    input: I | Json,  # noqa: A002
    *,
    fake: Fakes | None = None,
    crash_after: int | None = None,
    crash_at: str | None = None,
    pause_at: str | None = None,
    deliver_twice: bool = False,
    log: list[Event] | None = None,
    retry: Result[Any] | None = None,
    artifacts: MutableMapping[str, bytes] | None = None,
    signals: Mapping[str, Sequence[Json]] | None = None,
    approve: Mapping[str, bool | Verdict] | None = None,
    settle: Mapping[str, Done[Any] | Absent | Unknown] | None = None,
    ledger: Ledger | None = None,
    passages: list[Passage] | None = None,
    metadata: Mapping[str, str] | None = None,
    clock: Clock = SYSTEM,
    deadline: timedelta = timedelta(days=7),
    traces: Traces = OFF,
) -> Result[O]:
    """Run one turn of ``agent``.

    Args:
        agent: what ``@agent`` made.
        input: as the agent takes it, or the JSON that a client would send.
        fake: for steps, by function or name: the result, an exception to raise, or a function to call instead. The same for
            children, by agent or name; an agent without a fake that is spawned runs, undisturbed, in a world of its own.
        crash_after: the worker dies when this many events of the turn have become durable, and another one goes on from
            the log. In one process: ``finally`` blocks run, but nothing durable can be done in them.
        crash_at: the same at a point by its name, such as ``"before step.completed charge"``: the effect has happened,
            its record has not. ``named_crash_points`` lists them; ``longshift.testing.points`` says what they mean.
        pause_at: the worker is stopped at this point, as by SIGSTOP, until another one has taken over and ended the turn.
            Then it goes on as a stale writer: its next record is refused with ``LeaseLost``, every call after that too.
            ``result.refused`` has what it tried. In one process: what runs in a step when it stops runs on to its end.
        deliver_twice: the wake-up comes again at each record and after the end; every copy is refused.
        log: the session so far, from earlier runs; the turn's events are added to it. Default: a new session.
        retry: an earlier turn of this ``log`` that ended without success: go on from what it has recorded.
        artifacts: bytes by ``art_...`` id, to read; what the turn keeps is added.
        signals: payloads by the name of their signal, oldest first; all have come before the turn begins.
        approve: the answer to each approval of this name, given when the turn has left its worker. Others are not answered.
        settle: what an operator finds out of each call of the tool of this name that is in doubt, likewise: ``Done(result)``,
            ``Absent()``, or ``Unknown(reason)``, which gives it up.
        ledger: of tool calls, from earlier runs of the session. Default: a new one.
        passages: what can be recalled, from earlier runs of this session and of others of its tenant; what the turn adds is
            added. Default: nothing.
        metadata: of the turn.
        clock: where its time starts and how it flows; sleeps and back-off jump ahead of it. ``Clock(now=lambda: NOON)``
            stands still but for them.
        deadline: a turn that sleeps past it expires.
        traces: where its spans go, such as ``longshift.tracing.traces_to(exporter)``.

    Raises:
        InvalidInput: the input does not fit the agent.
        UsageError: the turn has no point of the name given; the message lists those it has.
    """
    return asyncio.run(
        arun(
            agent,
            input,
            fake=fake,
            crash_after=crash_after,
            crash_at=crash_at,
            pause_at=pause_at,
            deliver_twice=deliver_twice,
            log=log,
            retry=retry,
            artifacts=artifacts,
            signals=signals,
            approve=approve,
            settle=settle,
            ledger=ledger,
            passages=passages,
            metadata=metadata,
            clock=clock,
            deadline=deadline,
            traces=traces,
        )
    )


async def arun(
    agent: Agent[I, O],
    input: I | Json,  # noqa: A002
    *,
    fake: Fakes | None = None,
    crash_after: int | None = None,
    crash_at: str | None = None,
    pause_at: str | None = None,
    deliver_twice: bool = False,
    log: list[Event] | None = None,
    retry: Result[Any] | None = None,
    artifacts: MutableMapping[str, bytes] | None = None,
    signals: Mapping[str, Sequence[Json]] | None = None,
    approve: Mapping[str, bool | Verdict] | None = None,
    settle: Mapping[str, Done[Any] | Absent | Unknown] | None = None,
    ledger: Ledger | None = None,
    passages: list[Passage] | None = None,
    metadata: Mapping[str, str] | None = None,
    clock: Clock = SYSTEM,
    deadline: timedelta = timedelta(days=7),
    traces: Traces = OFF,
) -> Result[O]:
    """``run`` for a test that has an event loop."""
    faults = Faults(crash_after, crash_at, pause_at, deliver_twice)
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
    shelf = artifacts if artifacts is not None else {}
    if retry is not None:
        record = retried(record, retry, log)
        shelf.update(retry.shelf)
    post = Post(signals or {}, approve or {}, settle or {})
    world = World(submitted(record, shelf), log, shelf, time, faults, post=post, ledger=ledger, passages=passages)
    if traces.is_on:
        world.observe = Observers(traces).attempt
    return await rehearse(agent, world, fake=fake or {})


def crash_points(agent: Agent[I, O], input: I | Json, **options: Any) -> range:  # noqa: A002
    """Every value of ``crash_after`` that makes a difference: one for each event of an undisturbed run."""
    return range(1, len(run(agent, input, **options).events) + 1)


def named_crash_points(agent: Agent[I, O], input: I | Json, **options: Any) -> list[str]:  # noqa: A002
    """Every value of ``crash_at`` and ``pause_at``: before and after each record of an undisturbed run, in its order."""
    return list(run(agent, input, **options).points)


__all__ = [
    "Delta",
    "Effects",
    "Ledger",
    "Report",
    "Result",
    "Scenario",
    "arun",
    "crash_points",
    "named_crash_points",
    "run",
    "torture",
]
