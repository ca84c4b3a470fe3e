"""The records that pass between modules, one frozen type per concept, and the words of their states.

Identifiers are UUIDs of version 7, written for people as ``<prefix>_<32 hex digits>``.

    turn states    scheduled -> queued -> running -> (waiting -> queued)* -> succeeded | failed | cancelled | expired
                   running -> queued on an interrupt or a rescue
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from uuid_utils.compat import uuid7

from longshift.errors import InvalidInput

_WRITTEN_ID = re.compile(r"(?:(?P<prefix>[a-z]+)_)?(?P<hex>[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\Z")

Json = Any
"""A value that ``json`` can write: only at the edges."""


class Prefix(StrEnum):
    """What an identifier names; the part before the underscore."""

    SESSION = "ses"
    TURN = "turn"
    BATCH = "bat"
    ARTIFACT = "art"
    WORKER = "wrk"
    TENANT = "ten"
    KEY = "key"
    CALL = "call"
    APPROVAL = "apr"


def new_id() -> UUID:
    """A fresh UUIDv7: ordered by time, so that indexes stay compact."""
    return uuid7()


def show_id(prefix: Prefix, value: UUID) -> str:
    """``ses_0193...``: the form in which people and the API see an identifier."""
    return f"{prefix}_{value.hex}"


def parse_id(prefix: Prefix, text: str) -> UUID:
    """The identifier in ``text``, with or without its prefix.

    Raises:
        InvalidInput: it is not a UUID, or carries the prefix of something else.
    """
    match = _WRITTEN_ID.match(text.lower())
    if match is None or match["prefix"] not in (None, prefix.value):
        raise InvalidInput(f"{text!r} is not an identifier of the form {prefix}_<32 hex digits>")
    return UUID(match["hex"])


class TurnStatus(StrEnum):
    """Who moves a turn on: see each state."""

    SCHEDULED = "scheduled"  # has a run_after: the sweeper queues it when due
    QUEUED = "queued"  # has a position: a worker that claims the session starts it
    RUNNING = "running"  # the lease holder finishes or suspends it; the sweeper re-queues it if the holder dies
    WAITING = "waiting"  # holds no worker: a timer or mail makes its session ready
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({TurnStatus.SUCCEEDED, TurnStatus.FAILED, TurnStatus.CANCELLED, TurnStatus.EXPIRED})
OPEN = tuple(s for s in TurnStatus if s not in TERMINAL)


class OnBusy(StrEnum):
    """What a new turn does when its session has an open one."""

    ENQUEUE = "enqueue"
    REJECT = "reject"
    REPLACE = "replace"


class Condition(StrEnum):
    """What a worker says of itself; whether it drains stands beside it."""

    OK = "ok"
    UNREADY = "unready"  # something that it needs does not answer
    STUCK = "stuck"  # it takes no work though there is some, or a turn of its makes no progress


class MailKind(StrEnum):
    """What others may put into a session's mailbox beside turns."""

    SIGNAL = "signal"
    CANCEL = "cancel"
    EXPIRE = "expire"
    CONDEMN = "condemn"  # by the sweeper: the turn crashed its process, alone and more than once


class Effect(StrEnum):
    """What a call of a tool does to the world, and so what may be done when its outcome is in doubt."""

    READ = "read"  # nothing: just call again
    WRITE = "write"  # something that the receiver recognises by its key: call again with the same key
    IRREVERSIBLE = "irreversible"  # something that must not happen twice: never call again in doubt


class StepKind(StrEnum):
    """What a step does, for whoever watches the fleet."""

    STEP = "step"
    TOOL = "tool"
    MODEL = "model"  # asks one, for an agent of a framework


class Dedupe(StrEnum):
    """How far the key of a tool call reaches: within it the same input is the same call."""

    CALL = "call"
    TURN = "turn"
    SESSION = "session"


class CallStatus(StrEnum):
    """What is known of a tool call."""

    STARTED = "started"  # no outcome yet: it runs, or its worker died
    DONE = "done"
    FAILED = "failed"  # it had no effect that counts: it may be called again
    UNKNOWN = "unknown"  # irreversible, and nobody can say whether it happened: an operator can
    GIVEN_UP = "given_up"  # an operator could not either


class Settlement(StrEnum):
    """What an operator decides of a call that is in doubt."""

    DONE = "done"
    NOT_DONE = "not_done"  # it may be called again
    GIVE_UP = "give_up"  # it will never be known


@dataclass(frozen=True, slots=True)
class NewCall:
    """A call of a tool that is about to be made."""

    id: UUID  # its key
    turn_id: UUID
    tool: str
    effect: Effect
    dedupe: Dedupe
    place: str  # replay key
    input: str  # JSON text
    timeout: timedelta  # of one call


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """How a call ended: DONE with its result (JSON text, or an artifact), FAILED or UNKNOWN with its error (JSON text)."""

    status: CallStatus
    result: str | None = None
    artifact_id: UUID | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCallRecord:
    """One row of ``tool_calls``: the audit trail."""

    id: UUID
    tenant_id: UUID
    session_id: UUID
    turn_id: UUID
    tool: str
    effect: Effect
    dedupe: Dedupe
    place: str
    input: Json
    status: CallStatus
    attempts: int
    worker_id: UUID
    epoch: int
    timeout: timedelta
    created_at: datetime
    started_at: datetime
    ended_at: datetime | None
    result: Json
    artifact_id: UUID | None
    error: Mapping[str, Json] | None
    settled_at: datetime | None
    settled_by: UUID | None
    note: str | None

    @property
    def left_behind(self) -> bool:
        """Whether its thread still ran when its time was over: only the end of that process ends the call."""
        return self.error is not None and self.error.get("left_behind") is True


@dataclass(frozen=True, slots=True)
class ApprovalRecord:
    """One row of ``approvals``: a turn asks somebody whether it may go on."""

    id: UUID
    tenant_id: UUID
    session_id: UUID
    turn_id: UUID
    name: str
    show: Json
    created_at: datetime
    expires_at: datetime | None
    answered_at: datetime | None
    answer: Mapping[str, Json] | None  # {"granted", "comment"}
    answered_by: UUID | None
    closed_at: datetime | None


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One row of ``turns``: what a client polls and what a worker runs."""

    id: UUID
    session_id: UUID
    tenant_id: UUID
    status: TurnStatus
    agent: str
    agent_version: str | None  # pinned by the first attempt
    queue: str
    input: Json
    input_artifact: UUID | None  # where the input is, if it is too large for a row; ``input`` is None then
    output: Json
    output_artifact: UUID | None
    error: Mapping[str, Json] | None  # {"code", "message", ...}
    position: int | None  # place in the session's order; None while scheduled
    root_turn_id: UUID  # the first of a chain of retries: steps are keyed by it
    retry_of: UUID | None
    parent_turn_id: UUID | None
    attempts: int  # starts, interrupts included
    version: int  # grows with every change: the ETag
    first_seq: int | None  # seq of its first turn.started
    run_after: datetime | None
    deadline: datetime
    batch_id: UUID | None
    batch_index: int | None
    custom_id: str | None
    usage: Mapping[str, Json]
    metadata: Mapping[str, str]
    traceparent: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def continues(self) -> bool:
        """Whether it is a retry that goes on from what turns before it have recorded."""
        return self.root_turn_id != self.id


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One row of ``sessions`` as a client may see it."""

    id: UUID
    tenant_id: UUID
    queue: str
    open_turns: int
    next_position: int
    leased: bool
    last_seq: int
    metadata: Mapping[str, str]
    created_at: datetime
    active_at: datetime  # of what happened last, about: made, claimed, or a turn ended
    ttl: timedelta | None  # its own; None: as the fleet is set up
    expires_at: datetime | None  # not before this; later, if it is used until then
    archived_through: int  # events up to here are in the cold tier


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One row of ``batches`` with the counts of its turns by state."""

    id: UUID
    tenant_id: UUID
    total: int
    counts: Mapping[TurnStatus, int]
    metadata: Mapping[str, str]
    created_at: datetime
    last_ended_at: datetime | None

    @property
    def ended(self) -> int:
        return sum(self.counts.get(state, 0) for state in TERMINAL)


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """What a worker says it can run; the API validates from this and never imports user code."""

    name: str
    version: str
    queue: str
    description: str
    input_schema: Mapping[str, Json]
    output_schema: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """Named, immutable, content-addressed bytes in the cold tier."""

    id: UUID
    tenant_id: UUID
    sha256: str
    size: int
    content_type: str
    name: str
    key: str  # where the bytes are in the artifact store
    created_at: datetime


@dataclass(frozen=True, slots=True)
class MailRecord:
    """What somebody wants of a session's turn, or has for it, that the holder of the session has yet to record."""

    id: UUID
    session_id: UUID
    turn_id: UUID | None
    kind: MailKind
    name: str
    payload: Json


@dataclass(frozen=True, slots=True)
class Claim:
    """A lease just won: who holds what, under which epoch, and where the log ends."""

    session_id: UUID
    tenant_id: UUID
    worker_id: UUID
    epoch: int
    mail_seq: int
    last_seq: int
    last_event_id: UUID | None


@dataclass(frozen=True, slots=True)
class Kept:
    """The newest checkpoint of a session, and what has come since: every context has it with it, wherever it is copied,
    so that whoever continues it knows when the next one is due."""

    seq: int = 0  # 0: there is none; -1: there is none, and the log begins in an archive
    fresh: int = 0  # characters of what was folded in since


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls the API."""

    tenant_id: UUID
    key_id: UUID
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class NewTurn:
    """What a client submits, validated; the store fills in the rest."""

    agent: str
    input: Json
    queue: str
    id: UUID = field(default_factory=new_id)
    agent_version: str | None = None
    run_after: datetime | None = None
    deadline: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    custom_id: str | None = None
    traceparent: str | None = None
    parent_turn_id: UUID | None = None
    retry_of: UUID | None = None
    root_turn_id: UUID | None = None  # None: it begins a chain of its own
    input_artifact: UUID | None = None  # where the input is, if it is too large for a row; ``input`` is None then
    named: frozenset[UUID] = frozenset()  # artifacts that such an input names
