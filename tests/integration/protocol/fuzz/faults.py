"""What goes wrong: requests and replies are lost, statements run late, processes stop for a while."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from sqlalchemy import Row, TextClause
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db.database import Database, Params, Translated
from longshift.errors import Unavailable


class Fate(Enum):
    """Of one statement, as its sender sees it: in all but the first case it gets no answer."""

    ANSWERED = auto()
    REQUEST_LOST = auto()
    REPLY_LOST = auto()
    LATE = auto()  # the server runs it, or commits it, some time later


@dataclass
class Chaos:
    """One source of chance for a run. ``calm`` ends the faults, so that what can finish does."""

    seed: int
    ttl: float  # seconds of silence after which a worker is declared dead
    rate: float = 0.01  # of each kind of lost statement
    latency: float = 0.0  # seconds at most that an answer takes to arrive
    calm: bool = False
    stats: Counter[str] = field(default_factory=Counter)
    zombies: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def chance(self, probability: float) -> bool:
        return not self.calm and self.random.random() < probability

    def fate(self) -> Fate:
        x = 1.0 if self.calm else self.random.random()
        for n, fate in enumerate((Fate.REQUEST_LOST, Fate.REPLY_LOST, Fate.LATE), start=1):
            if x < n * self.rate:
                self.stats[f"statement: {fate.name.lower().replace('_', ' ')}"] += 1
                return fate
        return Fate.ANSWERED

    async def nap(self, most: float) -> None:
        await asyncio.sleep(self.random.random() * most)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._zombie(work))
        self.zombies.add(task)
        task.add_done_callback(self.zombies.discard)

    async def _zombie(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
            self.stats["late statement executed"] += 1
        except Exception as error:
            self.stats[f"late statement refused: {type(error).__name__}"] += 1


class FaultyDatabase(Database):
    """A worker's connections. While ``gate`` is shut its process stands still: nothing is sent, no answer is read."""

    def __init__(self, url: str, chaos: Chaos, *, size: int = 5) -> None:
        super().__init__(url, size=size)
        self.chaos = chaos
        self.gate = asyncio.Event()
        self.gate.set()
        self._server = Database(url, size=size)  # where late statements run

    async def close(self) -> None:
        await super().close()
        await self._server.close()

    async def fetch(self, statement: TextClause, params: Params | None = None) -> Sequence[Row[Any]]:
        await self.gate.wait()
        fate = self.chaos.fate()
        if fate is Fate.LATE:
            self.chaos.later(self._late(statement, params))
        if fate in (Fate.LATE, Fate.REQUEST_LOST):
            raise Unavailable("no answer")
        rows = await super().fetch(statement, params)
        if self.chaos.latency:
            await self.chaos.nap(self.chaos.latency)
        await self.gate.wait()
        if fate is Fate.REPLY_LOST:
            raise Unavailable("no answer")
        return rows

    async def _late(self, statement: TextClause, params: Params | None) -> None:
        await self.chaos.nap(self.chaos.ttl * 2.5)
        async with self._server.transaction() as connection:
            await connection.execute(statement, params)
            await self.chaos.nap(0.15)  # a commit that takes its time

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        await self.gate.wait()
        fate = self.chaos.fate()
        if fate is Fate.REQUEST_LOST:
            raise Unavailable("no answer")
        with Translated():
            async with AsyncExitStack() as stack:
                connection = await stack.enter_async_context(super().transaction())
                yield connection
                await self.gate.wait()
                if fate is Fate.LATE:
                    self.chaos.later(self._commit(stack.pop_all()))
        if fate is not Fate.ANSWERED:
            raise Unavailable("no answer")

    async def _commit(self, transaction: AsyncExitStack) -> None:
        async with transaction:
            await self.chaos.nap(0.6)
