"""Tools: steps that act on the world. ``@tool`` says what a call does there, and so what may be done when it is in doubt."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import cached_property, update_wrapper
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast, get_type_hints, overload

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from longshift.errors import InvalidInput, UsageError
from longshift.model import Dedupe, Effect, Json, Prefix, show_id
from longshift.place import current, running_step
from longshift.replay import derived_id
from longshift.steps import ONCE, Retry, StepDefinition
from longshift.tooling import (
    Absent,
    Approval,
    Done,
    Making,
    Told,
    ToolCall,
    ToolSpec,
    Unknown,
    hidden_parameter,
    making,
    own_call,
    visible,
)

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Tool(Generic[P, R_co]):
    """A function that acts on the world; call it like the function, but for its ``ToolCall``.

    Attributes:
        name: a wire format, and what a model calls it by.
        description: of its docstring, for models.
        effect: what a call does to the world.
    """

    def __init__(self, definition: StepDefinition, spec: ToolSpec, *, original: Callable[..., Any]) -> None:
        self.name = spec.name
        self.effect = spec.effect
        self.description = inspect.cleandoc(original.__doc__ or "")
        self._original = original
        self._spec = spec
        self.__longshift_step__ = definition
        update_wrapper(self, definition.function)

    def __repr__(self) -> str:
        return f"<tool {self.name!r}, {self.effect}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Within a turn this is a step; inside another step, or outside a turn, the plain function."""
        definition, execution = self.__longshift_step__, current()
        if execution is None or running_step() is not None:
            call = self._as_function_async if definition.is_async else self._as_function
            return cast(R_co, call(args, kwargs))
        if definition.is_async:
            return cast(R_co, execution.perform(definition, args, kwargs))
        if execution.in_loop:
            raise UsageError(
                f"tool {self.name!r} is not async and would block the event loop: write `await "
                f"turn.step({definition.name!r}, {self._original.__name__}, ...)`, or make it `async def`"
            )
        return cast(R_co, execution.from_thread(execution.perform(definition, args, kwargs)))

    @cached_property
    def schema(self) -> dict[str, Json]:
        """JSON Schema of the arguments, for models.

        Raises:
            UsageError: a parameter has a type of which there is no schema.
        """
        return self._arguments.json_schema(mode="validation")

    def validate(self, arguments: Mapping[str, Json]) -> dict[str, Any]:
        """A model's arguments as the function takes them.

        Raises:
            InvalidInput: they do not fit; the message says what is wrong where, so that it can be shown to the model.
        """
        try:
            found: dict[str, Any] = self._arguments.validate_json(json.dumps(arguments))
        except ValidationError as error:
            places = [{"path": "/".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
            said = "; ".join(f"{place['path'] or 'arguments'}: {place['message']}" for place in places)
            raise InvalidInput(f"the arguments do not fit tool {self.name!r}: {said}", errors=places) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"the arguments for tool {self.name!r} are no JSON object: {error}") from None
        return found

    async def call(self, arguments: Mapping[str, Json], id: str | None = None) -> Json:  # noqa: A002  # as models call it
        """Call the tool for a model: checks the arguments, and gives the result as JSON.

        A call that was made before (by ``dedupe``) is not made again; the answer is then
        ``{"result": ..., "note": "not repeated: done at ..."}``, so that the model knows.

        Args:
            arguments: by name, as the model has written them.
            id: the framework's own id of this call; default: its place in the turn.

        Raises:
            InvalidInput: the arguments do not fit.
            StepFailed: it failed for good; OutcomeUnknown and ToolDenied are such.
        """
        kwargs = self.validate(arguments)
        told, execution = Told(), current()
        definition = replace(self.__longshift_step__, tool=replace(self._spec, call_id=id, told=told))
        if execution is not None and running_step() is None:
            value = await execution.perform(definition, (), kwargs)
        elif definition.is_async:
            value = await self._as_function_async((), kwargs)
        else:
            value = await asyncio.to_thread(self._as_function, (), kwargs)
        result = json.loads(definition.encode(value))
        if told.done_at is None:
            return result
        return {"result": result, "note": f"not repeated: done at {told.done_at.isoformat(timespec='seconds')}"}

    def _as_function(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        token = making.set(Making(self._own_call()))
        try:
            return self.__longshift_step__.function(*args, **kwargs)
        finally:
            making.reset(token)

    async def _as_function_async(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        token = making.set(Making(self._own_call()))
        try:
            return await self.__longshift_step__.function(*args, **kwargs)
        finally:
            making.reset(token)

    def _own_call(self) -> ToolCall:
        """Outside a turn a key of its own; inside a step one that is the same on each try of that step."""
        execution, step = current(), running_step()
        if execution is None or step is None:
            return own_call(self.name)
        step.scope.counters["$call"] += 1
        place = str(step.scope.counters["$call"])
        identity = derived_id(execution.record.root_turn_id, step.scope.path, "$call", self.name, place)
        return ToolCall(show_id(Prefix.CALL, identity), step.attempt, self.name)

    @cached_property
    def _arguments(self) -> TypeAdapter[dict[str, Any]]:
        def collect(**arguments: Any) -> dict[str, Any]:
            return arguments

        try:
            hints = get_type_hints(self._original, include_extras=True)
            shown = [
                each.replace(annotation=hints.get(each.name, Any), kind=inspect.Parameter.KEYWORD_ONLY)
                if each.kind is not inspect.Parameter.VAR_KEYWORD
                else each.replace(annotation=hints.get(each.name, Any))
                for each in self.__longshift_step__.signature.parameters.values()
            ]
            collect.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
            collect.__annotations__ = {each.name: each.annotation for each in shown}
            return TypeAdapter(cast(Any, collect))
        except (NameError, PydanticUserError, PydanticSchemaGenerationError) as error:
            raise UsageError(
                f"tool {self.name!r}: {' '.join(str(error).split())}; a model can call it only if its parameters have types "
                "that its module defines and pydantic knows"
            ) from None


class _ToolDecorator:
    """``@tool(effect=...)``: async and plain functions alike."""

    def __init__(self, make: Callable[[Callable[..., Any]], Tool[..., Any]]) -> None:
        self._make = make

    @overload
    def __call__(self, function: Callable[Concatenate[ToolCall, P], R]) -> Tool[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R]) -> Tool[P, R]: ...

    def __call__(self, function: Callable[..., Any]) -> Tool[..., Any]:
        return self._make(function)


def tool(
    *,
    effect: Literal["read", "write", "irreversible"],
    name: str | None = None,
    dedupe: Literal["call", "turn", "session"] | None = None,
    retry: Retry = ONCE,
    timeout: timedelta | None = None,
    progress: timedelta | None = None,
    reconcile: Callable[..., Any] | None = None,
    approval: bool | timedelta | Approval = False,
) -> _ToolDecorator:
    """Make a function a tool: a step whose calls stand in a ledger, each under a key.

    A parameter annotated ``ToolCall`` (the first one, for type checkers) is hidden from callers and models.

    Args:
        effect: what a call does to the world. ``read``: nothing, it is repeated at will. ``write``: something that the
            receiver recognises by the key, so that it is repeated with the same key. ``irreversible``: something that must
            not happen twice; it is called at most once, and what stays in doubt is ``OutcomeUnknown``.
        name: a wire format; default: the function's name.
        dedupe: what is the same call. ``call`` (default): this one, when it is tried again. ``turn`` (default for
            irreversible): any with the same input in this turn. ``session``: any with the same input in this session.
        retry: how often to try; default once. Of an irreversible tool only what raises ``NotDone``, or is found to be absent,
            is tried again.
        timeout: of one try; default ``LONGSHIFT_STEP_TIMEOUT``. That of an irreversible tool says how long nobody else can
            know what becomes of it: keep it short.
        progress: the longest silence within a try: each ``emit`` ends one.
        reconcile: for irreversible tools: finds out what became of a call. Takes a ``ToolCall`` with the same key and the
            same arguments; returns ``Done(result)``, ``Absent()`` or ``Unknown()``.
        approval: somebody is asked before each call, as by ``turn.approval`` with the tool's name and its arguments; at most
            for so long, if it is a timedelta. Denied, or not answered in time, it raises ``ToolDenied``.

    Raises:
        UsageError: the function or the options do not go together.
    """
    kind = Effect(effect)
    scope = Dedupe(dedupe) if dedupe else (Dedupe.TURN if kind is Effect.IRREVERSIBLE else Dedupe.CALL)

    def make(function: Callable[..., Any]) -> Tool[..., Any]:
        called = name or function.__name__
        _check(function, called, kind, reconcile)
        spec = ToolSpec(called, kind, scope, reconcile, _approval(approval))
        definition = StepDefinition(called, visible(function), retry, timeout, progress, tool=spec)
        return Tool(definition, spec, original=function)

    return _ToolDecorator(make)


def _approval(wanted: bool | timedelta | Approval) -> Approval | None:
    match wanted:
        case bool():
            return Approval() if wanted else None
        case timedelta():
            return Approval(timeout=wanted)
        case _:
            return wanted


_UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


def _check(function: Callable[..., Any], name: str, effect: Effect, reconcile: Callable[..., Any] | None) -> None:
    hidden = hidden_parameter(function)
    for each in inspect.signature(function).parameters.values():
        if each.kind in _UNNAMED and each.name != hidden:
            raise UsageError(
                f"tool {name!r}: parameter {each.name!r} has no name for a model to use: make it an ordinary one"
            )
    if reconcile is not None and effect is not Effect.IRREVERSIBLE:
        raise UsageError(
            f"tool {name!r} is called again when in doubt ({effect}): only an irreversible one is reconciled"
        )


__all__ = ["Absent", "Approval", "Done", "Tool", "ToolCall", "Unknown", "tool"]
