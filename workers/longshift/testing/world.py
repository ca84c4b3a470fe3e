"""What outlives the workers of a turn under test: its log under a fence, its artifacts, its clock, its faults.

A session has one lease. Each claim gets the next epoch, and only the newest epoch may write: what an earlier holder
writes is refused with ``LeaseLost``, as Postgres does it for real workers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from longshift.clock import Clock
from longshift.errors import LeaseLost, UsageError
from longshift.events import Event, Kind, NewEvent
from longshift.model import CallOutcome, NewCall, ToolCallRecord, TurnRecord
from longshift.testing.ledger import Ledger
from longshift.testing.points import ENDS, SIDES, Names, call_name, check_point


@dataclass(frozen=True, slots=True)
class Delta:
    """What ``emit`` showed, and which step and try of it did."""

    text: str
    step: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Faults:
    """What shall go wrong, once: see ``longshift.testing.run``."""

    crash_after: int | None = None
    crash_at: str | None = None
    pause_at: str | None = None
    deliver_twice: bool = False

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.crash_after, self.crash_at, self.pause_at)) > 1:
            raise UsageError("a run has one fault: give crash_after, crash_at or pause_at, not several of them")
        for point in (self.crash_at, self.pause_at):
            if point is not None:
                check_point(point)


class Fault(StrEnum):
    """What befalls a run."""

    CRASH = "crash"
    PAUSE = "pause"
    DOUBLE = "doubled wake-ups"


class Time:
    """A clock that can jump ahead, and those who sleep until it does."""

    def __init__(self, clock: Clock) -> None:
        self._ahead = timedelta(0)
        self._sleepers: dict[asyncio.Future[None], datetime] = {}
        self.on_sleep: set[Callable[[], None]] = set()
        self.clock = Clock(now=lambda: clock.now() + self._ahead, monotonic=clock.monotonic)

    @property
    def next_due(self) -> datetime | None:
        return min(self._sleepers.values(), default=None)

    async def sleep_until(self, due: datetime) -> None:
        future = asyncio.get_running_loop().create_future()
        self._sleepers[future] = due
        for tell in self.on_sleep:
            tell()
        try:
            await future
        finally:
            del self._sleepers[future]

    def jump(self, to: datetime) -> None:
        self._ahead += max(timedelta(0), to - self.clock.now())
        for future, due in self._sleepers.items():
            if due <= to and not future.done():
                future.set_result(None)


def chain_of(log: Sequence[Event], turn_id: UUID | None) -> list[UUID]:
    """The turns that ``turn_id`` retries, from the first one on, and itself."""
    chain: list[UUID] = []
    while turn_id is not None:
        chain.insert(0, turn_id)
        started = next(event for event in log if event.turn_id == turn_id and event.kind == Kind.TURN_STARTED)
        before = started.payload.get("retry_of")
        turn_id = UUID(before) if before is not None else None
    return chain


class World:
    """One turn and its session, as its workers find them."""

    def __init__(
        self,
        record: TurnRecord,
        log: list[Event],
        artifacts: MutableMapping[str, bytes],
        time: Time,
        faults: Faults = Faults(),
        ledger: Ledger | None = None,
    ) -> None:
        self.record, self.log, self.artifacts, self.time = record, log, artifacts, time
        self.ledger = ledger if ledger is not None else Ledger()
        self.dead: set[int] = set()  # epochs of workers that have certainly ended
        self.first = len(log)
        self.kept: dict[str, bytes] = {}
        self.deltas: list[Delta] = []
        self.passages: dict[tuple[str, int], str] = {}
        self.refused: list[str] = []  # writes and wake-ups, in their order
        self.late: list[str] = []  # what a stale writer did although it was refused
        self.holder: int | None = None
        self._faults = faults
        self._fired = False
        self._names = Names()
        self._points: dict[str, None] = {}
        self._epoch = log[-1].epoch if log else 0

    @property
    def events(self) -> list[Event]:
        return self.log[self.first :]

    @property
    def earlier(self) -> list[Event]:
        """What the turns have recorded that this one retries."""
        if not self.record.continues:
            return []
        chain = chain_of(self.log, self.record.retry_of)
        return [event for event in self.log[: self.first] if event.turn_id in chain]

    @property
    def ended(self) -> bool:
        """Whether the terminal event is durable; it counts even if the worker died right after it."""
        return len(self.log) > self.first and self.log[-1].kind in ENDS

    # -- the lease

    def claim(self) -> int | None:
        """The next epoch; None: the session is held, or has nothing to do."""
        if self.holder is not None or self.ended:
            return None
        self._epoch += 1
        self.holder = self._epoch
        return self.holder

    def rescue(self) -> None:
        """The holder is thought to be dead."""
        self.holder = None

    def release(self, epoch: int) -> None:
        if self.holder == epoch:
            self.holder = None

    def deliver_again(self) -> None:
        """A second copy of the wake-up comes: whoever takes it must not win the session."""
        if self._faults.deliver_twice:
            when = "after the end" if self.ended else "while it runs"
            if self.claim() is None:
                self.refused.append(f"wake-up {when}")
            else:
                self.late.append(f"claimed by a doubled wake-up {when}")

    # -- the log

    def name(self, event: NewEvent) -> str:
        return self._names.upcoming(event)

    def write(self, event: NewEvent, *, name: str, epoch: int) -> None:
        """Make one event durable.

        Raises:
            LeaseLost: ``epoch`` is not the holder's.
        """
        if epoch != self.holder:
            self.refused.append(name)
            raise LeaseLost(f"the lease on session {self.record.session_id.hex} is gone")
        self._names.written(event)
        written = Event(
            session_id=self.record.session_id,
            seq=len(self.log) + 1,
            id=event.id,
            epoch=epoch,
            turn_id=event.turn_id,
            kind=event.kind,
            key=event.key,
            payload=json.loads(event.payload),
            created_at=self.time.clock.now(),
        )
        self.log.append(written)
        if event.kind == Kind.TURN_STARTED:
            self.record = replace(self.record, attempts=self.record.attempts + 1)

    # -- the ledger of tool calls

    def begin_call(self, call: NewCall, *, epoch: int, over: int | None) -> int | ToolCallRecord:
        """
        Raises:
            LeaseLost: ``epoch`` is not the holder's.
        """
        if epoch != self.holder:
            self.refused.append(call_name("begin", call.place))
            raise LeaseLost(f"the lease on session {self.record.session_id.hex} is gone")
        return self.ledger.begin(call, epoch=epoch, over=over, **self._call_facts)

    def end_call(self, call: NewCall, outcome: CallOutcome, *, epoch: int) -> ToolCallRecord | None:
        """Whoever holds the lease."""
        return self.ledger.end(call, outcome, epoch=epoch, **self._call_facts)

    @property
    def _call_facts(self) -> Any:
        record = self.record
        return {"session_id": record.session_id, "tenant_id": record.tenant_id, "now": self.time.clock.now()}

    # -- faults

    @property
    def points(self) -> list[str]:
        """Every point that a worker came to, both sides of each."""
        names = dict.fromkeys(point.partition(" ")[2] for point in self._points)
        return [f"{side} {name}" for name in names for side in SIDES]

    def reach(self, point: str) -> Fault | None:
        """What happens to the worker that has come to ``point``."""
        self._points[point] = None
        by_number = point.startswith("after ") and len(self.log) - self.first == self._faults.crash_after
        if self._fired or not (by_number or point in (self._faults.crash_at, self._faults.pause_at)):
            return None
        self._fired = True
        return Fault.PAUSE if point == self._faults.pause_at else Fault.CRASH

    def check_fired(self) -> None:
        """Raises UsageError: the run never came to the point at which the fault was to happen."""
        wanted = self._faults.crash_at or self._faults.pause_at
        if wanted is not None and not self._fired:
            known = "\n".join(f"    {point}" for point in self._points)
            raise UsageError(f"this run has no point {wanted!r}: it came to\n{known}")
