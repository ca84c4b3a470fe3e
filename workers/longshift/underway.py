"""Calls of tools that are under way in this process: each of them alone under its key, and none of them cut short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from math import inf
from typing import Any, TypeVar
from uuid import UUID

from longshift.clock import Clock
from longshift.ending import end

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORDING = 10.0
"""Seconds beyond its timeout that a call may take until its outcome is recorded."""


class UnderWay:
    """What a worker must remember of its calls, beyond the lease and the turn that they belong to."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._locks: dict[UUID, tuple[asyncio.Lock, int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.open_ends: set[UUID] = set()  # irreversible calls that were made here, and how they ended is not recorded
        self._calls: dict[object, float] = {}  # when each of them has ended for certain, by the monotonic clock
        self.thread_at = clock.monotonic()  # when a plain step last got its thread
        self._quiet = asyncio.Event()
        self._quiet.set()

    @asynccontextmanager
    async def alone(self, call_id: UUID) -> AsyncIterator[None]:
        """Only one in this process deals with a call at a time: two branches, or two turns, may make the same one.

        The ledger cannot tell them apart: to it both are the holder of one lease.
        """
        lock, users = self._locks.get(call_id, (asyncio.Lock(), 0))
        self._locks[call_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[call_id]
            if users > 1:
                self._locks[call_id] = lock, users - 1
            else:
                del self._locks[call_id]

    async def keep(self, work: Coroutine[Any, Any, T], *, name: str) -> T:
        """Wait for ``work``, which goes on if whoever waits is cancelled."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # asked for by nobody, if nobody waits any more: asyncio would log it; the ledger has it

    @contextmanager
    def calling(self, seconds: float) -> Iterator[None]:
        """Around a call that nobody may cut short, which takes at most ``seconds``, and the record of its outcome."""
        token = object()
        self._calls[token] = self._clock.monotonic() + seconds + RECORDING
        self._quiet.clear()
        try:
            yield
        finally:
            del self._calls[token]
            if not self._calls:
                self._quiet.set()

    def thread_began(self) -> None:
        """A plain step runs now that may have waited for a thread."""
        self.thread_at = self._clock.monotonic()

    @property
    def calls(self) -> int:
        """Calls that nobody may cut short."""
        return len(self._calls)

    async def finished(self, *, within: float = inf) -> None:
        """Return when no such call is left; at the latest when the last one's time is over, or so many seconds are."""
        end_by = self._clock.monotonic() + within
        while self._calls:
            left = min(max(self._calls.values()), end_by) - self._clock.monotonic()
            if left <= 0:
                logger.error("calls of irreversible tools are left in doubt", extra={"calls": len(self._calls)})
                return
            logger.warning("waiting for irreversible tools", extra={"calls": len(self._calls), "seconds": round(left)})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), left)

    async def idle(self) -> None:
        """Return when nothing is under way, however long that takes."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, *, within: float = inf) -> None:
        """Let every call end, then stop what is left: none of it has called anything yet."""
        await self.finished(within=within)
        await self.drop()

    async def drop(self) -> None:
        await end(self._tasks)
