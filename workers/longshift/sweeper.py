"""The sweeper: maintenance in every worker, active in one (the leader, who holds a lock; see db/liveness.py).

    rescue    declare silent workers dead, release what they held, ring
    ring      sessions whose timer is due, as soon as it is, and ready ones whose wake-up was lost: never more than the free
              slots that no wake-up is on its way to
    promote   scheduled turns whose time has come
    tell      parents whose children have ended without anybody telling them
    expire    turns past their deadline
    forget    old idempotency keys, read mail and tombstones

Defaults are settings (``LONGSHIFT_SWEEP``, ``_RERING``, ``_LEASE_TTL``, ``_LOCK_GRACE``). What can go wrong: while no worker
lives, nothing is swept; while Postgres is away, nobody is declared dead, and the clock of suspicion starts anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from longshift.clock import Clock
from longshift.config import Config
from longshift.db import children, mail, upkeep
from longshift.db.database import Database
from longshift.db.upkeep import Verdict
from longshift.errors import Unavailable
from longshift.heartbeat import Heartbeat
from longshift.hot import Hot
from longshift.metrics import WorkerMetrics
from longshift.model import MailKind

logger = logging.getLogger(__name__)

PRECISION = timedelta(milliseconds=100)
"""Timers that are due within so long of each other are rung together."""
TRICKLE = 10
"""Sessions rung in a pass even while wake-ups are queued: one of those may have been lost for good."""
TRICKLE_AFTER = timedelta(seconds=30)
FORGET_EVERY = timedelta(minutes=5)
FORGET_AT_ONCE = 1000
KEYS_AFTER = timedelta(hours=24)
WORKERS_AFTER = timedelta(days=1)
"""A TTL, many times over: a tombstone protects against the claim of a worker that wakes from a long pause."""


class Sweeper:
    """Passes over the database for as long as this worker leads."""

    def __init__(
        self, db: Database, hot: Hot, *, heartbeat: Heartbeat, config: Config, clock: Clock, metrics: WorkerMetrics
    ) -> None:
        self._db = db
        self._hot = hot
        self._heartbeat = heartbeat
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self._last_forget = 0.0
        self._next_timer: timedelta | None = None

    async def run(self) -> None:
        """A pass, a pause, for ever; followers only pause. Within a pause timers are rung that become due."""
        while True:
            await self._pause()
            if self._heartbeat.leader:
                await self.sweep()

    async def _pause(self) -> None:
        end = self._clock.monotonic() + self._config.sweep.total_seconds()
        while (left := end - self._clock.monotonic()) > 0:
            timer, self._next_timer = self._next_timer, None
            due = max(PRECISION, timer).total_seconds() if timer is not None else left
            await asyncio.sleep(min(due, left))
            if due < left and self._heartbeat.leader:
                await self._guarded(self.ring)

    async def sweep(self) -> None:
        """One pass of every service; one that fails does not keep the others from their work."""
        for service in (self.rescue, self.promote, self.tell, self.expire, self.ring, self.forget):
            await self._guarded(service)

    async def _guarded(self, service: Callable[[], Awaitable[None]]) -> None:
        try:
            await service()
        except Unavailable as error:
            logger.warning("sweeper pass put off", extra={"reason": str(error)})
        except Exception:
            logger.exception("sweeper pass failed", extra={"service": service.__name__})

    async def rescue(self) -> None:
        """Only what this worker has watched without a break is believed to be silent."""
        since, seen = self._heartbeat.watching_since, self._heartbeat.seen_at
        if since is None or seen is None:
            return
        verdict = Verdict(self._config.lease_ttl, self._config.lock_grace, since, as_of=seen)
        dead = await upkeep.tombstone(self._db, verdict)
        released, rung = await upkeep.rescue(self._db)
        self._metrics.buried.inc(len(dead))
        self._metrics.rescued.inc(released)
        if dead or released:
            logger.warning("workers declared dead", extra={"workers": [w.hex for w in dead], "leases": released})
        await self._hot.ring(rung, first=True)

    async def promote(self) -> None:
        await self._hot.ring(await upkeep.promote(self._db))

    async def tell(self) -> None:
        await self._hot.ring(await children.tell_oldest(self._db))

    async def expire(self) -> None:
        overdue = await upkeep.overdue(self._db)
        if overdue:
            reason = "the turn's deadline has passed"
            rung = await mail.end_turns(self._db, overdue, tenant_id=None, kind=MailKind.EXPIRE, reason=reason)
            await self._hot.ring(rung)

    async def ring(self) -> None:
        queues, self._next_timer = await upkeep.ready(self._db)
        if not queues:
            return
        free = await upkeep.free_slots(self._db)
        out = await self._hot.backlog(queues)
        if out is None:  # Redis is away: ringing would only mark sessions as rung
            return
        for queue in queues:
            room = free.get(queue, 0) - out[queue]
            if room > 0:
                await self._ring(queue, patience=self._config.rering, limit=min(room, 5000))
            else:
                await self._ring(queue, patience=TRICKLE_AFTER, limit=TRICKLE)

    async def _ring(self, queue: str, *, patience: timedelta, limit: int) -> None:
        sessions = await upkeep.undispatched(self._db, queue=queue, patience=patience, limit=limit)
        if sessions:
            logger.info("rung again", extra={"queue": queue, "sessions": len(sessions)})
        await self._hot.ring((session_id, queue) for session_id in sessions)

    async def forget(self) -> None:
        now = self._clock.monotonic()
        if now - self._last_forget > FORGET_EVERY.total_seconds():
            rows = await upkeep.forget(
                self._db, keys_after=KEYS_AFTER, workers_after=WORKERS_AFTER, limit=FORGET_AT_ONCE
            )
            if rows < FORGET_AT_ONCE:  # else there may be more: the next pass goes on
                self._last_forget = now
