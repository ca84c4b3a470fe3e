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
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import Any, Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel

from longshift.clock import Clock
from longshift.errors import InvalidInput, StepFailed, StepTimeout, TurnEvicted, UsageError
from longshift.events import Context, Kind, NewEvent, encode, storable
from longshift.model import Json, TurnRecord
from longshift.replay import Call, Replay, Scope
from longshift.steps import StepDefinition

T = TypeVar("T")
EVICT_AFTER = timedelta(seconds=1)
"""Waits shorter than this stay on the worker: leaving and coming back costs two commits and a claim."""
ERROR_TEXT = 2000
"""Characters of an error's text that are recorded."""


class Artifact(BaseModel, frozen=True):
    """A pointer to immutable bytes in the cold tier; pass it between steps, read it with ``turn.read``."""

    id: str
    name: str
    size: int
    sha256: str
    content_type: str


class Passage(BaseModel, frozen=True):
    """A piece of a source that answers a query; ``score`` orders them, larger is better."""

    source: str
    ordinal: int
    text: str
    score: float = 0.0


class Port(Protocol):
    """What an execution needs from whoever runs it."""

    clock: Clock
    step_timeout: timedelta
    max_event: int

    async def append(self, events: Sequence[NewEvent]) -> None:
        """Record facts durably; raises LeaseLost."""

    async def ready(self) -> None:
        """Wait until a step may start."""

    def emit(self, text: str, *, step: str, attempt: int) -> None:
        """Publish a delta: lossy, never awaited."""

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run blocking code in a bounded pool."""
        ...

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes, content_type: str) -> Artifact: ...

    async def get_artifact(self, artifact_id: UUID) -> bytes: ...

    async def index(self, source: str, texts: Sequence[str], /) -> int: ...

    async def recall(self, query: str, *, sources: Sequence[str] | None, limit: int) -> list[Passage]: ...


@dataclass(frozen=True, slots=True)
class StepRun:
    """The step that is running in this context."""

    definition: StepDefinition
    key: str
    attempt: int


_scope: ContextVar[tuple[Execution, Scope] | None] = ContextVar("longshift_scope", default=None)
_running: ContextVar[StepRun | None] = ContextVar("longshift_step", default=None)


def current() -> Execution | None:
    """The execution that this code belongs to, if any."""
    place = _scope.get()
    return place[0] if place is not None else None


def running_step() -> StepRun | None:
    """The step that this code is part of, if any."""
    return _running.get()


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
        self.waits = Waits(port.clock, lambda: self.on_idle())
        self._unwinding: str | None = None
        self._steps = 0
        self._draining = False
        self._blocked: set[concurrent.futures.Future[Any]] = set()
        self.loop = asyncio.get_running_loop()

    # -- entering and leaving

    @contextmanager
    def entered(self, *, threaded: bool) -> Iterator[None]:
        """Make this the current execution; ``threaded``: the agent runs in a thread, so no task owns its scope."""
        self.root.owner = None if threaded else asyncio.current_task()
        token = _scope.set((self, self.root))
        try:
            yield
        finally:
            _scope.reset(token)

    def unwind(self, reason: str) -> None:
        """From now on every durable call raises: the turn is leaving. Threads that wait for one are released."""
        self._unwinding = reason
        for future in list(self._blocked):
            future.cancel()

    def drain(self) -> None:
        """Let running steps finish and start no other; ``on_quiet`` is called when none runs."""
        self._draining = True
        self._quieten()

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
        if self.in_loop:
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise UsageError("this would block the event loop: write `await` here, or make the agent a plain `def`")
        self.check()

        async def wait() -> T:
            return await awaitable

        future = asyncio.run_coroutine_threadsafe(wait(), self.loop)
        self._blocked.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise TurnEvicted(f"the turn is leaving this worker ({self._unwinding})") from None
        finally:
            self._blocked.discard(future)

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

    def check(self) -> None:
        if self._unwinding is not None:
            raise TurnEvicted(f"the turn is leaving this worker ({self._unwinding})")

    def scope(self) -> Scope:
        """The branch this code runs in; a task that the agent started by itself becomes a branch when it first asks."""
        place = _scope.get()
        if place is None or place[0] is not self:
            raise UsageError("this turn is not running here: use it only inside its agent")
        scope = place[1]
        task = asyncio.current_task()
        if scope.owner is None or scope.owner is task:
            return scope
        child = scope.fork(f"~{scope.next_fork()}", owner=task)
        _scope.set((self, child))
        if task is not None:
            self.waits.begin_branches()
            task.add_done_callback(lambda _: self.waits.end_branch())
        return child

    # -- steps

    async def perform(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a step, or return what is recorded of it.

        Raises:
            StepFailed: it failed for good, now or in an earlier attempt at the turn.
        """
        scope = self.scope()
        digest = step.digest(tuple(args), kwargs)
        call = self.replay.call(scope, step.name, digest=digest)
        if call.diverged:
            await self._diverged(call, step.name, digest)
        if call.recorded is not None:
            return _replayed(scope, call, step)
        async with self._step():
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
        started = self.port.clock.now()
        try:
            value, attempts = await self._attempts(step, key, args, kwargs, random=scope.random)
            result = step.encode(value)
            event, now = self._completed(key, step.name, digest, result, started=started, attempts=attempts)
        except Exception as error:
            await self._failed(key, step, digest, error, scope=scope)
            raise _failure(step, error) from error
        self.check()
        await self.port.append([event])
        scope.now = now
        return step.decode(result)

    async def _attempts(
        self, step: StepDefinition, key: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, random: Random
    ) -> tuple[Any, int]:
        """The result and the number of tries it took."""
        attempt = 1
        while True:
            token = _running.set(StepRun(step, key, attempt))
            try:
                return await self._once(step, args, kwargs), attempt
            except Exception as error:
                if not step.retry.again(error, attempt=attempt):
                    raise
            finally:
                _running.reset(token)
            await asyncio.sleep(step.retry.pause(attempt, random=random))
            attempt += 1
            self.check()
            await self.port.ready()

    async def _once(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        limit = (step.timeout or self.port.step_timeout).total_seconds()
        try:
            async with asyncio.timeout(limit) as timer:
                if step.is_async:
                    return await step.function(*args, **kwargs)
                value = await self.port.in_thread(partial(copy_context().run, partial(step.function, *args, **kwargs)))
                return await value if inspect.isawaitable(value) else value
        except TimeoutError:
            if timer.expired():
                raise TimeoutError(f"no result within {limit:g} s") from None
            raise

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

    async def value(
        self, name: str, kind: Kind, payload: Mapping[str, Json], *, digest: str = ""
    ) -> Mapping[str, Json]:
        """Record ``payload`` under the next key of ``name``, or return what is recorded there."""
        if running_step() is not None:
            raise UsageError(f"a step cannot use {name.removeprefix('$')}(): call it in the agent, between steps")
        call = self.replay.call(self.scope(), name, digest=digest)
        if call.recorded is not None:
            return call.recorded.payload
        payload = dict(payload) | ({"digest": digest} if digest else {})
        await self.append(kind, call_key=call.key, payload=payload)
        return payload

    # -- branches and waits

    async def gather(self, branches: Sequence[Awaitable[T]]) -> list[T]:
        """Run the branches side by side, each in a scope of its own; results in the order given.

        Waits for all of them, and only then raises the first error in that order: which branch failed *first* would
        not be the same on a replay.
        """
        scope = self.scope()
        fork = scope.next_fork()
        if not branches:
            return []
        self.waits.begin_branches(len(branches) - 1)  # the one that gathers does not count meanwhile
        running = len(branches)

        async def run(branch: Awaitable[T], child: Scope) -> T:
            nonlocal running
            child.owner = asyncio.current_task()
            _scope.set((self, child))
            try:
                return await branch
            finally:
                running -= 1
                if running:  # the last one hands its place back to the one that gathers
                    self.waits.end_branch()

        tasks = [
            asyncio.ensure_future(run(branch, scope.fork(f"{fork}.{index}"))) for index, branch in enumerate(branches)
        ]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def wait_until(self, name: str, until: datetime) -> None:
        """Let time pass; the turn leaves the worker if every branch waits long enough."""
        begun = await self.value(name, Kind.WAIT_BEGUN, {"until": until.isoformat()})
        due = datetime.fromisoformat(begun["until"])
        scope = self.scope()
        self.check()
        remaining = (due - self.port.clock.now()).total_seconds()
        if remaining > 0:
            with self.waits.waiting(due):
                await asyncio.sleep(remaining)
            self.check()
        scope.now = max(scope.now, due)


class Waits:
    """Counts the branches of a turn, and those that wait: when all do, the turn may leave its worker."""

    def __init__(self, clock: Clock, on_idle: Callable[[], None]) -> None:
        self._clock = clock
        self._branches = 1
        self._waits: dict[object, datetime] = {}
        self._on_idle = on_idle

    @property
    def until(self) -> datetime:
        """When the first of the waits ends."""
        return min(self._waits.values())

    def begin_branches(self, more: int = 1) -> None:
        self._branches += more

    def end_branch(self) -> None:
        self._branches -= 1
        self._look()

    @contextmanager
    def waiting(self, until: datetime) -> Iterator[None]:
        token = object()
        self._waits[token] = until
        self._look()
        try:
            yield
        finally:
            del self._waits[token]

    @property
    def idle(self) -> bool:
        """Every branch waits, and not just for an instant."""
        return (
            bool(self._waits) and len(self._waits) >= self._branches and self.until - self._clock.now() >= EVICT_AFTER
        )

    def _look(self) -> None:
        if self.idle:
            self._on_idle()


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
