"""Where code stands: in which turn, in which of its branches, in which step.

A branch is a coroutine given to ``turn.gather``, or a task that the agent starts by itself. Tasks get their place when they
are *created*, by a task factory: the code that creates them is the same on a replay, while the order in which they first
ask for something depends on how long the steps before took.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from longshift.replay import Scope
from longshift.steps import StepDefinition
from longshift.watch import Watch

if TYPE_CHECKING:
    from longshift.execution import Execution

Task = asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class StepRun:
    """The step that is running in this context."""

    definition: StepDefinition
    key: str
    attempt: int
    watch: Watch
    scope: (
        Scope  # for uuid() and random inside the step: they must not move those of the branch, which replays without it
    )


scope_place: ContextVar[tuple[Execution, Scope] | None] = ContextVar("longshift_scope", default=None)
step_place: ContextVar[StepRun | None] = ContextVar("longshift_step", default=None)


def place() -> tuple[Execution, Scope] | None:
    """The execution and the branch that this code belongs to, if any."""
    return scope_place.get()


def current() -> Execution | None:
    """The execution that this code belongs to, if any."""
    found = scope_place.get()
    return found[0] if found is not None else None


def running_step() -> StepRun | None:
    """The step that this code is part of, if any."""
    return step_place.get()


def stand(execution: Execution, scope: Scope) -> None:
    """From here on, code of this context belongs to ``scope``."""
    scope_place.set((execution, scope))


def context_in(execution: Execution, scope: Scope) -> Context:
    """A copy of this context that belongs to ``scope``."""
    context = copy_context()
    context.run(stand, execution, scope)
    return context


def place_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Let ``loop`` give tasks that agents start their branches; other tasks are made as before."""
    before = loop.get_task_factory()
    if not isinstance(before, _Placing):
        loop.set_task_factory(cast(Any, _Placing(before)))  # its type has changed with each release of Python


class _Placing:
    """A task factory."""

    def __init__(self, before: object) -> None:
        self._before = cast(Callable[..., Task] | None, before)

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> Task:
        found = scope_place.get()
        if found is not None:
            coroutine = _Contained(coroutine)
        if found is None or step_place.get() is not None or options.get("context") is not None:
            return self._make(loop, coroutine, **options)
        execution, scope = found
        if scope.owner is None or scope.owner is not asyncio.current_task(loop):
            return self._make(loop, coroutine, **options)
        child = scope.fork_task()
        task = self._make(loop, coroutine, **options | {"context": context_in(execution, child)})
        child.owner = task
        return task

    def _make(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> Task:
        if self._before is not None:
            return self._before(loop, coroutine, **options)
        return asyncio.Task(coroutine, loop=loop, **options)


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine of an agent's task, whose ``sys.exit()`` fails that task: asyncio would end the worker for it.

    Not a coroutine around a coroutine: one that is cancelled before it begins would leave the other unawaited.
    """

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self._inner = inner

    def send(self, value: Any) -> Any:
        try:
            return self._inner.send(value)
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError(told(error)) from error

    def throw(self, *error: Any) -> Any:
        try:
            return self._inner.throw(*error)
        except (SystemExit, KeyboardInterrupt) as error_out:
            raise RuntimeError(told(error_out)) from error_out

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()


def told(error: SystemExit | KeyboardInterrupt) -> str:
    """What code did that wanted to end the process."""
    return f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else "raised KeyboardInterrupt"
