"""Pre-warming: while an accepted turn waits in its queue, the context that it will need is brought into Redis.

    accepted -> a moment's patience (an idle worker has it by then) -> not in Redis, not claimed -> restore -> compare-and-set

Done by the process that accepted the turn, in the background, for sessions whose restore is dear: archived ones, and such with
a long log. Nothing waits for it, nothing depends on it, and under load most of it is left out. It writes under the epoch of the
session's last lease, so that whatever a worker knows, or does later, counts more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from longshift.archive import Archive
from longshift.context import DEAR, Tiers, restore
from longshift.db import archives
from longshift.db.database import Database
from longshift.ending import end
from longshift.errors import ControlFlow, LongshiftError
from longshift.hot import Contexts, Key

logger = logging.getLogger(__name__)
PATIENCE = 0.05
"""Seconds after which a turn that no worker has taken stands in a queue."""
LANES = 4
"""Contexts that are restored at the same time."""
MOST = 200
"""Sessions that may wait for it; who comes then is left out."""


class Warmer:
    """Brings contexts into Redis, for one process."""

    def __init__(self, db: Database, contexts: Contexts, archive: Archive) -> None:
        self._db, self._contexts = db, contexts
        self._tiers = Tiers(archive=archive)
        self._wanted: dict[Key, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._looking: asyncio.Task[None] | None = None

    def warm(self, sessions: Iterable[Key]) -> None:
        """Sessions, each with its tenant before it, in which a turn was accepted just now. Returns at once."""
        for key in sessions:
            if len(self._wanted) < MOST:
                self._wanted[key] = None
        if self._wanted and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look(), name="warmer")

    async def close(self) -> None:
        """What is not warm by now never will be."""
        await end([*self._tasks, *([self._looking] if self._looking is not None else [])])

    async def _look(self) -> None:
        while self._wanted:
            await asyncio.sleep(PATIENCE)
            wanted, self._wanted = list(self._wanted), {}
            known = await self._contexts.known(wanted)
            cold = iter([key for key in wanted if key not in known])
            self._tasks = [asyncio.create_task(self._lane(cold), name="warmer-lane") for _ in range(LANES)]
            await asyncio.wait(self._tasks)

    async def _lane(self, keys: Iterable[Key]) -> None:
        for key in keys:
            try:
                await self._one(key)
            except (LongshiftError, ControlFlow) as error:  # the worker will say so, if it is still so then
                logger.debug("not pre-warmed", extra={"session_id": key[1].hex, "reason": str(error)})
            except Exception:
                logger.exception("pre-warming failed", extra={"session_id": key[1].hex})

    async def _one(self, key: Key) -> None:
        tenant_id, session_id = key
        seen = await archives.head(self._db, session_id, tenant_id=tenant_id)
        cheap = seen.archived_through == 0 and seen.last_seq < DEAR
        waits = seen.in_use and not seen.leased
        if not waits or cheap or seen.last_event_id is None:
            return
        restored = await restore(
            self._db, session_id, through=seen.last_seq, event_id=seen.last_event_id, tiers=self._tiers
        )
        now = await archives.head(self._db, session_id, tenant_id=tenant_id)
        if not now.same_log(seen):  # archived, or used, while its log was read: some of it may have been missed
            return
        fold = restored.fold
        stored = await self._contexts.store(key, fold.context, epoch=seen.lease_epoch, kept=fold.kept)
        logger.debug("pre-warmed", extra={"session_id": session_id.hex, "seq": seen.last_seq, "stored": stored})
