"""What an execution needs from whoever runs it, and the records that pass between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel

from longshift.clock import Clock
from longshift.events import NewEvent

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

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes, content_type: str) -> Artifact: ...

    async def get_artifact(self, artifact_id: UUID) -> bytes: ...

    async def index(self, source: str, texts: Sequence[str], /) -> int: ...

    async def recall(self, query: str, *, sources: Sequence[str] | None, limit: int) -> list[Passage]: ...
