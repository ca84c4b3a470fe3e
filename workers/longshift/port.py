"""How a running turn reaches the world: the journal for facts, Redis for deltas, the object store for bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, NoReturn, TypeVar
from uuid import UUID

from longshift.artifacts import Spooled
from longshift.catalogue import Draft, Elsewhere
from longshift.clock import Clock
from longshift.cold import Cold
from longshift.context import Tiers
from longshift.contract import Artifact, Cause, Look, NewChild, Passage, Question, RecallScope
from longshift.db import approvals, children, tool_calls
from longshift.db.database import Database
from longshift.db.files import named_in
from longshift.db.passages import Reach
from longshift.errors import LeaseLost, Unavailable
from longshift.events import NewEvent, encode
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.ledger import Ledger
from longshift.mailbox import Mailbox
from longshift.mailroom import Mailroom
from longshift.model import ArtifactRecord, CallOutcome, NewCall, NewTurn, Prefix, ToolCallRecord, TurnRecord, show_id
from longshift.notices import Notices
from longshift.observing import Observer, Observers
from longshift.retrieval import Retrieval
from longshift.underway import UnderWay
from longshift.watch import Pace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outside:
    """What all turns of a worker share."""

    db: Database
    journal: Journal
    notices: Notices
    mailroom: Mailroom
    mailbox: Mailbox
    cold: Cold
    retrieval: Retrieval
    clock: Clock
    step_threads: ThreadPoolExecutor
    agent_threads: ThreadPoolExecutor
    step_timeout: timedelta
    inline: int
    max_event: int
    max_value: int
    ledger: Ledger
    underway: UnderWay
    lease_ttl: timedelta
    lock_grace: timedelta
    is_beating: Callable[[], bool]  # whether the worker's heart was heard less than ``lock_grace`` ago; from any thread
    observers: Observers = field(default_factory=Observers)
    tiers: Tiers = field(default_factory=Tiers)  # where contexts come from besides Postgres

    async def asking(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Call ``function(db, ...)`` until Postgres answers; the journal says when it is back."""
        while True:
            try:
                return await function(self.db, *args, **kwargs)
            except Unavailable as error:
                self.journal.suspect(str(error))
                await self.journal.ready()


class TurnPort:
    """The ``Port`` of one turn on a worker."""

    def __init__(self, outside: Outside, lease: Lease, record: TurnRecord, *, observer: Observer) -> None:
        self._outside = outside
        self._lease = lease
        self._record = record
        self.clock = outside.clock
        self.step_timeout = outside.step_timeout
        self.inline, self.max_event, self.max_value = outside.inline, outside.max_event, outside.max_value
        self.lease_ttl = outside.lease_ttl
        self.underway = outside.underway
        self.observer = observer
        self.pace = Pace(outside.clock, between=outside.step_timeout)

    async def append(self, events: Sequence[NewEvent]) -> None:
        await self._outside.journal.append(self._lease, events)
        self.pace.move()
        self._outside.notices.log_grew(self._lease.session_id, self._lease.seq)

    async def ready(self) -> None:
        await self._outside.journal.ready()

    def emit(self, text: str, *, step: str, attempt: int) -> None:
        self.pace.move()
        self._outside.notices.delta(
            text, session_id=self._record.session_id, turn_id=self._record.id, step=step, attempt=attempt
        )

    async def back_off(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def sleep_until(self, due: datetime) -> None:
        await asyncio.sleep((due - self.clock.now()).total_seconds())

    async def until(self, future: asyncio.Future[Any], due: datetime | None) -> None:
        seconds = max(0.0, (due - self.clock.now()).total_seconds()) if due is not None else None
        await asyncio.wait({future}, timeout=seconds)

    async def look(self, causes: Mapping[Cause, int]) -> Look:
        mailroom = self._outside.mailroom
        return await self._outside.asking(lambda _: mailroom.look(self._lease.session_id, causes))

    async def ask(self, question: Question) -> None:
        held = await self._outside.asking(
            approvals.ask,
            question.id,
            claim=self._lease.claim,
            turn_id=self._record.id,
            name=question.name,
            show=question.show,
            expires_at=question.expires_at,
        )
        if not held:
            self._lost()

    async def close(self, ids: Sequence[UUID]) -> None:
        if not await self._outside.asking(approvals.close, ids, claim=self._lease.claim):
            self._lost()

    async def spawn(self, child: NewChild) -> UUID:
        turn = await self._outside.asking(lambda _: self._child(child))
        session, holder = child.session_id, self._lease.claim
        try:
            if child.instead_of is not None:
                turn_id, ring = await self._outside.asking(
                    children.retry, turn, child.instead_of, session_id=session, holder=holder, now=self.clock.now()
                )
            else:
                turn_id = turn.id
                ring = await self._outside.asking(children.spawn, turn, session_id=session, holder=holder)
        except LeaseLost:
            self._lost()
        for session_id, queue in ring:
            self._outside.notices.ring(session_id, queue)
        return turn_id

    async def _child(self, child: NewChild) -> NewTurn:
        """Validated like what a client submits."""
        catalogue = await self._outside.mailbox.catalogue(wanted=(child.agent, None))
        draft = Draft(agent=child.agent, input=child.input, deadline=child.deadline, metadata=child.metadata)
        turn = catalogue.new_turn(draft, now=self.clock.now())
        turn = replace(
            turn,
            id=child.id,
            parent_turn_id=self._record.id,
            queue=child.queue or turn.queue,
            traceparent=self.observer.traceparent,
        )
        if child.input_artifact is None:
            return turn
        return Elsewhere(child.input_artifact, frozenset(named_in(encode(child.input)))).of(turn)

    def _lost(self) -> NoReturn:
        self._outside.journal.lose(self._lease, fenced=True)
        raise LeaseLost(f"the lease on session {self._lease.session_id.hex} is gone")

    async def in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._outside.step_threads, function)

    async def begin_call(self, call: NewCall, *, over: int | None = None) -> int | ToolCallRecord:
        return await self._outside.ledger.begin(self._lease, call, over=over)

    async def end_call(self, call: NewCall, outcome: CallOutcome, *, epoch: int | None = None) -> ToolCallRecord | None:
        standing = await self._outside.ledger.end(self._lease, call, outcome, epoch=epoch)
        if standing is None and (self._lease.lost or self._lease.ended):  # whoever has it now may have given up on this
            for session_id, queue in await self._outside.asking(tool_calls.wake, self._lease.session_id):
                self._outside.notices.ring(session_id, queue)
        return standing

    async def look_up_call(self, call_id: UUID) -> ToolCallRecord | None:
        found = await self._outside.asking(tool_calls.standing, [call_id])
        return found.get(call_id)

    async def starter_gone(self, call_id: UUID, *, epoch: int) -> bool:
        return await self._outside.asking(tool_calls.starter_gone, call_id, epoch=epoch, lease_ttl=self.lease_ttl)

    def may_call(self, *, since: float) -> bool:
        """Nobody is declared dead whose heart was heard less than ``lock_grace`` ago."""
        outside = self._outside
        soon = self.clock.monotonic() - since < outside.lock_grace.total_seconds()
        return soon and not self._lease.lost and outside.journal.is_open and outside.is_beating()

    async def put_artifact(self, artifact_id: UUID, *, name: str, data: bytes | Spooled, content_type: str) -> Artifact:
        record, _ = await self._outside.cold.put(
            data,
            tenant_id=self._record.tenant_id,
            name=name,
            content_type=content_type,
            artifact_id=artifact_id,
            session_id=self._record.session_id,
        )
        return shown(record)

    async def get_artifact(self, artifact_id: UUID) -> bytes:
        return await self._outside.cold.read(
            artifact_id, tenant_id=self._record.tenant_id, session_id=self._record.session_id
        )

    async def stream_artifact(
        self, artifact_id: UUID, *, start: int, end: int | None, pause: Callable[[Unavailable], Awaitable[None]]
    ) -> AsyncGenerator[bytes, None]:
        cold, tenant, session = self._outside.cold, self._record.tenant_id, self._record.session_id
        record = None
        while record is None:
            try:
                record = await cold.find(artifact_id, tenant_id=tenant, session_id=session)
            except Unavailable as error:
                await pause(error)
        async with aclosing(cold.stream(record, start=start, end=end, pause=pause)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def index(self, source: str, texts: Sequence[str], /, *, ordinals: Sequence[int] | None = None) -> int:
        retrieval, numbers = self._outside.retrieval, range(len(texts)) if ordinals is None else ordinals
        claim = self._lease.claim
        if not await self._outside.asking(lambda _: retrieval.index(claim, texts, source=source, ordinals=numbers)):
            self._lost()
        return len(texts)

    async def recall(
        self, query: str, *, sources: Sequence[str] | None, limit: int, scope: RecallScope
    ) -> list[Passage]:
        record, retrieval = self._record, self._outside.retrieval
        reach = Reach(record.tenant_id, record.session_id if scope == "session" else None, sources)
        return await self._outside.asking(
            lambda _: retrieval.recall(query, reach=reach, session_id=record.session_id, limit=limit)
        )


def shown(record: ArtifactRecord) -> Artifact:
    """The pointer that agents and clients see."""
    return Artifact(
        id=show_id(Prefix.ARTIFACT, record.id),
        name=record.name,
        size=record.size,
        sha256=record.sha256,
        content_type=record.content_type,
    )
