"""Steps while they run: tries, their time limits, and the record of how they ended; or what is recorded of them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

from longshift.calling import GRANTED, Caller
from longshift.contract import Verdict
from longshift.errors import Diverged, OutcomeUnknown, StepFailed, StepTimeout, ToolDenied
from longshift.events import Kind, NewEvent, encode, storable
from longshift.model import Effect, Json
from longshift.observing import Seen
from longshift.offload import check_size, size_of
from longshift.place import StepRun, running_step, step_place, told
from longshift.replay import Call, Scope
from longshift.steps import StepDefinition
from longshift.watch import Silence, Watch

if TYPE_CHECKING:
    from longshift.execution import Execution

ERROR_TEXT = 2000
"""Characters of an error's text that are recorded."""


LONG = timedelta(seconds=5)
"""Pauses between two tries that are shorter stay on the worker; the longer ones are waits like any other."""


UNWATCHED = nullcontext()
"""Around a try of a step that may be silent."""


@dataclass(frozen=True, slots=True)
class Pause:
    """The next try comes later."""

    attempt: int  # tries so far
    due: datetime
    failure: StepFailed


class Stepper:
    """Performs the steps of one execution."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.calls = Caller(self)

    async def perform(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a step, or return what is recorded of it; inside another step, part of that one.

        Raises:
            StepFailed: it failed for good, now or in an earlier attempt at the turn.
        """
        if running_step() is not None:
            return await self.once(step, args, kwargs)
        scope = self.execution.scope()
        digest = step.digest(tuple(args), kwargs)
        verdict = GRANTED if step.tool is None else await self.calls.approved(step.tool, step, args, kwargs)
        call = self.execution.replay.call(scope, step.name, digest=digest)
        if call.diverged:
            await self._diverged(call, step.name, digest)
        if call.recorded is not None:
            if acts(step) and call.recorded.digest != digest:
                raise self.execution.give_up(Diverged(step.name, place=call.key))
            await self.execution.breathe()
            return await self._replayed(scope, call, step)
        if not verdict.granted:
            await self._denied(step, call.key, verdict, digest=digest, scope=scope)
        return await self._run(step, call.key, args, kwargs, digest=digest, scope=scope)

    async def _denied(self, step: StepDefinition, key: str, verdict: Verdict, *, digest: str, scope: Scope) -> NoReturn:
        text = (
            "nobody approved it in time" if verdict.timed_out else f"denied: {verdict.comment or 'without a comment'}"
        )
        error = ToolDenied(step.name, error_type="ToolDenied", error_message=text)
        async with self.execution.stepping():
            await self._failed(key, step, digest, error, scope=scope)
        raise error

    async def _run(
        self,
        step: StepDefinition,
        key: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        digest: str,
        scope: Scope,
    ) -> Any:
        """Try until it is done or has failed for good; between two tries the turn may leave the worker."""
        attempt, due = self.execution.replay.retrying.get(key, (0, scope.now))
        started: datetime | None = None
        while True:
            if attempt:
                await self.execution.branches.rest(due)
            async with self.execution.stepping():
                started = started or self.execution.port.clock.now()
                with self.execution.port.observer.step(step, key) as seen:
                    try:
                        tried = await self._tries(step, key, args, kwargs, attempt=attempt + 1, scope=scope, seen=seen)
                        if not isinstance(tried, Pause):
                            event, value, now = await self._completed(key, step, digest, tried, started=started)
                    except Exception as error:
                        await self._failed(key, step, digest, error, scope=scope)
                        raise _failure(step, error) from error
                    if not isinstance(tried, Pause):
                        self.execution.check()
                        await self.execution.port.append([event])
                        scope.now = now
                        return value
                    await self._postponed(key, step, tried)
                    seen.postponed()
                attempt, due = tried.attempt, tried.due

    async def _tries(
        self,
        step: StepDefinition,
        key: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        attempt: int,
        scope: Scope,
        seen: Seen,
    ) -> tuple[Any, int] | Pause:
        """The result and the number of tries it took; a pause, if the next try comes too late to wait for it here."""
        port = self.execution.port
        while True:
            run = StepRun(step, key, attempt, Watch(port.clock), scope.within(key))
            token = step_place.set(run)
            try:
                if step.tool is not None:
                    return await self.calls.attempt(step, args, kwargs), attempt
                return await self.once(step, args, kwargs), attempt
            except Exception as error:
                if not step.retry.again(error, attempt=attempt):
                    raise
                seen.retried()
                # not the turn's random numbers: those would differ on a replay, which pauses for nothing
                pause = step.retry.pause(attempt, random=Random(), error=error, now=port.clock.now())
                if pause >= LONG.total_seconds():
                    return Pause(attempt, port.clock.now() + timedelta(seconds=pause), _failure(step, error))
            finally:
                run.watch.over = True
                step_place.reset(token)
            await port.back_off(pause)
            attempt += 1
            self.execution.check()
            await port.ready()
            self.execution.check()  # the lease may have been lost while Postgres was away

    def called(self, step: StepDefinition) -> None:
        """The own code of a tool begins now, perhaps in a thread."""

    async def once(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One try of the step's function, within its time limits."""
        limit = (step.timeout or self.execution.port.step_timeout).total_seconds()
        run = running_step()
        silence = Silence(run.watch, step.progress) if run is not None and step.progress is not None else None
        pace, trial = self.execution.port.pace, object()
        pace.begin(trial, _longest_silence(step, limit) if step.is_async else inf)
        try:
            async with asyncio.timeout(limit if step.is_async else None) as timer:
                with UNWATCHED if silence is None else silence.broken_by(timer):
                    if step.is_async:
                        if silence is not None:
                            silence.begin()
                        return await step.function(*args, **kwargs)
                    call = partial(copy_context().run, partial(step.function, *args, **kwargs))
                    begin = partial(self._begin, step, trial, timer=timer, limit=limit, silence=silence)
                    timed = partial(self._timed, call, begin=begin)
                    value = await self.execution.port.in_thread(timed)
                    return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if timer.expired():
                if run is not None:
                    run.watch.expired = True
                verdict = silence.verdict if silence is not None else ""
                raise TimeoutError(verdict or f"no result within {limit:g} s") from None
            raise
        except (SystemExit, KeyboardInterrupt) as error:  # would end the worker
            raise RuntimeError(told(error)) from error
        except asyncio.CancelledError as error:
            if self.execution.cancelled_from_outside():
                raise
            raise RuntimeError("cancelled by its own code") from error
        finally:
            pace.end(trial)

    def _timed(self, call: Callable[[], Any], *, begin: Callable[[], None]) -> Any:
        """Run ``call``, in a thread; its time begins now, not while it waited for the thread."""
        self.execution.loop.call_soon_threadsafe(begin)
        return call()

    def _begin(
        self, step: StepDefinition, trial: object, *, timer: asyncio.Timeout, limit: float, silence: Silence | None
    ) -> None:
        port = self.execution.port
        port.underway.thread_began()
        with suppress(RuntimeError):  # the turn has left meanwhile
            timer.reschedule(self.execution.loop.time() + limit)
            port.pace.begin(trial, _longest_silence(step, limit))
            if silence is not None:
                silence.begin()

    async def _completed(
        self, key: str, step: StepDefinition, digest: str, tried: tuple[Any, int], *, started: datetime
    ) -> tuple[NewEvent, Any, datetime]:
        """The record, the result as every replay will see it, and when that was."""
        value, attempts = tried
        laid = self.calls.laid_out(key)
        if laid is None:
            result = step.encode(value)
            value = step.decode(result)  # before it is recorded: what cannot be read back would fail every replay
        now = self.execution.port.clock.now()
        facts: dict[str, Json] = {"name": step.name, "digest": digest, "at": now.isoformat(), "ms": _ms(now - started)}
        if attempts > 1:
            facts["attempts"] = attempts
        facts |= self.calls.facts(key)
        what = f"the result of step {step.name!r}"
        if laid is None:
            beside = size_of(encode(facts)) + len(',"result":')
            place = (key, "result")
            laid = await self.execution.large.lay_out(result, place=place, name=step.name, what=what, beside=beside)
        else:
            check_size(size_of(laid.text), limits=self.execution.port, what=what)
        payload = laid.within(facts, "result")
        return NewEvent(Kind.STEP_COMPLETED, self.execution.record.id, payload, key), value, now

    async def _failed(self, key: str, step: StepDefinition, digest: str, error: Exception, *, scope: Scope) -> None:
        self.execution.check()
        failure = _failure(step, error)
        scope.now = self.execution.port.clock.now()
        described: dict[str, Json] = {
            "type": failure.error_type,
            "message": failure.error_message,
            "code": failure.code,
        }
        if isinstance(failure, OutcomeUnknown):
            described["call"] = failure.call
        await self.execution.append(
            Kind.STEP_FAILED,
            call_key=key,
            payload={"name": step.name, "digest": digest, "error": described, "at": scope.now.isoformat()}
            | self.calls.facts(key),
        )

    async def _postponed(self, key: str, step: StepDefinition, pause: Pause) -> None:
        """Let the number of tries outlast this worker."""
        payload: dict[str, Json] = {"name": step.name, "attempt": pause.attempt, "until": pause.due.isoformat()}
        error = {"type": pause.failure.error_type, "message": pause.failure.error_message}
        await self.execution.append(Kind.STEP_RETRYING, call_key=key, payload=payload | {"error": error})

    async def _replayed(self, scope: Scope, call: Call, step: StepDefinition) -> Any:
        assert call.recorded is not None
        payload = call.recorded.payload
        if call.recorded.kind == Kind.STEP_COMPLETED:
            text = await self.execution.large.text(payload, "result")
        if "at" in payload:
            scope.now = datetime.fromisoformat(payload["at"])
        if call.recorded.kind == Kind.STEP_FAILED:
            raise _recorded_failure(step, payload["error"])
        if step.tool is not None and step.tool.told is not None and "done_at" in payload:
            step.tool.told.done_at = datetime.fromisoformat(payload["done_at"])
        return step.decode(text)

    async def _diverged(self, call: Call, name: str, digest: str) -> None:
        assert call.recorded is not None
        self.execution.replay.diverged.add(call.key)
        payload = {"name": name, "recorded": call.recorded.digest, "called": digest}
        await self.execution.append(Kind.TURN_DIVERGED, call_key=call.key, payload=payload)


def _longest_silence(step: StepDefinition, limit: float) -> float:
    """Seconds that a try may take to its next sign of progress."""
    return limit if step.progress is None else min(limit, step.progress.total_seconds())


def acts(step: StepDefinition) -> bool:
    """Whether the step changes the world, so that its record must not be taken for another call's."""
    return step.tool is not None and step.tool.effect is not Effect.READ


def _recorded_failure(step: StepDefinition, error: Mapping[str, Json]) -> StepFailed:
    """What the agent saw when it was recorded; the first format had ``timeout`` instead of ``code``."""
    code = error.get("code", StepTimeout.code if error.get("timeout") else StepFailed.code)
    if code == OutcomeUnknown.code:
        return OutcomeUnknown(
            step.name, error_type=error["type"], error_message=error["message"], call=error.get("call", "")
        )
    failed = next((kind for kind in (StepTimeout, ToolDenied) if kind.code == code), StepFailed)
    return failed(step.name, error_type=error["type"], error_message=error["message"])


def _failure(step: StepDefinition, error: Exception) -> StepFailed:
    if isinstance(error, OutcomeUnknown | ToolDenied):
        return error
    failed = StepTimeout if isinstance(error, TimeoutError) else StepFailed
    return failed(step.name, error_type=type(error).__name__, error_message=storable(str(error))[:ERROR_TEXT])


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
