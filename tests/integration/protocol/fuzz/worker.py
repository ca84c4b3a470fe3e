"""A worker: the real journal and the real statements, and a turn that does nothing but steps, waits and ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from sqlalchemy import text

from longshift.db import leases, log
from longshift.db.liveness import HEARTBEAT, REGISTER
from longshift.errors import LeaseLost, Unavailable
from longshift.events import Kind, NewEvent
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.model import TurnRecord, TurnStatus, new_id
from tests.integration.protocol.fuzz.faults import FaultyDatabase

if TYPE_CHECKING:
    from tests.integration.protocol.fuzz.world import World

T = TypeVar("T")
CAPACITY = 20
MAIL = text("SELECT kind FROM mail WHERE session_id = :session AND turn_id = :turn AND consumed_at IS NULL")
SIGNAL = text("SELECT id FROM mail WHERE session_id = :session AND name = :name")
ALIVE = {
    "running": 0,
    "loop_age": timedelta(0),
    "draining": False,
    "want_leader": False,
    "leader": 0,
    "watching_since": None,
    "condition": "ok",
    "complaint": None,
    "stuck_after": timedelta(seconds=30),
}
ROW = {
    "host": "here",
    "pid": 1,
    "queues": ["default"],
    "capacity": CAPACITY,
    "lock_key": None,
    "process": None,
    "isolated": False,
    "version": None,
    "revision": None,
    "serves": "[]",
}
ENDS = {"cancel": (Kind.TURN_CANCELLED, TurnStatus.CANCELLED), "expire": (Kind.TURN_EXPIRED, TurnStatus.EXPIRED)}


class Worker:
    """One process after another: each crash, and some verdicts, begin a new life with an empty memory."""

    def __init__(self, world: World) -> None:
        self.world, self.chaos, self.witness = world, world.chaos, world.witness
        self.plan = world.plan
        self.db = FaultyDatabase(world.url, world.chaos)
        self.id = new_id()
        self.journal = Journal(self.db)
        self.tasks: set[asyncio.Task[None]] = set()
        self.claiming = asyncio.Lock()

    async def run(self) -> None:
        await self._be_born()
        try:
            async with asyncio.TaskGroup() as group:
                for loop in (self._heartbeat, self._claim, self._reconcile, self._misfortune):
                    group.create_task(loop())
        finally:
            await self._die()
            await self.db.close()

    # -- life

    async def _be_born(self) -> None:
        self.id = new_id()
        await self.world.clean.execute(
            REGISTER,
            {"id": self.id} | ROW,
        )
        self.journal.start_lanes()

    async def _die(self) -> None:
        """A crash: nothing is said, everything in memory is gone."""
        tasks, self.tasks = self.tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.journal.close()
        self.journal = Journal(self.db)

    async def _misfortune(self) -> None:
        while not self.world.stopping:
            await asyncio.sleep(0.1)
            if self.chaos.chance(self.plan.pauses):
                self.chaos.stats["paused past the TTL"] += 1
                self.db.gate.clear()
                await asyncio.sleep(self.chaos.ttl * (1.2 + self.chaos.random.random() * 2))
                self.db.gate.set()
            elif self.chaos.chance(self.plan.crashes):
                self.chaos.stats["crashed"] += 1
                await self._die()
                await self._be_born()

    async def _heartbeat(self) -> None:
        while not self.world.stopping:
            await asyncio.sleep(self.chaos.ttl / 6)
            for lane in (task for task in self.journal._tasks if task.done() and not task.cancelled()):
                self.witness.violated("a lane of the journal ended", lane)
            try:
                rows = await self.db.fetch(HEARTBEAT, ALIVE | {"id": self.id})
            except Unavailable:
                continue
            if not rows:
                await self._found_dead()

    async def _found_dead(self) -> None:
        """A real worker drops its turns; here these may go on, as stale as a writer can be."""
        self.chaos.stats["found itself dead"] += 1
        if self.chaos.chance(self.plan.obedience):
            for lease in self.journal.held:
                self.journal.lose(lease)
        old, self.id = self.id, new_id()
        assert old != self.id
        await self.world.clean.execute(
            REGISTER,
            {"id": self.id} | ROW,
        )

    async def _reconcile(self) -> None:
        while not self.world.stopping:
            await asyncio.sleep(0.2)
            try:
                standing = await leases.held(self.db, worker_id=self.id)
                async with self.claiming:
                    orphans = standing - {lease.key for lease in self.journal.held}
                freed = await leases.reconcile(self.db, worker_id=self.id, orphans=orphans)
            except Unavailable:
                continue
            self.chaos.stats["orphaned leases released"] += len(freed)
            for session_id, _ in freed:
                self.world.ring(session_id)

    async def _claim(self) -> None:
        while not self.world.stopping:
            if not self.journal.is_open:  # not ready(): a crash may replace the journal meanwhile
                await asyncio.sleep(0.02)
                continue
            ids = await self.world.rung(CAPACITY - len(self.tasks))
            try:
                async with self.claiming:
                    for one in await self._won(ids):
                        lease = Lease(one.claim)
                        self.journal.hold(lease)
                        self._spawn(self._session(lease, one.turn))
            except Unavailable:
                continue

    async def _won(self, ids: list[UUID]) -> list[leases.Won]:
        """Whoever hears nothing looks for suspects: there are no wards, and every worker may be one."""
        if ids:
            return await leases.claim(self.db, ids, worker_id=self.id)
        if len(self.tasks) >= CAPACITY:
            return []
        return await leases.claim_suspects(self.db, worker_id=self.id, queues=["default"], most=1)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # -- a session under a lease

    async def _session(self, lease: Lease, turn: TurnRecord | None) -> None:
        try:
            while turn is not None:
                if await self._start(lease, turn):
                    await self._turn(lease, turn)
                if lease.ended or lease.lost:
                    return
                turn = await self._read(lambda: leases.head(self.db, lease.session_id))
            await self._release(lease)
        except LeaseLost:
            self.chaos.stats["lease lost"] += 1
            await self._check_lost(lease)
        except Exception as error:
            self.witness.violated(f"a worker raised {type(error).__name__}", error)
        finally:
            self.journal.drop(lease)

    async def _check_lost(self, lease: Lease) -> None:
        """Whoever is told that his lease is lost must have lost it (or have been told to drop it)."""
        standing = (await log.standing(self.world.clean, [(lease.claim, lease.seq)]))[lease.key]
        if standing.held and lease.claim.worker_id == self.id:
            self.witness.violated("a rightful holder was told that his lease is lost", lease.key)

    async def _release(self, lease: Lease) -> None:
        self.chaos.stats["claimed in vain"] += 1
        lease.ended = True
        try:
            if await leases.release(self.db, lease.claim):
                self.world.ring(lease.session_id)
        except Unavailable:
            pass  # reconcile will find it

    async def _read(self, look: Callable[[], Awaitable[T]]) -> T:
        while True:
            await self.journal.ready()
            try:
                return await look()
            except Unavailable:
                await asyncio.sleep(0.01)

    async def _start(self, lease: Lease, turn: TurnRecord) -> bool:
        event = NewEvent(Kind.TURN_STARTED, turn.id, "{}")
        done = await self.journal.write(lease, lambda seq: log.Start(lease.claim, seq, (event,), turn.id, "1"))
        if done.flag:
            self.witness.acknowledged.add((lease.session_id, event.id))
        return done.flag

    async def _turn(self, lease: Lease, turn: TurnRecord) -> None:
        written = await self._read(lambda: log.read(self.db, lease.session_id, turn_ids=[turn.id]))
        done = {event.key for event in written if event.kind == Kind.STEP_COMPLETED}
        heard = any(event.kind == Kind.WAIT_ENDED for event in written)
        steps: int = turn.input["steps"]
        while True:
            seen = await self._read(lambda: leases.mail_seq(self.db, lease.session_id))
            urgent = await self._read(lambda: self._mail(lease, turn))
            todo = [name for name in map(str, range(steps)) if name not in done]
            if urgent is not None:
                return await self._finish(lease, turn, *ENDS[urgent])
            if turn.input["waits"] and not heard and len(todo) <= steps // 2:
                if not await self._read(lambda: self._signalled(lease, turn)):
                    await self.chaos.nap(self.plan.look)
                    return await self._leave(lease, turn, TurnStatus.WAITING, seen=seen)
                await self._append(lease, NewEvent(Kind.WAIT_ENDED, turn.id, "{}"))
                heard = True
            elif self.chaos.chance(0.02):
                return await self._interrupted(lease, turn, todo, seen=seen)
            elif todo:
                some = todo[: self.chaos.random.choice((1, 1, 2, 3))]
                if self.chaos.chance(self.plan.burst):
                    await self._step(lease, turn, *todo[:3])
                    some = todo[:3]
                else:
                    await asyncio.gather(*(self._step(lease, turn, name) for name in some))
                done.update(some)
            else:
                return await self._finish(lease, turn, Kind.TURN_SUCCEEDED, TurnStatus.SUCCEEDED)

    async def _mail(self, lease: Lease, turn: TurnRecord) -> str | None:
        rows = await self.db.fetch(MAIL, {"session": lease.session_id, "turn": turn.id})
        return rows[0].kind if rows else None

    async def _signalled(self, lease: Lease, turn: TurnRecord) -> bool:
        return bool(await self.db.fetch(SIGNAL, {"session": lease.session_id, "name": turn.id.hex}))

    async def _step(self, lease: Lease, turn: TurnRecord, *names: str) -> None:
        await self.journal.ready()
        for name in names:
            self.witness.step_starts(turn.id, name, epoch=lease.claim.epoch)
        await self.chaos.nap(self.plan.step)
        await self._append(lease, *(NewEvent(Kind.STEP_COMPLETED, turn.id, "{}", name) for name in names))
        for name in names:
            self.witness.step_recorded(turn.id, name, epoch=lease.claim.epoch)

    async def _append(self, lease: Lease, *events: NewEvent) -> None:
        await self.journal.append(lease, events)
        self.witness.acknowledged.update((lease.session_id, event.id) for event in events)

    async def _interrupted(self, lease: Lease, turn: TurnRecord, todo: list[str], *, seen: int) -> None:
        """A drain: a step's result may be on its way to the log when nobody waits for it any more."""
        self.chaos.stats["interrupted"] += 1
        if todo:
            event = NewEvent(Kind.STEP_COMPLETED, turn.id, "{}", todo[0])
            append = asyncio.create_task(self.journal.append(lease, [event]))
            await self.chaos.nap(0.005)
            append.cancel()
            await asyncio.gather(append, return_exceptions=True)
        await self._leave(lease, turn, TurnStatus.QUEUED, seen=seen)

    async def _leave(self, lease: Lease, turn: TurnRecord, status: TurnStatus, *, seen: int) -> None:
        kind = Kind.TURN_WAITING if status is TurnStatus.WAITING else Kind.TURN_RESCHEDULED
        event = NewEvent(kind, turn.id, "{}")
        until = datetime.now(UTC) + timedelta(seconds=0.3) if self.chaos.chance(0.2) else None
        done = await self.journal.write(
            lease, lambda seq: log.Leave(lease.claim, seq, (event,), turn.id, status, until, seen)
        )
        self.witness.acknowledged.add((lease.session_id, event.id))
        self.chaos.stats[f"left {status}"] += 1
        if done.flag:
            self.world.ring(lease.session_id)

    async def _finish(self, lease: Lease, turn: TurnRecord, kind: Kind, status: TurnStatus) -> None:
        event = NewEvent(kind, turn.id, "{}")
        keep = self.chaos.random.random() < 0.5
        done = await self.journal.write(
            lease, lambda seq: log.Finish(lease.claim, seq, (event,), turn.id, status, "null", None, keep)
        )
        self.witness.acknowledged.add((lease.session_id, event.id))
        self.witness.turn_ended(turn.id, str(status))
        if done.more and not done.flag:
            self.world.ring(lease.session_id)
