"""Branches of a turn side by side, and timers, in which it may leave its worker."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from longshift.errors import UsageError
from longshift.events import Kind, NewEvent, encode
from longshift.place import context_in, running_step, told
from longshift.replay import Scope

if TYPE_CHECKING:
    from longshift.execution import Execution

T = TypeVar("T")


class Branches:
    """The branches of one execution."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution

    async def gather(self, branches: Sequence[Awaitable[T]]) -> list[T]:
        """Run the branches side by side, each in a scope of its own; results in the order given.

        Waits for all of them, and only then raises the first error in that order: which branch failed *first* would
        not be the same on a replay.
        """
        if running_step() is not None:
            return _first_error(await asyncio.gather(*branches, return_exceptions=True))
        scope = self.execution.scope()
        children = scope.fork_branches(len(branches))
        if not branches:
            return []
        tasks = self._start(branches, children, gives_back=len(branches))
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        except BaseException:
            await _cancel(tasks)
            raise
        finally:
            _close(branches)
            _merge(scope, children)
        scope.now = max(scope.now, *(child.now for child in children))
        return _first_error(results)

    async def race(self, branches: Sequence[Awaitable[T]]) -> tuple[int, T]:
        """Run the branches side by side until the first one ends; the others are cancelled. Its place and its result.

        Which one is recorded, together with the end of its last wait; a replay runs no other.
        """
        if not branches:
            raise UsageError("a race needs at least one branch")
        if running_step() is not None:
            return await _plain_race(branches)
        scope = self.execution.scope()
        call = self.execution.replay.call(scope, "$race", digest="")
        children = scope.fork_branches(len(branches), racing=True)
        if call.recorded is not None:
            winner = int(call.recorded.payload["winner"])
            for child in (*children[:winner], *children[winner + 1 :]):
                self.execution.forgo(child.path)
            children[winner].late = None  # nothing is put off any more: the race is over
            _drop([*branches[:winner], *branches[winner + 1 :]])
            [task] = self._start([branches[winner]], [children[winner]], gives_back=1)
        else:
            winner, task = await self._first(branches, scope, children)
            await self._decide(call.key, scope, children, winner=winner)
        try:
            result = await task
        except BaseException:
            await _cancel([task])
            raise
        finally:
            _close(branches)
        scope.now = max(scope.now, children[winner].now)
        return winner, result

    async def _first(
        self, branches: Sequence[Awaitable[T]], scope: Scope, children: Sequence[Scope]
    ) -> tuple[int, asyncio.Task[T]]:
        """The first branch to end; the others have ended too when this returns."""
        tasks = self._start(branches, children, gives_back=1)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            winner = next(index for index, task in enumerate(tasks) if task.done())
        except BaseException:
            await _cancel(tasks)
            if not _merge(scope, children):
                self.execution.awaiting.forget(event for child in children for event in child.late or ())
            raise
        finally:
            await _cancel(tasks)
            _close(branches)
        return winner, tasks[winner]

    async def _decide(self, key: str, scope: Scope, children: Sequence[Scope], *, winner: int) -> None:
        """Record who has won, with how its last waits ended; what the others were given is given back."""
        execution = self.execution
        await execution.settle()
        event = NewEvent(Kind.VALUE_RECORDED, execution.record.id, encode({"winner": winner}), key)
        await execution.write([*(children[winner].late or ()), event])
        losers = [*children[:winner], *children[winner + 1 :]]
        for loser in losers:
            execution.awaiting.forget(loser.late or ())
        await execution.awaiting.close(loser.path for loser in losers)

    def _start(
        self, branches: Sequence[Awaitable[T]], children: Sequence[Scope], *, gives_back: int
    ) -> list[asyncio.Task[T]]:
        """A task for each branch. The one that started them does not count as a branch meanwhile: it gets its place back
        from the ``gives_back``-th that ends."""
        waits = self.execution.waits
        waits.begin_branches(len(branches) - 1)
        tasks = [
            asyncio.create_task(self._branch(branch, child), context=context_in(self.execution, child))
            for branch, child in zip(branches, children, strict=True)
        ]
        over = 0

        def ended(_: object) -> None:
            nonlocal over
            over += 1
            if over != gives_back:
                waits.end_branch()

        for task in tasks:
            task.add_done_callback(ended)
        return tasks

    async def _branch(self, branch: Awaitable[T], scope: Scope) -> T:
        scope.owner = asyncio.current_task()
        try:
            return await branch
        except (SystemExit, KeyboardInterrupt) as error:  # would end the worker
            raise RuntimeError(told(error)) from error

    async def wait_until(self, name: str, until: datetime) -> None:
        """Let time pass; the turn leaves the worker if every branch waits long enough."""
        begun = await self.execution.value(name, Kind.WAIT_BEGUN, {"until": until.isoformat()})
        due = datetime.fromisoformat(begun["until"])
        scope = self.execution.scope()
        await self.rest(due)
        scope.now = max(scope.now, due)

    async def rest(self, due: datetime) -> None:
        """Return at ``due``; the turn may leave the worker meanwhile. What it waits for must be recorded."""
        self.execution.check()
        if due > self.execution.port.clock.now():
            with self.execution.waits.waiting(due):
                await self.execution.port.sleep_until(due)
            self.execution.check()


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _close(branches: Sequence[Awaitable[Any]]) -> None:
    """Of tasks that were cancelled before they began; others have ended, and do not mind."""
    for branch in branches:
        if inspect.iscoroutine(branch):
            branch.close()


def _drop(branches: Sequence[Awaitable[Any]]) -> None:
    """These shall not run, or not run on."""
    for branch in branches:
        if isinstance(branch, asyncio.Future):
            branch.cancel()
    _close(branches)


def _merge(scope: Scope, children: Sequence[Scope]) -> bool:
    """What branches have put off is now up to the one that started them; False: that one puts nothing off."""
    if scope.late is None:
        return False
    for child in children:
        scope.late.extend(child.late or ())
    return True


async def _plain_race(branches: Sequence[Awaitable[T]]) -> tuple[int, T]:
    """Inside a step: a race of plain coroutines, of which nothing is recorded."""
    tasks = [asyncio.ensure_future(branch) for branch in branches]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        winner = next(index for index, task in enumerate(tasks) if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return winner, tasks[winner].result()


def _first_error(results: Sequence[T | BaseException]) -> list[T]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
