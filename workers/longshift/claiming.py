"""How a worker gets its sessions: by wake-ups, many at a time; or, in a ward, by looking for suspects, one group at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from longshift.clock import Clock
from longshift.config import Config
from longshift.db import leases
from longshift.db.database import Database
from longshift.errors import Unavailable
from longshift.heartbeat import Load
from longshift.journal import Journal
from longshift.runner import UNKNOWN_AGENT, Run
from longshift.vitals import Vitals

logger = logging.getLogger(__name__)

CLAIM_AT_ONCE = 200
LEAVE_ALONE = 2 * UNKNOWN_AGENT
"""For so long a worker does not claim a session again whose agent nobody has, so that whoever comes gets a chance."""
ADMIT_EVERY = timedelta(milliseconds=250)
SETTLED = timedelta(seconds=5)
"""A suspect that has run for so long without a crash makes room for others that wait: it goes back to where everybody runs.
Twice as long for each crash that it was in before the last one, so that what takes its time to crash is found, too."""
LONGEST_PATIENCE = 10
"""So often it doubles: to an hour and a half."""


class Holder(Protocol):
    """The worker for which is claimed.

    Attributes:
        claiming: held from a claim until what it won is in memory.
        running: how many sessions run there; ``runs``: which.
    """

    claiming: asyncio.Lock

    @property
    def worker_id(self) -> UUID: ...

    @property
    def draining(self) -> bool: ...

    @property
    def running(self) -> int: ...

    @property
    def runs(self) -> Sequence[Run]: ...

    def run(self, won: leases.Won, *, woken_at: float | None = None) -> None: ...

    async def leave_all(self) -> None: ...


@dataclass(slots=True)
class Wish:
    """The sessions of one wake-up, and who waits until they were tried."""

    sessions: list[UUID]
    woken_at: float  # monotonic
    tried: asyncio.Future[None]


class Claims:
    """Claims what wake-ups name, those together that come together, as long as there are free slots."""

    def __init__(
        self, holder: Holder, db: Database, journal: Journal, *, vitals: Vitals, config: Config, clock: Clock
    ) -> None:
        self._holder, self._db, self._journal, self._vitals = holder, db, journal, vitals
        self._capacity, self._clock = config.capacity, clock
        self._not_for_us: dict[UUID, float] = {}  # sessions that nobody serves, and until when we leave them alone
        self._wishes: deque[Wish] = deque()
        self._wished = asyncio.Event()
        self._freed = asyncio.Event()

    async def wake(self, session_ids: Sequence[UUID]) -> None:
        """Have the sessions tried; returns when they were."""
        wish = Wish(list(session_ids), self._clock.monotonic(), asyncio.get_running_loop().create_future())
        self._wishes.append(wish)
        self._wished.set()
        await wish.tried

    def freed(self) -> None:
        """There is a free slot again."""
        self._freed.set()

    def leave_alone(self, session_id: UUID) -> None:
        """Nobody serves its agent: let whoever comes have it."""
        self._not_for_us[session_id] = self._clock.monotonic() + LEAVE_ALONE.total_seconds()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._wished.wait()
            free = self._capacity - self._holder.running
            if free <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            await self._journal.ready()
            await self._claim(min(free, CLAIM_AT_ONCE))

    async def _claim(self, most: int) -> None:
        sessions, tried = self._together(most)
        if self._not_for_us:
            now = self._clock.monotonic()
            self._not_for_us = {session: until for session, until in self._not_for_us.items() if until > now}
            sessions = {session: at for session, at in sessions.items() if session not in self._not_for_us}
        holder = self._holder
        try:
            async with holder.claiming:
                if not holder.draining:
                    claimed = await leases.claim(self._db, sessions.keys(), worker_id=holder.worker_id)
                    self._vitals.claimed(len(claimed), of=len(sessions))
                    for won in claimed:
                        holder.run(won, woken_at=sessions[won.claim.session_id])
        except Unavailable as error:  # the sweeper rings again
            self._journal.suspect(str(error))
        finally:
            for wish in tried:
                if not wish.tried.done():
                    wish.tried.set_result(None)

    def _together(self, most: int) -> tuple[dict[UUID, float], list[Wish]]:
        """Sessions to claim in one statement, with when this worker was woken for them, and the wishes that are tried then."""
        sessions: dict[UUID, float] = {}
        tried: list[Wish] = []
        while self._wishes and len(sessions) < most:
            wish = self._wishes[0]
            while wish.sessions and len(sessions) < most:
                sessions.setdefault(wish.sessions.pop(), wish.woken_at)
            if not wish.sessions:
                tried.append(self._wishes.popleft())
        if not self._wishes:
            self._wished.clear()
        return sessions, tried


class Suspects:
    """In a ward: takes a group of suspects, then the next one; never two, or it would not be known which of them crashed."""

    def __init__(
        self, holder: Holder, db: Database, journal: Journal, *, load: Load, config: Config, clock: Clock
    ) -> None:
        self._holder, self._db, self._journal, self._load = holder, db, journal, load
        self._config, self._clock = config, clock

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(ADMIT_EVERY.total_seconds())
            await self._journal.ready()
            runs = self._holder.runs
            try:
                if not runs and not self._holder.draining:
                    await self._admit()
                elif runs and self._load.suspects and all(map(self._settled, runs)):
                    await self._acquit(len(runs))
            except Unavailable as error:
                self._journal.suspect(str(error))

    async def _admit(self) -> None:
        holder = self._holder
        async with holder.claiming:
            group = await leases.claim_suspects(
                self._db, worker_id=holder.worker_id, queues=self._config.queues, most=self._config.capacity
            )
            for won in group:
                holder.run(won)
        if group:
            logger.warning("suspects run in this ward", extra={"turns": len(group)})

    async def _acquit(self, turns: int) -> None:
        """Others wait, and those that are here have crashed nothing: they may run anywhere, from their last step on."""
        logger.warning("suspects acquitted", extra={"turns": turns})
        await leases.acquit(self._db, worker_id=self._holder.worker_id)
        await self._holder.leave_all()

    def _settled(self, run: Run) -> bool:
        patience: float = SETTLED.total_seconds() * 2 ** min(max(0, run.crashes - 1), LONGEST_PATIENCE)
        return self._clock.monotonic() > run.claimed_at + patience
