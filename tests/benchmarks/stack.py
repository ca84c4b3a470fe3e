"""What a benchmark runs on: a real Postgres and Redis, a fresh database for each part, worker processes of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import UUID

import psycopg
import redis
from psycopg.rows import namedtuple_row

from longshift.artifacts import open_store
from longshift.catalogue import Draft
from longshift.cold import Cold
from longshift.config import load
from longshift.db import views
from longshift.db.database import Database
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.hot import Hot
from longshift.mailbox import Mailbox
from longshift.model import Json, TurnRecord, new_id
from longshift.testing.waiting import wait_until
from tests.benchmarks.process import Process
from tests.support.databases import Databases

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
WORKER = ("longshift.cli", "worker")
API = ("longshift_api",)
API_KEY = "lsk_benchmarks_only_0123456789abcdef"
Settings = Mapping[str, object]
GRACE = timedelta(seconds=10)
PATIENCE = 300.0
"""Seconds after which a benchmark is stuck; no figure depends on it."""


class Stack:
    """The servers of one run of the benchmarks."""

    def __init__(self, folder: Path, *, guardian: Guardian) -> None:
        self.folder = folder
        self.guardian = guardian
        self._postgres = LocalPostgres(folder / "postgres", guardian=guardian)
        self._redis = LocalRedis(folder / "redis", guardian=guardian)
        self._numbers = itertools.count()

    def start(self) -> None:
        self._postgres.start()
        self._redis.start()
        self._databases = Databases(self._postgres.url)
        self._databases.make_template()

    def stop(self) -> None:
        self._redis.stop()
        self._postgres.stop()

    def fresh_redis(self) -> str:
        """The URL of an empty database of Redis: sites that live side by side do not take each other's wake-ups."""
        url = f"{self._redis.url.rpartition('/')[0]}/{next(self._numbers) % 16}"
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url

    def effects_file(self) -> Path:
        """A file for ``effects``, not there yet."""
        return self.folder / f"effects-{new_id().hex}"

    @asynccontextmanager
    async def without(self, server: str) -> AsyncIterator[None]:
        """``postgres`` or ``redis`` is gone while the block runs: connections are cut, then refused."""
        gone: LocalPostgres | LocalRedis = self._postgres if server == "postgres" else self._redis
        await asyncio.to_thread(gone.stop)
        try:
            yield
        finally:
            await asyncio.to_thread(gone.start)

    @property
    def server_url(self) -> str:
        """A database in which nothing happens: from there the others can be watched."""
        return self._postgres.url

    @asynccontextmanager
    async def site(self) -> AsyncIterator[Site]:
        """A fresh database with a client on it, and room for workers, which end with the block."""
        with self._databases.fresh() as url:
            site = Site(self, url, self.fresh_redis())
            try:
                yield site
            finally:
                await site.close()


@dataclass(eq=False)
class Site:
    """A database, a client that submits as the API does, and the workers that serve it."""

    stack: Stack
    database_url: str
    redis_url: str
    tenant: UUID = field(default_factory=new_id)
    workers: list[Process] = field(default_factory=list)
    apis: list[Process] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)  # of all that were ever started

    def __post_init__(self) -> None:
        self.db = Database(self.database_url, name="benchmark")
        self.hot = Hot(self.redis_url)
        self.store = open_store(f"file://{self.stack.folder}/artifacts")
        self.mailbox = Mailbox(self.db, self.hot, cold=Cold(self.db, self.store), config=load())

    async def close(self) -> None:
        for worker in list(self.workers):
            self.kill(worker)  # the database goes too: there is nothing to hand over
        for api in self.apis:
            api.kill_group()
            self.stack.guardian.forget(api.pid)
        await self.mailbox.close()
        await self.store.close()
        await self.hot.close()
        await self.db.close()

    # -- workers

    async def start(self, count: int = 1, *, settings: Settings | None = None) -> list[Process]:
        """Start workers with ``LONGSHIFT_<name>`` settings; returns when they are ready to claim."""
        started = [self.spawn(settings or {}) for _ in range(count)]

        async def ready() -> bool:
            if dead := [worker for worker in started if worker.has_ended]:
                raise RuntimeError(f"a worker ended: {dead[0].log.read_text()[-2000:]}")
            return set((await self.serving()).values()) >= set(started)

        await until(ready, description="workers are ready", limit=60)
        return started

    async def serving(self) -> dict[int, Process]:
        """The processes that run turns, by pid, with the worker that each belongs to: itself, or its parent."""
        rows = await self.query("SELECT pid FROM workers WHERE dead_at IS NULL")
        return {row.pid: worker for row in rows for worker in self.workers if worker.owns(row.pid)}

    def spawn(self, settings: Settings) -> Process:
        """Start a worker and do not wait for it."""
        worker = self._launch(WORKER, {"agents": "tests.benchmarks.agents", **settings})
        self.workers.append(worker)
        return worker

    def _launch(self, command: Sequence[str], settings: Settings) -> Process:
        given = {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "ARTIFACTS_URL": f"file://{self.stack.folder}/artifacts",
            **{name.upper(): str(value) for name, value in settings.items()},
        }
        log = self.stack.folder / f"process-{new_id().hex}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=environment() | {f"LONGSHIFT_{name}": value for name, value in given.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.stack.guardian.watch(process.pid, grace=GRACE)
        self.logs.append(log)
        return Process(process, log, settings)

    async def end(self, workers: Iterable[Process]) -> None:
        """SIGTERM, and wait."""
        ending = list(workers)
        for worker in ending:
            worker.process.terminate()
            self.workers.remove(worker)
        await asyncio.to_thread(self._reap, ending)

    def _reap(self, workers: Iterable[Process]) -> None:
        for worker in workers:
            try:
                worker.process.wait(60)
            except subprocess.TimeoutExpired:
                worker.kill_group()
            self.stack.guardian.forget(worker.pid)

    def kill(self, worker: Process) -> None:
        """SIGKILL of all its processes, as if the machine were lost: nobody is left to tell."""
        worker.kill_group()
        self.stack.guardian.forget(worker.pid)
        self.workers.remove(worker)

    def replace_ended(self) -> int:
        """A new worker, with its settings, for each that has ended; how many. What supervises itself is left alone."""
        ended = [worker for worker in self.workers if worker.has_ended]
        for worker in ended:
            self.stack.guardian.forget(worker.pid)
            self.workers.remove(worker)
            self.spawn(worker.settings)
        return len(ended)

    async def start_api(self, *, settings: Settings | None = None) -> str:
        """Start the API on a port that is free; its URL."""
        api = self._launch(API, {"PORT": 0, "API_KEY": API_KEY, **(settings or {})})
        self.apis.append(api)

        def port() -> int | None:
            if api.has_ended:
                raise RuntimeError(f"the API ended: {api.log.read_text()[-2000:]}")
            lines = [json.loads(line) for line in api.log.read_text().splitlines() if line.startswith("{")]
            return next((int(line["port"]) for line in lines if line["message"] == "the api listens"), None)

        return f"http://127.0.0.1:{await wait_until(port, description='the API listens', limit=60)}"

    # -- turns

    async def submit(self, agent: str, inputs: Sequence[Json]) -> UUID:
        """A batch, each turn in a session of its own; returns when it is accepted and the wake-ups leave."""
        accepted = await self.mailbox.submit_batch([Draft(agent, value) for value in inputs], tenant_id=self.tenant)
        return accepted.resource_id

    async def results(self, batch_id: UUID) -> list[TurnRecord]:
        """Wait until all turns of a batch have ended, then fetch them.

        Raises:
            RuntimeError: one of them did not succeed.
        """
        await until(lambda: self.has_ended(batch_id), description="the batch ends", limit=PATIENCE)
        turns = [turn async for turn in views.results(self.db, batch_id, tenant_id=self.tenant)]
        wrong = next((turn for turn in turns if turn.status != "succeeded"), None)
        if wrong is not None:
            raise RuntimeError(f"a turn {wrong.status.value}: {wrong.error}")
        return turns

    async def run(self, agent: str, inputs: Sequence[Json]) -> list[TurnRecord]:
        return await self.results(await self.submit(agent, inputs))

    async def warm_up(self) -> None:
        """Let connections, pools and caches of all workers come into being."""
        await self.run("steps", [5] * 100 * len(self.workers))

    async def has_ended(self, batch_id: UUID) -> bool:
        batch = await views.batch(self.db, batch_id, tenant_id=self.tenant)
        return batch is not None and batch.ended == batch.total

    async def query(self, statement: str, *params: object) -> list[Any]:
        """Rows of a statement of the benchmark's own, on a connection of its own."""
        return await asyncio.to_thread(query, self.database_url, statement, *params)


def query(url: str, statement: str, *params: object) -> list[Any]:
    with psycopg.connect(url, autocommit=True, row_factory=namedtuple_row) as connection:
        return connection.execute(statement.encode(), params).fetchall()


async def until(predicate: Callable[[], Awaitable[T]], *, description: str, limit: float) -> T:
    """Poll an async ``predicate`` until it returns something true."""
    return cast(T, await wait_until(cast(Callable[[], object], predicate), description=description, limit=limit))


def environment() -> dict[str, str]:
    """This process's environment without settings of Longshift: the benchmarks measure the defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGSHIFT_")}
    paths = [str(ROOT), str(ROOT / "workers"), str(ROOT / "api"), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
