"""One turn under test, from attempt to attempt."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

from pydantic_core import PydanticSerializationError, to_jsonable_python

from longshift.agent import Agent
from longshift.attempt import Outcome, begun, call, failed, left, resumed, stopped, unwind
from longshift.events import Context, Event, fold
from longshift.execution import Execution
from longshift.model import Json, TurnRecord, TurnStatus, new_id
from longshift.place import running_step
from longshift.steps import StepDefinition
from longshift.testing.outside import Crashed, Delta, Outside

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741
Fakes = Mapping[Callable[..., Any] | str, Any]
QUIET = 0.002  # seconds without a running step after which a sleep is skipped


@dataclass(frozen=True, slots=True)
class Result(Generic[O]):
    """How a turn went.

    Attributes:
        status: ``succeeded``, ``failed`` or ``expired``.
        error: ``{"code", "message", ...}`` as a client sees it; None if it succeeded.
        events: what the turn has added to the log.
        attempts: how often it started: 1, one more for each crash, and one more for each sleep that left the worker.
        calls: how often the function of each step was called, retries included, by the step's name.
        artifacts: what it kept, by name; of several with one name, the last.
        deltas: what it emitted.
        unused: keys of recorded steps that the last attempt did not ask for: the code between steps takes another way
            on a replay than it did before.
    """

    status: TurnStatus
    error: Mapping[str, Json] | None
    events: tuple[Event, ...]
    attempts: int
    calls: Counter[str]
    artifacts: Mapping[str, bytes]
    deltas: tuple[Delta, ...]
    unused: tuple[str, ...]
    value: O | None

    @property
    def output(self) -> O:
        """What the agent returned, read back from its JSON.

        Raises:
            AssertionError: the turn did not succeed; the message says why.
        """
        if self.status is not TurnStatus.SUCCEEDED:
            raise AssertionError(f"the turn has {self.status}: {self.error}")
        return cast(O, self.value)


class Rehearsal(Execution):
    """An execution whose steps are counted and may be faked."""

    fakes: Mapping[Callable[..., Any] | str, Any]
    calls: Counter[str]

    async def once(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        outermost = running_step()
        if outermost is not None and outermost.definition is step and not step.ours:
            self.calls[step.name] += 1
        fake = self.fakes.get(step.function, self.fakes.get(step.name, step.function))
        if isinstance(fake, Exception):
            raise fake
        return await super().once(replace(step, function=fake), args, kwargs) if callable(fake) else fake


class Bench:
    """One turn, from attempt to attempt."""

    def __init__(
        self,
        agent: Agent[Any, Any],
        outside: Outside,
        threads: ThreadPoolExecutor,
        fakes: Mapping[Callable[..., Any] | str, Any],
    ) -> None:
        self._agent, self._outside, self._threads, self._fakes = agent, outside, threads, fakes
        self._calls: Counter[str] = Counter()
        self._unused: tuple[str, ...] = ()
        self._outcome: Outcome | None = None
        self._wake = asyncio.Event()
        self._crashed = False
        outside.on_crash = self._crash

    @property
    def ended(self) -> bool:
        """Whether the terminal event is durable; it counts even if the worker died right after it."""
        if self._outcome is None or not self._outside.events:
            return False
        return self._outside.events[-1].kind == self._outcome.event(self._outside.record).kind

    def _crash(self) -> None:
        self._crashed = True
        self._wake.set()

    async def attempt(self) -> None:
        """Start, resume, and let the agent run until it ends, waits or dies with its worker."""
        outside, record = self._outside, self._outside.record
        recorded = outside.events
        now = outside.clock.now()
        outside.revive()
        self._crashed = False
        started = replace(record, attempts=record.attempts + 1)
        outside.record = started
        try:
            outside.write(begun(record, self._agent, now=now))
            before = fold(outside.log[: outside.first], start=Context())
            execution = resumed(record, recorded, before=before, port=outside, now=now, make=Rehearsal)
            assert isinstance(execution, Rehearsal)
            execution.fakes, execution.calls = self._fakes, self._calls
            outcome = await self._drive(execution)
            self._unused = tuple(execution.replay.unused)
            if outcome is not None:
                self._outcome = outcome
                outside.write(outcome.event(record))
        except Crashed:
            pass

    async def _drive(self, execution: Rehearsal) -> Outcome | None:
        """The outcome; None: the turn has left its worker, or the worker died."""
        self._wake = asyncio.Event()
        execution.on_idle = self._outside.time.on_sleep = self._wake.set
        task = asyncio.create_task(call(self._agent, execution, threads=self._threads))
        task.add_done_callback(lambda _: self._wake.set())
        try:
            until = await self._watch(task, execution)
            ended = task.done()  # by itself: what an agent returns while it is being unwound is not its answer
        finally:
            await unwind(task, execution)
        if self._crashed:
            return None
        if not ended:
            assert until is not None
            return self._leave(until)
        if task.cancelled() or task.exception() is not None:
            return failed("internal", "the agent gave no result")
        return task.result()

    async def _watch(self, task: asyncio.Task[Outcome], execution: Rehearsal) -> datetime | None:
        """Wait until the agent ends, its worker dies or every branch waits (the answer: until when)."""
        quiet = False
        while not (self._crashed or task.done()):
            if execution.waits.idle:
                return execution.waits.until
            due = self._outside.time.next_due
            if quiet and due is not None and not execution.busy:
                self._outside.time.jump(due)
            quiet = await self._quiet(None if due is None else QUIET)
        return None

    async def _quiet(self, seconds: float | None) -> bool:
        """Wait for something to happen; True: nothing did, for so long."""
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return True
        self._wake.clear()
        return False

    def _leave(self, until: datetime) -> Outcome | None:
        """The turn waits without a worker; the clock jumps to where it comes back."""
        outside = self._outside
        outside.write(left(outside.record, until=until))
        outside.time.jump(min(until, outside.record.deadline))
        if until >= outside.record.deadline:
            return stopped(TurnStatus.EXPIRED, "")
        return None

    def result(self) -> Result[Any]:
        outside, outcome = self._outside, self._outcome
        assert outcome is not None
        value = self._agent.output.validate_json(outcome.output) if outcome.output is not None else None
        return Result(
            status=outcome.status,
            error=json.loads(outcome.error) if outcome.error is not None else None,
            events=tuple(outside.events),
            attempts=outside.record.attempts,
            calls=self._calls,
            artifacts=outside.kept,
            deltas=tuple(outside.deltas),
            unused=self._unused,
            value=value,
        )


def named(fakes: Fakes) -> dict[Callable[..., Any] | str, Any]:
    """Decorated functions as the functions they decorate, which is how an execution knows them."""
    return {getattr(getattr(key, "__longshift_step__", None), "function", key): fake for key, fake in fakes.items()}


def as_sent(agent: Agent[Any, Any], value: Json) -> Json:
    """The input as the JSON that a client would send."""
    try:
        return json.loads(agent.input.dump_json(value, by_alias=True, warnings="error"))
    except PydanticSerializationError:
        return to_jsonable_python(value)


def new_record(
    agent: Agent[Any, Any],
    sent: Json,
    *,
    session_id: UUID,
    metadata: Mapping[str, str],
    now: datetime,
    until: datetime,
) -> TurnRecord:
    turn_id = new_id()
    return TurnRecord(
        id=turn_id,
        session_id=session_id,
        tenant_id=new_id(),
        status=TurnStatus.RUNNING,
        agent=agent.name,
        agent_version=agent.version,
        queue=agent.queue,
        input=sent,
        output=None,
        error=None,
        position=0,
        root_turn_id=turn_id,
        retry_of=None,
        parent_turn_id=None,
        attempts=0,
        version=1,
        first_seq=None,
        run_after=None,
        deadline=until,
        batch_id=None,
        batch_index=None,
        custom_id=None,
        usage={},
        metadata=metadata,
        traceparent=None,
        created_at=now,
        started_at=now,
        ended_at=None,
    )
