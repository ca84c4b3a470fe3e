"""What one worker of a turn under test reaches: a list for the log, a dict for artifacts, counted words for search."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from longshift.artifacts import CHUNK, Spooled, check_range
from longshift.config import Config
from longshift.contract import (
    Artifact,
    Cause,
    CauseKind,
    Found,
    Look,
    NewChild,
    Passage,
    Question,
    RecallScope,
)
from longshift.errors import Conflict, ControlFlow, LeaseLost, NotFound, Unavailable, UsageError
from longshift.events import NewEvent, encode
from longshift.model import (
    CallOutcome,
    CallStatus,
    Json,
    NewCall,
    Prefix,
    ToolCallRecord,
    TurnRecord,
    parse_id,
    show_id,
)
from longshift.observing import Observer
from longshift.offload import Pointer
from longshift.replay import derived_id
from longshift.testing.points import call_name
from longshift.testing.world import Delta, Fault, World
from longshift.underway import UnderWay
from longshift.watch import Pace

T = TypeVar("T")


TIMED_OUT: Mapping[str, Json] = {"reason": "timeout"}


async def _no_children(child: NewChild) -> Mapping[str, Json]:
    raise UsageError(f"nothing runs child {child.agent!r} here")


class Crashed(ControlFlow):
    """The worker is dead: nothing more becomes durable in this attempt."""


class Outside:
    """The ``Port`` of one attempt at a turn whose log is a list."""

    step_timeout = timedelta(minutes=10)
    lease_ttl: timedelta = Config.model_fields["lease_ttl"].default
    inline: int = Config.model_fields["inline"].default
    max_event: int = Config.model_fields["max_event"].default
    max_value: int = Config.model_fields["max_value"].default

    def __init__(self, world: World, *, epoch: int, threads: ThreadPoolExecutor) -> None:
        self.world, self.epoch = world, epoch
        self.clock = world.time.clock
        self.on_crash: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        self.run_child: Callable[[NewChild], Awaitable[Mapping[str, Json]]] = _no_children
        self.moves = 0  # grows with all that the agent asks for
        self.dead = False
        self.refused = False
        self.stopped = asyncio.Event()  # once it was: it stays set
        self._running = asyncio.Event()
        self._running.set()
        self._threads = threads
        self.underway = UnderWay(self.clock)
        self.observer = Observer()
        self.pace = Pace(self.clock, between=self.step_timeout)
        self.in_tools = 0  # calls whose code is running; it runs on while the worker is stopped
        world.workers[epoch] = self

    # -- faults

    async def running(self) -> None:
        """Wait while the process is stopped."""
        self.moves += 1
        await self._running.wait()

    async def awake(self) -> None:
        """The same; the dead do not return."""
        await self.running()
        if self.dead:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # its clean-up shall not wait for ever once more
                raise asyncio.CancelledError
            await asyncio.get_running_loop().create_future()

    def resume(self) -> None:
        self._running.set()

    async def _reach(self, point: str) -> None:
        match self.world.reach(point):
            case Fault.CRASH:
                self.dead = True
                raise Crashed
            case Fault.PAUSE:
                self._running.clear()
                self.stopped.set()
                await self.running()
            case _:
                pass

    async def write(self, event: NewEvent) -> None:
        """Make one event durable.

        Raises:
            Crashed: this worker dies before or after it.
            LeaseLost: another one has taken over.
        """
        if self.dead:
            raise Crashed
        await self.running()
        name = self.world.name(event)
        await self._reach(f"before {name}")
        self.world.deliver_again()
        try:
            self.world.write(event, name=name, epoch=self.epoch)
        except LeaseLost:
            self.refused = True
            self.on_lost()
            raise
        await self._reach(f"after {name}")

    # -- the port

    async def append(self, events: Sequence[NewEvent]) -> None:
        try:
            for (
                event
            ) in events:  # at once, as a worker's journal takes them: who is cancelled after this has recorded them
                await self.write(event)
        except Crashed:
            self.on_crash()
            await self.awake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def begin_call(self, call: NewCall, *, over: int | None = None) -> int | ToolCallRecord:
        async with self._recording(call_name("begin", call.place)):
            try:
                return self.world.begin_call(call, epoch=self.epoch, over=over)
            except LeaseLost:
                self.refused = True
                self.on_lost()
                raise
        raise AssertionError("the dead do not return")

    async def end_call(self, call: NewCall, outcome: CallOutcome, *, epoch: int | None = None) -> ToolCallRecord | None:
        async with self._recording(call_name("end", call.place)):
            return self.world.end_call(call, outcome, epoch=self.epoch if epoch is None else epoch)
        raise AssertionError("the dead do not return")

    @asynccontextmanager
    async def _recording(self, name: str) -> AsyncIterator[None]:
        """Around what the ledger records; a worker that dies before or after it does not return."""
        await asyncio.sleep(0)
        try:
            if self.dead:
                raise Crashed
            await self.running()
            await self._reach(f"before {name}")
            yield
            await self._reach(f"after {name}")
        except Crashed:
            self.on_crash()
            await self.awake()

    async def look_up_call(self, call_id: UUID) -> ToolCallRecord | None:
        await self.awake()
        return self.world.ledger.find(call_id)

    async def starter_gone(self, call_id: UUID, *, epoch: int) -> bool:
        await self.awake()
        starter = self.world.workers.get(epoch)
        dead = starter is not None and starter.dead
        if starter is not None and starter.in_tools and not dead:  # this clock jumps, that code takes the time it takes
            await asyncio.sleep(0)
            return False
        return self.world.ledger.starter_gone(
            call_id, epoch=epoch, dead=dead, lease_ttl=self.lease_ttl, now=self.clock.now()
        )

    def may_call(self, *, since: float) -> bool:
        return not (self.dead or self.refused or self.stopped.is_set())

    async def end_calls(self) -> None:
        """The dead do nothing more; all others end what they have begun."""
        if not self.dead:
            await self.underway.idle()
        await self.underway.drop()

    async def ready(self) -> None:
        await asyncio.sleep(0)
        await self.awake()

    def emit(self, text: str, *, step: str, attempt: int) -> None:
        self.world.deltas.append(Delta(text, step, attempt))

    async def back_off(self, seconds: float) -> None:
        await self.awake()
        self.world.time.jump(self.clock.now() + timedelta(seconds=seconds))
        await asyncio.sleep(0)

    async def sleep_until(self, due: datetime) -> None:
        await self.world.time.sleep_until(due)
        await self.awake()

    async def until(self, future: asyncio.Future[Any], due: datetime | None) -> None:
        await self.world.time.sleep_until(due, unless=future)
        await self.awake()

    async def look(self, causes: Mapping[Cause, int]) -> Look:
        await asyncio.sleep(0)
        await self.awake()
        return Look(
            0, urgent=False, found=[found for cause, most in causes.items() for found in self._came(cause, most)]
        )

    def _came(self, cause: Cause, most: int) -> list[Found]:
        post = self.world.post
        match cause.kind:
            case CauseKind.SIGNAL:
                signals = [(i, payload) for i, (name, payload) in post.mail.items() if name == cause.name]
                return [Found(cause, i, {"reason": "signal", "payload": payload}) for i, payload in signals[:most]]
            case CauseKind.APPROVAL if cause.id in post.decided:
                said = post.decided[cause.id]
                told = (
                    {"reason": "answer", **said.model_dump()} if said is not None and not said.timed_out else TIMED_OUT
                )
                return [Found(cause, cause.id, told)]
            case CauseKind.CALL if cause.id is not None:
                call = self.world.ledger.find(cause.id)
                if call is not None and call.status not in (CallStatus.STARTED, CallStatus.UNKNOWN):
                    return [Found(cause, cause.id, _ended(call))]
            case CauseKind.CHILD if cause.id in post.children:
                return [Found(cause, cause.id, post.children[cause.id])]
        return []

    async def ask(self, question: Question) -> None:
        await self._fenced(f"approval {question.name}")
        self.world.post.ask(question)

    async def close(self, approvals: Sequence[UUID]) -> None:
        await self._fenced("end of an approval")
        self.world.post.close(approvals)

    async def spawn(self, child: NewChild) -> UUID:
        await self._fenced(f"child {child.agent}")
        if child.instead_of is not None and self.world.has_succeeded(child.instead_of):
            return child.instead_of
        if child.id not in self.world.post.children:
            ended = await self.run_child(child)
            await self._fenced(f"child {child.agent}")
            self.world.post.children[child.id] = ended
        return child.id

    async def _fenced(self, what: str) -> None:
        """As the lease decides it in Postgres."""
        await self.awake()
        try:
            self.world.check(what, epoch=self.epoch)
        except LeaseLost:
            self.refused = True
            self.on_lost()
            raise

    async def in_thread(self, function: Callable[[], T]) -> T:
        await self.awake()
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes | Spooled, content_type: str) -> Artifact:
        await self.awake()
        identity = show_id(Prefix.ARTIFACT, artifact_id)
        whole = data if isinstance(data, bytes) else data.whole()
        if self.world.artifacts.get(identity, whole) != whole:
            raise Conflict(f"artifact {identity} has other bytes, and never changes: give new ones an id of their own")
        self.world.artifacts[identity] = self.world.ledger.artifacts[identity] = self.world.kept[name] = whole
        sha256 = hashlib.sha256(whole).hexdigest()
        return Artifact(id=identity, name=name, size=len(whole), sha256=sha256, content_type=content_type)

    async def get_artifact(self, artifact_id: UUID) -> bytes:
        await self.awake()
        for identity, data in (self.world.ledger.artifacts | dict(self.world.artifacts)).items():
            if parse_id(Prefix.ARTIFACT, identity) == artifact_id:
                return data
        raise NotFound(f"there is no artifact {show_id(Prefix.ARTIFACT, artifact_id)}")

    async def stream_artifact(
        self, artifact_id: UUID, *, start: int, end: int | None, pause: Callable[[Unavailable], Awaitable[None]]
    ) -> AsyncGenerator[bytes, None]:
        check_range(start, end)
        wanted = (await self.get_artifact(artifact_id))[start:end]
        for first in range(0, len(wanted), CHUNK):
            yield wanted[first : first + CHUNK]

    async def index(self, source: str, texts: Sequence[str], /, *, ordinals: Sequence[int] | None = None) -> int:
        await self._fenced(f"passages of {source}")
        session = show_id(Prefix.SESSION, self.world.record.session_id)
        for ordinal, text in zip(range(len(texts)) if ordinals is None else ordinals, texts, strict=True):
            self.world.keep(Passage(source=source, ordinal=ordinal, text=text, session_id=session))
        return len(texts)

    async def recall(
        self, query: str, *, sources: Sequence[str] | None, limit: int, scope: RecallScope
    ) -> list[Passage]:
        words, session = _words(query), show_id(Prefix.SESSION, self.world.record.session_id)
        found = [
            passage.model_copy(update={"score": score})
            for passage in self.world.passages
            if (scope == "tenant" or passage.session_id == session)
            and (sources is None or passage.source in sources)
            and (score := _score(words, passage.text)) > 0
        ]
        return sorted(found, key=lambda p: (-p.score, p.session_id, p.source, p.ordinal))[:limit]


def submitted(record: TurnRecord, artifacts: MutableMapping[str, bytes]) -> TurnRecord:
    """The turn as it is accepted: a large input goes to the artifacts."""
    data = encode(record.input).encode()
    if len(data) <= Outside.inline:
        return record
    identity = derived_id(record.id, "input")
    artifacts[show_id(Prefix.ARTIFACT, identity)] = data
    return replace(record, input=None, input_artifact=identity)


def _ended(call: ToolCallRecord) -> Mapping[str, Json]:
    """What a wait for the outcome of a call records of it."""
    return {
        "reason": "call",
        "status": call.status.value,
        "result": call.result,
        "error": call.error,
        "artifact": Pointer(call.artifact_id, 0, "").facts if call.artifact_id is not None else None,
        "note": call.note,
    }


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
