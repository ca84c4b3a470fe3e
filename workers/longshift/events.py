"""The event log's vocabulary: past-tense facts, numbered without gaps in their session, never changed.

Persisted format. A kind is never renamed and a field never changes its meaning; readers tolerate kinds and fields they
do not know. Each change of the format adds a sentence to ``FORMAT_CHANGES``, whose length is the ``schema_version``.

    turn.started       {attempt, agent, version, input}      a worker began (or resumed) the turn; retry_of instead of input
    step.completed     {name, digest, result, attempts, started_at, ms}   key = replay key
                       of a tool also {call, done_at}: the call's key; when it was done, if that was by another step
    step.failed        {name, digest, error, attempts, started_at, ms}    final: the agent sees StepFailed, now and on replay
    value.recorded     {value}                               key = replay key; turn.now, turn.uuid, turn.random
    wait.begun         {until, signal | approval | child | call}    key = replay key; without any of these: a timer
    wait.ended         {reason, at, ...}                     key = that of its wait.begun; reason is what came, or timeout
    state.changed      {set: {k: v}, unset: [k]}             the session's state, by the agent
    message.said       {role, content}                       key = replay key; joins the session's history
    step.retrying      {name, attempt, until, error}         key = replay key; the next try comes later than this worker waits
    tool.started       {name, call, effect, attempt}         key = replay key; durable before an irreversible call begins
    turn.diverged      {name, recorded, called}              key = replay key; the code between steps has changed
    turn.waiting       {until}                               the turn left the worker
    turn.rescheduled   {reason}                              interrupted: drain, or the agent is unknown here
    turn.succeeded     {output}
    turn.failed        {error: {code, message, ...}}
    turn.cancelled     {reason}
    turn.expired       {reason}
    context.summarized {replaces, role, content, summary_of, fingerprint, tokens}    key = replay key; one message stands for
                       the oldest ``replaces`` of the context, which stand for ``summary_of`` of the session

A value too large for a row is in the cold tier: where {input}, {output}, {result} or {content} would be, the event has
{artifact: {id, size, sha256, preview}} instead. ``id``: 32 hex digits; ``size``: bytes of its JSON; ``preview``: how it begins,
at most 200 characters and 400 bytes as JSON, of a string its own characters, of anything else its JSON. A wait.ended of a child
or a call has {artifact: {id, size, sha256}}, or null, beside {output} or {result}, which then is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from longshift.errors import InvalidInput
from longshift.model import Json, new_id

FORMAT_CHANGES = (
    "1: the first format.",
    "2: new are step.retrying, tool.started, `call` of a tool's step, `retry_of` of turn.started; wait.ended is written.",
    "3: new are context.summarized, and `artifact` in the place of a large input, output, result or content.",
)
SCHEMA_VERSION = len(FORMAT_CHANGES)
DEEPEST = 190  # what reads JSON again stops somewhere: Python at its stack's end, pydantic near 200


class Kind(StrEnum):
    TURN_STARTED = "turn.started"
    STEP_COMPLETED = "step.completed"
    STEP_FAILED = "step.failed"
    STEP_RETRYING = "step.retrying"
    TOOL_STARTED = "tool.started"
    VALUE_RECORDED = "value.recorded"
    WAIT_BEGUN = "wait.begun"
    WAIT_ENDED = "wait.ended"
    STATE_CHANGED = "state.changed"
    MESSAGE_SAID = "message.said"
    TURN_DIVERGED = "turn.diverged"
    TURN_WAITING = "turn.waiting"
    TURN_RESCHEDULED = "turn.rescheduled"
    TURN_SUCCEEDED = "turn.succeeded"
    TURN_FAILED = "turn.failed"
    TURN_CANCELLED = "turn.cancelled"
    TURN_EXPIRED = "turn.expired"
    CONTEXT_SUMMARIZED = "context.summarized"


FOLDED = frozenset(
    {Kind.TURN_STARTED, Kind.TURN_SUCCEEDED, Kind.MESSAGE_SAID, Kind.STATE_CHANGED, Kind.CONTEXT_SUMMARIZED}
)
"""Kinds that leave something in the context; of all others it takes only the place."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """A fact before it has a place: the writer makes its id, so that it recognises its own retries."""

    kind: str
    turn_id: UUID | None
    payload: str  # JSON text, encoded once by ``encode``
    key: str | None = None
    id: UUID = field(default_factory=new_id)
    consumes: UUID | None = None  # the signal that it records: consumed by the statement that writes it, or not at all


@dataclass(frozen=True, slots=True)
class Event:
    """A fact in its place: ``seq`` counts from 1 without gaps in its session."""

    session_id: UUID
    seq: int
    id: UUID
    epoch: int
    turn_id: UUID | None
    kind: str
    key: str | None
    payload: Mapping[str, Json]
    created_at: datetime
    schema_version: int = SCHEMA_VERSION


def encode(payload: Json, *, limit: int | None = None) -> str:
    """JSON text that Postgres will accept.

    ``\\u0000`` and lone surrogates are not storable as jsonb, and one of them would abort a whole batch: NUL is written
    as U+2400 (its picture), a lone surrogate as U+FFFD.

    Raises:
        InvalidInput: not JSON (NaN, an unknown type), nested too deep, or more than ``limit`` bytes.
    """
    try:
        text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"this value cannot be written as JSON: {error}") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(payload) > DEEPEST:
        raise InvalidInput(
            f"this value is nested more than {DEEPEST} deep: it could be written, but not always read back"
        )
    text = storable_json(text)
    if limit is not None and (size := len(text.encode())) > limit:
        raise InvalidInput(f"a value of {size:,} bytes is larger than one event may be ({limit:,}): use turn.artifact")
    return text


def _depth(value: Json) -> int:
    """How deep lists and objects stand in each other, counted without recursion."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        inner, depth = todo.pop()
        if isinstance(inner, Mapping):
            inner = inner.values()
        elif not isinstance(inner, list | tuple):
            continue
        deepest = max(deepest, depth)
        todo.extend((item, depth + 1) for item in inner)
    return deepest


def storable_json(text: str) -> str:
    """JSON text without what Postgres refuses in jsonb."""
    return storable(_unescape_nul(text) if "\\u0000" in text else text)


def storable(text: str) -> str:
    """Plain text without what Postgres refuses; what only looks like an escape stays as it is."""
    if "\0" in text:
        text = text.replace("\0", "\u2400")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _unescape_nul(text: str) -> str:
    """Replace the escape ``\\u0000``, but not ``\\\\u0000``, which is a backslash and five characters."""
    parts = text.split("\\\\")
    return "\\\\".join(part.replace("\\u0000", "\u2400") for part in parts)


@dataclass(slots=True)
class Context:
    """What folds out of a session's log: what an agent sees of earlier turns (promise P5).

    Text, not objects: nothing that an agent does to what it was shown can change it, and copies of it are cheap.

    Attributes:
        seq, event_id: the last event that is folded in; together they name one history.
        messages: JSON text of each ``{"role": "user" | "assistant" | ..., "content": ..., "turn_id"}``; a summary has
            ``summary_of``, too: for how many messages of the session it stands.
        remembered: the state, JSON text by name.
    """

    seq: int = 0
    event_id: UUID | None = None
    messages: list[str] = field(default_factory=list)
    remembered: dict[str, str] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Json]]:
        return [json.loads(message) for message in self.messages]

    @property
    def state(self) -> dict[str, Json]:
        return {name: json.loads(value) for name, value in self.remembered.items()}

    @property
    def size(self) -> int:
        """Characters of its text, about."""
        return sum(map(len, self.messages)) + sum(len(name) + len(value) for name, value in self.remembered.items())

    def copy(self) -> Context:
        return Context(self.seq, self.event_id, [*self.messages], {**self.remembered})


def fold(events: Iterable[Event], *, start: Context | None = None) -> Context:
    """Apply ``events`` in order; pure, so that fold(a + b) == fold(b, start=fold(a)). ``start`` is left as it is."""
    context = start.copy() if start is not None else Context()
    for event in events:
        apply(context, event)
    return context


def apply(context: Context, event: Event) -> None:
    """Let ``context`` include ``event``, the one after ``context.seq``."""
    if event.kind in FOLDED:
        include(context, event.kind, event.payload, turn_id=event.turn_id)
    context.seq, context.event_id = event.seq, event.id


def include(context: Context, kind: str, payload: Mapping[str, Json], *, turn_id: UUID | None) -> None:
    """Let ``context`` include what an event says, wherever in the log that is."""
    match kind:
        case Kind.TURN_STARTED if payload.get("attempt") == 1 and "retry_of" not in payload:
            context.messages.append(_message("user", _content(payload, "input"), turn_id))
        case Kind.TURN_SUCCEEDED:
            context.messages.append(_message("assistant", _content(payload, "output"), turn_id))
        case Kind.MESSAGE_SAID:
            context.messages.append(_message(payload["role"], _content(payload, "content"), turn_id))
        case Kind.CONTEXT_SUMMARIZED:
            of = payload.get("summary_of", payload["replaces"])
            summary = _message(payload["role"], payload["content"], turn_id, summary_of=of)
            context.messages[: payload["replaces"]] = [summary]
        case Kind.STATE_CHANGED:
            for name, value in payload.get("set", {}).items():
                context.remembered[name] = _text(value)
            for name in payload.get("unset", ()):
                context.remembered.pop(name, None)


def _content(payload: Mapping[str, Json], name: str) -> Json:
    """The value, or what stands for one that is in the cold tier."""
    artifact = payload.get("artifact")
    if artifact is None or name in payload:
        return payload.get(name)
    return {"$artifact": f"art_{artifact['id']}", "size": artifact["size"], "preview": artifact.get("preview", "")}


def _message(role: str, content: Json, turn_id: UUID | None, **more: Json) -> str:
    return _text({"role": role, "content": content, "turn_id": turn_id.hex if turn_id else None, **more})


def _text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
