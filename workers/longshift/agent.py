"""What users write against: ``@agent`` and ``@step``. Decorated functions are called like functions."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar, cast, get_type_hints, overload

from pydantic import TypeAdapter, ValidationError

from longshift.errors import ConfigError, InvalidInput, UsageError
from longshift.model import AgentRecord, Json
from longshift.place import current, running_step
from longshift.steps import ONCE, Retry, StepDefinition
from longshift.summaries import Budget
from longshift.turn import Turn
from longshift.wakeup import queue_key

P = ParamSpec("P")
R = TypeVar("R")
I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True, slots=True, eq=False)
class Agent(Generic[I, O]):
    """An agent: a function of a turn and its input, with a name and a version that are wire formats."""

    name: str
    version: str
    queue: str
    function: Callable[[Turn, I], Awaitable[O] | O]
    input: TypeAdapter[I] = field(repr=False)
    output: TypeAdapter[O] = field(repr=False)
    budget: Budget | None = None

    def __call__(self, turn: Turn, question: I) -> Awaitable[O] | O:
        return self.function(turn, question)

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def read_input(self, value: Json) -> I:
        """``value`` as the agent's input type.

        Raises:
            InvalidInput: it does not fit.
        """
        try:
            return self.input.validate_json(json.dumps(value))  # JSON's rules: a strict model takes a date as text
        except ValidationError as error:
            places = [{"path": "/".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
            raise InvalidInput(f"the input does not fit agent {self.name!r}", errors=places) from None

    def describe(self) -> AgentRecord:
        return AgentRecord(
            name=self.name,
            version=self.version,
            queue=self.queue,
            description=inspect.cleandoc(self.function.__doc__ or ""),
            input_schema=self.input.json_schema(mode="validation"),
            output_schema=self.output.json_schema(mode="serialization"),
        )


class _AgentDecorator:
    """``@agent("name")``: async and plain functions alike."""

    def __init__(self, name: str, *, version: str, queue: str, budget: Budget | None) -> None:
        if not name or len(name) > 128 or "/" in name:
            raise UsageError(f"{name!r} cannot name an agent: use 1 to 128 characters without '/'")
        queue_key(queue)
        self.name, self.version, self.queue, self.budget = name, version, queue, budget

    @overload
    def __call__(self, function: Callable[[Turn, I], Awaitable[O]]) -> Agent[I, O]: ...

    @overload
    def __call__(self, function: Callable[[Turn, I], O]) -> Agent[I, O]: ...

    def __call__(self, function: Callable[..., Any]) -> Agent[Any, Any]:
        parameters = list(inspect.signature(function).parameters.values())
        if len(parameters) != 2:
            raise UsageError(f"agent {self.name!r} must take (turn, input), not {inspect.signature(function)}")
        try:
            hints = get_type_hints(function, include_extras=True)
        except NameError as error:
            raise UsageError(
                f"agent {self.name!r}: {error}; its annotations must name what its module defines, because what "
                "clients send is checked against them"
            ) from None
        return Agent(
            name=self.name,
            version=self.version,
            queue=self.queue,
            function=function,
            input=TypeAdapter(hints.get(parameters[1].name, Any)),
            output=TypeAdapter(hints.get("return", Any)),
            budget=self.budget,
        )


def agent(name: str, *, version: str = "1", queue: str = "default", budget: Budget | None = None) -> _AgentDecorator:
    """Make a function of ``(turn, input)`` an agent.

    Args:
        name: how clients ask for it.
        version: pinned by a turn when it first starts; change it when code between steps changes.
        queue: the class of workers that runs it.
        budget: how large the context of its sessions may become; None: it grows.

    Raises:
        UsageError: the function does not take (turn, input).
    """
    return _AgentDecorator(name, version=version, queue=queue, budget=budget)


@overload
def step(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def step(
    *,
    name: str | None = None,
    retry: Retry = ONCE,
    timeout: timedelta | None = None,
    progress: timedelta | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def step(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    retry: Retry = ONCE,
    timeout: timedelta | None = None,
    progress: timedelta | None = None,
) -> Any:
    """Make a function a step: within a turn its result is recorded once and replayed ever after.

    Outside a turn, and inside another step, it is the plain function. A plain ``def`` step is called so by a plain
    ``def`` agent; an async agent writes ``await turn.step("name", function, ...)``, which runs it in a thread.

    Args:
        name: a wire format; default: the function's name.
        retry: how often to try; default once.
        timeout: of one try; default ``LONGSHIFT_STEP_TIMEOUT``.
        progress: the longest silence within a try; each ``emit`` is a sign of progress. Default: only ``timeout`` counts.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        definition = StepDefinition(name or function.__name__, function, retry, timeout, progress)
        wrapper = _async_step(definition) if definition.is_async else _plain_step(definition)
        wrapper = wraps(function)(wrapper)
        wrapper.__longshift_step__ = definition  # type: ignore[attr-defined]
        return cast(Callable[P, R], wrapper)

    return decorate if function is None else decorate(function)


def _async_step(definition: StepDefinition) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        execution = current()
        if execution is None or running_step() is not None:
            return await definition.function(*args, **kwargs)
        return await execution.perform(definition, args, kwargs)

    return call


def _plain_step(definition: StepDefinition) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        execution = current()
        if execution is None or running_step() is not None:
            return definition.function(*args, **kwargs)
        if execution.in_loop:
            raise UsageError(
                f"step {definition.name!r} is not async and would block the event loop: write "
                f"`await turn.step({definition.name!r}, {definition.function.__name__}, ...)`, or make it `async def`"
            )
        return execution.from_thread(execution.perform(definition, args, kwargs))

    return call


class Agents:
    """The agents that a worker serves, by name and version."""

    def __init__(self, agents: Iterable[Agent[Any, Any]]) -> None:
        self._agents: dict[tuple[str, str], Agent[Any, Any]] = {}
        self._newest: dict[str, Agent[Any, Any]] = {}
        for each in agents:
            known = self._agents.setdefault((each.name, each.version), each)
            if known is not each:
                raise ConfigError(f"two agents are called {each.name!r} version {each.version!r}: rename one")
            self._newest[each.name] = each

    def find(self, name: str, version: str | None) -> Agent[Any, Any] | None:
        """The agent, in the version a turn is pinned to, or in the one loaded last."""
        return self._newest.get(name) if version is None else self._agents.get((name, version))

    def describe(self) -> list[AgentRecord]:
        return [each.describe() for each in self._agents.values()]

    def __iter__(self) -> Iterator[Agent[Any, Any]]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)


def load_agents(modules: Iterable[str]) -> Agents:
    """Import ``modules`` and collect the agents they define.

    Raises:
        ConfigError: a module cannot be imported, or defines no agent.
    """
    found: dict[int, Agent[Any, Any]] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module that exits would have its worker started again for ever
            raise ConfigError(f"LONGSHIFT_AGENTS: cannot import {name!r}: {type(error).__name__}: {error}") from error
        mine = [value for value in vars(module).values() if isinstance(value, Agent)]
        if not mine:
            raise ConfigError(f"LONGSHIFT_AGENTS: module {name!r} defines no agent: decorate a function with @agent")
        found.update({id(each): each for each in mine})
    return Agents(found.values())
