"""Runs turns: from a claim to the end of the turn, or to the point where it leaves this worker.

    claimed -> restore -> start -> replay, agent runs -> finish (next turn of the session, or release)
                  |                              |
                  +-> store away: give back      |
                                                 +-> every branch waits: suspend      drain: interrupt at the last step
                                                 +-> cancel, deadline: finish         lease lost: drop everything

Recovery is not here: a turn that was interrupted simply comes again, by a wake-up, to whoever claims its session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from itertools import count
from random import SystemRandom
from typing import Any

from longshift.agent import Agent, Agents
from longshift.attempt import Given, Outcome, begun, call, failed, given, left, resumed, stopped, unwind
from longshift.db import children, leases, log, workers
from longshift.errors import ArtifactCorrupt, InvalidInput, LeaseLost, NotFound, StoreUnavailable, Unavailable
from longshift.execution import Execution
from longshift.lease import Lease
from longshift.model import MailKind, MailRecord, TurnRecord, TurnStatus
from longshift.observing import Observer
from longshift.port import Outside, TurnPort
from longshift.restoring import Known, Restorer

logger = logging.getLogger(__name__)

TIME_SLICE = timedelta(seconds=5)
"""How long a lease is kept from turn to turn of one session before others get their chance."""
UNKNOWN_AGENT = timedelta(seconds=5)
"""Pause before a session whose agent nobody has is offered again to whoever serves its queue."""
MISDIRECTED = timedelta(seconds=0.5)
"""The same if others have the agent: as long as two versions are deployed, a wake-up may find the wrong worker.

On average: between 0.2 and 0.8 s, by chance. Redis gives a wake-up to whoever has waited longest, and a worker asks anew every
second: by an even pause the same wrong workers got it again and again, in measurements for half a minute.
"""
_CHANCE = SystemRandom()
AWAY = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each attempt to restore a context again while Postgres is away; the last repeats."""
STORE_AWAY = timedelta(seconds=5)
"""Pause before a session whose next turn's input or context could not be fetched is tried again, by whichever worker."""
BROKEN = (InvalidInput, ArtifactCorrupt, NotFound, ValueError, RecursionError)
"""What is stored of a turn, or was to be, cannot be handled."""


class Stop(StrEnum):
    """Why the runner looks up."""

    DONE = "done"  # the agent returned or raised
    IDLE = "idle"  # every branch waits
    DRAIN = "drain"  # the worker stops, and no step of the turn is running
    CANCEL = "cancel"
    EXPIRE = "expire"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Idle:
    """The waits of a turn all of whose branches wait, as of the moment at which that was found."""

    until: datetime | None = None  # when the first of them ends by itself
    seen: int | None = None  # mail_seq as of the last look for what they wait for; None: there was no look
    stops_clock: bool = False


class Run:
    """One session on this worker: its lease, and whichever of its turns is running."""

    def __init__(self, lease: Lease, *, claimed_at: float, crashes: int = 0, woken_at: float | None = None) -> None:
        """
        Args:
            claimed_at: monotonic, as ``woken_at``.
            crashes: processes that died under the session's turn since it last recorded anything.
            woken_at: when this worker heard that there may be work; None: it was not told, but looked.
        """
        self.lease = lease
        self.woken_at = woken_at
        self.claimed_at = self.moved_at = (
            claimed_at  # the latter: when it last came a stage further, while no agent runs
        )
        self.crashes = crashes
        self.record: TurnRecord | None = None
        self.execution: Execution | None = None
        self.draining = False
        self.started = False  # the turn's row says that it runs
        self.deferred = False  # this worker does not have the agent
        self.unserved = False  # and nobody else has it either
        self.idle = Idle()  # how the turn waits that leaves
        self._nudge: asyncio.Future[Stop] | None = None
        self._after_idle: Stop | None = None
        self.reason = ""  # of a cancel
        self.seen: Observer
        self.on_started: Callable[[], None] = lambda: None  # told, once, that its first turn has started
        lease.on_lost = self._lost

    def begin(self, record: TurnRecord, seen: Observer) -> None:
        self.seen = seen
        self.record, self.execution, self.reason, self.started = record, None, "", False
        self._nudge, self._after_idle = asyncio.get_running_loop().create_future(), None

    def stop(self, why: Stop, *, reason: str = "") -> None:
        """Make the runner look up; the first reason counts, but ``IDLE`` may turn out to be over already."""
        self.reason = self.reason or reason
        if self._nudge is None:
            return
        if not self._nudge.done():
            self._nudge.set_result(why)
        elif self._after_idle is None and why is not Stop.IDLE:
            self._after_idle = why

    def deliver(self, mail: MailRecord) -> None:
        """A cancel or an expiry for the turn that is running; it is condemned only when it is not."""
        if self.record is not None and mail.turn_id == self.record.id and mail.kind is not MailKind.CONDEMN:
            self.stop(Stop.EXPIRE if mail.kind is MailKind.EXPIRE else Stop.CANCEL, reason=_reason_of(mail))

    def _lost(self) -> None:
        """The runner looks up a little later; until then no step may begin that waited for Postgres to come back."""
        if self.execution is not None:
            self.execution.unwind("its lease is gone")
        self.stop(Stop.LOST)

    @property
    def calling(self) -> bool:
        """Whether an irreversible tool is being called, which may not be cut short."""
        return self.execution is not None and self.execution.is_calling

    def drain(self) -> None:
        self.draining = True
        if self.execution is not None:
            self.execution.drain()

    def cut_short(self) -> None:
        """The grace is over: leave now, whatever is running."""
        self.stop(Stop.DRAIN)

    async def within(self, seconds: float) -> Stop | None:
        """Why the runner looks up in this time, if it does, while no agent runs."""
        assert self._nudge is not None
        if not self.draining:
            await asyncio.wait({self._nudge}, timeout=seconds)
        return self._nudge.result() if self._nudge.done() else Stop.DRAIN if self.draining else None

    async def looked_up(self) -> Stop:
        assert self._nudge is not None
        return await asyncio.shield(self._nudge)

    def again(self) -> None:
        """It was not idle after all: wait for the next reason, which may have come meanwhile."""
        self._nudge = asyncio.get_running_loop().create_future()
        if self._after_idle is not None:
            self._nudge.set_result(self._after_idle)


class Runner:
    """Runs the turns of claimed sessions."""

    def __init__(self, outside: Outside, agents: Agents, *, queues: Sequence[str]) -> None:
        self._outside = outside
        self._agents = agents
        self._queues = frozenset(queues)
        self._restorer = Restorer(outside)

    async def run_session(self, run: Run, record: TurnRecord | None) -> None:
        """Run the session's turns, one after another, as long as the lease is kept."""
        lease = run.lease
        try:
            if record is None:
                await self._give_back(lease)
            while record is not None:
                record = await self._run_turn_or_give_up(run, record)
        except LeaseLost:
            logger.info("turn dropped, its lease is gone", extra={"session_id": lease.session_id.hex})
        except Unavailable as error:
            logger.warning("turn dropped, postgres is away", extra={"reason": str(error)})
        finally:
            self._outside.journal.drop(lease)
            lease.on_lost = None  # it points to the run, which points to the lease

    async def _run_turn(self, run: Run, record: TurnRecord, seen: Observer) -> TurnRecord | None:
        """Run one turn; the next one of the session, if the lease was kept for it."""
        mail = await self._mail(run, record)
        if mail is not None:
            return await self._finish(run, record, _ended_by(mail))
        agent = self._agents.find(record.agent, record.agent_version)
        if agent is None:
            await self._defer(run, record)
            return None
        try:
            had = await given(record, partial(self._outside.cold.read, tenant_id=record.tenant_id))
            known = await self._known(run, had.record)
        except Unavailable as error:
            await self._postpone(run.lease, record, error)
            return None
        if isinstance(known, Stop):
            return await self._not_started(run, record, known)
        record = had.record
        started = await self._start(run.lease, agent, had)
        if started is None:
            return await self._next(run.lease)
        run.started = True
        seen.started(started)
        run.on_started()
        run.on_started = lambda: None
        if had.lost is not None:
            return await self._finish(run, record, had.lost)
        if isinstance(known, Exception):
            raise known
        port = TurnPort(self._outside, run.lease, record, observer=seen)
        execution = resumed(record, known.recorded, before=known.before, port=port, now=started, pointer=had.pointer)
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
                return await self._finish(run, record, stopped(status, run.reason))
            case _:
                return await self._finish(run, record, result or failed("internal", "the agent gave no result"))

    # -- the stages

    async def _run_turn_or_give_up(self, run: Run, record: TurnRecord) -> TurnRecord | None:
        woken_at, run.woken_at = run.woken_at, None  # by which the first turn of the session came here
        with self._outside.observers.attempt(record, run.lease.claim, woken_at=woken_at) as seen:
            run.begin(record, seen)
            try:
                return await self._run_turn(run, record, seen)
            except BROKEN as error:
                return await self._give_up(run, record, error)

    async def _give_up(self, run: Run, record: TurnRecord, error: Exception) -> TurnRecord | None:
        """What is stored of a turn, or was to be, cannot be handled, and never will be: the turn fails.

        A turn that has not started is left alone: it could have been cancelled meanwhile, and would count twice.
        """
        if not run.started:
            raise error
        logger.error("turn failed inside", exc_info=error, extra={"turn_id": record.id.hex})
        if isinstance(error, ArtifactCorrupt):
            return await self._finish(run, record, failed(error.code, str(error)))
        return await self._finish(run, record, failed("internal", f"{type(error).__name__}: {error}"))

    async def _defer(self, run: Run, record: TurnRecord) -> None:
        """This worker does not have the agent: leave the turn to one that has, at once if others serve its queue."""
        run.deferred = True
        if record.queue not in self._queues:
            await self._give_back(run.lease, queue=record.queue)
            return
        served = await self._outside.asking(
            workers.serves,
            agent=record.agent,
            version=record.agent_version,
            queue=record.queue,
            but=run.lease.claim.worker_id,
        )
        run.unserved = not served
        logger.log(
            logging.INFO if served else logging.WARNING,
            "no such agent here, turn deferred",
            extra={"agent": record.agent, "version": record.agent_version, "served": served},
        )
        delay = misdirected() if served else UNKNOWN_AGENT
        await self._give_back(run.lease, delay=delay, queue=record.queue)

    async def _postpone(self, lease: Lease, record: TurnRecord, error: Unavailable) -> None:
        """The turn's input or context cannot be fetched: it waits where it is, holding no worker, and can be cancelled and
        expire."""
        extra = {"turn_id": record.id.hex, "reason": str(error)}
        logger.warning("a turn waits for the artifact store", extra=extra)
        await self._give_back(lease, delay=STORE_AWAY, queue=record.queue)

    async def _start(self, lease: Lease, agent: Agent[Any, Any], had: Given) -> datetime | None:
        """Record ``turn.started`` and return its time; None if the turn ended before."""
        now, record = self._outside.clock.now(), had.record
        event = begun(record, agent, now=now, pointer=had.pointer)
        done = await self._outside.journal.write(
            lease, lambda seq: log.Start(lease.claim, seq, (event,), record.id, agent.version)
        )
        if not done.flag:
            return None
        self._tell(lease, record, TurnStatus.RUNNING)
        return now

    async def _mail(self, run: Run, record: TurnRecord) -> MailRecord | None:
        """A cancel, an expiry or a verdict that came before this attempt."""
        if run.lease.claim.mail_seq == 0:
            return None
        mail = await self._outside.asking(
            leases.urgent_mail, worker_id=run.lease.claim.worker_id, session_id=run.lease.session_id
        )
        return next((m for m in mail if m.turn_id == record.id), None)

    async def _known(self, run: Run, record: TurnRecord) -> Known | Stop | Exception:
        """What the turn begins with; or why the runner looks up before that is here, or why it never will be.

        Raises:
            StoreUnavailable: it is in the object store, which is away.
        """
        for attempt in count():
            try:
                return await self._restorer.restore(run.lease, record)
            except StoreUnavailable:
                raise
            except Unavailable as error:
                if attempt == 0:
                    waiting = {"turn_id": record.id.hex, "reason": str(error)}
                    logger.warning("a turn waits for its context", extra=waiting)
            except BROKEN as error:  # the turn fails by it, once it has started
                return error
            if (stop := await run.within(AWAY[min(attempt, len(AWAY) - 1)])) is not None:
                return stop
            await self._outside.journal.ready()
        raise AssertionError("it is tried for ever")

    async def _not_started(self, run: Run, record: TurnRecord, stop: Stop) -> TurnRecord | None:
        """The end of an attempt that has not begun."""
        match stop:
            case Stop.CANCEL | Stop.EXPIRE:
                status = TurnStatus.EXPIRED if stop is Stop.EXPIRE else TurnStatus.CANCELLED
                return await self._finish(run, record, stopped(status, run.reason))
            case Stop.LOST:
                raise LeaseLost("the lease is gone")
            case _:
                await self._give_back(run.lease, queue=record.queue)
                return None

    async def _drive(self, run: Run, agent: Agent[Any, Any], execution: Execution) -> tuple[Stop, Outcome | None]:
        """Let the agent run until it ends or has to leave; unwound either way when this returns."""
        loop = asyncio.get_running_loop()
        execution.on_idle = lambda: run.stop(Stop.IDLE)
        execution.on_quiet = lambda: run.stop(Stop.DRAIN)
        run.execution = execution
        task = asyncio.create_task(
            call(agent, execution, threads=self._outside.agent_threads), name=f"turn-{execution.record.id.hex}"
        )
        task.add_done_callback(lambda _: run.stop(Stop.DONE))
        remaining = (execution.record.deadline - self._outside.clock.now()).total_seconds()
        timer = loop.call_later(max(0.0, min(remaining, 86_400.0)), self._deadline, run, execution)
        if run.draining:
            execution.drain()
        try:
            while (stop := await run.looked_up()) is Stop.IDLE and not execution.waits.idle:
                run.again()
            if stop is Stop.IDLE:  # now: what is looked for while the turn unwinds is not handed to anybody
                waits = execution.waits
                run.idle = Idle(waits.until, execution.awaiting.seen, waits.stops_clock)
        finally:
            timer.cancel()
            ended = task.done()  # by itself: what an agent returns while it is being unwound is not its answer
            await unwind(task, execution)
            run.execution, run.moved_at = None, self._outside.clock.monotonic()
        if not ended or stop is Stop.LOST:
            return stop, None
        return Stop.DONE, None if task.cancelled() or task.exception() is not None else task.result()

    def _deadline(self, run: Run, execution: Execution) -> None:
        if execution.record.deadline <= self._outside.clock.now():
            run.stop(Stop.EXPIRE, reason="the turn's deadline has passed")

    async def _finish(self, run: Run, record: TurnRecord, outcome: Outcome) -> TurnRecord | None:
        lease, journal = run.lease, self._outside.journal
        event = outcome.event(record)
        if outcome.status is not TurnStatus.SUCCEEDED:
            # before the end is recorded: after it nobody would come back to this
            for session_id, queue in await self._outside.asking(children.cancel, record.id, holder=lease.claim):
                self._outside.notices.ring(session_id, queue)
        kept = self._outside.clock.monotonic() - run.claimed_at < TIME_SLICE.total_seconds() and not run.draining
        done = await journal.write(
            lease,
            lambda seq: log.Finish(
                lease.claim,
                seq,
                (event,),
                record.id,
                outcome.status,
                outcome.output,
                outcome.error,
                kept,
                outcome.artifact,
            ),
        )
        self._restorer.hand_on(lease)
        run.seen.ended(outcome.status, error=outcome.error)
        self._tell(lease, record, outcome.status)
        if record.parent_turn_id is not None:
            self._outside.mailroom.child_ended(record.id)
        if done.flag:
            return await self._next(lease)
        if done.more:
            self._outside.notices.ring(lease.session_id, record.queue)
        return None

    async def _leave(self, run: Run, record: TurnRecord, status: TurnStatus) -> None:
        lease = run.lease
        waits = status is TurnStatus.WAITING
        idle = run.idle if waits else Idle()
        event = left(record, waits=waits, until=idle.until)
        seen = lease.claim.mail_seq if idle.seen is None else idle.seen
        clock = self._outside.clock
        done = await self._outside.journal.write(
            lease,
            lambda seq: log.Leave(
                lease.claim, seq, (event,), record.id, status, idle.until, seen, clock.now(), idle.stops_clock
            ),
        )
        run.seen.left(status)
        self._tell(lease, record, status)
        if done.flag:
            self._outside.notices.ring(lease.session_id, record.queue, first=not waits)

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


def misdirected() -> timedelta:
    """The pause of a turn that came to the wrong worker."""
    return MISDIRECTED * _CHANCE.uniform(0.4, 1.6)


def _ended_by(mail: MailRecord) -> Outcome:
    """The end of a turn that this attempt does not even begin."""
    match mail.kind:
        case MailKind.CONDEMN:
            return failed("crash_loop", f"{_reason_of(mail)}: it is not tried again")
        case MailKind.EXPIRE:
            return stopped(TurnStatus.EXPIRED, _reason_of(mail))
        case _:
            return stopped(TurnStatus.CANCELLED, _reason_of(mail))


def _reason_of(mail: MailRecord) -> str:
    return str(mail.payload.get("reason", "")) if isinstance(mail.payload, dict) else ""
