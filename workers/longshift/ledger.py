"""Group commit for the ledger of tool calls: the begins, and the ends, of all turns of a worker in one statement each.

A begin needs the lease: a session that is missing from the answer is looked up, as in ``journal.py``; if its row was only
locked, the begin is sent again. An end needs nothing but Postgres, and is sent until it is recorded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from longshift.db import log, tool_calls
from longshift.db.database import Database
from longshift.db.tool_calls import Begun, Ending, Start
from longshift.ending import end
from longshift.errors import InvalidInput, LeaseLost, Unavailable
from longshift.journal import RETRY_LOCKED, Journal
from longshift.lease import Lease
from longshift.model import CallOutcome, NewCall, ToolCallRecord

logger = logging.getLogger(__name__)

W = TypeVar("W")
A = TypeVar("A")
BATCH = 500
"""Calls in one statement, at most."""


@dataclass(slots=True, eq=False)
class Entry(Generic[W, A]):
    """One write, and who waits for its answer."""

    write: W
    key: Hashable  # two of one key do not fit into one statement
    future: asyncio.Future[A]


class Lane(Generic[W, A]):
    """Writes of one kind: one statement in flight, what arrives meanwhile goes with the next."""

    def __init__(
        self, db: Database, journal: Journal, statement: Callable[[Database, Sequence[W]], Awaitable[Any]]
    ) -> None:
        self._db, self._journal, self._statement = db, journal, statement
        self._entries: deque[Entry[W, A]] = deque()
        self._filled = asyncio.Event()

    async def put(self, write: W, *, key: Hashable) -> A:
        entry: Entry[W, A] = Entry(write, key, asyncio.get_running_loop().create_future())
        self._entries.append(entry)
        self._filled.set()
        return await entry.future

    async def run(self, answer: Callable[[Entry[W, A], Any], None]) -> None:
        """Write for ever; ``answer`` is given each entry with what came back for all of its statement."""
        while True:
            await self._filled.wait()
            await self._journal.ready()
            batch = self._take()
            if batch:
                await self._write(batch, answer)

    def _take(self) -> list[Entry[W, A]]:
        batch: dict[Hashable, Entry[W, A]] = {}
        later: list[Entry[W, A]] = []
        while self._entries and len(batch) < BATCH:
            entry = self._entries.popleft()
            if entry.future.done():  # nobody waits any more
                continue
            if entry.key in batch:
                later.append(entry)
            else:
                batch[entry.key] = entry
        self._entries.extendleft(reversed(later))
        if not self._entries:
            self._filled.clear()
        return list(batch.values())

    async def _write(self, batch: list[Entry[W, A]], answer: Callable[[Entry[W, A], Any], None]) -> None:
        try:
            answers = await self._statement(self._db, [entry.write for entry in batch])
        except Unavailable as error:  # it may have happened or not: either may happen twice
            self._entries.extendleft(reversed(batch))
            self._filled.set()
            self._journal.suspect(str(error))
        except Exception as error:  # noqa: BLE001 - a bug must not end the lane, on which every turn of the worker depends
            await self._isolate(batch, answer, error)
        else:
            for entry in batch:
                if not entry.future.done():
                    answer(entry, answers)

    async def _isolate(
        self, batch: list[Entry[W, A]], answer: Callable[[Entry[W, A], Any], None], error: Exception
    ) -> None:
        """One bad row refused the whole statement: halve it until the row stands alone and fails alone."""
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._write(batch[:middle], answer)
            await self._write(batch[middle:], answer)
        elif not batch[0].future.done():
            if not isinstance(error, InvalidInput):
                logger.error("tool call not recorded", exc_info=error)
            batch[0].future.set_exception(error)


class Ledger:
    """All writes of one worker process to the ledger of tool calls."""

    def __init__(self, db: Database, journal: Journal) -> None:
        self._db, self._journal = db, journal
        self._begins: Lane[Start, Begun] = Lane(db, journal, tool_calls.begin)
        self._ends: Lane[Ending, ToolCallRecord | None] = Lane(db, journal, tool_calls.end)
        self._tasks: list[asyncio.Task[None]] = []

    def start_lanes(self) -> None:
        self._tasks = [
            asyncio.create_task(self._begins.run(_begun), name="ledger-begin"),
            asyncio.create_task(self._ends.run(_ended), name="ledger-end"),
        ]

    async def close(self) -> None:
        await end(self._tasks)

    async def begin(self, lease: Lease, call: NewCall, *, over: int | None = None) -> int | ToolCallRecord:
        """How often the call was started by now; or what stands in the ledger instead of another start.

        Raises:
            LeaseLost: another worker may hold the session.
            InvalidInput: Postgres refuses a value.
        """
        start = Start(lease.claim, call, over)
        while True:
            if lease.lost or lease.ended:
                raise LeaseLost(f"the lease on session {lease.session_id.hex} is gone")
            begun = await self._begins.put(start, key=start.key)
            if begun.attempts:
                return begun.attempts
            if begun.standing is not None:
                return begun.standing
            if not begun.held:
                await self._check_held(lease)
            await asyncio.sleep(RETRY_LOCKED)

    async def end(
        self, lease: Lease, call: NewCall, outcome: CallOutcome, *, epoch: int | None = None
    ) -> ToolCallRecord | None:
        """Record how a call ended, whoever has the lease by now; what stands in the ledger, if it is something else."""
        return await self._ends.put(Ending(lease.claim, call, outcome, epoch), key=call.id)

    async def _check_held(self, lease: Lease) -> None:
        """The session was missing: somebody had its row locked, or the lease is gone."""
        await self._journal.ready()
        try:
            found = await log.standing(self._db, [(lease.claim, lease.seq)])
        except Unavailable as error:
            self._journal.suspect(str(error))
            return
        if not found[lease.key].held:
            self._journal.lose(lease, fenced=True)


def _begun(entry: Entry[Start, Begun], answers: dict[tuple[Any, int], Begun]) -> None:
    entry.future.set_result(answers[entry.write.key])


def _ended(entry: Entry[Ending, ToolCallRecord | None], answers: dict[Any, ToolCallRecord]) -> None:
    entry.future.set_result(answers.get(entry.write.call.id))
