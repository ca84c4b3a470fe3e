"""Branches of a turn side by side, and waits, in which it may leave its worker."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from longshift.events import Kind
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
        self.execution.waits.begin_branches(len(branches) - 1)  # the one that gathers does not count meanwhile
        tasks = [
            asyncio.create_task(self._branch(branch, child), context=context_in(self.execution, child))
            for branch, child in zip(branches, children, strict=True)
        ]
        running = len(tasks)

        def ended(_: object) -> None:
            nonlocal running
            running -= 1
            if running:  # the last one hands its place back to the one that gathers
                self.execution.waits.end_branch()

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


def _first_error(results: Sequence[T | BaseException]) -> list[T]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
