"""Calls of tools: one try of a step whose every call stands in the ledger.

    read, write      begin -> call -> end               the same again after a crash, with the same key
    irreversible     begin -> tool.started -> is the lease certain? -> call -> end
                       |        no: begin again
                       +-> found started by somebody else, or in doubt: reconcile
                             done: that is the result     absent, and the starter is proven gone: call
                             else OutcomeUnknown, an open item that an operator settles

What stands in the ledger is the step's result. An irreversible call runs in a task of the worker: whatever becomes of its
turn and its lease meanwhile, it runs to its end, and its outcome is recorded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from longshift.contract import Verdict
from longshift.errors import Diverged, NotDone, OutcomeUnknown, TurnEvicted, Unavailable
from longshift.events import Kind, encode, storable
from longshift.model import CallOutcome, CallStatus, Effect, Json, NewCall, Prefix, ToolCallRecord, parse_id, show_id
from longshift.place import StepRun, running_step, step_place
from longshift.replay import derived_id
from longshift.steps import StepDefinition
from longshift.tooling import Absent, Done, Making, ToolCall, ToolSpec, Unknown, canonical, making
from longshift.watch import Watch

if TYPE_CHECKING:
    from longshift.execution import Execution
    from longshift.stepping import Stepper

ERROR_TEXT = 2000
"""Characters of an error's text that are recorded."""
INLINE = 32 * 1024
"""Bytes of a result that stand in the ledger itself; a larger one becomes an artifact."""
PATIENCE = 2
"""So many times the time-to-live of a lease a turn waits for somebody else to say how a call has ended."""
FIRST_PAUSE = 1 / 20
"""Of that time-to-live: until it looks again."""
LONGEST_NAME = 118
"""Characters of a tool's name in that of the question what became of its call."""
SLOWER = 1.5
"""So many times longer is the next pause, up to that time-to-live."""


GRANTED = Verdict(granted=True)


class TooLate(Exception):
    """It is not certain any more that the lease still stands: the tool was not called."""


@dataclass(slots=True)
class Try:
    """One try of a tool's step.

    Attributes:
        row: the call as the ledger has it.
        begun: how often it was started.
        made: the tool's own code has begun to run.
        over: nobody waits for its thread any more; one that begins only now calls nothing.
        wanted: somebody waits for it; what has not been called by then will not be.
    """

    step: StepDefinition
    spec: ToolSpec
    run: StepRun
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    row: NewCall
    begun: int = 0
    made: bool = False
    over: bool = False
    wanted: bool = True
    announced: bool = False  # by tool.started

    @property
    def call(self) -> ToolCall:
        return ToolCall(self.name, self.begun, self.spec.name)

    @property
    def name(self) -> str:
        return show_id(Prefix.CALL, self.row.id)

    @property
    def limit(self) -> timedelta:
        return self.row.timeout


class Caller:
    """Makes the calls of one execution."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._facts: dict[str, dict[str, Json]] = {}

    @property
    def execution(self) -> Execution:
        return self._stepper.execution

    def facts(self, key: str) -> dict[str, Json]:
        """What the record of the step at ``key`` says of its call."""
        return self._facts.pop(key, {})

    async def approved(
        self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any], *, digest: str
    ) -> Verdict:
        """Whether the call may be made; somebody is asked, now or in an earlier attempt, if the tool wants that.

        Raises:
            Diverged: at this place of the turn another call was asked about.
        """
        if step.tool is None or step.tool.approval is None:
            return GRANTED
        wanted, name = step.tool.approval, step.tool.name
        shown = json.loads(canonical(step.arguments(tuple(args), kwargs), tool=name))
        return await self.execution.awaiting.approve(
            name, shown, timeout=wanted.timeout, stops_deadline=wanted.stops_deadline, digest=digest
        )

    async def attempt(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One try, or what stands in the ledger instead.

        Raises:
            OutcomeUnknown: an irreversible call is in doubt.
            Diverged: another call was begun at this place.
        """
        trial = self._try(step, args, kwargs)
        await self._check_place(trial)
        self._facts[trial.run.key] = {"call": trial.name}
        underway = self.execution.port.underway
        if trial.spec.effect is Effect.IRREVERSIBLE:
            try:
                return await underway.keep(self._irreversible(trial), name=f"tool-{trial.name}")
            except asyncio.CancelledError:
                trial.wanted = False
                raise
        async with underway.alone(trial.row.id):
            return await self._repeatable(trial)

    def _try(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Try:
        run, execution, spec = running_step(), self.execution, step.tool
        assert run is not None
        assert spec is not None
        record = execution.record
        text = canonical(step.arguments(tuple(args), kwargs), tool=spec.name)
        key = spec.key(session_id=record.session_id, root_turn_id=record.root_turn_id, place=run.key, text=text)
        row = NewCall(
            id=key,
            turn_id=record.id,
            tool=spec.name,
            effect=spec.effect,
            dedupe=spec.dedupe,
            place=run.key,
            input=encode(json.loads(text), limit=execution.port.max_event),
            timeout=step.timeout or execution.port.step_timeout,
        )
        return Try(step, spec, run, args, kwargs, row)

    async def _check_place(self, trial: Try) -> None:
        """Raises Diverged: another call was begun at this place, and that has certainly not happened cannot be said of it."""
        before = self.execution.replay.called
        if trial.run.key not in before or trial.name in before.values():  # side by side, places may change
            return
        other = await self.execution.port.look_up_call(parse_id(Prefix.CALL, before[trial.run.key]))
        if other is None or other.status is not CallStatus.FAILED:
            raise self.execution.diverge(Diverged(trial.step.name, place=trial.run.key))

    # -- read and write

    async def _repeatable(self, trial: Try) -> Any:
        begun = await self.execution.port.begin_call(trial.row)
        if isinstance(begun, ToolCallRecord):
            return await self._stands(trial, begun)
        trial.begun = begun
        try:
            value = await self._made(trial, check=lambda: None)
            text = trial.step.encode(value)
        except Exception as error:
            if not trial.step.retry.again(error, attempt=trial.run.attempt):
                standing = await self._end(trial, CallStatus.FAILED, error=error)
                if standing is not None and standing.status is CallStatus.DONE:  # by who had the lease before
                    return await self._stands(trial, standing)
            raise
        return await self._done(trial, text)

    async def _made(self, trial: Try, *, check: Callable[[], None]) -> Any:
        """What the tool's own code returns; ``check`` is called right before that code, in its thread."""

        def begin() -> None:
            trial.made = True  # first: who finds that it is not made has said before that it is over
            try:
                check()
            except BaseException:
                trial.made = False
                raise
            self._stepper.called(trial.step)

        token = making.set(Making(trial.call, begin))
        try:
            return await self._stepper.once(trial.step, trial.args, trial.kwargs)
        finally:
            making.reset(token)

    # -- irreversible

    async def _irreversible(self, trial: Try) -> Any:
        """In a task of its own, which nobody cancels because of what becomes of the turn."""
        # that nobody waits for the step any more does not mean that nobody wants to know how the call ended
        step_place.set(replace(trial.run, watch=Watch(self.execution.port.clock)))
        over: int | None = None
        async with self.execution.port.underway.alone(trial.row.id):
            while True:
                since = self.execution.port.clock.monotonic()
                begun = await self._begin(trial, over=over)
                if isinstance(begun, ToolCallRecord):
                    found = await self._found(trial, begun)
                    if not isinstance(found, _Again):
                        return found.value
                    over = found.over
                    continue
                trial.begun = begun
                try:
                    return await self._call(trial, since=since)
                except TooLate:
                    await self.execution.port.ready()
                    await self.execution.port.back_off(self._pause)

    async def _begin(self, trial: Try, *, over: int | None) -> int | ToolCallRecord:
        """Begin, unless it was called in this process, and how it ended could not be recorded: to the ledger that is a call
        of the same holder, who may begin again."""
        port = self.execution.port
        if over is None and trial.row.id in port.underway.open_ends:
            standing = await port.look_up_call(trial.row.id)
            if standing is not None and standing.status is CallStatus.STARTED:
                return standing
        return await port.begin_call(trial.row, over=over)

    async def _call(self, trial: Try, *, since: float) -> Any:
        """The call itself, and the record of how it ended; that it was not made, too, since that leaves no doubt."""
        execution = self.execution

        def check() -> None:
            self._check(trial)
            if trial.over or not execution.port.may_call(since=since):
                raise TooLate
            execution.port.underway.open_ends.add(trial.row.id)

        try:
            if not trial.announced:
                payload = {
                    "name": trial.step.name,
                    "call": trial.name,
                    "effect": "irreversible",
                    "attempt": trial.begun,
                }
                await execution.append(Kind.TOOL_STARTED, call_key=trial.run.key, payload=payload)
                trial.announced = True
            with execution.calling(trial.limit.total_seconds()):
                try:
                    text = trial.step.encode(await self._made(trial, check=check))
                except BaseException as error:
                    trial.over = not isinstance(error, TooLate)
                    if not trial.made:
                        raise
                    return await self._broken(trial, error)
                try:
                    return await self._done(trial, text)
                except Exception as error:
                    if trial.row.id in execution.port.underway.open_ends:
                        return await self._doubtful(trial, error)
                    raise
        except BaseException as error:
            if not trial.made:
                await self._end(trial, CallStatus.FAILED, error=NotDone(f"it was not called: {_text(error)}"))
            raise

    def _check(self, trial: Try) -> None:
        self.execution.check()
        if not trial.wanted:
            raise TurnEvicted("the branch that wanted this call was cancelled")

    async def _broken(self, trial: Try, error: BaseException) -> Any:
        """The call was made and ended badly: is it done, or certainly not?"""
        if isinstance(error, NotDone):
            return await self._failed(trial, error)
        if not isinstance(error, Exception):
            return await self._doubtful(trial, error)
        run = running_step()
        if run is not None and run.watch.expired and not trial.step.is_async:
            # the thread still runs: nothing that is said of its call now need be true in a moment
            return await self._doubtful(trial, error, left_behind=True)
        match await self._ask(trial):
            case Done(result):
                return await self._done(trial, trial.step.encode(result))
            case Absent():
                return await self._failed(trial, error)
            case Unknown(reason):
                return await self._doubtful(trial, error, reason=reason)

    async def _failed(self, trial: Try, error: Exception) -> Any:
        """It has certainly not happened, so that it may be tried again."""
        standing = await self._end(trial, CallStatus.FAILED, error=error)
        if standing is not None and standing.status is CallStatus.DONE:
            return await self._stands(trial, standing)
        raise error

    async def _doubtful(
        self,
        trial: Try,
        error: BaseException,
        *,
        reason: str = "",
        epoch: int | None = None,
        left_behind: bool = False,
    ) -> Any:
        """Nobody knows: an operator may find out. ``epoch``: of the start that is in doubt, if it was another's."""
        standing = await self._end(
            trial, CallStatus.UNKNOWN, error=error, reason=reason, epoch=epoch, left_behind=left_behind
        )
        if standing is not None and standing.status is not CallStatus.UNKNOWN:
            return await self._stands(trial, standing)
        message = f"{_text(error)} ({reason})" if reason else _text(error)
        raise self._unknown(trial, type(error).__name__, message) from error

    def _unknown(self, trial: Try, kind: str, message: str) -> OutcomeUnknown:
        return OutcomeUnknown(trial.step.name, error_type=kind, error_message=message, call=trial.name)

    # -- a call that somebody has started before

    async def _found(self, trial: Try, record: ToolCallRecord) -> _Value | _Again:
        """What stands in the ledger, if it says how the call ended; else what can be found out about it.

        A call that is absent may be made as soon as it is proven that who started it will not make it any more; that is so
        at the latest when its time is over. Without such an answer only the starter itself can say more, if it lives.
        """
        port = self.execution.port
        give_up, pause = port.clock.now() + PATIENCE * port.lease_ttl, self._pause
        while record.status in (CallStatus.STARTED, CallStatus.UNKNOWN):
            trial.begun = record.attempts
            # in this order: what is absent while its starter lives may come, and the starter be gone, a moment later
            gone = await port.starter_gone(trial.row.id, epoch=record.epoch)
            asked = await self._ask(trial)
            if isinstance(asked, Done):
                return _Value(await self._done(trial, trial.step.encode(asked.result)))
            if isinstance(asked, Absent) and gone:
                return _Again(over=record.epoch)
            if record.status is CallStatus.UNKNOWN and (isinstance(asked, Unknown) or record.left_behind):
                break  # its starter has said all that it will
            if isinstance(asked, Unknown) and (gone or port.clock.now() >= give_up):
                doubt = Doubt(f"it was started at {record.started_at.isoformat(timespec='seconds')}")
                return _Value(await self._doubtful(trial, doubt, reason=asked.reason, epoch=record.epoch))
            await port.back_off(pause)
            pause = min(SLOWER * pause, port.lease_ttl.total_seconds())
            self._check(trial)
            record = await port.look_up_call(trial.row.id) or record
        if record.status is CallStatus.FAILED:
            return _Again(over=None)
        return _Value(await self._stands(trial, record))

    async def _ask(self, trial: Try) -> Done[Any] | Absent | Unknown:
        """What ``reconcile`` says; whatever else it does is no answer."""
        if trial.spec.reconcile is None:
            return Unknown()
        name = f"{trial.step.name[:LONGEST_NAME]}.reconcile"
        question = StepDefinition(name, trial.spec.reconcile, timeout=trial.step.timeout)
        try:
            answer = await self._stepper.once(question, (trial.call, *trial.args), trial.kwargs)
            if isinstance(answer, Done):
                trial.step.encode(answer.result)  # what cannot be the tool's result is no answer either
        except Exception as error:  # noqa: BLE001 - of the agent's author
            return Unknown(f"reconcile raised {type(error).__name__}: {_text(error)}")
        if isinstance(answer, Done | Absent):
            return answer
        if isinstance(answer, Unknown):
            return Unknown(storable(str(answer.reason))[:ERROR_TEXT])
        return Unknown(f"reconcile returned a {type(answer).__name__}, not Done, Absent or Unknown")

    # -- outcomes

    async def _done(self, trial: Try, text: str) -> Any:
        """Record the result (JSON text), and return what stands."""
        artifact = await self._laid_out(trial, text) if len(text) > INLINE else None
        outcome = CallOutcome(CallStatus.DONE, None if artifact else text, artifact_id=artifact)
        standing = await self._record(trial, outcome)
        return trial.step.decode(text) if standing is None else await self._stands(trial, standing)

    async def _laid_out(self, trial: Try, text: str) -> UUID | None:
        """The artifact with a large result; None while the store is away: that it is done must not wait for that."""
        identity = derived_id(trial.row.id, "result")
        try:
            await self.execution.port.put_artifact(
                identity, name=f"{trial.spec.name}.json", data=text.encode(), content_type="application/json"
            )
        except Unavailable:
            return None
        return identity

    async def _end(
        self,
        trial: Try,
        status: CallStatus,
        *,
        error: BaseException,
        reason: str = "",
        epoch: int | None = None,
        left_behind: bool = False,
    ) -> ToolCallRecord | None:
        described: dict[str, Json] = {"type": type(error).__name__, "message": _text(error)}
        if reason:
            described["reason"] = reason
        if left_behind:
            described["left_behind"] = True
        return await self._record(trial, CallOutcome(status, error=encode(described)), epoch=epoch)

    async def _record(self, trial: Try, outcome: CallOutcome, *, epoch: int | None = None) -> ToolCallRecord | None:
        port = self.execution.port
        standing = await port.end_call(trial.row, outcome, epoch=epoch)
        port.underway.open_ends.discard(trial.row.id)
        return standing

    async def _stands(self, trial: Try, record: ToolCallRecord) -> Any:
        """The outcome in the ledger as that of this try."""
        if record.status is CallStatus.DONE:
            at = record.ended_at
            if at is not None and (record.turn_id, record.place) != (trial.row.turn_id, trial.row.place):
                self._facts[trial.run.key]["done_at"] = at.isoformat()
                if trial.spec.told is not None:
                    trial.spec.told.done_at = at
            return trial.step.decode(await self._text_of(record))
        error = record.error or {}
        kind, message = str(error.get("type", "Unknown")), str(error.get("message", "it is in doubt"))
        if record.status is CallStatus.FAILED:
            raise NotDone(record.note or message)
        if record.status is CallStatus.GIVEN_UP:
            message = f"given up by an operator: {record.note or 'no note'}"
        raise self._unknown(trial, kind, message)

    async def _text_of(self, record: ToolCallRecord) -> str:
        if record.artifact_id is None:
            return json.dumps(record.result)
        return (await self.execution.port.get_artifact(record.artifact_id)).decode()

    @property
    def _pause(self) -> float:
        return self.execution.port.lease_ttl.total_seconds() * FIRST_PAUSE


class Doubt(Exception):
    """A call was started, and who did it has not said how it ended."""


@dataclass(frozen=True, slots=True)
class _Value:
    value: Any


@dataclass(frozen=True, slots=True)
class _Again:
    """The call may be made, ``over`` that earlier start."""

    over: int | None


def _text(error: BaseException) -> str:
    return storable(str(error))[:ERROR_TEXT]


__all__ = ["Caller", "TooLate"]
