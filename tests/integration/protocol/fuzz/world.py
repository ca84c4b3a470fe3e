"""A fleet in one process: clients, workers and sweepers around one real Postgres, with faults; then the checker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TypeVar
from uuid import UUID

from sqlalchemy import text

from longshift.db import idempotency, intake, mail, upkeep
from longshift.db.database import Database
from longshift.errors import Unavailable
from longshift.model import MailKind, NewTurn, new_id
from tests.integration.protocol.fuzz.faults import Chaos, FaultyDatabase
from tests.integration.protocol.fuzz.witness import Witness, check
from tests.integration.protocol.fuzz.worker import Worker

T = TypeVar("T")
TTL = 0.6  # seconds
PATIENCE = timedelta(seconds=0.1)  # doubled five times at most, and so still shorter than ``Plan.stall``
CLIENTS = 2
OPEN = text("SELECT count(*) AS n, coalesce(sum(version), 0) AS moves FROM turns WHERE ended_at IS NULL")
NOW = text("SELECT clock_timestamp() AS now")


@dataclass(frozen=True)
class Plan:
    """How large a run is and what may happen in it."""

    turns: int = 600
    sessions: int = 60
    workers: int = 4
    seed: int = 1
    rate: float = 0.01  # of each kind of lost statement
    pauses: float = 0.02  # probability, each 0.1 s, that a worker stands still past the TTL
    crashes: float = 0.01  # the same for a crash
    obedience: float = 0.5  # of workers declared dead that drop their turns
    latency: float = 0.0  # seconds at most that an answer takes
    step: float = 0.01  # seconds at most that a step takes
    burst: float = 0.1  # of step groups that are one multi-row append
    look: float = 0.02  # seconds at most between looking for mail and suspending
    doubled: float = 0.05  # of wake-ups
    waits: float = 0.25  # of turns that wait for a signal in the middle
    pace: float = 0.008  # seconds between two submits of a client
    stall: float = 6.0  # seconds without any change after which the run is given up
    limit: float = 200.0  # seconds in all


class World:
    """One run."""

    def __init__(self, url: str, plan: Plan) -> None:
        self.url, self.plan = url, plan
        self.chaos = Chaos(plan.seed, TTL, plan.rate, plan.latency)
        self.witness = Witness()
        self.clean = Database(url, size=10)
        self.tenant = new_id()
        self.sessions = [new_id() for _ in range(plan.sessions)]
        self.stopping = False
        self._bell: asyncio.Queue[UUID] = asyncio.Queue()
        self._errands: set[asyncio.Task[None]] = set()

    async def run(self) -> Witness:
        workers = [Worker(self) for _ in range(self.plan.workers)]
        staff = [asyncio.create_task(worker.run()) for worker in workers]
        staff += [asyncio.create_task(self._sweep()) for _ in range(2)]
        try:
            await asyncio.wait_for(self._clients(), self.plan.limit / 2)
            self.chaos.calm = True
            await self._until_still()
        finally:
            self.stopping = self.chaos.calm = True
            await asyncio.gather(*self.chaos.zombies, return_exceptions=True)
            await asyncio.gather(*staff)
        await check(self.clean, self.witness)
        await self.clean.close()
        return self.witness

    async def _until_still(self) -> None:
        """Until every turn has ended, or nothing has moved for a while."""
        start = changed = time.monotonic()
        before = None
        while time.monotonic() < start + self.plan.limit / 2 and time.monotonic() < changed + self.plan.stall:
            await asyncio.sleep(0.1)
            [now] = await self.clean.fetch(OPEN)
            if now.n == 0 and not self.chaos.zombies:
                return
            if now != before:
                before, changed = now, time.monotonic()

    # -- wake-ups

    def ring(self, session_id: UUID) -> None:
        if self.chaos.chance(0.05):
            self.chaos.stats["wake-up dropped"] += 1
            return
        self._bell.put_nowait(session_id)
        if self.chaos.chance(self.plan.doubled):
            self._bell.put_nowait(session_id)

    async def rung(self, most: int) -> list[UUID]:
        """At most so many wake-ups that arrived together; none after a short while."""
        if most <= 0:
            await asyncio.sleep(0.01)
            return []
        try:
            ids = {await asyncio.wait_for(self._bell.get(), 0.05)}
        except TimeoutError:
            return []
        while len(ids) < most and not self._bell.empty():
            ids.add(self._bell.get_nowait())
        return list(ids)

    # -- clients

    async def _clients(self) -> None:
        db = FaultyDatabase(self.url, self.chaos, size=10)
        await asyncio.gather(*(self._client(db, n) for n in range(CLIENTS)))
        while self._errands:
            await asyncio.gather(*self._errands)
        await db.close()

    async def _client(self, db: Database, number: int) -> None:
        random = Random(f"{self.plan.seed}-{number}")
        for n in range(self.plan.turns // CLIENTS):
            waits = random.random() < self.plan.waits
            key = f"{number}-{n}"
            session, now = random.choice(self.sessions), datetime.now(UTC)
            turn = NewTurn(
                agent="fuzz",
                input={"steps": random.randrange(6), "waits": waits},
                queue="default",
                run_after=now + timedelta(seconds=0.2) if random.random() < 0.08 else None,
                deadline=now + timedelta(seconds=random.random() * 2) if random.random() < 0.04 else None,
            )
            turn_id = await self._submit(db, session, turn, key)
            self.witness.accepted.add(turn_id)
            if waits:
                self._errand(self._signal(db, session, turn_id, delay=random.random()))
            if random.random() < 0.08:
                self._errand(self._cancel(db, turn_id, delay=random.random()))
            if random.random() < 0.05:
                again = NewTurn(agent="fuzz", input=turn.input, queue="default")
                if await self._submit(db, session, again, key) != turn_id:
                    self.witness.violated("a repeated submit was answered differently", key)
            await asyncio.sleep(self.plan.pace)

    def _errand(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await ask()
            except Unavailable:
                await asyncio.sleep(0.02)

    async def _submit(self, db: Database, session: UUID, turn: NewTurn, key: str) -> UUID:
        accepted = await self._insist(
            lambda: intake.submit(
                db,
                [intake.Entry(turn, session)],
                tenant_id=self.tenant,
                resource_id=turn.id,
                now=datetime.now(UTC),
                lifetime=timedelta(days=7),
                idempotency=idempotency.Idempotency("turns", key, b"hash"),
            )
        )
        for session_id, _ in accepted.ring:
            self.ring(session_id)
        return accepted.resource_id

    async def _signal(self, db: Database, session: UUID, turn: UUID, *, delay: float) -> None:
        await asyncio.sleep(delay)
        sent = await self._insist(lambda: mail.signal(db, session, tenant_id=self.tenant, name=turn.hex, payload=None))
        self.ring(sent.ring[0][0])

    async def _cancel(self, db: Database, turn: UUID, *, delay: float) -> None:
        await asyncio.sleep(delay)
        asked = lambda: mail.end_turns(db, [turn], tenant_id=self.tenant, kind=MailKind.CANCEL, reason="fuzz")  # noqa: E731
        for session_id, _ in await self._insist(asked):
            self.ring(session_id)

    # -- upkeep

    async def _sweep(self) -> None:
        db = FaultyDatabase(self.url, self.chaos)
        since = (await self.clean.fetch(NOW))[0].now
        ttl = timedelta(seconds=TTL)
        verdict = upkeep.Verdict(ttl=ttl, lock_grace=ttl, trusted_since=since)
        while not self.stopping:
            await asyncio.sleep(0.1)
            try:
                await self._pass(db, verdict)
            except Unavailable:
                continue
        await db.close()

    async def _pass(self, db: Database, verdict: upkeep.Verdict) -> None:
        await upkeep.tombstone(db, verdict)
        released, ring = await upkeep.rescue(db)
        self.chaos.stats["rescued"] += released
        ring += await upkeep.promote(db)
        due = await upkeep.overdue(db)
        ring += await mail.end_turns(db, due, tenant_id=None, kind=MailKind.EXPIRE, reason="deadline")
        late = await upkeep.undispatched(db, queue="default", patience=PATIENCE, limit=200)
        for session_id in [*(session_id for session_id, _ in ring), *late]:
            self.ring(session_id)
