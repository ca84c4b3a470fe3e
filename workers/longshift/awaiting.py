"""What a turn waits for that others bring: a signal, an answer, the end of a child, the settling of a tool call.

    wait.begun ──> look ──found──> wait.ended        a signal is consumed by the statement that records it
                    │  ^
                    │  └── a later look: another branch of the turn still works, so it stays on its worker
                    └─nothing──> the branch waits; when all do, the turn leaves, and looks again when it is back

No wake-up is lost: what comes sets the session's ``mail_seq`` with it, and a turn leaves with the ``mail_seq`` of its last
look (``seen``), in the same snapshot as what that look found. A branch counts as waiting only after a look that asked for it
too; so whatever came later has made ``mail_seq`` larger than ``seen``, and the session is ready at once.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from longshift.contract import Cause, CauseKind, Found, NewChild, Question, Verdict
from longshift.errors import UsageError
from longshift.events import Kind, NewEvent, encode
from longshift.model import Json, Prefix, new_id, parse_id, show_id
from longshift.place import running_step
from longshift.replay import Scope, derived_id
from longshift.waits import Pending

if TYPE_CHECKING:
    from longshift.execution import Execution

TIMEOUT = "timeout"
"""The reason of a wait.ended for which nothing came."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait as the agent words it: ``facts`` go into its wait.begun, and say what is waited for."""

    name: str
    facts: Mapping[str, Json]
    timeout: timedelta | None = None
    stops_clock: bool = False
    reads: TypeAdapter[Any] | None = None  # of the payload: what it refuses, the agent cannot go on with


@dataclass(slots=True, eq=False)
class Waiter:
    """A branch that waits here."""

    cause: Cause
    came: asyncio.Future[Found]
    looked: bool = False  # a look has asked for it
    pending: Pending | None = None


@dataclass(slots=True)
class _Taken:
    """Signals that were handed to branches of this attempt: no other gets them, however old a look's answer is."""

    found: dict[UUID, Found] = field(default_factory=dict)
    unrecorded: Counter[Cause] = field(default_factory=Counter)  # not consumed yet: a look will find them again


class Awaiting:
    """The waits of one execution."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.seen: int | None = None  # mail_seq as of the last look
        self._waiters: list[Waiter] = []  # in the order in which they began
        self._taken = _Taken()
        self._asked: dict[UUID, str] = {}  # open approvals, and in which branch
        self._looking = asyncio.Lock()  # one look at a time, or an older answer could come after a newer one

    @property
    def missing(self) -> list[Cause]:
        """What is waited for and has not come."""
        return [waiter.cause for waiter in self._waiters if not waiter.came.done()]

    # -- one wait

    async def wait(self, wait: Wait) -> Mapping[str, Json]:
        """The payload of its wait.ended, recorded now or in an earlier attempt."""
        execution = self.execution
        if running_step() is not None:
            raise UsageError(f"a step cannot use {wait.name.removeprefix('$')}(): call it in the agent, between steps")
        scope = execution.scope()
        call = execution.replay.call(scope, wait.name, digest="")
        if call.recorded is not None and call.recorded.kind == Kind.WAIT_ENDED:
            await execution.breathe()
            ended = call.recorded.payload
        else:
            begun = call.recorded.payload if call.recorded is not None else await self._begin(call.key, wait)
            cause = _cause_of(begun)
            if cause.kind is CauseKind.APPROVAL:
                await self._ask(cause, begun, scope)
            due = datetime.fromisoformat(begun["until"]) if begun["until"] is not None else None
            found = await self._until(cause, due, stops_clock=wait.stops_clock)
            ended = await self._end(call.key, found, scope, reads=wait.reads)
        scope.now = max(scope.now, datetime.fromisoformat(ended["at"]))
        return ended

    async def _begin(self, key: str, wait: Wait) -> Mapping[str, Json]:
        until = self.execution.port.clock.now() + wait.timeout if wait.timeout is not None else None
        begun = {"until": until.isoformat() if until is not None else None, **wait.facts}
        await self.execution.settle()
        await self.execution.append(Kind.WAIT_BEGUN, payload=begun, call_key=key)
        return begun

    async def _ask(self, cause: Cause, begun: Mapping[str, Json], scope: Scope) -> None:
        """Open the approval, also if that was done in an earlier attempt: this one cannot know."""
        assert cause.id is not None
        self.execution.check()
        expires = datetime.fromisoformat(begun["until"]) if begun["until"] is not None else None
        self._asked[cause.id] = scope.path
        await self.execution.port.ask(Question(cause.id, begun["approval"], begun["show"], expires))

    async def _until(self, cause: Cause, due: datetime | None, *, stops_clock: bool) -> Found | None:
        """What has come; None: nothing in time."""
        execution = self.execution
        waiter = Waiter(cause, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await self._look_for(waiter)
            if not waiter.came.done() and (due is None or due > execution.port.clock.now()):
                waiter.pending = execution.waits.begin(due, stops_clock=stops_clock)
                await execution.port.until(waiter.came, due)
                execution.check()
            if not waiter.came.done():  # the time is over; what came until now still counts
                await self._last_look(waiter)
        except BaseException:  # the branch has lost a race, or the turn leaves: others may have what came
            self._waiters.remove(waiter)
            if waiter.came.done():
                self.give_back([waiter.came.result()])
            raise
        finally:
            if waiter.pending is not None:
                execution.waits.end(waiter.pending)
        self._waiters.remove(waiter)
        return waiter.came.result() if waiter.came.done() else None

    async def _last_look(self, waiter: Waiter) -> None:
        if waiter.cause.kind is CauseKind.APPROVAL:  # it is answered or closed, whichever comes first, never both
            assert waiter.cause.id is not None
            await self.execution.port.close([waiter.cause.id])
        elif waiter.pending is None:  # its first look came after its time
            return
        waiter.looked = False
        await self._look_for(waiter)

    async def _end(
        self, key: str, found: Found | None, scope: Scope, *, reads: TypeAdapter[Any] | None
    ) -> Mapping[str, Json]:
        ended: dict[str, Json] = {"reason": TIMEOUT} if found is None else dict(found.value)
        if reads is not None and "payload" in ended:
            try:
                reads.validate_json(json.dumps(ended["payload"]))
            except ValidationError:
                ended["misfit"] = True  # a retry waits again
        ended["at"] = self.execution.port.clock.now().isoformat()
        signal = found.id if found is not None and found.cause.kind is CauseKind.SIGNAL else None
        text = encode(ended)  # of any size: it was accepted as a signal or a result before
        event = NewEvent(Kind.WAIT_ENDED, self.execution.record.id, text, key, consumes=signal)
        self.execution.check()
        if scope.late is not None:
            scope.late.append(event)
        else:
            await self.execution.write([event])
        return json.loads(text)  # type: ignore[no-any-return]

    async def approve(
        self, name: str, shown: Json, *, timeout: timedelta | None, stops_deadline: bool = False, of: str = ""
    ) -> Verdict:
        """Ask somebody whether to go on; ``shown`` is JSON.

        ``of``: what exactly is asked, if the answer to something else must not be taken for it on a replay.
        """
        facts = {"approval": name, "id": new_approval(), "show": shown}
        ended = await self.wait(Wait(f"$approval{of and ' '}{of}", facts, timeout, stops_deadline))
        if ended["reason"] == TIMEOUT:
            return Verdict(granted=False, timed_out=True)
        return Verdict(granted=ended["granted"], comment=ended["comment"], by=ended["by"])

    # -- looking

    async def look(self) -> None:
        """Look for all that is waited for, and hand it out."""
        async with self._looking:
            await self._look()

    async def _look_for(self, waiter: Waiter) -> None:
        async with self._looking:
            if not waiter.looked:  # else somebody's look has asked for it while this one waited
                await self._look()

    async def _look(self) -> None:
        waiters = [waiter for waiter in self._waiters if not waiter.came.done()]
        wanted = Counter(waiter.cause for waiter in waiters)
        if not wanted:
            return
        self.execution.check()
        look = await self.execution.port.look({cause: n + self._taken.unrecorded[cause] for cause, n in wanted.items()})
        for waiter in waiters:
            waiter.looked = True
        for found in look.found:
            self._hand_out(found)
        if not look.urgent:  # else the turn shall come back at once, and find that it is to end
            self.seen = look.mail_seq

    def _hand_out(self, found: Found) -> None:
        """A signal to the branch that has waited longest, anything else to all that wait for it.

        They no longer count as waiting, before their code has noticed: or the turn could leave with what came.
        """
        signal = found.cause.kind is CauseKind.SIGNAL
        if signal and found.id in self._taken.found:
            return
        waiters = [w for w in self._waiters if w.cause == found.cause and not w.came.done()]
        for waiter in waiters[:1] if signal else waiters:
            if waiter.pending is not None:
                self.execution.waits.end(waiter.pending)
            waiter.came.set_result(found)
        if signal and waiters:
            self._taken.found[found.id] = found
            self._taken.unrecorded[found.cause] += 1

    def recorded(self, events: Iterable[NewEvent]) -> None:
        """These are durable."""
        for event in events:
            if event.consumes is not None:
                self._taken.unrecorded[self._taken.found[event.consumes].cause] -= 1

    def forget(self, events: Iterable[NewEvent]) -> None:
        """These never will be: their branch has lost a race."""
        self.give_back([self._taken.found[event.consumes] for event in events if event.consumes is not None])

    def give_back(self, signals: Iterable[Found]) -> None:
        """Let others have what was handed out in vain."""
        for found in signals:
            if self._taken.found.pop(found.id, None) is not None:
                self._taken.unrecorded[found.cause] -= 1
                self._hand_out(found)

    async def close(self, paths: Iterable[str]) -> None:
        """Nobody waits any more for the approvals that these branches have asked for."""
        lost = [approval for approval, path in self._asked.items() if path.startswith(tuple(paths))]
        if lost:
            await self.execution.port.close(lost)

    # -- children

    async def spawn(
        self,
        agent: str,
        value: Json,
        *,
        definition: object | None,
        queue: str | None,
        deadline: timedelta | None,
        metadata: Mapping[str, str],
    ) -> Mapping[str, Json]:
        """Start a turn of another session; what is recorded of it: its ``turn`` and its ``session``.

        Its ids follow from the place in this turn, so that a start that was not recorded is found, not repeated. If this turn
        is a retry, so is the child, of one that has ended without success: it goes on from its own last step.
        """
        execution = self.execution
        if running_step() is not None:
            raise UsageError("a step cannot use spawn(): call it in the agent, between steps")
        call = execution.replay.call(execution.scope(), "$spawn", digest="")
        before = call.recorded
        if before is not None and not before.earlier:
            await execution.breathe()
            return before.payload
        async with execution.stepping():
            limit = execution.record.deadline
            pointer = None
            if before is None:  # else the child goes on with the input that it had
                what = f"the input of child {agent!r}"
                laid = await execution.large.lay_out(encode(value), place=(call.key, "input"), name="input", what=what)
                pointer = laid.pointer
            session = derived_id(execution.record.id, call.key, "session")
            child = NewChild(
                id=derived_id(execution.record.id, call.key, "turn"),
                session_id=session if before is None else parse_id(Prefix.SESSION, before.payload["session"]),
                instead_of=None if before is None else parse_id(Prefix.TURN, before.payload["turn"]),
                agent=agent,
                input=value,
                input_artifact=pointer.id if pointer is not None else None,
                queue=queue,
                deadline=limit if deadline is None else min(limit, execution.port.clock.now() + deadline),
                metadata=metadata,
                definition=definition,
            )
            turn_id = await execution.port.spawn(child)
            spawned = {
                "agent": agent,
                "turn": show_id(Prefix.TURN, turn_id),
                "session": show_id(Prefix.SESSION, child.session_id),
            }
            await execution.append(Kind.VALUE_RECORDED, payload=spawned, call_key=call.key)
        return spawned


def new_approval() -> str:
    """An id that no replay makes anew: it is recorded with the begin of the wait."""
    return show_id(Prefix.APPROVAL, new_id())


def _cause_of(begun: Mapping[str, Json]) -> Cause:
    match begun:
        case {"signal": str(name)}:
            return Cause(CauseKind.SIGNAL, name)
        case {"approval": str(), "id": str(approval)}:
            return Cause(CauseKind.APPROVAL, id=parse_id(Prefix.APPROVAL, approval))
        case {"child": str(turn)}:
            return Cause(CauseKind.CHILD, id=parse_id(Prefix.TURN, turn))
        case {"call": str(call)}:
            return Cause(CauseKind.CALL, id=parse_id(Prefix.CALL, call))
        case _:
            raise UsageError(f"this version of Longshift cannot wait for {dict(begun)!r}, which another one has begun")
