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
from typing import TYPE_CHECKING, Any

from longshift.contract import Verdict
from longshift.errors import ControlFlow, Diverged, NotDone, TurnEvicted
from longshift.events import Kind, encode
from longshift.metrics.turns import REPLAYED
from longshift.model import CallStatus, Effect, Json, NewCall, Prefix, ToolCallRecord, parse_id
from longshift.offload import Laid
from longshift.place import running_step, step_place
from longshift.recording import Records, Try, text_of
from longshift.steps import StepDefinition
from longshift.tooling import Absent, Done, Making, ToolSpec, Unknown, canonical, making
from longshift.watch import Watch

if TYPE_CHECKING:
    from longshift.execution import Execution
    from longshift.stepping import Stepper

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


class Caller:
    """Makes the calls of one execution."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._records = Records(stepper.execution)

    @property
    def execution(self) -> Execution:
        return self._stepper.execution

    def facts(self, key: str) -> dict[str, Json]:
        """What the record of the step at ``key`` says of its call."""
        return self._records.facts(key)

    def laid_out(self, key: str) -> Laid | None:
        """The result of the call at ``key``, if the ledger has it as an artifact."""
        return self._records.laid_out(key)

    async def approved(
        self, tool: ToolSpec, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Verdict:
        """Whether the call may be made; somebody is asked, now or in an earlier attempt, if the tool wants that."""
        if tool.approval is None:
            return GRANTED
        wanted, name = tool.approval, tool.name
        shown = json.loads(canonical(step.arguments(tuple(args), kwargs), tool=name))
        return await self.execution.awaiting.approve(
            name,
            shown,
            timeout=wanted.timeout,
            stops_deadline=wanted.stops_deadline,
            of=step.digest(tuple(args), kwargs),
        )

    async def attempt(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One try, or what stands in the ledger instead.

        Raises:
            OutcomeUnknown: an irreversible call is in doubt.
            Diverged: another call was begun at this place.
        """
        trial = self._try(step, args, kwargs)
        await self._check_same(trial)
        self._records.open(trial)
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

    async def _check_same(self, trial: Try) -> None:
        """Another call that was begun at this place, and may have happened, must not be followed by this one."""
        before = self.execution.replay.called
        if trial.run.key not in before or trial.name in before.values():  # side by side, calls may change places
            return
        earlier = await self.execution.port.look_up_call(parse_id(Prefix.CALL, before[trial.run.key]))
        if earlier is not None and earlier.status is not CallStatus.FAILED:
            raise self.execution.give_up(Diverged(trial.step.name, place=trial.run.key))

    # -- read and write

    async def _repeatable(self, trial: Try) -> Any:
        begun = await self.execution.port.begin_call(trial.row)
        if isinstance(begun, ToolCallRecord):
            return await self._replayed(trial, begun)
        trial.begun = begun
        try:
            value = await self._made(trial, check=lambda: None)
            text = trial.step.encode(value)
        except Exception as error:
            if not trial.step.retry.again(error, attempt=trial.run.attempt):
                standing = await self._records.end(trial, CallStatus.FAILED, error=error)
                if standing is not None and standing.status is CallStatus.DONE:  # by who had the lease before
                    return await self._records.stands(trial, standing)
            raise
        return await self._records.done(trial, text)

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
            with self.execution.port.observer.call(trial.spec, trial.name):
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
            with execution.calling((trial.limit + execution.port.lease_ttl).total_seconds()):
                try:
                    text = trial.step.encode(await self._made(trial, check=check))
                except BaseException as error:
                    trial.over = not isinstance(error, TooLate)
                    if not trial.made:
                        raise
                    return await self._broken(trial, error)
                try:
                    return await self._records.done(trial, text)
                except Exception as error:
                    if trial.row.id in execution.port.underway.open_ends:
                        return await self._records.doubtful(trial, error)
                    raise
        except BaseException as error:
            if not trial.made:
                await self._records.end(trial, CallStatus.FAILED, error=NotDone(f"it was not called: {text_of(error)}"))
            raise

    def _check(self, trial: Try) -> None:
        self.execution.check()
        if not trial.wanted:
            raise TurnEvicted("the branch that wanted this call was cancelled")

    async def _broken(self, trial: Try, error: BaseException) -> Any:
        """The call was made and ended badly: is it done, or certainly not?"""
        if isinstance(error, NotDone):
            return await self._records.failed(trial, error)
        if not isinstance(error, Exception):
            return await self._records.doubtful(trial, error)
        if isinstance(error, TimeoutError):
            return await self._timed_out(trial, error)
        match await self._ask(trial):
            case Done(result):
                return await self._records.done(trial, trial.step.encode(result))
            case Absent():
                return await self._records.failed(trial, error)
            case Unknown(reason):
                return await self._records.doubtful(trial, error, reason=reason)

    async def _timed_out(self, trial: Try, error: TimeoutError) -> Any:
        """What it has sent may still arrive: that it is absent counts only when its time is over for anybody."""
        run = running_step()
        left_behind = not trial.step.is_async and run is not None and run.watch.expired  # its thread still runs
        if left_behind or trial.spec.reconcile is None:
            return await self._records.doubtful(trial, error, left_behind=left_behind)
        record = await self.execution.port.look_up_call(trial.row.id)
        try:
            found = None if record is None else await self._found(trial, record, doubt=error)
        except ControlFlow:  # nobody waits for the answer any more
            return await self._records.doubtful(trial, error)
        return found.value if isinstance(found, _Value) else await self._records.failed(trial, error)

    # -- a call that somebody has started before

    async def _found(self, trial: Try, record: ToolCallRecord, *, doubt: Exception | None = None) -> _Value | _Again:
        """What stands in the ledger, if it says how the call ended; else what can be found out about it.

        A call that is absent may be made as soon as it is proven that who started it will not make it any more; that is so
        at the latest when its time is over. Without such an answer only the starter itself can say more, if it lives and is
        not this try, which has ended with ``doubt``.
        """
        port = self.execution.port
        give_up, pause = port.clock.now() + PATIENCE * port.lease_ttl, self._pause
        while record.status in (CallStatus.STARTED, CallStatus.UNKNOWN):
            trial.begun = record.attempts
            # in this order: what is absent while its starter lives may come, and the starter be gone, a moment later
            gone = await port.starter_gone(trial.row.id, epoch=record.epoch)
            asked = await self._ask(trial)
            if isinstance(asked, Done):
                return _Value(await self._records.done(trial, trial.step.encode(asked.result)))
            if isinstance(asked, Absent) and gone:
                return _Again(over=record.epoch)
            if record.status is CallStatus.UNKNOWN and (isinstance(asked, Unknown) or record.left_behind):
                break  # its starter has said all that it will
            if isinstance(asked, Unknown) and (gone or doubt is not None or port.clock.now() >= give_up):
                doubt = doubt or Doubt(f"it was started at {record.started_at.isoformat(timespec='seconds')}")
                return _Value(await self._records.doubtful(trial, doubt, reason=asked.reason, epoch=record.epoch))
            await port.back_off(pause)
            pause = min(SLOWER * pause, port.lease_ttl.total_seconds())
            self._check(trial)
            record = await port.look_up_call(trial.row.id) or record
        if record.status is CallStatus.FAILED:
            return _Again(over=None)
        return _Value(await self._replayed(trial, record))

    async def _replayed(self, trial: Try, record: ToolCallRecord) -> Any:
        """What stands in the ledger is the result; nothing was called for it."""
        self.execution.port.observer.call_ended(trial.spec.effect, REPLAYED)
        return await self._records.stands(trial, record)

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
            return Unknown(f"reconcile raised {type(error).__name__}: {text_of(error)}")
        if isinstance(answer, Done | Absent):
            return answer
        if isinstance(answer, Unknown):
            return Unknown(text_of(answer.reason))
        return Unknown(f"reconcile returned a {type(answer).__name__}, not Done, Absent or Unknown")

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


__all__ = ["GRANTED", "Caller", "TooLate"]
