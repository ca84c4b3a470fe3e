"""One attempt at a turn, inside the worker: where its code stands, what it has recorded, and when it has to leave.

Its steps are run by ``Stepper``, its branches and timers by ``Branches``, its waits for what others bring by ``Awaiting``.

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
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from longshift.additions import Additions
from longshift.awaiting import Awaiting
from longshift.branching import Branches
from longshift.contract import Port
from longshift.errors import GivenUp, TurnEvicted, UsageError
from longshift.events import Context, Kind, NewEvent, encode
from longshift.model import Json, TurnRecord
from longshift.offload import Large
from longshift.place import place, place_tasks, running_step, scope_place, stand
from longshift.replay import Replay, Scope
from longshift.stepping import Stepper
from longshift.steps import StepDefinition
from longshift.waits import Waits

T = TypeVar("T")
G = TypeVar("G", bound=GivenUp)
BREATH = 50
"""Replayed calls after which the event loop gets its turn."""


class Execution:
    """State of one attempt, keyed by (session, epoch): dropped with the lease."""

    make_stepper: ClassVar[type[Stepper]] = Stepper

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
        self.branches = Branches(self)
        self.awaiting = Awaiting(self)
        self.large = Large(self)
        self.stepper = self.make_stepper(self)
        self.given_up: GivenUp | None = None  # out of band: whatever the agent makes of the error, its turn has failed
        self._unwinding: str | None = None
        self._additions = Additions(context, turn_id=record.id)
        self._order = replay.newest
        self._calls = 0  # of irreversible tools, under way
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
    async def stepping(self) -> AsyncIterator[None]:
        """Around a step that really runs, from its start to its durable record."""
        self.check()
        await self.port.ready()
        if self._draining:
            await asyncio.get_running_loop().create_future()  # until the turn is unwound
        await self.settle()
        self.check()
        self._steps += 1
        self.port.pace.move()
        try:
            yield
        finally:
            self._steps -= 1
            self._quieten()

    @contextmanager
    def calling(self, seconds: float) -> Iterator[None]:
        """Around the call of an irreversible tool, of at most so many seconds: the worker waits for it before it ends."""
        self._calls += 1
        try:
            with self.port.underway.calling(seconds):
                yield
        finally:
            self._calls -= 1

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
        self.port.pace.move()  # what waits for a store has not come to a stop
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

    def give_up(self, error: G) -> G:
        """``error``, which fails the turn even if the agent catches it."""
        self.given_up = self.given_up or error
        return error

    def cancelled_from_outside(self) -> bool:
        """Whether a ``CancelledError`` here is somebody's wish, and not something that the code itself ran into."""
        task = asyncio.current_task()
        return self._unwinding is not None or task is None or task.cancelling() > 0

    @property
    def is_calling(self) -> bool:
        """Whether an irreversible tool is being called, which may not be cut short."""
        return self._calls > 0

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

    @contextmanager
    def standing_in(self, scope: Scope) -> Iterator[None]:
        """Let this code run in ``scope``."""
        token = scope_place.set((self, scope))
        try:
            yield
        finally:
            scope_place.reset(token)

    def whole_context(self) -> Context:
        """The fold of the log as it is now: on a replay that is more than the agent has seen so far. Not to be changed."""
        return self._additions.whole((r.order, Kind(r.kind), r.payload) for r in self.replay.ahead())

    def forgo(self, path: str) -> None:
        """The branch ``path`` has lost a race and will not run again: what it has added is in the log, and so in the
        context."""
        for left in self.replay.skip(path):
            self._additions.apply(Kind(left.kind), left.payload, order=left.order)

    # -- what is durable

    async def perform(self, step: StepDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a step, or return what is recorded of it; inside another step, part of that one.

        Raises:
            StepFailed: it failed for good, now or in an earlier attempt at the turn.
        """
        return await self.stepper.perform(step, args, kwargs)

    async def breathe(self) -> None:
        """Now and then on a replay let the other turns of this worker go on: it makes no pause of its own."""
        self._replayed += 1
        if self._replayed % BREATH == 0:
            await asyncio.sleep(0)

    async def append(self, kind: Kind, *, payload: Mapping[str, Json], call_key: str | None = None) -> None:
        """Record one fact of this turn; it is durable when this returns."""
        self.check()
        text = encode(payload, limit=self.port.max_event)
        await self.port.append([NewEvent(kind, self.record.id, text, call_key)])

    async def write(self, events: Sequence[NewEvent]) -> None:
        """Make events durable that may consume signals."""
        self.check()
        await self.port.append(events)
        self.awaiting.recorded(events)

    async def settle(self) -> None:
        """Before this branch does anything else that is durable: record how its last waits ended, if that was put off."""
        late = self.scope().late
        if late:
            events, late[:] = list(late), []
            await self.write(events)

    async def value(self, name: str, kind: Kind, payload: Mapping[str, Json]) -> Mapping[str, Json]:
        """Record ``payload`` under the next key of ``name``, or return what is recorded there, as JSON has it."""
        recorded, _ = await self._value(name, kind, payload)
        return recorded

    async def add(self, name: str, kind: Kind, payload: Mapping[str, Json], *, large: str | None = None) -> None:
        """The same for what joins the session's context; ``large``: the member of ``payload`` that may be large."""
        recorded, order = await self._value(name, kind, payload, large=large, joins=True)
        if order is not None:
            self._additions.apply(kind, recorded, order=order)

    async def _value(
        self, name: str, kind: Kind, payload: Mapping[str, Json], *, large: str | None = None, joins: bool = False
    ) -> tuple[Mapping[str, Json], int | None]:
        """What is recorded, and its place in the log; None: before this turn, so that its context has it already.

        ``joins``: the context, also if the caller is cancelled while the log takes it: it takes it all the same.
        """
        if running_step() is not None:
            raise UsageError(f"a step cannot use {name.removeprefix('$')}(): call it in the agent, between steps")
        call = self.replay.call(self.scope(), name, digest="")
        if call.recorded is not None:
            await self.breathe()
            return call.recorded.payload, None if call.recorded.earlier else call.recorded.order
        self.check()
        await self.settle()
        if large is None:
            text = encode(payload, limit=self.port.max_event)
        else:
            text = await self.large.payload(payload, large, place=(call.key, large), what=f"the {large} of {kind}")
            self.check()
        self._order += 1  # right before the append: the log has the order in which they come to it
        order = self._order
        recorded = json.loads(text)
        try:
            await self.port.append([NewEvent(kind, self.record.id, text, call.key)])
        except asyncio.CancelledError:  # of a branch that lost a race, or ran out of time: the turn goes on
            if joins:
                self._additions.apply(kind, recorded, order=order)
            raise
        return recorded, order
