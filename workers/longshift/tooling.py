"""What a tool is, apart from how it is written (``longshift.tools``) and how it is called (``longshift.calling``).

The **key** of a call is a hash of its session, its scope, the tool's name and its input. What the input is does not depend on
how it was given: by place or by name, left to its default or not, as a model's JSON or as Python's values.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import wraps
from typing import Any, Generic, TypeVar
from uuid import UUID

from longshift.errors import UsageError
from longshift.model import Dedupe, Effect, Json, Prefix, new_id, show_id
from longshift.replay import exact_json

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a tool may know of its call: annotate a parameter with it, which callers and models then do not see.

    Attributes:
        key: ``call_`` and 32 hex digits; the same on each try, by whichever worker. Give it to whom the call reaches, who can
            then tell a repetition from another call.
        attempt: the how-manieth start of this call it is, from 1 on, of all workers.
        tool: the tool's name.
    """

    key: str
    attempt: int
    tool: str

    def headers(self) -> dict[str, str]:
        """For a call over HTTP: ``{"Idempotency-Key": key}``."""
        return {"Idempotency-Key": self.key}


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """Answer of ``reconcile``: the call has had its effect, and this is what the tool would have returned."""

    result: R


@dataclass(frozen=True, slots=True)
class Absent:
    """Answer of ``reconcile``: whoever the call was meant for knows nothing of it, so that it may be made."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Answer of ``reconcile``: it cannot be found out. ``reason`` is for the operator who will have to."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Approval:
    """That somebody is asked before a tool is called: an approval with the tool's name, which shows the arguments.

    Attributes:
        timeout: after this the call counts as denied; None: with the turn's deadline.
        stops_deadline: while the turn waits for this without a worker, its deadline comes no nearer; needs ``timeout``.
    """

    timeout: timedelta | None = None
    stops_deadline: bool = False

    def __post_init__(self) -> None:
        if self.stops_deadline and self.timeout is None:
            raise UsageError("an approval that stops the deadline needs a timeout: or the turn might never end")


@dataclass(slots=True)
class Told:
    """What is to be told of one call beside its result: ``done_at``, if it was not made, because it had been before."""

    done_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What makes a step the call of a tool.

    Attributes:
        reconcile: asked what became of a call in doubt; takes a ``ToolCall`` and the tool's arguments.
        approval: somebody is asked before each call.
        call_id: the framework's own id of this call.
        told: where to write what is to be told.
    """

    name: str
    effect: Effect
    dedupe: Dedupe
    reconcile: Callable[..., Any] | None = None
    approval: Approval | None = None
    call_id: str | None = None
    told: Told | None = None

    def key(self, *, session_id: UUID, root_turn_id: UUID, place: str, text: str) -> UUID:
        """The key of the call with the canonical input ``text``, made at ``place`` (its replay key)."""
        match self.dedupe:
            case Dedupe.CALL:
                scope = [root_turn_id.hex, "id" if self.call_id is not None else "place", self.call_id or place]
            case Dedupe.TURN:
                scope = [root_turn_id.hex]
            case Dedupe.SESSION:
                scope = []
        parts = json.dumps([session_id.hex, self.dedupe.value, scope, self.name, text])
        return UUID(bytes=hashlib.sha256(parts.encode()).digest()[:16], version=4)


@dataclass(frozen=True, slots=True)
class Making:
    """A call while it is made. ``check`` is called right before the tool's own code, and may raise."""

    call: ToolCall
    check: Callable[[], None] = lambda: None


making: ContextVar[Making | None] = ContextVar("longshift_making", default=None)


def own_call(tool: str) -> ToolCall:
    """For a tool that is called as a plain function: a key that nobody else has."""
    return ToolCall(show_id(Prefix.CALL, new_id()), 1, tool)


def canonical(arguments: Mapping[str, Any], *, tool: str) -> str:
    """The input of a call as JSON text, the same for the same input.

    Raises:
        UsageError: an argument cannot be written as JSON, so that calls could not be told apart.
    """
    plain = {}
    for name, value in arguments.items():
        try:
            plain[name] = _numbers(exact_json(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"argument {name!r} of tool {tool!r} is a {type(value).__name__} that cannot be written as JSON "
                f"({' '.join(str(error).split())}): give it data, and let the tool find clients and the like by itself"
            ) from None
    return json.dumps(plain, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def _numbers(value: Json) -> Json:
    """1.0 is 1: a model writes either, and JSON knows no difference."""
    match value:
        case float() if value.is_integer() and abs(value) < 2**53:
            return int(value)
        case list():
            return [_numbers(each) for each in value]
        case dict():
            return {key: _numbers(each) for key, each in value.items()}
        case _:
            return value


def hidden_parameter(function: Callable[..., Any]) -> str | None:
    """The name of the parameter of ``function`` that is annotated ``ToolCall``."""
    names = [name for name, each in inspect.signature(function).parameters.items() if _is_call(each, function)]
    if len(names) > 1:
        raise UsageError(f"tool {function.__name__!r} has two parameters of type ToolCall: one is enough")
    return names[0] if names else None


def _is_call(parameter: inspect.Parameter, function: Callable[..., Any]) -> bool:
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation is ToolCall
    if annotation.strip("'\" ") in ("ToolCall", "tools.ToolCall", "longshift.ToolCall"):
        return True
    found = getattr(inspect.unwrap(function), "__globals__", {}).get(annotation)  # imported under another name
    return found is ToolCall


def visible(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as its callers see it: without its ``ToolCall``, which it gets from the call that is being made."""
    hidden = hidden_parameter(function)
    whole = inspect.signature(function)
    shown = whole.replace(parameters=[each for name, each in whole.parameters.items() if name != hidden])

    def bound(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        now = making.get() or Making(own_call(function.__name__))
        now.check()
        given = shown.bind(*args, **kwargs).arguments
        if hidden is not None:
            given[hidden] = now.call
        ordered = {name: given[name] for name in whole.parameters if name in given}
        return inspect.BoundArguments(whole, ordered)

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            all_of_it = bound(args, kwargs)
            return await function(*all_of_it.args, **all_of_it.kwargs)

    else:

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            all_of_it = bound(args, kwargs)
            return function(*all_of_it.args, **all_of_it.kwargs)

    call.__signature__ = shown  # type: ignore[attr-defined]
    return call
