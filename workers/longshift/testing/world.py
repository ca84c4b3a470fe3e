"""What outlives the workers of a turn under test: its log under a fence, its artifacts, its clock, its faults.

A session has one lease. Each claim gets the next epoch, and only the newest epoch may write: what an earlier holder
writes is refused with ``LeaseLost``, as Postgres does it for real workers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from longshift.clock import Clock
from longshift.contract import Passage, Question, Verdict
from longshift.errors import LeaseLost, UsageError
from longshift.events import Event, Kind, NewEvent
from longshift.model import (
    CallOutcome,
    CallStatus,
    Json,
    NewCall,
    Prefix,
    Settlement,
    ToolCallRecord,
    TurnRecord,
    TurnStatus,
    new_id,
    show_id,
)
from longshift.observing import Observer
from longshift.testing.ledger import Ledger
from longshift.testing.points import ENDS, SIDES, Names, call_name, check_point
from longshift.tooling import Absent, Done, Unknown

if TYPE_CHECKING:
    from longshift.testing.outside import Outside


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

    async def sleep_until(self, due: datetime | None, *, unless: asyncio.Future[Any] | None = None) -> None:
        """Sleep until then (None: for ever), or until something happens (``unless``)."""
        alarm = asyncio.get_running_loop().create_future()
        if due is not None:
            self._sleepers[alarm] = due
        for tell in self.on_sleep:
            tell()
        try:
            await asyncio.wait({alarm} if unless is None else {alarm, unless}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._sleepers.pop(alarm, None)

    def jump(self, to: datetime) -> None:
        self._ahead += max(timedelta(0), to - self.clock.now())
        for alarm, due in self._sleepers.items():
            if due <= to and not alarm.done():
                alarm.set_result(None)


@dataclass(slots=True)
class Post:
    """What others bring to the turn under test, as Postgres would keep it.

    Attributes:
        signals: by name, all there from the beginning.
        approve: how each approval is answered that has this name: when its turn has left, or has nothing else to do.
        settle: what an operator finds out of each call of this tool that is in doubt; at the same times.
        mail: signals that nobody has consumed.
        asked: approvals that wait for an answer.
        decided: those that wait no longer; None: closed without one.
        children: how each of them has ended, as wait.ended says it.
    """

    signals: Mapping[str, Sequence[Json]] = field(default_factory=dict)
    approve: Mapping[str, bool | Verdict] = field(default_factory=dict)
    settle: Mapping[str, Done[Any] | Absent | Unknown] = field(default_factory=dict)
    mail: dict[UUID, tuple[str, Json]] = field(init=False)
    asked: dict[UUID, Question] = field(init=False, default_factory=dict)
    decided: dict[UUID, Verdict | None] = field(init=False, default_factory=dict)
    children: dict[UUID, Mapping[str, Json]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        sent = ((name, payload) for name, payloads in self.signals.items() for payload in payloads)
        self.mail = {new_id(): signal for signal in sent}

    @property
    def unread(self) -> dict[str, list[Json]]:
        """Payloads of the signals that are left, by name."""
        left: dict[str, list[Json]] = {}
        for name, payload in self.mail.values():
            left.setdefault(name, []).append(payload)
        return left

    def ask(self, question: Question) -> None:
        if question.id not in self.decided:
            self.asked.setdefault(question.id, question)

    def close(self, ids: Sequence[UUID]) -> None:
        for identity in ids:
            if self.asked.pop(identity, None) is not None:
                self.decided[identity] = None

    def answer(self) -> bool:
        """Answer what is asked, as far as answers are known; whether any was."""
        known = [question for question in self.asked.values() if question.name in self.approve]
        for question in known:
            said = self.approve[question.name]
            self.decided[question.id] = said if isinstance(said, Verdict) else Verdict(granted=said)
            del self.asked[question.id]
        return bool(known)


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
        *,
        post: Post | None = None,
        ledger: Ledger | None = None,
        passages: list[Passage] | None = None,
    ) -> None:
        self.post = post or Post()
        self.record, self.log, self.artifacts, self.time = record, log, artifacts, time
        self.ledger = ledger if ledger is not None else Ledger()
        self.workers: dict[int, Outside] = {}  # by epoch
        self.observe: Callable[[TurnRecord], Observer] = lambda _: Observer()
        self.first = len(log)
        self.kept: dict[str, bytes] = {}
        self.deltas: list[Delta] = []
        self.passages = passages if passages is not None else []
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

    def keep(self, passage: Passage) -> None:
        """Unless it is there."""
        place = passage.session_id, passage.source, passage.ordinal
        if all((each.session_id, each.source, each.ordinal) != place for each in self.passages):
            self.passages.append(passage)

    @property
    def earlier(self) -> list[Event]:
        """What the turns have recorded that this one retries."""
        if not self.record.continues:
            return []
        chain = chain_of(self.log, self.record.retry_of)
        return [event for event in self.log[: self.first] if event.turn_id in chain]

    def text_of(self, artifact_id: UUID) -> str:
        """A large value."""
        return self.artifacts[show_id(Prefix.ARTIFACT, artifact_id)].decode()

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

    def check(self, name: str, *, epoch: int) -> None:
        """Raises LeaseLost: ``epoch`` is not the holder's, so that ``name`` is refused."""
        if epoch != self.holder:
            self.refused.append(name)
            raise LeaseLost(f"the lease on session {self.record.session_id.hex} is gone")

    def write(self, event: NewEvent, *, name: str, epoch: int) -> None:
        """Make one event durable.

        Raises:
            LeaseLost: ``epoch`` is not the holder's.
        """
        self.check(name, epoch=epoch)
        if event.consumes is not None and self.post.mail.pop(event.consumes, None) is None:
            self.late.append(f"consumed a signal again: {name}")
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

    def answer(self) -> bool:
        """Let people answer what is asked and settle what is in doubt; whether they did."""
        doubts = self.doubts
        for call in doubts:
            found = self.post.settle[call.tool]
            outcome, result, note = Settlement.NOT_DONE, None, None
            if isinstance(found, Done):
                outcome, result = Settlement.DONE, found.result
            elif isinstance(found, Unknown):
                outcome, note = Settlement.GIVE_UP, found.reason
            self.ledger.settle(call.id, outcome, result=result, note=note, now=self.time.clock.now())
        return self.post.answer() or bool(doubts)

    @property
    def doubts(self) -> list[ToolCallRecord]:
        """The calls that somebody will settle."""
        return [call for call in self.ledger if call.status is CallStatus.UNKNOWN and call.tool in self.post.settle]

    @property
    def _call_facts(self) -> Any:
        record = self.record
        return {"session_id": record.session_id, "tenant_id": record.tenant_id, "now": self.time.clock.now()}

    def has_succeeded(self, child: UUID) -> bool:
        """Whether the log knows of a child that it did, as it stands in a turn that this one retries."""
        name = show_id(Prefix.TURN, child)
        keys = {event.key for event in self.log if event.kind == Kind.WAIT_BEGUN and event.payload.get("child") == name}
        ended = (event.payload for event in self.log if event.kind == Kind.WAIT_ENDED and event.key in keys)
        return any(payload.get("status") == TurnStatus.SUCCEEDED for payload in ended)

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
