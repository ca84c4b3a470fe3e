"""One turn under test, from attempt to attempt."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

from pydantic_core import PydanticSerializationError, to_jsonable_python

from longshift.agent import Agent
from longshift.attempt import Outcome, begun, call, failed, given, left, resumed, stopped, unwind
from longshift.contract import Cause
from longshift.ending import end
from longshift.errors import LeaseLost, UsageError
from longshift.events import Context, Event, fold
from longshift.execution import Execution
from longshift.model import Json, ToolCallRecord, TurnRecord, TurnStatus, new_id
from longshift.place import running_step
from longshift.stepping import Stepper
from longshift.steps import StepDefinition
from longshift.testing.children import Children
from longshift.testing.outside import Crashed, Outside
from longshift.testing.world import Delta, World, chain_of
from longshift.tooling import visible

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741
Fakes = Mapping[Callable[..., Any] | Agent[Any, Any] | str, Any]
QUIET = 0.002  # seconds without a running step after which a sleep is skipped
SILENCE = 500  # times QUIET, after which what a turn waits for is not expected any more
SETTLED = 10  # turns of the event loop, in which whoever can go on does something that is seen


@dataclass(frozen=True, slots=True)
class Result(Generic[O]):
    """How a turn went.

    Attributes:
        status: ``succeeded``, ``failed`` or ``expired``.
        error: ``{"code", "message", ...}`` as a client sees it; None if it succeeded.
        events: what the turn has added to the log.
        attempts: how often it started: 1, one more for each crash, and one more for each sleep that left the worker.
        calls: how often the function of each step was called, retries included, by the step's name.
        artifacts: what it kept, by name; of several with one name, the last. With its large values: ``output.json``,
            ``<step>.json``.
        deltas: what it emitted.
        unused: keys of recorded steps that the last attempt did not ask for: the code between steps takes another way
            on a replay than it did before.
        refused: what the fence has refused, in its order: writes of a stale writer, and doubled wake-ups.
        tool_calls: what stands in the ledger of the calls of tools, of the whole session, in the order of their first start.
        points: every point at which ``crash_at`` and ``pause_at`` make a difference.
        late: what a stale writer did although it had been refused. Only an agent that catches ``BaseException`` can.
        unread: payloads of the signals that nobody has consumed, by name.
        shelf: all artifacts, by ``art_...`` id: what a retry goes on from.
    """

    status: TurnStatus
    error: Mapping[str, Json] | None
    events: tuple[Event, ...]
    attempts: int
    calls: Counter[str]
    artifacts: Mapping[str, bytes]
    deltas: tuple[Delta, ...]
    unused: tuple[str, ...]
    refused: tuple[str, ...]
    late: tuple[str, ...]
    unread: Mapping[str, Sequence[Json]]
    tool_calls: tuple[ToolCallRecord, ...]
    points: tuple[str, ...]
    value: O | None
    shelf: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def output(self) -> O:
        """What the agent returned, read back from its JSON.

        Raises:
            AssertionError: the turn did not succeed; the message says why.
        """
        if self.status is not TurnStatus.SUCCEEDED:
            raise AssertionError(f"the turn has {self.status}: {self.error}")
        return cast(O, self.value)


class RehearsedSteps(Stepper):
    """Steps that are counted and may be faked."""

    async def once(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        rehearsal = self._rehearsal
        outermost = running_step()
        if outermost is not None and outermost.definition is step and not step.ours and step.tool is None:
            self.called(step)
        fake = rehearsal.fakes.get(step.function, rehearsal.fakes.get(step.name, step.function))
        if step.tool is not None and fake is not step.function:
            fake = visible(fake if callable(fake) else _giving(fake))
        if isinstance(fake, Exception):
            raise fake
        if not callable(fake):
            return fake
        rehearsal.outside.in_tools += step.tool is not None
        try:
            return await super().once(replace(step, function=fake), args, kwargs)
        finally:
            rehearsal.outside.in_tools -= step.tool is not None

    def called(self, step: StepDefinition) -> None:
        outside = self._rehearsal.outside
        self._rehearsal.calls[step.name] += 1
        if outside.refused:
            outside.world.late.append(f"step {step.name}")

    @property
    def _rehearsal(self) -> Rehearsal:
        assert isinstance(self.execution, Rehearsal)
        return self.execution


def _giving(fake: Any) -> Callable[..., Any]:
    """A function for a fake that is a result or an exception."""

    def give(*_: Any, **__: Any) -> Any:
        if isinstance(fake, Exception):
            raise fake
        return fake

    return give


class Rehearsal(Execution):
    """An execution of which the steps are rehearsed."""

    make_stepper = RehearsedSteps
    fakes: Mapping[Callable[..., Any] | str, Any]
    calls: Counter[str]
    outside: Outside


@dataclass(slots=True)
class Ending:
    """How an attempt let the turn end."""

    outcome: Outcome
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """How a turn waits that leaves its worker."""

    until: datetime | None
    stops_clock: bool
    missing: Sequence[Cause]


class Attempt:
    """One worker's try at the turn: from its claim until the agent ends, waits, or the worker dies or is refused."""

    def __init__(self, bench: Bench, outside: Outside) -> None:
        self.outside = outside
        self._bench, self._world = bench, outside.world
        self._wake = asyncio.Event()
        self._stop = False  # the worker is dead or refused: nothing of what the agent does counts any more
        outside.on_crash = self._look_up
        outside.run_child = bench.children.run

    def _look_up(self) -> None:
        self._stop = True
        self._wake.set()

    async def run(self) -> None:
        """One attempt, and whoever looks on."""
        with self._world.observe(self._world.record) as self.outside.observer:
            await self._run()

    async def _run(self) -> None:
        """Start, resume, and let the agent run."""
        world, outside = self._world, self.outside
        record = world.record
        now = outside.clock.now()
        try:
            had = await given(record, outside.get_artifact)
            record = had.record
            await outside.write(begun(record, self._bench.agent, now=now, pointer=had.pointer))
            outside.observer.started(now)
            if had.lost is not None:
                await self._end(had.lost, record)
                return
            recorded = world.earlier  # that of turns before it that it retries
            if record.attempts:
                recorded = [*recorded, *world.events]  # whoever was stopped meanwhile sees what came since
            before = fold(world.log[: world.first], start=Context())
            execution = resumed(
                record, recorded, before=before, port=outside, now=now, pointer=had.pointer, make=Rehearsal
            )
            assert isinstance(execution, Rehearsal)
            execution.outside, execution.fakes, execution.calls = outside, self._bench.fakes, self._bench.calls
            outcome = await self._drive(execution)
            if outcome is not None:
                await self._end(outcome, record, unused=tuple(execution.replay.unused))
        except (Crashed, LeaseLost):
            pass
        finally:
            world.release(outside.epoch)

    async def _end(self, outcome: Outcome, record: TurnRecord, *, unused: tuple[str, ...] = ()) -> None:
        event = outcome.event(record)
        self._bench.endings[event.id] = Ending(outcome, unused)
        await self.outside.write(event)
        self.outside.observer.ended(outcome.status, error=outcome.error)

    async def _drive(self, execution: Rehearsal) -> Outcome | None:
        """The outcome; None: the turn has left its worker, or the worker died or was refused."""
        time = self._world.time
        execution.on_idle = self._wake.set
        time.on_sleep.add(self._wake.set)
        task = asyncio.create_task(call(self._bench.agent, execution, threads=self._bench.threads))
        task.add_done_callback(lambda _: self._wake.set())

        def lost() -> None:
            execution.unwind("its lease is gone")
            self._look_up()

        self.outside.on_lost = lost
        try:
            waits = await self._watch(task, execution)
            ended = task.done()  # by itself: what an agent returns while it is being unwound is not its answer
        finally:
            await unwind(task, execution)
            time.on_sleep.discard(self._wake.set)
        if self._stop:
            return None
        if not ended:
            assert waits is not None
            return await self._leave(waits)
        if task.cancelled() or task.exception() is not None:
            return failed("internal", "the agent gave no result")
        return task.result()

    async def _watch(self, task: asyncio.Task[Outcome], execution: Rehearsal) -> Left | None:
        """Wait until the agent ends, its worker dies or every branch waits (the answer: for what)."""
        quiet, silence, missing, time = False, 0, execution.awaiting.missing, self._world.time
        while not (self._stop or task.done()):
            if execution.waits.idle:
                waits = execution.waits
                return Left(waits.until, waits.stops_clock, execution.awaiting.missing)
            due = time.next_due
            if quiet and not execution.busy:
                if self._world.answer():
                    await execution.awaiting.look()
                elif due is not None:
                    time.jump(due)
                elif silence > SILENCE:  # a branch that waits for the others does not count as waiting
                    return Left(None, stops_clock=False, missing=missing)
            missing = execution.awaiting.missing
            silence = silence + 1 if quiet and missing and due is None else 0
            quiet = await self._quiet(QUIET if due is not None or missing or self._world.doubts else None)
            await self.outside.running()
        return None

    async def _quiet(self, seconds: float | None) -> bool:
        """Wait for something to happen; True: nothing did, for so long, and nobody is about to do anything.

        Time alone does not tell: on a busy machine it passes while this process does not run.
        """
        moves = self.outside.moves
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            for _ in range(SETTLED):
                await asyncio.sleep(0)
            return self.outside.moves == moves and not self._wake.is_set()
        self._wake.clear()
        return False

    async def _leave(self, waits: Left) -> Outcome | None:
        """The turn waits without a worker: until somebody answers, or the clock jumps to where it comes back."""
        world, until = self._world, waits.until
        record, time = world.record, world.time
        await self.outside.write(left(record, waits=True, until=until))
        self.outside.observer.left(TurnStatus.WAITING)
        if world.answer():
            return None
        if waits.stops_clock and until is not None:
            world.record = replace(record, deadline=record.deadline + max(timedelta(0), until - time.clock.now()))
        elif until is None or until >= record.deadline:
            time.jump(record.deadline)
            missing = ", ".join(f"{cause.kind} {cause.name or cause.id}".strip() for cause in waits.missing)
            return stopped(
                TurnStatus.EXPIRED, f"the deadline has passed, and nothing brought {missing}" if missing else ""
            )
        time.jump(until)
        return None


class Bench:
    """One turn, from attempt to attempt, until it has ended and no worker of it is left."""

    def __init__(
        self,
        agent: Agent[Any, Any],
        world: World,
        *,
        fakes: Mapping[Callable[..., Any] | str, Any],
        steps: ThreadPoolExecutor,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.agent, self.world, self.fakes, self.threads = agent, world, fakes, threads
        self.calls: Counter[str] = Counter()
        self.children = Children(world, fakes=fakes, rehearse=_rehearsed)
        self.endings: dict[UUID, Ending] = {}  # by the id of the event that was to record it
        self._steps = steps

    async def run(self) -> Result[Any]:
        """
        Raises:
            UsageError: the fault never happened, because the turn has no such point.
        """
        attempts: list[tuple[Attempt, asyncio.Task[None]]] = []
        try:
            while not self.world.ended:
                epoch = self.world.claim()
                assert epoch is not None, "nobody else holds the session"
                attempt = Attempt(self, Outside(self.world, epoch=epoch, threads=self._steps))
                task = asyncio.create_task(attempt.run())
                attempts.append((attempt, task))
                if await _stopped(attempt, task):
                    self.world.rescue()  # past its lease: others take over
            for attempt, task in attempts:  # whoever was stopped goes on, as a stale writer
                attempt.outside.resume()
                await task
            for attempt, _ in attempts:
                await attempt.outside.end_calls()
        finally:
            await end(task for _, task in attempts)
            for attempt, _ in attempts:
                await attempt.outside.underway.drop()
        self.world.deliver_again()
        self.world.check_fired()
        return self._result()

    def _result(self) -> Result[Any]:
        world = self.world
        ending = self.endings[world.log[-1].id]
        outcome = ending.outcome
        output = outcome.output if outcome.artifact is None else world.text_of(outcome.artifact)
        value = self.agent.output.validate_json(output) if output is not None else None
        return Result(
            status=outcome.status,
            error=json.loads(outcome.error) if outcome.error is not None else None,
            events=tuple(world.events),
            attempts=world.record.attempts,
            calls=self.calls,
            artifacts=world.kept,
            deltas=tuple(world.deltas),
            unused=ending.unused,
            refused=tuple(world.refused),
            late=tuple(world.late),
            unread=world.post.unread,
            tool_calls=tuple(world.ledger),
            points=tuple(world.points),
            value=value,
            shelf=world.artifacts,
        )


async def _stopped(attempt: Attempt, task: asyncio.Task[None]) -> bool:
    """Whether the attempt's worker was stopped in the middle; else it has ended, and its errors are raised."""
    stop = asyncio.create_task(attempt.outside.stopped.wait())
    try:
        await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end([stop])
    if task.done():
        task.result()
    return not task.done()


async def rehearse(agent: Agent[I, O], world: World, *, fake: Fakes) -> Result[O]:
    """Run the turn of ``world`` to its end."""
    with ThreadPoolExecutor(8, "step") as steps, ThreadPoolExecutor(8, "agent") as threads:
        return await Bench(agent, world, fakes=named(fake), steps=steps, threads=threads).run()


async def _rehearsed(agent: Agent[Any, Any], world: World, fakes: Fakes) -> Mapping[str, Json]:
    """How a child of its own world ends, as wait.ended says it."""
    result = await rehearse(agent, world, fake=fakes)
    said = result.events[-1].payload
    ended = {"reason": "child", "status": result.status.value, "error": result.error}
    return {**ended, "output": said.get("output"), "artifact": said.get("artifact")}


def named(fakes: Fakes) -> dict[Callable[..., Any] | str, Any]:
    """Decorated functions as the functions they decorate, which is how an execution knows them."""
    return {getattr(getattr(key, "__longshift_step__", None), "function", key): fake for key, fake in fakes.items()}


def as_sent(agent: Agent[Any, Any], value: Json) -> Json:
    """The input as the JSON that a client would send."""
    try:
        return json.loads(agent.input.dump_json(value, by_alias=True, warnings="error"))
    except PydanticSerializationError:
        return to_jsonable_python(value)


def retried(record: TurnRecord, result: Result[Any], log: Sequence[Event]) -> TurnRecord:
    """``record`` as that of a turn which goes on where the one of ``result`` ended.

    Raises:
        UsageError: that one succeeded, or is not in this log.
    """
    first = result.events[0]
    if result.status is TurnStatus.SUCCEEDED or first not in log:
        why = "has succeeded" if result.status is TurnStatus.SUCCEEDED else "is not in the log that was given"
        raise UsageError(f"this turn cannot be retried: it {why}")
    return replace(record, retry_of=first.turn_id, root_turn_id=chain_of(log, first.turn_id)[0])


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
        input_artifact=None,
        output=None,
        output_artifact=None,
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
