"""What becomes of sessions with time: idle ones are archived, those whose time to live is over are deleted, and what is left
of deleted ones is removed.

A service of every worker, active in the one that leads, with a task of its own: an upload may take long, and a rescue must
not wait for it. When there is nothing to do, a pass is one statement. What can go wrong: while the store is away nothing is
archived, and what is deleted leaves objects to the collector; a log that cannot be archived is left alone until its session
has been used again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

from longshift.clock import Clock
from longshift.config import Config
from longshift.db import aging, archives
from longshift.db.database import Database
from longshift.errors import InUse, LongshiftError, NotFound, Unavailable
from longshift.lifecycle import AGAIN, Lifecycle

logger = logging.getLogger(__name__)
T = TypeVar("T")
EVERY = timedelta(minutes=1)
"""Between two passes, at most; less if sessions are to be archived or to expire after less than ten times as long."""
AT_ONCE = 50
"""Sessions of a kind in one pass; while there are so many, the next pass comes soon."""
LANES = 4
"""Sessions that are worked on at the same time."""
ADOPTED_AT_ONCE = 1000


class Aging:
    """Passes over the sessions for as long as this worker leads."""

    def __init__(
        self, db: Database, lifecycle: Lifecycle, *, leads: Callable[[], bool], config: Config, clock: Clock
    ) -> None:
        self._db, self._lifecycle = db, lifecycle
        self._leads, self._clock = leads, clock
        self._ttl = config.session_ttl
        self._archive_after = config.archive_after or None  # 0: never
        shortest = min((limit for limit in (self._ttl, self._archive_after) if limit), default=EVERY * 10)
        self._pause = max(config.sweep, min(EVERY, shortest / 10)).total_seconds()
        self._breath = config.sweep.total_seconds()
        self._adopted = UUID(int=0)

    async def run(self) -> None:
        """A pass, a pause, for ever."""
        more = False
        while True:
            await asyncio.sleep(self._breath if more else self._pause)
            more = self._leads() and await self._guarded()

    async def _guarded(self) -> bool:
        try:
            return await self.look()
        except Unavailable as error:
            logger.info("sessions are looked after later", extra={"reason": str(error)})
        except Exception:
            logger.exception("looking after sessions failed")
        return False

    async def look(self) -> bool:
        """One pass; whether there is more to do.

        Raises:
            Unavailable: Postgres or the store is away.
        """
        more = await self._adopt() if self._ttl is not None else False
        due = await aging.due(self._db, archive_after=self._archive_after, limit=AT_ONCE)
        if due.buried:
            await self._all(await aging.buried(self._db, due.buried), self._finish)
        if due.expiring:
            await self._all(await aging.expired(self._db, due.expiring, ttl=self._ttl), self._delete)
        if due.idle:
            await self._all(due.idle, self._archive)
        return more or AT_ONCE in (len(due.buried), len(due.expiring), len(due.idle))

    async def _adopt(self) -> bool:
        """Sessions that know of no time to live, as those that are made by a submit: the fleet's holds for them."""
        minute_ago = int((self._clock.now() - AGAIN).timestamp() * 1000)  # those before are committed, or never will be
        before = UUID(int=minute_ago << 80)
        last = await aging.adopt(self._db, after=self._adopted, before=before, limit=ADOPTED_AT_ONCE)
        self._adopted = last or self._adopted
        return last is not None

    async def _finish(self, session: aging.Buried) -> None:
        try:
            await self._lifecycle.finish_deletion(session.id, tenant_id=session.tenant_id, epoch=session.epoch)
        except Unavailable:
            raise
        except LongshiftError:  # its turn comes again, see ``finish_deletion``
            logger.exception("deleted session cannot be removed", extra={"session_id": session.id.hex})

    async def _delete(self, session: aging.Expired) -> None:
        try:
            removed = await self._lifecycle.delete(session.id, unused_since=session.active_at)
        except NotFound:
            return
        except InUse:  # used in this very moment, or somebody's child
            await aging.look_later(self._db, session.id, pause=AGAIN)
            return
        logger.info("session expired", extra={"session_id": session.id.hex, "events": removed.events})

    async def _archive(self, session_id: UUID) -> None:
        try:
            moved = await self._lifecycle.archive(session_id)
        except (NotFound, InUse):
            return
        except Unavailable:
            raise
        except LongshiftError as error:
            logger.error("log cannot be archived", extra={"session_id": session_id.hex, "reason": str(error)})
            await archives.give_up(self._db, session_id)
            return
        logger.info("log archived", extra={"session_id": session_id.hex, "events": moved.events, "bytes": moved.bytes})

    async def _all(self, items: Sequence[T], work: Callable[[T], Awaitable[None]]) -> None:
        """``work`` on all of ``items``, a few at a time; the first error ends it when those under way are done."""
        waiting = iter(items)

        async def lane() -> None:
            for item in waiting:
                if self._leads():
                    await work(item)

        done = await asyncio.gather(*(lane() for _ in range(LANES)), return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
