"""Steps: the smallest durable units. A step's result is recorded once, and replayed ever after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from math import isfinite
from random import Random
from types import SimpleNamespace
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from longshift.errors import OutcomeUnknown, ToolDenied, UsageError
from longshift.events import storable_json
from longshift.model import StepKind
from longshift.replay import check_name, digest_of
from longshift.tooling import ToolSpec


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a step is tried, and how long it pauses between: full jitter below an exponential ceiling.

    ``on`` lists the exceptions worth another try; a timeout of the step counts as ``TimeoutError``. An error that says
    when to come again is believed: by an attribute ``retry_after`` (seconds, a timedelta or an aware datetime), or by the
    HTTP response that it carries (RFC 9110, section 10.2.3). Jitter after Brooker, "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015.
    """

    attempts: int = 3
    first: timedelta = timedelta(milliseconds=200)
    longest: timedelta = timedelta(seconds=30)
    on: tuple[type[Exception], ...] = (Exception,)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UsageError(f"Retry(attempts={self.attempts}): a step is tried at least once")

    def again(self, error: Exception, *, attempt: int) -> bool:
        final = isinstance(error, UsageError | OutcomeUnknown | ToolDenied)
        return attempt < self.attempts and isinstance(error, self.on) and not final

    def pause(
        self, attempt: int, *, random: Random, error: Exception | None = None, now: datetime | None = None
    ) -> float:
        """Seconds to wait after the ``attempt``-th failure, which was ``error``, at the time ``now``."""
        doubled = 2.0 ** min(attempt - 1, 64)  # tries that go on for days would leave the range of floats
        ceiling = min(self.longest.total_seconds(), self.first.total_seconds() * doubled)
        asked = None if error is None or now is None else retry_after(error, now=now)
        return max(random.uniform(0, ceiling), asked or 0.0)


ONCE = Retry(attempts=1)
LONGEST_ASKED = timedelta(days=1)
"""No error makes a step wait longer."""


def retry_after(error: Exception, *, now: datetime) -> float | None:
    """Seconds until ``error`` says that another try is worth it, at most a day; None if it does not say."""
    said = getattr(error, "retry_after", None)
    if said is None:
        headers = getattr(getattr(error, "response", None), "headers", None)
        said = headers.get("retry-after") if isinstance(headers, Mapping) else None
    seconds = _seconds_until(said, now=now)
    return None if seconds is None else min(max(0.0, seconds), LONGEST_ASKED.total_seconds())


def _seconds_until(said: object, *, now: datetime) -> float | None:
    match said:
        case bool():
            return None
        case int() | float():
            return float(said) if isfinite(said) else None
        case timedelta():
            return said.total_seconds()
        case datetime():
            return (said if said.tzinfo else said.replace(tzinfo=UTC)).timestamp() - now.timestamp()
        case str() if said.strip().isdecimal():
            return float(said[:9])
        case str():
            try:
                return _seconds_until(parsedate_to_datetime(said), now=now)
            except ValueError:
                return None
        case _:
            return None


@dataclass(frozen=True, slots=True)
class StepDefinition:
    """A function that is run as a step: how it is called, named, retried, and how its result is written."""

    name: str
    function: Callable[..., Any]
    retry: Retry = ONCE
    timeout: timedelta | None = None
    progress: timedelta | None = None  # the longest silence within a try: each ``emit`` ends one
    ours: bool = False  # one of the library's own, whose names begin with "$"
    tool: ToolSpec | None = None  # its calls stand in the ledger
    asks_model: bool = False  # for an agent of a framework
    signature: inspect.Signature = field(init=False)
    is_async: bool = field(init=False)
    kind: StepKind = field(init=False)
    _adapter: list[TypeAdapter[Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        check_name(self.name, ours=self.ours)
        for what, limit in (("timeout", self.timeout), ("progress", self.progress)):
            if limit is not None and limit <= timedelta(0):
                raise UsageError(f"step {self.name!r}: {what}={limit} leaves it no time")
        object.__setattr__(self, "signature", _signature(self.function))
        object.__setattr__(self, "is_async", inspect.iscoroutinefunction(self.function))
        kind = StepKind.TOOL if self.tool is not None else StepKind.MODEL if self.asks_model else StepKind.STEP
        object.__setattr__(self, "kind", kind)

    @property
    def adapter(self) -> TypeAdapter[Any]:
        """Built when first needed: annotations may name what is defined later in the module."""
        if not self._adapter:
            self._adapter.append(result_adapter(self.function))
        return self._adapter[0]

    def digest(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Digest of the arguments, the same whether they were given by place or by name."""
        return digest_of(self.name, self.arguments(args, kwargs))

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments by name, defaults included."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def encode(self, value: Any) -> str:
        """The result as JSON text.

        Raises:
            UsageError: it cannot be written as JSON under the step's return type.
        """
        try:
            text = self.adapter.dump_json(value, warnings="error", round_trip=True).decode()
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            raise UsageError(
                f"step {self.name!r} returned a {type(value).__name__} that cannot be recorded as JSON: annotate the "
                f"return type with what it returns, or return plain data ({' '.join(str(error).split())})"
            ) from None
        return storable_json(text)

    def decode(self, text: str) -> Any:
        """The result as the agent sees it; always read back from its JSON, so that run and replay agree."""
        try:
            return self.adapter.validate_json(text, by_alias=False, by_name=True)  # as it was written
        except ValidationError as error:
            raise UsageError(
                f"the recorded result of step {self.name!r} does not fit its return type: {error.errors()[0]['msg']}. "
                "A step's return type may grow, not change: give the changed step a new name"
            ) from None


def result_adapter(function: Callable[..., Any]) -> TypeAdapter[Any]:
    """For the return annotation of ``function``; without one, any JSON."""
    annotation = _returned(function)
    try:
        return TypeAdapter(annotation, config=_JSON)
    except PydanticUserError:  # a model, dataclass or TypedDict: its own configuration counts
        return TypeAdapter(annotation)


_JSON = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings")
"""What JSON lacks: any bytes, not only UTF-8, and floats that are no numbers."""


def _returned(function: Callable[..., Any]) -> Any:
    """The return annotation alone: one of a parameter that cannot be resolved does not matter here."""
    plain = inspect.unwrap(function)
    annotations = getattr(plain, "__annotations__", {})
    if "return" not in annotations:
        return Any
    only = SimpleNamespace(__annotations__={"return": annotations["return"]})
    try:
        return get_type_hints(only, globalns=getattr(plain, "__globals__", None), include_extras=True)["return"]
    except (NameError, TypeError):  # one that only a type checker can resolve
        return Any


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:  # some builtins, such as max, have none
        kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        return inspect.Signature(
            [inspect.Parameter(name, kind) for name, kind in zip(("args", "kwargs"), kinds, strict=True)]
        )
