"""Group commit: the writes of all turns of a worker, one statement per round trip and kind.

    append()  start()  finish()  leave()          what turns call; each returns when its write is durable
        |        |         |        |
      lane     lane      lane     lane            one statement in flight each; what arrives meanwhile goes with the next

A session has at most one unacknowledged write; it is sent again **verbatim** after doubt, so that the database recognises
it by the ids of its events. A session that is missing from a statement's answer is looked up in a separate statement: its
event is there (it was our own retry), or the lease still stands (somebody had the row locked: again), or it is lost.

When Postgres does not answer, the journal closes: nothing is sent, turns wait in ``ready()`` before they start a step, and
finished results stay queued. The same holds when it answers but cannot store (its disk is full, it is read-only), and after
each lost connection, whoever used it. When it answers again, every lease is compared with the database (a failover may have
lost a tail) and one write that waits is tried; only if that is stored does the journal open.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from random import random
from typing import Any
from uuid import UUID

from longshift.clock import SYSTEM, Clock
from longshift.db import log
from longshift.db.database import Database, UniqueConflict
from longshift.db.log import Append, Done, Finish, Leave, Standing, Start, Write
from longshift.ending import end
from longshift.errors import InvalidInput, LeaseLost, Unavailable
from longshift.events import NewEvent
from longshift.lease import Entry, Lease
from longshift.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

RETRY_LOCKED = 0.01  # seconds before a write that met a locked session row is sent again
RECONNECT = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds before each attempt to reach Postgres again; the last repeats, until a write has been stored."""

Statement = Callable[[Database, Sequence[Any]], Awaitable[dict[log.Key, Done]]]
Item = tuple[Lease, Write]


class Lane:
    """Leases whose next write is of one kind."""

    def __init__(self, statement: Statement, *, kind: type[Write], metrics: WorkerMetrics) -> None:
        self.statement = statement
        name = kind.__name__.lower()
        self.rows, self.seconds = metrics.batch_rows.labels(name), metrics.batch_seconds.labels(name)
        self.leases: deque[Lease] = deque()
        self.filled = asyncio.Event()
        self.in_flight = False

    def put(self, lease: Lease) -> None:
        self.leases.append(lease)
        self.filled.set()


class Journal:
    """All log writes of one worker process."""

    def __init__(
        self,
        db: Database,
        *,
        batch_rows: int = 500,
        batch_bytes: int = 4 * 1024 * 1024,
        metrics: WorkerMetrics | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._db = db
        self._rows, self._bytes = batch_rows, batch_bytes
        self._metrics, self._clock = metrics or WorkerMetrics(), clock
        statements: dict[type[Write], Statement] = {
            Append: log.append,
            Start: log.start,
            Finish: log.finish,
            Leave: log.leave,
        }
        self._lanes = {kind: Lane(each, kind=kind, metrics=self._metrics) for kind, each in statements.items()}
        self._leases: dict[tuple[UUID, int], Lease] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._recovery: asyncio.Task[None] | None = None
        self._breaks = db.breaks  # of the connections, when the leases were last known to stand
        self._doubts = 0  # statements without an answer
        self._setbacks = 0  # attempts to reach Postgres since it last stored something
        db.on_break = self.suspect

    # -- life

    def start_lanes(self) -> None:
        self._tasks = [
            asyncio.create_task(self._run(lane), name=f"journal-{kind.__name__.lower()}")
            for kind, lane in self._lanes.items()
        ]

    async def close(self) -> None:
        """Stop writing; what is not yet durable was never acknowledged."""
        self._db.on_break = lambda _: None
        await end([*self._tasks, *([self._recovery] if self._recovery else [])])

    def hold(self, lease: Lease) -> None:
        """From now on the journal writes for this lease and watches over it."""
        if (other := self._leases.get(lease.key)) is not None:  # epochs repeat only where Postgres lost the first one
            self.lose(other)
        self._leases[lease.key] = lease

    def drop(self, lease: Lease) -> None:
        if self._leases.get(lease.key) is lease:
            del self._leases[lease.key]

    @property
    def held(self) -> list[Lease]:
        return list(self._leases.values())

    async def ready(self) -> None:
        """Wait while Postgres is away: no step and no effect starts without it."""
        await self._open.wait()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    # -- what turns call

    async def append(self, lease: Lease, events: Sequence[NewEvent]) -> None:
        """Record facts; they are durable when this returns.

        Raises:
            LeaseLost: another worker may hold the session.
            InvalidInput: Postgres refuses a value.
        """
        await self._submit(lease, Entry(asyncio.get_running_loop().create_future(), events=tuple(events)))

    async def write(self, lease: Lease, make: Callable[[int], Write]) -> Done:
        """Commit a Start, Finish or Leave; ``make`` is given the seq of its event.

        Raises:
            LeaseLost: another worker may hold the session.
        """
        return await self._submit(lease, Entry(asyncio.get_running_loop().create_future(), make=make))

    async def _submit(self, lease: Lease, entry: Entry) -> Done:
        if lease.lost or lease.ended:
            raise LeaseLost(f"the lease on session {lease.session_id.hex} is gone")
        lease.queue.append(entry)
        if not lease.busy:
            self._dispatch(lease)
        return await entry.future

    # -- lanes

    def _dispatch(self, lease: Lease) -> None:
        """Put the lease into the lane of its next write, unless it is there or there is none."""
        if not (lease.in_lane or lease.in_flight or lease.lost) and (kind := _next_kind(lease)) is not None:
            lease.in_lane = True
            self._lanes[kind].put(lease)

    async def _run(self, lane: Lane) -> None:
        while True:
            await lane.filled.wait()
            await self._open.wait()
            batch = self._take(lane)
            if not batch:
                continue
            lane.in_flight = True
            try:
                await self._commit(lane, batch)
            finally:
                lane.in_flight = False

    def _take(self, lane: Lane) -> list[Item]:
        """As many writes as fit into one statement, at least one."""
        batch: list[Item] = []
        rows = size = 0
        while lane.leases and rows < self._rows and size < self._bytes:
            lease = lane.leases.popleft()
            lease.in_lane = False
            if lease.lost:
                continue
            kind = _next_kind(lease)
            if kind is None or self._lanes[kind] is not lane:  # a recovery found its write done while it waited here
                self._dispatch(lease)
                continue
            if lease.unacked is None:
                lease.unacked = self._compose(lease)
            lease.in_flight = True
            write = lease.unacked[0]
            batch.append((lease, write))
            rows += len(write.events)
            size += sum(len(event.payload) for event in write.events)
        if not lane.leases:
            lane.filled.clear()
        return batch

    def _compose(self, lease: Lease) -> tuple[Write, list[Entry]]:
        """Fix the next write of a lease: one control write, or all appends that wait at the head of its queue."""
        head = lease.queue[0]
        if head.make is not None:
            lease.queue.popleft()
            return head.make(lease.seq + 1), [head]
        entries: list[Entry] = []
        size = 0
        while lease.queue and lease.queue[0].make is None and (not entries or size < self._bytes):
            entry = lease.queue.popleft()
            entries.append(entry)
            size += entry.size
        events = tuple(event for entry in entries for event in entry.events)
        return Append(lease.claim, lease.seq + 1, events), entries

    async def _commit(self, lane: Lane, batch: list[Item]) -> None:
        sent = self._clock.monotonic()
        try:
            with self._db.since(self._breaks):
                answers = await lane.statement(self._db, [write for _, write in batch])
        except Unavailable as error:
            self._doubt(batch, error)
            return
        except Exception as error:  # noqa: BLE001 - a bug must not end the lane, on which every turn of the worker depends
            await self._isolate(lane, batch, error)
            return
        self._setbacks = 0
        lane.seconds.observe(self._clock.monotonic() - sent)
        lane.rows.observe(sum(len(write.events) for _, write in batch))
        missing = []
        for lease, write in batch:
            done = answers.get(write.key)
            if done is None:
                missing.append((lease, write))
            else:
                self._acknowledge(lease, done)
        if missing:
            await self._settle(missing)

    async def _isolate(self, lane: Lane, batch: list[Item], error: Exception) -> None:
        """One bad row refused the whole statement: halve it until the row stands alone and fails alone."""
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._commit(lane, batch[:middle])
            await self._commit(lane, batch[middle:])
        elif isinstance(error, UniqueConflict):  # our own first try, committing meanwhile
            await self._settle(batch)
        elif isinstance(error, InvalidInput):
            self._refuse(batch[0][0], error)
        else:  # of the server or of ours, not of the agent: its turn shall not fail for it, but come again
            logger.error("write failed, turn dropped", exc_info=error)
            self.lose(batch[0][0])

    async def _settle(self, missing: list[Item]) -> None:
        """Find out why sessions are missing from an answer."""
        try:
            found = await log.standing(self._db, [(lease.claim, write.seq) for lease, write in missing])
        except Exception as error:
            if not isinstance(error, Unavailable):  # a bug, or one of the server's: it must not end the lane either
                logger.exception("writes without an answer cannot be looked up, turns are paused")
            self._doubt(missing, error)
            return
        for lease, write in missing:
            self._judge(lease, write, found[lease.key], delay=RETRY_LOCKED)

    def _doubt(self, batch: list[Item], error: Exception) -> None:
        """No answer: each of these writes may have happened or not. ``_recover`` will find out."""
        for lease, _ in batch:
            lease.in_flight = False
        self._doubts += 1
        self.suspect(str(error))

    def _judge(self, lease: Lease, write: Write, standing: Standing, *, delay: float = 0) -> None:
        lease.in_flight = False
        if lease.lost:  # given up while the statement was under way
            return
        if standing.event_id == write.events[0].id:
            self._acknowledge(lease, _done_anyway(write, standing))
        elif standing.held and standing.event_id is None and standing.last_seq == lease.seq:
            asyncio.get_running_loop().call_later(delay, self._dispatch, lease)
        else:
            self.lose(lease, fenced=True)

    # -- outcomes

    def _acknowledge(self, lease: Lease, done: Done) -> None:
        lease.in_flight = False
        if lease.lost:
            return
        assert lease.unacked is not None
        write, entries = lease.unacked
        lease.unacked = None
        if not (isinstance(write, Start) and not done.flag):
            lease.acknowledge(write.seq, write.events)
        if isinstance(write, Leave) or (isinstance(write, Finish) and not done.flag):
            lease.ended = True
            self.drop(lease)
        for entry in entries:
            if not entry.future.done():
                entry.future.set_result(done)
        self._dispatch(lease)

    def _refuse(self, lease: Lease, error: Exception) -> None:
        """A value cannot be stored. Merged appends are tried one by one, so that only the bad one fails."""
        lease.in_flight = False
        if lease.lost:
            return
        assert lease.unacked is not None
        write, entries = lease.unacked
        if len(entries) > 1:
            first, *rest = entries
            lease.unacked = (Append(lease.claim, write.seq, tuple(first.events)), [first])
            lease.queue.extendleft(reversed(rest))
        else:
            lease.unacked = None
            if not entries[0].future.done():
                entries[0].future.set_exception(error)
        self._dispatch(lease)

    def lose(self, lease: Lease, *, fenced: bool = False) -> None:
        """The lease is gone: everything that waits on it learns so. ``fenced``: found out by a write that Postgres refused."""
        if lease.lost:
            return
        if fenced:
            self._metrics.fenced.inc()
        lease.lost, lease.in_flight = True, False
        self.drop(lease)
        entries = [*(lease.unacked[1] if lease.unacked else ()), *lease.queue]
        lease.unacked = None
        lease.queue.clear()
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(LeaseLost(f"the lease on session {lease.session_id.hex} is gone"))
        if not lease.ended:
            logger.warning("lease lost", extra={"session_id": lease.session_id.hex, "epoch": lease.claim.epoch})
            if lease.on_lost is not None:
                lease.on_lost()

    # -- outages

    def suspect(self, reason: str) -> None:
        """Postgres may be away: close, and open again once every lease has been compared with it."""
        self._open.clear()
        if self._recovery is None or self._recovery.done():
            logger.warning("postgres does not answer, turns are paused", extra={"reason": reason})
            # in a context of its own: the one of a statement that broke would refuse every connection after the break
            self._recovery = asyncio.create_task(self._recover(), name="journal-recovery", context=Context())

    async def _recover(self) -> None:
        while True:
            wait = RECONNECT[min(self._setbacks, len(RECONNECT) - 1)]
            self._setbacks += 1
            await asyncio.sleep(wait * (1 + random() / 2))  # workers shall not come back all at once
            if any(lane.in_flight for lane in self._lanes.values()):
                continue  # their answers, or their time-outs, are still to come
            held = self.held
            try:
                if await self._stands(held) and await self._stores():
                    break
            except Exception:  # a journal that stays closed would pause this worker for ever
                logger.exception("leases cannot be compared with postgres, turns stay paused")
        self._open.set()
        logger.warning("postgres answers again", extra={"held": len(held), "kept": len(self._leases)})

    async def _stands(self, held: Sequence[Lease]) -> bool:
        """Compare each lease with the database; False if that does not answer."""
        breaks = self._db.breaks
        places = [(lease.claim, lease.unacked[0].seq if lease.unacked else lease.seq) for lease in held]
        try:
            with self._db.since(breaks):
                found = await log.standing(self._db, places)
        except Unavailable:
            return False
        self._breaks = breaks
        for lease in held:
            self._compare(lease, found[lease.key])
        return True

    async def _stores(self) -> bool:
        """Try one write that waits: a Postgres with a full disk still reads, and opening for it would start steps whose
        results could not be recorded."""
        waiting = next((lease for lease in self.held if lease.unacked is not None), None)
        if waiting is None or waiting.unacked is None:
            return True
        doubts, write = self._doubts, waiting.unacked[0]
        waiting.in_flight = True
        await self._commit(self._lanes[type(write)], [(waiting, write)])
        return self._doubts == doubts

    def _compare(self, lease: Lease, standing: Standing) -> None:
        if lease.lost:
            return
        if lease.unacked is not None:
            self._judge(lease, lease.unacked[0], standing)
        elif not standing.held or (standing.last_seq, standing.last_event_id) != (lease.seq, lease.event_id):
            self.lose(lease)


def _next_kind(lease: Lease) -> type[Write] | None:
    if lease.unacked is not None:
        return type(lease.unacked[0])
    if not lease.queue:
        return None
    head = lease.queue[0]
    return Append if head.make is None else type(head.make(0))


def _done_anyway(write: Write, standing: Standing) -> Done:
    """The answer to a write whose reply was lost: ring once too often rather than never."""
    return Done(flag=standing.held if isinstance(write, Finish) else True, more=isinstance(write, Finish))
