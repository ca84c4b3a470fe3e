"""Runs turns: from a claim to the end of the turn, or to the point where it leaves this worker.

    claimed -> start -> restore and replay -> agent runs -> finish (next turn of the session, or release)
                                                 |
                                                 +-> every branch waits: suspend      drain: interrupt at the last step
                                                 +-> cancel, deadline: finish         lease lost: drop everything

Recovery is not here: a turn that was interrupted simply comes again, by a wake-up, to whoever claims its session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, cast
from uuid import UUID

from pydantic_core import PydanticSerializationError

from longshift.agent import Agent, Agents
from longshift.context import events, keep, restore
from longshift.db import leases, log
from longshift.db.database import Database
from longshift.errors import (
    ControlFlow,
    InvalidInput,
    LeaseLost,
    LongshiftError,
    StepFailed,
    Unavailable,
    UsageError,
)
from longshift.events import Event, Kind, NewEvent, encode, storable
from longshift.execution import ERROR_TEXT, Execution
from longshift.lease import Lease
from longshift.model import Json, MailKind, MailRecord, TurnRecord, TurnStatus
from longshift.port import Outside, TurnPort
from longshift.replay import Replay
from longshift.turn import Turn

logger = logging.getLogger(__name__)

TIME_SLICE = timedelta(seconds=5)
"""How long a lease is kept from turn to turn of one session before others get their chance."""
UNKNOWN_AGENT = timedelta(seconds=5)
"""Pause before a session whose agent this worker does not have is offered to others again."""
UNWIND = timedelta(seconds=10)
"""Time that an agent's ``finally`` blocks get when its turn leaves."""


class Stop(StrEnum):
    """Why the runner looks up."""

    DONE = "done"  # the agent returned or raised
    IDLE = "idle"  # every branch waits
    DRAIN = "drain"  # the worker stops, and no step of the turn is running
    CANCEL = "cancel"
    EXPIRE = "expire"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a turn ended, as its terminal event and row will say."""

    status: TurnStatus
    payload: str
    output: str | None = None
    error: str | None = None


_KINDS = {
    TurnStatus.SUCCEEDED: Kind.TURN_SUCCEEDED,
    TurnStatus.FAILED: Kind.TURN_FAILED,
    TurnStatus.CANCELLED: Kind.TURN_CANCELLED,
    TurnStatus.EXPIRED: Kind.TURN_EXPIRED,
}


class Run:
    """One session on this worker: its lease, and whichever of its turns is running."""

    def __init__(self, lease: Lease, *, claimed_at: float) -> None:
        self.lease = lease
        self.claimed_at = claimed_at
        self.record: TurnRecord | None = None
        self.execution: Execution | None = None
        self.draining = False
        self.until: datetime | None = None  # when the waits of a turn that left end
        self._nudge: asyncio.Future[Stop] | None = None
        self.reason = ""  # of a cancel
        lease.on_lost = lambda: self.stop(Stop.LOST)

    def begin(self, record: TurnRecord) -> None:
        self.record, self.execution, self.reason = record, None, ""
        self._nudge = asyncio.get_running_loop().create_future()

    def stop(self, why: Stop, *, reason: str = "") -> None:
        """Make the runner look up; the first reason counts, but for a lost lease."""
        self.reason = self.reason or reason
        if self._nudge is not None and not self._nudge.done():
            self._nudge.set_result(why)

    def deliver(self, mail: MailRecord) -> None:
        """A cancel or an expiry for the turn that is running."""
        if self.record is not None and mail.turn_id == self.record.id:
            self.stop(Stop.EXPIRE if mail.kind is MailKind.EXPIRE else Stop.CANCEL, reason=_reason_of(mail))

    def drain(self) -> None:
        self.draining = True
        if self.execution is not None:
            self.execution.drain()

    def cut_short(self) -> None:
        """The grace is over: leave now, whatever is running."""
        self.stop(Stop.DRAIN)

    async def looked_up(self) -> Stop:
        assert self._nudge is not None
        return await asyncio.shield(self._nudge)

    def again(self) -> None:
        """Wait for the next reason."""
        self._nudge = asyncio.get_running_loop().create_future()


class Runner:
    """Runs the turns of claimed sessions."""

    def __init__(self, outside: Outside, agents: Agents, *, queues: Sequence[str]) -> None:
        self._outside = outside
        self._agents = agents
        self._queues = frozenset(queues)

    async def run_session(self, run: Run, record: TurnRecord | None) -> None:
        """Run the session's turns, one after another, as long as the lease is kept."""
        lease = run.lease
        try:
            if record is None:
                await self._give_back(lease)
            while record is not None:
                record = await self._run_turn(run, record)
        except LeaseLost:
            logger.info("turn dropped, its lease is gone", extra={"session_id": lease.session_id.hex})
        except Unavailable as error:
            logger.warning("turn dropped, postgres is away", extra={"reason": str(error)})
        finally:
            self._outside.journal.drop(lease)

    async def _run_turn(self, run: Run, record: TurnRecord) -> TurnRecord | None:
        """Run one turn; the next one of the session, if the lease was kept for it."""
        run.begin(record)
        mail = await self._mail(run, record)
        if mail is not None:
            status = TurnStatus.EXPIRED if mail.kind is MailKind.EXPIRE else TurnStatus.CANCELLED
            return await self._finish(run, record, _stopped(status, _reason_of(mail)))
        agent = self._agents.find(record.agent, record.agent_version)
        if agent is None:
            await self._defer(run, record)
            return None
        started = await self._start(run.lease, agent, record)
        if started is None:
            return await self._next(run.lease)
        execution = await self._restore(run, record, started=started)
        stop, result = await self._drive(run, agent, execution)
        match stop:
            case Stop.LOST:
                raise LeaseLost("the lease is gone")
            case Stop.IDLE:
                await self._leave(run, record, TurnStatus.WAITING)
                return None
            case Stop.DRAIN:
                await self._leave(run, record, TurnStatus.QUEUED)
                return None
            case Stop.CANCEL | Stop.EXPIRE:
                status = TurnStatus.EXPIRED if stop is Stop.EXPIRE else TurnStatus.CANCELLED
                return await self._finish(run, record, _stopped(status, run.reason))
            case _:
                return await self._finish(run, record, result or _failed("internal", "the agent gave no result"))

    # -- the stages

    async def _defer(self, run: Run, record: TurnRecord) -> None:
        """This worker does not have the agent: leave the turn to one that has, at once if other workers serve its queue."""
        elsewhere = record.queue not in self._queues
        if not elsewhere:
            logger.warning(
                "no such agent here, turn deferred", extra={"agent": record.agent, "version": record.agent_version}
            )
        await self._give_back(run.lease, delay=timedelta(0) if elsewhere else UNKNOWN_AGENT, queue=record.queue)

    async def _start(self, lease: Lease, agent: Agent[Any, Any], record: TurnRecord) -> datetime | None:
        """Record ``turn.started`` and return its time; None if the turn ended before."""
        attempt, now = record.attempts + 1, self._outside.clock.now()
        payload: dict[str, Json] = {
            "attempt": attempt,
            "agent": agent.name,
            "version": agent.version,
            "at": now.isoformat(),
        }
        if attempt == 1:
            payload["input"] = record.input
        event = NewEvent(Kind.TURN_STARTED, record.id, encode(payload))
        done = await self._outside.journal.write(
            lease, lambda seq: log.Start(lease.claim, seq, (event,), record.id, agent.version)
        )
        if not done.flag:
            return None
        self._tell(lease, record, TurnStatus.RUNNING)
        return now

    async def _mail(self, run: Run, record: TurnRecord) -> MailRecord | None:
        """A cancel or expiry that came before this attempt."""
        if run.lease.claim.mail_seq == 0:
            return None
        mail = await self._outside.asking(leases.urgent_mail, worker_id=run.lease.claim.worker_id)
        return next((m for m in mail if m.turn_id == record.id), None)

    async def _restore(self, run: Run, record: TurnRecord, *, started: datetime) -> Execution:
        """The context as of the turn's start, and what is recorded of the turn."""
        outside, lease = self._outside, run.lease
        first_seq = record.first_seq or lease.seq
        restored = await self._outside.asking(restore, lease.session_id, through=first_seq - 1)
        with suppress(Unavailable):
            await keep(outside.db, lease.claim, restored)
        recorded: list[Event] = []
        if record.attempts > 0:
            recorded = await self._outside.asking(_collected, lease.session_id, after=first_seq - 1, turn=record)
        first = next((e for e in recorded if e.kind == Kind.TURN_STARTED), None)
        if first is not None:
            started = datetime.fromisoformat(first.payload["at"])
        restored.context.history.append({"role": "user", "content": record.input, "turn_id": record.id.hex})
        return Execution(
            record,
            attempt=record.attempts + 1,
            replay=Replay(recorded),
            context=restored.context,
            port=TurnPort(outside, lease, record),
            started=started,
        )

    async def _drive(self, run: Run, agent: Agent[Any, Any], execution: Execution) -> tuple[Stop, Outcome | None]:
        """Let the agent run until it ends or has to leave; unwound either way when this returns."""
        loop = asyncio.get_running_loop()
        execution.on_idle = lambda: run.stop(Stop.IDLE)
        execution.on_quiet = lambda: run.stop(Stop.DRAIN)
        run.execution = execution
        task = asyncio.create_task(self._call(agent, execution), name=f"turn-{execution.record.id.hex}")
        task.add_done_callback(lambda _: run.stop(Stop.DONE))
        remaining = (execution.record.deadline - self._outside.clock.now()).total_seconds()
        timer = loop.call_later(max(0.0, min(remaining, 86_400.0)), self._deadline, run, execution)
        if run.draining:
            execution.drain()
        try:
            while (stop := await run.looked_up()) is Stop.IDLE and not execution.waits.idle:
                run.again()
                if task.done():
                    run.stop(Stop.DONE)
            run.until = execution.waits.until if stop is Stop.IDLE else None
        finally:
            timer.cancel()
            ended = task.done()  # by itself: what an agent returns while it is being unwound is not its answer
            await _unwind(task, execution)
            run.execution = None
        if not ended or stop is Stop.LOST:
            return stop, None
        return Stop.DONE, None if task.cancelled() or task.exception() is not None else task.result()

    def _deadline(self, run: Run, execution: Execution) -> None:
        if execution.record.deadline <= self._outside.clock.now():
            run.stop(Stop.EXPIRE, reason="the turn's deadline has passed")

    async def _call(self, agent: Agent[Any, Any], execution: Execution) -> Outcome:
        """The agent's result, or how it failed; control flow passes through."""
        try:
            value = agent.read_input(execution.record.input)
            turn = Turn(execution)
            with execution.entered(threaded=not agent.is_async):
                if agent.is_async:
                    result = await cast(Awaitable[Any], agent.function(turn, value))
                else:
                    call = partial(copy_context().run, partial(agent.function, turn, value))
                    loop = asyncio.get_running_loop()
                    result = await loop.run_in_executor(self._outside.agent_threads, call)
            return self._succeeded(agent, result)
        except StepFailed as error:
            return _failed(error.code, str(error), step=error.step, type=error.error_type)
        except InvalidInput as error:
            return _failed(error.code, str(error), errors=error.errors)
        except LongshiftError as error:
            return _failed(error.code, str(error))
        except Exception as error:
            logger.exception("agent failed", extra={"agent": agent.name, "turn_id": execution.record.id.hex})
            return _failed("agent_error", str(error), type=type(error).__name__)

    def _succeeded(self, agent: Agent[Any, Any], result: Any) -> Outcome:
        try:
            output = storable(agent.output.dump_json(result, warnings="error").decode())
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            raise UsageError(
                f"agent {agent.name!r} returned a {type(result).__name__} that does not fit its return annotation: "
                f"{str(error).splitlines()[0]}"
            ) from None
        if (size := len(output.encode())) > self._outside.max_event:
            raise InvalidInput(f"an output of {size:,} bytes is too large: return turn.artifact(...) instead")
        return Outcome(TurnStatus.SUCCEEDED, f'{{"output":{output}}}', output=output)

    async def _finish(self, run: Run, record: TurnRecord, outcome: Outcome) -> TurnRecord | None:
        lease, journal = run.lease, self._outside.journal
        event = NewEvent(_KINDS[outcome.status], record.id, outcome.payload)
        kept = self._outside.clock.monotonic() - run.claimed_at < TIME_SLICE.total_seconds() and not run.draining
        done = await journal.write(
            lease,
            lambda seq: log.Finish(
                lease.claim, seq, (event,), record.id, outcome.status, outcome.output, outcome.error, kept
            ),
        )
        self._tell(lease, record, outcome.status)
        if done.flag:
            return await self._next(lease)
        if done.more:
            self._outside.notices.ring(lease.session_id, record.queue)
        return None

    async def _leave(self, run: Run, record: TurnRecord, status: TurnStatus) -> None:
        lease = run.lease
        waits = status is TurnStatus.WAITING
        until = run.until if waits else None
        kind = Kind.TURN_WAITING if waits else Kind.TURN_RESCHEDULED
        payload = {"until": until.isoformat()} if until is not None else {"reason": "drain"}
        event = NewEvent(kind, record.id, encode(payload))
        seen = lease.claim.mail_seq
        done = await self._outside.journal.write(
            lease, lambda seq: log.Leave(lease.claim, seq, (event,), record.id, status, until, seen)
        )
        self._tell(lease, record, status)
        if done.flag:
            self._outside.notices.ring(lease.session_id, record.queue)

    async def _next(self, lease: Lease) -> TurnRecord | None:
        """The turn that comes now, under the lease that was kept; else the lease is given back."""
        record: TurnRecord | None = await self._outside.asking(leases.head, lease.session_id)
        if record is None:
            await self._give_back(lease)
        return record

    async def _give_back(self, lease: Lease, *, delay: timedelta = timedelta(0), queue: str | None = None) -> None:
        more = await self._outside.asking(leases.release, lease.claim, delay=delay, queue=queue)
        lease.ended = True
        if more and not delay and queue is not None:
            self._outside.notices.ring(lease.session_id, queue)

    def _tell(self, lease: Lease, record: TurnRecord, status: TurnStatus) -> None:
        self._outside.notices.log_grew(lease.session_id, lease.seq)
        self._outside.notices.turn_changed(record.id, status)


async def _collected(db: Database, session_id: UUID, *, after: int, turn: TurnRecord) -> list[Event]:
    return [event async for event in events(db, session_id, after=after, turn_id=turn.id)]


async def _unwind(task: asyncio.Task[Outcome], execution: Execution) -> None:
    """End the agent's coroutine: durable calls raise, everything else is cancelled."""
    execution.unwind("leaving")
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=UNWIND.total_seconds())
    if not task.done():
        logger.error("agent does not end, turn left behind", extra={"turn_id": execution.record.id.hex})
        task.add_done_callback(_retrieve)
    else:
        _retrieve(task)


def _retrieve(task: asyncio.Task[Outcome]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ControlFlow):
        logger.error("agent raised while leaving", exc_info=error)


def _reason_of(mail: MailRecord) -> str:
    return str(mail.payload.get("reason", "")) if isinstance(mail.payload, dict) else ""


def _stopped(status: TurnStatus, reason: str) -> Outcome:
    text = reason or ("the deadline has passed" if status is TurnStatus.EXPIRED else "cancelled")
    error = encode({"code": status.value, "message": text})
    return Outcome(status, encode({"reason": text}), error=error)


def _failed(code: str, message: str, **more: Json) -> Outcome:
    error = encode({"code": code, "message": message[:ERROR_TEXT], **more})
    return Outcome(TurnStatus.FAILED, f'{{"error":{error}}}', error=error)
