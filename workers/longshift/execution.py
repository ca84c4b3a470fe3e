"""One attempt at a turn, inside the worker: runs steps or replays them, counts branches, knows when every branch waits.

The agent's author sees it through ``Turn``; the runner drives it; what it needs from the outside is ``Port``, which the
runner implements with Postgres and Redis, and ``longshift.testing`` with a list.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import Any, TypeVar

from longshift.additions import Additions
from longshift.contract import Port
from longshift.errors import InvalidInput, StepFailed, StepTimeout, TurnEvicted, UsageError
from longshift.events import Context, Kind, NewEvent, encode, storable
from longshift.model import Json, TurnRecord
from longshift.place import StepRun, context_in, place, place_tasks, running_step, scope_place, stand, step_place, told
from longshift.replay import Call, Replay, Scope
from longshift.steps import StepDefinition
from longshift.waits import Waits

T = TypeVar("T")
ERROR_TEXT = 2000
"""Characters of an error's text that are recorded."""
BREATH = 50
"""Replayed calls after which the event loop gets its turn."""


class Execution:
    """State of one attempt, keyed by (session, epoch): dropped with the lease."""

    def __init__(
        self, record: TurnRecord, *, attempt: int, replay: Replay, context: Context, port: Port, started: datetime
    ) -> None:
        self.record = record
        self.attempt = attempt
        self.replay = replay
        self.context = context  # as of the turn's start, then with what the turn itself adds
        self.port = port
        self.root = Scope(path="", now=started, seed=record.root_turn_id.hex)
        self.on_idle: Callable[[], None] = lambda: None  # every branch waits: the turn may leave
        self.on_quiet: Callable[[], None] = lambda: None  # draining, and no step is running any more
        self.waits = Waits(port.clock, self._idle)
        self._unwinding: str | None = None
        self._additions = Additions(context)
        self._order = replay.newest
        self._steps = 0
        self._draining = False
        self._blocked: set[concurrent.futures.Future[Any]] = set()
        self._replayed = 0
        self.loop = asyncio.get_running_loop()
        place_tasks(self.loop)

    # -- entering and leaving

    @contextmanager
    def entered(self, *, threaded: bool) -> Iterator[None]:
        """Make this the current execution; ``threaded``: the agent runs in a thread, so no task owns its scope."""
        self.root.owner = None if threaded else asyncio.current_task()
        token = scope_place.set((self, self.root))
        try:
            yield
        finally:
            scope_place.reset(token)

    def unwind(self, reason: str) -> None:
        """From now on every durable call raises: the turn is leaving. Threads that wait for one are released."""
        self._unwinding = reason
        self.waits.close()
        for future in list(self._blocked):
            future.cancel()

    def drain(self) -> None:
        """Let running steps finish and start no other; ``on_quiet`` is called when none runs."""
        self._draining = True
        self._quieten()

    def _idle(self) -> None:
        self.on_idle()

    def _quieten(self) -> None:
        if self._draining and self._steps == 0:
            self.on_quiet()

    @asynccontextmanager
    async def _step(self) -> AsyncIterator[None]:
        """Around a step that really runs, from its start to its durable record."""
        self.check()
        await self.port.ready()
        if self._draining:
            await asyncio.get_running_loop().create_future()  # until the turn is unwound
        self.check()
        self._steps += 1
        try:
            yield
        finally:
            self._steps -= 1
            self._quieten()

    def from_thread(self, awaitable: Awaitable[T]) -> T:
        """Block the agent's thread until the loop has done ``awaitable``.

        Raises:
            UsageError: this *is* the loop's thread.
            TurnEvicted: the turn leaves the worker meanwhile.
        """
        try:
            if self.in_loop:
                raise UsageError("this would block the event loop: write `await` here, or make the agent a plain `def`")
            self.check()
        except BaseException:
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise
        future = asyncio.run_coroutine_threadsafe(self._for_thread(awaitable), self.loop)
        self._blocked.add(future)
        if self._unwinding is not None:  # it came between the check and the line above
            future.cancel()
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            self.check()
            raise
        finally:
            self._blocked.discard(future)

    async def _for_thread(self, awaitable: Awaitable[T]) -> T:
        """Own the thread's scope while its call runs, so that tasks which the call starts become branches."""
        found = place()
        if found is None or found[1].owner is not None:
            return await awaitable
        found[1].owner = asyncio.current_task()
        try:
            return await awaitable
        finally:
            found[1].owner = None

    async def pause(self, seconds: float) -> None:
        """Let time pass because a store is away. Between steps no step counts as running meanwhile, so that a drain need
        not wait; inside a step of the agent's author it is that step's time.
        """
        step = running_step()
        ours = step is not None and step.definition.ours
        self._steps -= ours
        self._quieten()
        try:
            await self.port.back_off(seconds)
            if ours and self._draining:
                await asyncio.get_running_loop().create_future()  # until the turn is unwound
        finally:
            self._steps += ours
        self.check()

    @property
    def is_live(self) -> bool:
        return self._unwinding is None

    @property
    def in_loop(self) -> bool:
        """Whether this code runs in the event loop, where it must not block."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def cancelled_from_outside(self) -> bool:
        """Whether a ``CancelledError`` here is somebody's wish, and not something that the code itself ran into."""
        task = asyncio.current_task()
        return self._unwinding is not None or task is None or task.cancelling() > 0

    @property
    def busy(self) -> bool:
        """Whether a step is running."""
        return self._steps > 0

    def check(self) -> None:
        """Refuse what is durable while the turn leaves.

        Raises:
            TurnEvicted: it does.
        """
        if self._unwinding is not None:
            raise TurnEvicted(f"the turn is leaving this worker ({self._unwinding})")

    def scope(self) -> Scope:
        """The branch this code runs in."""
        found = place()
        if found is None or found[0] is not self:
            raise UsageError("this turn is not running here: use it only inside its agent")
        step = running_step()
        if step is not None:
            return step.scope
        scope = found[1]
        task = asyncio.current_task() if self.in_loop else None
        if scope.owner is not None and scope.owner is not task:  # its creator gave it a context, or it is a thread
            scope = scope.fork_stranger(owner=task)
            stand(self, scope)
        if scope.is_task and not scope.counted and task is not None:
            scope.counted = True
            self.waits.begin_branches()
            task.add_done_callback(lambda _: self.waits.end_branch())
        return scope

    # -- steps

    async def perform(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a step, or return what is recorded of it; inside another step, part of that one.

        Raises:
            StepFailed: it failed for good, now or in an earlier attempt at the turn.
        """
        if running_step() is not None:
            return await self.once(step, args, kwargs)
        scope = self.scope()
        digest = step.digest(tuple(args), kwargs)
        call = self.replay.call(scope, step.name, digest=digest)
        if call.diverged:
            await self._diverged(call, step.name, digest)
        if call.recorded is not None:
            await self._breathe()
            return _replayed(scope, call, step)
        async with self._step():
            return await self._run(step, call.key, args, kwargs, digest=digest, scope=scope)

    async def _breathe(self) -> None:
        """Now and then on a replay let the other turns of this worker go on: it makes no pause of its own."""
        self._replayed += 1
        if self._replayed % BREATH == 0:
            await asyncio.sleep(0)

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
        started = self.port.clock.now()
        try:
            value, attempts = await self._attempts(step, key, args, kwargs, scope=scope)
            result = step.encode(value)
            value = step.decode(result)  # before it is recorded: what cannot be read back would fail every replay
            event, now = self._completed(key, step.name, digest, result, started=started, attempts=attempts)
        except Exception as error:
            await self._failed(key, step, digest, error, scope=scope)
            raise _failure(step, error) from error
        self.check()
        await self.port.append([event])
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
            await self.port.back_off(step.retry.pause(attempt, random=Random()))
            attempt += 1
            self.check()
            await self.port.ready()
            self.check()  # the lease may have been lost while Postgres was away

    async def once(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One try of the step's function, within its time limit."""
        limit = (step.timeout or self.port.step_timeout).total_seconds()
        try:
            async with asyncio.timeout(limit if step.is_async else None) as timer:
                if step.is_async:
                    return await step.function(*args, **kwargs)
                call = partial(copy_context().run, partial(step.function, *args, **kwargs))
                value = await self.port.in_thread(partial(self._timed, call, timer=timer, limit=limit))
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if timer.expired():
                raise TimeoutError(f"no result within {limit:g} s") from None
            raise
        except (SystemExit, KeyboardInterrupt) as error:  # would end the worker
            raise RuntimeError(told(error)) from error
        except asyncio.CancelledError as error:
            if self.cancelled_from_outside():
                raise
            raise RuntimeError("cancelled by its own code") from error

    def _timed(self, call: Callable[[], Any], *, timer: asyncio.Timeout, limit: float) -> Any:
        """Run ``call``, in a thread; its time begins now, not while it waited for the thread."""

        def begin() -> None:
            with suppress(RuntimeError):  # the turn has left meanwhile
                timer.reschedule(self.loop.time() + limit)

        self.loop.call_soon_threadsafe(begin)
        return call()

    def _completed(
        self, key: str, name: str, digest: str, result: str, *, started: datetime, attempts: int
    ) -> tuple[NewEvent, datetime]:
        now = self.port.clock.now()
        facts: dict[str, Json] = {"name": name, "digest": digest, "at": now.isoformat(), "ms": _ms(now - started)}
        if attempts > 1:
            facts["attempts"] = attempts
        payload = f'{encode(facts)[:-1]},"result":{result}}}'
        if (size := len(payload.encode())) > self.port.max_event:
            raise InvalidInput(
                f"step {name!r} returned {size:,} bytes, more than one event may hold ({self.port.max_event:,}): "
                "return turn.artifact(...) instead"
            )
        return NewEvent(Kind.STEP_COMPLETED, self.record.id, payload, key), now

    async def _failed(self, key: str, step: StepDefinition, digest: str, error: Exception, *, scope: Scope) -> None:
        self.check()
        failure = _failure(step, error)
        scope.now = self.port.clock.now()
        described = {
            "type": failure.error_type,
            "message": failure.error_message,
            "timeout": isinstance(failure, StepTimeout),
        }
        await self.append(
            Kind.STEP_FAILED,
            call_key=key,
            payload={"name": step.name, "digest": digest, "error": described, "at": scope.now.isoformat()},
        )

    async def _diverged(self, call: Call, name: str, digest: str) -> None:
        assert call.recorded is not None
        self.replay.diverged.add(call.key)
        payload = {"name": name, "recorded": call.recorded.digest, "called": digest}
        await self.append(Kind.TURN_DIVERGED, call_key=call.key, payload=payload)

    async def append(self, kind: Kind, *, payload: Mapping[str, Json], call_key: str | None = None) -> None:
        """Record one fact of this turn; it is durable when this returns."""
        self.check()
        text = encode(payload, limit=self.port.max_event)
        await self.port.append([NewEvent(kind, self.record.id, text, call_key)])

    async def value(self, name: str, kind: Kind, payload: Mapping[str, Json]) -> Mapping[str, Json]:
        """Record ``payload`` under the next key of ``name``, or return what is recorded there, as JSON has it."""
        recorded, _ = await self._value(name, kind, payload)
        return recorded

    async def add(self, name: str, kind: Kind, payload: Mapping[str, Json]) -> None:
        """The same for what joins the session's context."""
        recorded, order = await self._value(name, kind, payload)
        self._additions.apply(kind, recorded, order=order, turn=self.record.id.hex)

    async def _value(self, name: str, kind: Kind, payload: Mapping[str, Json]) -> tuple[Mapping[str, Json], int]:
        if running_step() is not None:
            raise UsageError(f"a step cannot use {name.removeprefix('$')}(): call it in the agent, between steps")
        call = self.replay.call(self.scope(), name, digest="")
        if call.recorded is not None:
            await self._breathe()
            return call.recorded.payload, call.recorded.order
        self.check()
        text = encode(payload, limit=self.port.max_event)
        self._order += 1
        order = self._order
        await self.port.append([NewEvent(kind, self.record.id, text, call.key)])
        return json.loads(text), order

    # -- branches and waits

    async def gather(self, branches: Sequence[Awaitable[T]]) -> list[T]:
        """Run the branches side by side, each in a scope of its own; results in the order given.

        Waits for all of them, and only then raises the first error in that order: which branch failed *first* would
        not be the same on a replay.
        """
        if running_step() is not None:
            return _first_error(await asyncio.gather(*branches, return_exceptions=True))
        scope = self.scope()
        children = scope.fork_branches(len(branches))
        if not branches:
            return []
        self.waits.begin_branches(len(branches) - 1)  # the one that gathers does not count meanwhile
        tasks = [
            asyncio.create_task(self._branch(branch, child), context=context_in(self, child))
            for branch, child in zip(branches, children, strict=True)
        ]
        running = len(tasks)

        def ended(_: object) -> None:
            nonlocal running
            running -= 1
            if running:  # the last one hands its place back to the one that gathers
                self.waits.end_branch()

        for task in tasks:
            task.add_done_callback(ended)
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        except BaseException:
            await _cancel(tasks)
            raise
        finally:
            for branch in branches:
                if inspect.iscoroutine(branch):
                    branch.close()  # of a task that was cancelled before it began
        scope.now = max(scope.now, *(child.now for child in children))
        return _first_error(results)

    async def _branch(self, branch: Awaitable[T], scope: Scope) -> T:
        scope.owner = asyncio.current_task()
        try:
            return await branch
        except (SystemExit, KeyboardInterrupt) as error:  # would end the worker
            raise RuntimeError(told(error)) from error

    async def wait_until(self, name: str, until: datetime) -> None:
        """Let time pass; the turn leaves the worker if every branch waits long enough."""
        begun = await self.value(name, Kind.WAIT_BEGUN, {"until": until.isoformat()})
        due = datetime.fromisoformat(begun["until"])
        scope = self.scope()
        self.check()
        if due > self.port.clock.now():
            with self.waits.waiting(due):
                await self.port.sleep_until(due)
            self.check()
        scope.now = max(scope.now, due)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _first_error(results: Sequence[T | BaseException]) -> list[T]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


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
