"""What an agent under test reaches: a list for the log, a dict for artifacts, counted words for full-text search."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from longshift.clock import Clock
from longshift.config import Config
from longshift.contract import Artifact, Passage
from longshift.errors import ControlFlow, NotFound
from longshift.events import Event, NewEvent
from longshift.model import Prefix, TurnRecord, parse_id, show_id

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delta:
    """What ``emit`` showed, and which step and try of it did."""

    text: str
    step: str
    attempt: int


class Crashed(ControlFlow):
    """The worker is dead: nothing more becomes durable in this attempt."""


class Time:
    """A clock that can jump ahead, and those who sleep until it does."""

    def __init__(self, clock: Clock) -> None:
        self._ahead = timedelta(0)
        self._sleepers: dict[asyncio.Future[None], datetime] = {}
        self.on_sleep: Callable[[], None] = lambda: None
        self.clock = Clock(now=lambda: clock.now() + self._ahead, monotonic=clock.monotonic)

    @property
    def next_due(self) -> datetime | None:
        return min(self._sleepers.values(), default=None)

    async def sleep_until(self, due: datetime) -> None:
        future = asyncio.get_running_loop().create_future()
        self._sleepers[future] = due
        self.on_sleep()
        try:
            await future
        finally:
            del self._sleepers[future]

    def jump(self, to: datetime) -> None:
        self._ahead += max(timedelta(0), to - self.clock.now())
        for future, due in self._sleepers.items():
            if due <= to and not future.done():
                future.set_result(None)


class Outside:
    """The ``Port`` of a turn whose log is a list."""

    step_timeout = timedelta(minutes=10)
    max_event: int = Config.model_fields["max_event"].default

    def __init__(
        self,
        record: TurnRecord,
        log: list[Event],
        artifacts: MutableMapping[str, bytes],
        time: Time,
        threads: ThreadPoolExecutor,
        crash_after: int | None,
    ) -> None:
        self.record, self.log, self.artifacts, self.time = record, log, artifacts, time
        self.clock = time.clock
        self.first = len(log)
        self.kept: dict[str, bytes] = {}
        self.deltas: list[Delta] = []
        self.on_crash: Callable[[], None] = lambda: None
        self._threads = threads
        self._crash_after = crash_after
        self._dead = False
        self._passages: dict[tuple[str, int], str] = {}

    @property
    def events(self) -> list[Event]:
        return self.log[self.first :]

    def revive(self) -> None:
        """Another worker takes over."""
        self._dead = False

    def write(self, event: NewEvent) -> None:
        """Make one event durable.

        Raises:
            Crashed: it was the last one before the crash, or comes after it.
        """
        if self._dead:
            raise Crashed
        self.log.append(
            Event(
                session_id=self.record.session_id,
                seq=len(self.log) + 1,
                id=event.id,
                epoch=self.record.attempts,
                turn_id=event.turn_id,
                kind=event.kind,
                key=event.key,
                payload=json.loads(event.payload),
                created_at=self.clock.now(),
            )
        )
        if len(self.events) == self._crash_after:
            self._dead = True
            raise Crashed

    async def append(self, events: Sequence[NewEvent]) -> None:
        await asyncio.sleep(0)
        try:
            for event in events:
                self.write(event)
        except Crashed:
            self.on_crash()
            await asyncio.get_running_loop().create_future()  # the dead do not return
        await asyncio.sleep(0)

    async def ready(self) -> None:
        await asyncio.sleep(0)

    def emit(self, text: str, *, step: str, attempt: int) -> None:
        self.deltas.append(Delta(text, step, attempt))

    async def back_off(self, seconds: float) -> None:
        self.time.jump(self.clock.now() + timedelta(seconds=seconds))
        await asyncio.sleep(0)

    async def sleep_until(self, due: datetime) -> None:
        await self.time.sleep_until(due)

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes, content_type: str) -> Artifact:
        identity = show_id(Prefix.ARTIFACT, artifact_id)
        self.artifacts[identity] = self.kept[name] = data
        sha256 = hashlib.sha256(data).hexdigest()
        return Artifact(id=identity, name=name, size=len(data), sha256=sha256, content_type=content_type)

    async def get_artifact(self, artifact_id: UUID) -> bytes:
        for identity, data in self.artifacts.items():
            if parse_id(Prefix.ARTIFACT, identity) == artifact_id:
                return data
        raise NotFound(f"there is no artifact {show_id(Prefix.ARTIFACT, artifact_id)}")

    async def index(self, source: str, texts: Sequence[str], /) -> int:
        for ordinal, text in enumerate(texts):
            self._passages.setdefault((source, ordinal), text)
        return len(texts)

    async def recall(self, query: str, *, sources: Sequence[str] | None, limit: int) -> list[Passage]:
        words = _words(query)
        found = [
            Passage(source=source, ordinal=ordinal, text=text, score=score)
            for (source, ordinal), text in self._passages.items()
            if (sources is None or source in sources) and (score := _score(words, text)) > 0
        ]
        return sorted(found, key=lambda p: (-p.score, p.source, p.ordinal))[:limit]


_WORD = re.compile(r"\w+")
_ENDING = re.compile(r"(?:ing|ies|ied|es|ed|s|e|y)$")
_COMMON = frozenset(
    "a an and are as at be by do does for from how in is it of on or that the to was what which with".split()  # noqa: SIM905
)


def _words(text: str) -> Counter[str]:
    """Roughly what Postgres' English full text makes of ``text``: lower case, no common words, no endings."""
    return Counter(_ENDING.sub("", word) for word in _WORD.findall(text.lower()) if word not in _COMMON)


def _score(query: Counter[str], text: str) -> float:
    words = _words(text)
    return round(sum(words[word] for word in query) / (1 + math.log(1 + words.total())), 6)
