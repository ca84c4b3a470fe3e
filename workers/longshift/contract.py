"""What an execution needs from whoever runs it, and the records that pass between the two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel

from longshift.artifacts import Spooled
from longshift.clock import Clock
from longshift.errors import Unavailable
from longshift.events import NewEvent
from longshift.model import CallOutcome, Json, NewCall, ToolCallRecord
from longshift.observing import Observer
from longshift.underway import UnderWay
from longshift.watch import Pace

T = TypeVar("T")
RecallScope = Literal["session", "tenant"]


class Artifact(BaseModel, frozen=True):
    """A pointer to immutable bytes in the cold tier; pass it between steps, read it with ``turn.read``."""

    id: str
    name: str
    size: int
    sha256: str
    content_type: str


class Passage(BaseModel, frozen=True):
    """A piece of a source that answers a query.

    Attributes:
        source: what it was taken from; ``history``: a message that has left the context.
        ordinal: its place in the source.
        score: orders the answers to one query, larger is better.
        session_id: ``ses_...``, whose it is.
    """

    source: str
    ordinal: int
    text: str
    score: float = 0.0
    session_id: str = ""  # not in what earlier versions have recorded


class Verdict(BaseModel, frozen=True):
    """What came of ``turn.approval``. Not granted: denied, or (``timed_out``) nobody answered in time."""

    granted: bool
    comment: str | None = None
    by: str | None = None  # the API key behind the answer, if it came over the API
    timed_out: bool = False


class CauseKind(StrEnum):
    """What others bring to a waiting turn."""

    SIGNAL = "signal"
    APPROVAL = "approval"
    CHILD = "child"
    CALL = "call"  # the settling of a tool call that was in doubt


@dataclass(frozen=True, slots=True)
class Cause:
    """What a branch waits for: signals by their name, the others by their id."""

    kind: CauseKind
    name: str = ""
    id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What has come. ``id`` is the signal's own; ``value`` joins wait.ended."""

    cause: Cause
    id: UUID
    value: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Look:
    """What one look has found, all of it as of one moment; signals oldest first.

    ``mail_seq`` is the session's as of that moment; ``urgent``: somebody wants the turn to end, which is heard elsewhere.
    """

    mail_seq: int
    urgent: bool
    found: Sequence[Found]


@dataclass(frozen=True, slots=True)
class Question:
    """An approval to be opened."""

    id: UUID
    name: str
    show: Json
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewChild:
    """A turn to be started by this one, in a session of its own."""

    id: UUID
    session_id: UUID
    agent: str
    input: Json
    input_artifact: UUID | None  # where it is, if it is too large for a row
    queue: str | None  # None: the agent's own
    deadline: datetime
    metadata: Mapping[str, str]
    definition: object | None = None  # the agent itself, where it is at hand
    instead_of: UUID | None = None  # on a retry: the child that the turn before has started, in this session


class Port(Protocol):
    """What an execution needs from whoever runs it."""

    clock: Clock
    step_timeout: timedelta
    inline: int
    max_event: int
    max_value: int
    lease_ttl: timedelta
    underway: UnderWay
    observer: Observer
    pace: Pace

    async def append(self, events: Sequence[NewEvent]) -> None:
        """Record facts durably; raises LeaseLost."""

    async def ready(self) -> None:
        """Wait until a step may start."""

    def emit(self, text: str, *, step: str, attempt: int) -> None:
        """Publish a delta: lossy, never awaited."""

    async def back_off(self, seconds: float) -> None:
        """Let the pause between two tries of a step pass."""

    async def sleep_until(self, due: datetime) -> None:
        """Return at ``due`` or later."""

    async def until(self, future: asyncio.Future[Any], due: datetime | None) -> None:
        """Return when ``future`` is done, or at ``due`` or later."""

    async def look(self, causes: Mapping[Cause, int]) -> Look:
        """What has come of what the turn waits for; of each cause at most so many."""
        ...

    async def ask(self, question: Question) -> None:
        """Open an approval, unless it is there; raises LeaseLost."""

    async def close(self, approvals: Sequence[UUID]) -> None:
        """Take no answer any more to those that have none; raises LeaseLost."""

    async def spawn(self, child: NewChild) -> UUID:
        """Start a turn, unless it is there; raises LeaseLost, UnknownAgent, InvalidInput.

        The turn that is there now: on a retry it may be the child of before, if that has not ended without success.
        """
        ...

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run blocking code in a bounded pool."""
        ...

    async def begin_call(self, call: NewCall, *, over: int | None = None) -> int | ToolCallRecord:
        """Start a call in the ledger, for the holder of the lease: how often it was started by now, or what stands there
        instead of another start. ``over``: the epoch of a start of which it is proven that it comes to nothing.

        Raises:
            LeaseLost: this is not the holder any more.
        """
        ...

    async def end_call(self, call: NewCall, outcome: CallOutcome, *, epoch: int | None = None) -> ToolCallRecord | None:
        """Record how a call ended, whoever holds the lease; what stands in the ledger, if it is something else. ``epoch``: of
        the start that it ends, if that was another's."""
        ...

    async def look_up_call(self, call_id: UUID) -> ToolCallRecord | None:
        """What stands in the ledger."""
        ...

    async def starter_gone(self, call_id: UUID, *, epoch: int) -> bool:
        """Whether the start under ``epoch`` can come to nothing any more."""
        ...

    def may_call(self, *, since: float) -> bool:
        """Whether the lease that stood at ``since`` (monotonic seconds) has not been taken away yet. From any thread."""
        ...

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes | Spooled, content_type: str) -> Artifact:
        """Store bytes under an id that depends on them; the same id again is the same artifact.

        Raises:
            Unavailable: the store, or Postgres, is away.
            Conflict: the id has other bytes already.
        """
        ...

    async def get_artifact(self, artifact_id: UUID) -> bytes:
        """All of it, verified; raises NotFound, ArtifactCorrupt, Unavailable."""
        ...

    def stream_artifact(
        self, artifact_id: UUID, *, start: int, end: int | None, pause: Callable[[Unavailable], Awaitable[None]]
    ) -> AsyncGenerator[bytes, None]:
        """Some of it in chunks; ``pause`` lets time pass while something is away. Raises NotFound, ArtifactCorrupt."""
        ...

    async def index(self, source: str, texts: Sequence[str], /, *, ordinals: Sequence[int] | None = None) -> int:
        """Keep passages of the session, numbered from 0 or by ``ordinals``, unless they are there; raises LeaseLost."""
        ...

    async def recall(
        self, query: str, *, sources: Sequence[str] | None, limit: int, scope: RecallScope
    ) -> list[Passage]:
        """The passages of the session, or of all sessions of its tenant, that answer best."""
        ...
