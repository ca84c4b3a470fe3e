"""Steps while they run: tries, their time limits, and the record of how they ended; or what is recorded of them."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from longshift.errors import InvalidInput, StepFailed, StepTimeout
from longshift.events import Kind, NewEvent, encode, storable
from longshift.model import Json
from longshift.place import StepRun, running_step, step_place, told
from longshift.replay import Call, Scope
from longshift.steps import StepDefinition

if TYPE_CHECKING:
    from longshift.execution import Execution

ERROR_TEXT = 2000
"""Characters of an error's text that are recorded."""


class Stepper:
    """Performs the steps of one execution."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution

    async def perform(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a step, or return what is recorded of it; inside another step, part of that one.

        Raises:
            StepFailed: it failed for good, now or in an earlier attempt at the turn.
        """
        if running_step() is not None:
            return await self.once(step, args, kwargs)
        scope = self.execution.scope()
        digest = step.digest(tuple(args), kwargs)
        call = self.execution.replay.call(scope, step.name, digest=digest)
        if call.diverged:
            await self._diverged(call, step.name, digest)
        if call.recorded is not None:
            await self.execution.breathe()
            return _replayed(scope, call, step)
        async with self.execution.stepping():
            return await self._run(step, call.key, args, kwargs, digest=digest, scope=scope)

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
        started = self.execution.port.clock.now()
        try:
            value, attempts = await self._attempts(step, key, args, kwargs, scope=scope)
            result = step.encode(value)
            value = step.decode(result)  # before it is recorded: what cannot be read back would fail every replay
            event, now = self._completed(key, step.name, digest, result, started=started, attempts=attempts)
        except Exception as error:
            await self._failed(key, step, digest, error, scope=scope)
            raise _failure(step, error) from error
        self.execution.check()
        await self.execution.port.append([event])
        scope.now = now
        return value

    async def _attempts(
        self, step: StepDefinition, key: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, scope: Scope
    ) -> tuple[Any, int]:
        """The result and the number of tries it took."""
        attempt = 1
        while True:
            token = step_place.set(StepRun(step, key, attempt, scope.within(key)))
            try:
                return await self.once(step, args, kwargs), attempt
            except Exception as error:
                if not step.retry.again(error, attempt=attempt):
                    raise
            finally:
                step_place.reset(token)
            # not the turn's random numbers: those would differ on a replay, which pauses for nothing
            await self.execution.port.back_off(step.retry.pause(attempt, random=Random()))
            attempt += 1
            self.execution.check()
            await self.execution.port.ready()
            self.execution.check()  # the lease may have been lost while Postgres was away

    async def once(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One try of the step's function, within its time limit."""
        limit = (step.timeout or self.execution.port.step_timeout).total_seconds()
        try:
            async with asyncio.timeout(limit if step.is_async else None) as timer:
                if step.is_async:
                    return await step.function(*args, **kwargs)
                call = partial(copy_context().run, partial(step.function, *args, **kwargs))
                value = await self.execution.port.in_thread(partial(self._timed, call, timer=timer, limit=limit))
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if timer.expired():
                raise TimeoutError(f"no result within {limit:g} s") from None
            raise
        except (SystemExit, KeyboardInterrupt) as error:  # would end the worker
            raise RuntimeError(told(error)) from error
        except asyncio.CancelledError as error:
            if self.execution.cancelled_from_outside():
                raise
            raise RuntimeError("cancelled by its own code") from error

    def _timed(self, call: Callable[[], Any], *, timer: asyncio.Timeout, limit: float) -> Any:
        """Run ``call``, in a thread; its time begins now, not while it waited for the thread."""

        def begin() -> None:
            with suppress(RuntimeError):  # the turn has left meanwhile
                timer.reschedule(self.execution.loop.time() + limit)

        self.execution.loop.call_soon_threadsafe(begin)
        return call()

    def _completed(
        self, key: str, name: str, digest: str, result: str, *, started: datetime, attempts: int
    ) -> tuple[NewEvent, datetime]:
        now = self.execution.port.clock.now()
        facts: dict[str, Json] = {"name": name, "digest": digest, "at": now.isoformat(), "ms": _ms(now - started)}
        if attempts > 1:
            facts["attempts"] = attempts
        payload = f'{encode(facts)[:-1]},"result":{result}}}'
        if (size := len(payload.encode())) > self.execution.port.max_event:
            raise InvalidInput(
                f"step {name!r} returned {size:,} bytes, more than one event may hold ({self.execution.port.max_event:,}): "
                "return turn.artifact(...) instead"
            )
        return NewEvent(Kind.STEP_COMPLETED, self.execution.record.id, payload, key), now

    async def _failed(self, key: str, step: StepDefinition, digest: str, error: Exception, *, scope: Scope) -> None:
        self.execution.check()
        failure = _failure(step, error)
        scope.now = self.execution.port.clock.now()
        described = {
            "type": failure.error_type,
            "message": failure.error_message,
            "timeout": isinstance(failure, StepTimeout),
        }
        await self.execution.append(
            Kind.STEP_FAILED,
            call_key=key,
            payload={"name": step.name, "digest": digest, "error": described, "at": scope.now.isoformat()},
        )

    async def _diverged(self, call: Call, name: str, digest: str) -> None:
        assert call.recorded is not None
        self.execution.replay.diverged.add(call.key)
        payload = {"name": name, "recorded": call.recorded.digest, "called": digest}
        await self.execution.append(Kind.TURN_DIVERGED, call_key=call.key, payload=payload)


def _replayed(scope: Scope, call: Call, step: StepDefinition) -> Any:
    assert call.recorded is not None
    payload = call.recorded.payload
    if "at" in payload:
        scope.now = datetime.fromisoformat(payload["at"])
    if call.recorded.kind == Kind.STEP_FAILED:
        error = payload["error"]
        failed = StepTimeout if error.get("timeout") else StepFailed
        raise failed(step.name, error_type=error["type"], error_message=error["message"])
    return step.decode(json.dumps(payload["result"]))


def _failure(step: StepDefinition, error: Exception) -> StepFailed:
    failed = StepTimeout if isinstance(error, TimeoutError) else StepFailed
    return failed(step.name, error_type=type(error).__name__, error_message=storable(str(error))[:ERROR_TEXT])


def _ms(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)
