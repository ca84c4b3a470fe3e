"""What an execution needs from whoever runs it, and the records that pass between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel

from longshift.clock import Clock
from longshift.events import NewEvent
from longshift.model import CallOutcome, NewCall, ToolCallRecord
from longshift.underway import UnderWay

T = TypeVar("T")


class Artifact(BaseModel, frozen=True):
    """A pointer to immutable bytes in the cold tier; pass it between steps, read it with ``turn.read``."""

    id: str
    name: str
    size: int
    sha256: str
    content_type: str


class Passage(BaseModel, frozen=True):
    """A piece of a source that answers a query; ``score`` orders them, larger is better."""

    source: str
    ordinal: int
    text: str
    score: float = 0.0


class Port(Protocol):
    """What an execution needs from whoever runs it."""

    clock: Clock
    step_timeout: timedelta
    max_event: int
    lease_ttl: timedelta
    underway: UnderWay

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

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes, content_type: str) -> Artifact: ...

    async def get_artifact(self, artifact_id: UUID) -> bytes: ...

    async def index(self, source: str, texts: Sequence[str], /) -> int: ...

    async def recall(self, query: str, *, sources: Sequence[str] | None, limit: int) -> list[Passage]: ...
