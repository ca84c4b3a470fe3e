"""What the checks look at: connections, and facts that several of them need, read once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from longshift.artifacts import ArtifactStore, open_store
from longshift.clock import Clock
from longshift.config import Config
from longshift.db import doctor, workers
from longshift.db.database import Database
from longshift.db.doctor import Leftovers, Server
from longshift.db.workers import WorkerRecord
from longshift.errors import ConfigError
from longshift.hot import Hot

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """Something that the settings name, or why they do not."""

    opened: T | None
    complaint: str = ""

    @property
    def it(self) -> T:
        """
        Raises:
            ConfigError: the settings do not name it.
        """
        if self.opened is None:
            raise ConfigError(self.complaint)
        return self.opened


@dataclass(slots=True)
class Ground:
    """Everything that a check may look at. ``db``, ``hot`` and ``store`` raise what ``Part`` raises."""

    config: Config
    clock: Clock
    parts: tuple[Part[Database], Part[Hot], Part[ArtifactStore]]
    _server: Server | None = field(default=None, init=False)
    _workers: Sequence[WorkerRecord] | None = field(default=None, init=False)
    _leftovers: Leftovers | None = field(default=None, init=False)

    @property
    def db(self) -> Database:
        return self.parts[0].it

    @property
    def hot(self) -> Hot:
        return self.parts[1].it

    @property
    def store(self) -> ArtifactStore:
        return self.parts[2].it

    async def server(self) -> Server:
        if self._server is None:
            self._server = await doctor.server(self.db)
        return self._server

    async def workers(self) -> Sequence[WorkerRecord]:
        """Those that nobody has declared dead."""
        if self._workers is None:
            self._workers = await workers.list_workers(self.db)
        return self._workers

    async def leftovers(self) -> Leftovers:
        if self._leftovers is None:
            self._leftovers = await doctor.leftovers(self.db)
        return self._leftovers


@asynccontextmanager
async def opened(config: Config, *, clock: Clock) -> AsyncIterator[Ground]:
    """Nothing connects yet."""
    async with AsyncExitStack() as stack:
        database: Part[Database] = Part(None)
        hot: Part[Hot] = Part(None)
        store: Part[ArtifactStore] = Part(None)
        try:
            url, timeout = config.require("database_url"), config.connect_timeout
            database = Part(Database(url, size=3, connect_timeout=timeout, name="longshift-doctor"))
            stack.push_async_callback(database.it.close)
        except ConfigError as error:
            database = Part(None, str(error))
        try:
            hot = Part(Hot(config.require("redis_url"), timeout=config.connect_timeout))
            stack.push_async_callback(hot.it.close)
        except ConfigError as error:
            hot = Part(None, str(error))
        try:
            store = Part(open_store(config.require("artifacts_url"), connect_timeout=config.connect_timeout))
            stack.push_async_callback(store.it.close)
        except ConfigError as error:
            store = Part(None, str(error))
        yield Ground(config, clock, (database, hot, store))
