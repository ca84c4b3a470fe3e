"""What a framework does on behalf of a turn: its model requests and tool calls, each in its place.

A framework makes tasks as it likes, so nothing here depends on them. What it does is recorded in the branch whose code
called it (the nearest ``turn.gather`` branch or tool, or the agent itself), as if that code had done it:

    model:gpt-5             the first model request of the branch; the next one is model:gpt-5#2
    @call_7f3a/search       the tool that the model called as ``call_7f3a``: a branch of its own, whatever runs beside it

Requests that run side by side in one branch (guardrails, ``asyncio.gather``) find their records by their content.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from random import Random
from typing import Any, Literal

from longshift.errors import UsageError
from longshift.execution import Execution
from longshift.model import Dedupe, Effect, Json
from longshift.place import current, running_step, scope_place
from longshift.replay import Scope
from longshift.steps import ONCE, Retry, StepDefinition
from longshift.tooling import Told, ToolCall, ToolSpec, making, own_call, visible

EffectName = Literal["read", "write", "irreversible"]
EFFECTS: frozenset[EffectName | None] = frozenset({"read", "write", "irreversible", None})
_NOT_IN_NAMES = re.compile(r"[/#~\x00-\x1f]")
_NOT_IN_MARKS = re.compile(r"[^\w.-]")
_MADE_UP = re.compile(r"[0-9a-f]{32}\Z")  # a framework's own id for a call that came without one: another in every run


@dataclass(frozen=True, slots=True)
class Policy:
    """How the calls of an agent are made.

    Attributes:
        retry: of model requests.
        timeout: of one try of a model request.
        tool_retry: of tool calls.
        tool_timeout: of one try of a tool call.
        effects: of tools by name; None: it is plain code of the agent, which may itself use the turn.
    """

    retry: Retry = ONCE
    timeout: timedelta | None = None
    tool_retry: Retry = ONCE
    tool_timeout: timedelta | None = None
    effects: Mapping[str, EffectName | None] | None = None

    def __post_init__(self) -> None:
        for name, effect in (self.effects or {}).items():
            if effect not in EFFECTS:
                raise UsageError(
                    f"the effect of tool {name!r} cannot be {effect!r}: write 'read', 'write', 'irreversible', or None "
                    "for plain code of the agent"
                )

    def effect(self, tool: str) -> EffectName | None:
        return (self.effects or {}).get(tool, "write")


def turn_here() -> Execution | None:
    """The turn whose code this is. None: there is none, or this is inside one of its steps and so part of that."""
    return None if running_step() is not None else current()


async def step(
    execution: Execution,
    name: str,
    function: Callable[..., Awaitable[Json]],
    *digested: Any,
    retry: Retry = ONCE,
    timeout: timedelta | None = None,
    asks_model: bool = False,
) -> Json:
    """A step of the framework; ``function`` is called with ``digested``, by which its record is told from others.

    Raises:
        StepFailed: it failed for good.
    """
    definition = StepDefinition(step_name(name), function, retry, timeout, asks_model=asks_model)
    with _on_behalf(execution, beside(execution)):
        return await execution.perform(definition, digested, {})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tool call came to; ``note`` tells the model that it was not made, because it had been before."""

    value: Json
    note: str | None = None


async def call_tool(
    execution: Execution,
    name: str,
    call_id: str | None,
    invoke: Callable[[], Awaitable[Json]],
    arguments: Mapping[str, Any],
    *,
    effect: EffectName,
    policy: Policy,
) -> Outcome:
    """One tool call, through the ledger, in a branch of its own.

    Args:
        call_id: the framework's own id of the call, which makes its key.
        invoke: makes the call.
        arguments: what the ledger has as its input.

    Raises:
        StepFailed: it failed for good.
    """
    dedupe = Dedupe.TURN if effect == "irreversible" else Dedupe.CALL
    told = Told()
    definition = StepDefinition(
        step_name(name),
        visible(_with_parameters(invoke, arguments)),
        policy.tool_retry,
        policy.tool_timeout,
        tool=ToolSpec(name, Effect(effect), dedupe, call_id=call_id, told=told),
    )
    async with branch(execution, name, call_id):
        value = await execution.perform(definition, (), arguments)
    note = None if told.done_at is None else f"not repeated: done at {told.done_at.isoformat(timespec='seconds')}"
    return Outcome(value, note)


def _with_parameters(invoke: Callable[[], Awaitable[Json]], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """``invoke`` as a function that takes ``arguments``: so they stand in the ledger as they do for any other tool."""

    async def call(**_: Any) -> Json:
        return await invoke()

    with suppress(ValueError):  # a name that is none in Python: then they are one parameter, a mapping
        names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in arguments]
        call.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    return call


def current_call() -> ToolCall:
    """The call that a framework's tool is running for: its ``key`` is what the tool's own requests should carry.

    Outside a turn it is one that nobody else has.
    """
    now = making.get()
    return own_call("tool") if now is None else now.call


@asynccontextmanager
async def branch(execution: Execution, tool: str, call_id: str | None) -> AsyncIterator[None]:
    """A branch for one tool call: the code inside may use the turn as the code of ``turn.gather`` branches does."""
    home = _home(execution)
    mark = _mark(home, tool, call_id)
    with standing(execution, beside(execution)):
        await execution.settle()
    scope = Scope(
        path=f"{home.path}{mark}/",
        now=home.now,
        seed=home.seed,
        owner=asyncio.current_task(),
        parent=home,
        late=None if home.late is None else [],
    )
    with _on_behalf(execution, scope):
        yield


class _Beside(Scope):
    """A branch as seen from another task: the same place in the turn, with the same counters."""

    __slots__ = ()

    @property
    def random(self) -> Random:
        assert self.parent is not None
        return self.parent.random

    def fork_branches(self, number: int, *, racing: bool = False) -> list[Scope]:
        assert self.parent is not None
        return self.parent.fork_branches(number, racing=racing)


def beside(execution: Execution) -> Scope:
    """The branch whose code called the framework, for any task of the framework to record in."""
    home = _home(execution)
    return _Beside(
        path=home.path,
        now=home.now,
        seed=home.seed,
        counters=home.counters,
        is_task=True,
        counted=True,
        parent=home,
        late=home.late,
    )


@contextmanager
def standing(execution: Execution, scope: Scope) -> Iterator[None]:
    """The code inside belongs to ``scope``."""
    token = scope_place.set((execution, scope))
    try:
        yield
    finally:
        scope_place.reset(token)


@contextmanager
def _on_behalf(execution: Execution, scope: Scope) -> Iterator[None]:
    """One call of the framework. The branch that called the framework waits meanwhile, so it is the calls that count
    when the turn asks whether everything waits, not the branch, and not the framework's tasks."""
    home = scope.parent
    assert home is not None
    home.calls += 1
    if home.calls > 1:  # the first takes the place of the branch
        execution.waits.begin_branches()
    try:
        with standing(execution, scope):
            yield
    finally:
        home.calls -= 1
        if home.calls:
            execution.waits.end_branch()
        home.now = max(home.now, scope.now)
        if home.late is not None and home.late is not scope.late:
            home.late.extend(scope.late or ())


def _home(execution: Execution) -> Scope:
    found = scope_place.get()
    if found is None or found[0] is not execution:
        raise UsageError("this turn is not running here: use it only inside its agent")
    scope = found[1]
    while scope.is_task and scope.parent is not None:
        scope = scope.parent
    return scope


def _mark(home: Scope, tool: str, call_id: str | None) -> str:
    if call_id and not _MADE_UP.search(call_id):
        return "@" + _NOT_IN_MARKS.sub("_", call_id)[:64]
    name = _NOT_IN_MARKS.sub("_", tool)[:64]
    home.counters[f"@{name}"] += 1
    return f"@{name}.{home.counters[f'@{name}']}"


def step_name(name: str) -> str:
    """``name`` as steps may have it."""
    return _NOT_IN_NAMES.sub("_", name)[:128].lstrip("$") or "tool"


def with_retry_after(error: Exception) -> Exception:
    """``error``, with the time after which the provider wants to be asked again, if it said so."""
    answer = getattr(error.__cause__, "response", None)
    headers = getattr(error, "headers", None) or getattr(answer, "headers", None) or {}
    said = headers.get("retry-after")
    if said is not None and not hasattr(error, "retry_after"):
        with suppress(ValueError):
            error.retry_after = float(said) if said.strip().isdigit() else parsedate_to_datetime(said)  # type: ignore[attr-defined]
    return error
