"""The local stack: Postgres, Redis, the API and workers, started in order, looked after, stopped in reverse.

    lock the folder -> is the port free? -> Postgres, Redis -> migrate, key -> API, workers -> ready
    stop: API, workers (they drain), Redis, Postgres

Whatever dies is started again, after a pause that grows while it keeps dying. When this process is killed, the guardian
stops all of it; what is told in ``stack.json`` is then out of date until the next start.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import httpx
from pydantic import SecretStr

from longshift import deaths
from longshift.cli import ground, local
from longshift.cli.local import StackFile
from longshift.cli.parts import Foreign, Part, Process, Server, State, Status
from longshift.cli.processes import API
from longshift.clock import SYSTEM, Clock
from longshift.config import Config, child_environment
from longshift.db import workers
from longshift.db.database import Database
from longshift.embedded import FolderLock, Guardian, LocalPostgres, LocalRedis
from longshift.errors import ConfigError, LongshiftError, Unavailable

POLL = 0.1
"""Seconds between two looks at the parts."""
START_LIMIT = timedelta(seconds=60)
API_GRACE = timedelta(seconds=15)
EXTRA_GRACE = timedelta(seconds=25)
"""What a worker may take to stop beyond the grace of its steps."""
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a part that died is started again: the first time, the second ..."""
SETTLED = 60.0
"""Seconds that a part must run before its next death counts as the first."""

Tell = Callable[[Status], None]


class Stopped(Exception):
    """Somebody asked for the end before the stack was ready."""


@dataclass(slots=True)
class Shutdown:
    """How often somebody has asked for the end."""

    requests: int = 0

    def check(self) -> None:
        if self.requests:
            raise Stopped


@dataclass(slots=True)
class Care:
    """What is known about a part's deaths."""

    part: Part
    started_at: float = 0.0
    deaths: int = 0
    due: float | None = None  # when it is started again


class Stack:
    """One stack on one folder, owned by this process. Blocking; ``tell`` gets every change."""

    def __init__(self, config: Config, *, tell: Tell, shutdown: Shutdown, clock: Clock = SYSTEM) -> None:
        self.config = config
        self.data = config.data.resolve()
        self.key_is_new = False
        self.key = ""
        self.url = ""
        self._tell = tell
        self._shutdown = shutdown
        self._clock = clock
        self._lock = FolderLock(self.data)
        self._cares: list[Care] = []

    @property
    def pids(self) -> dict[str, int]:
        found = {care.part.name: care.part.pid for care in self._cares}
        return {name: pid for name, pid in found.items() if pid is not None} | {"guardian": self._guardian.pid}

    def run(self, on_ready: Callable[[Stack], None]) -> None:
        """Start, look after, and stop when asked to.

        Raises:
            ConfigError, Unavailable: it cannot start; nothing is left running.
        """
        self._lock.acquire()
        try:
            port = ground.free_port(self.config.host, self.config.port)
            with Guardian() as self._guardian:
                try:
                    self._start(port)
                    on_ready(self)
                    self._supervise()
                except Stopped:
                    pass
                finally:
                    self._stop()
        finally:
            self._lock.release()

    # -- start

    def _start(self, port: int) -> None:
        config, data = self.config, self.data
        database = self._serve("postgres", config.require("database_url") if config.database_url else None)
        redis = self._serve("redis", config.require("redis_url") if config.redis_url else None)
        artifacts_url = config.artifacts_url or (data / "artifacts").as_uri()
        self.key, self.key_is_new = ground.prepare(config, database_url=database.url, key_file=data / "api-key")
        self._shutdown.check()
        self.url = ground.url_of(config.host, port)
        environment = child_environment(
            database_url=database.url,
            redis_url=redis.url,
            artifacts_url=artifacts_url,
            agents=config.agents,
            data=data,
            host=config.host,
            port=port,
            metrics_port=None if config.metrics_port is None else 0,  # they cannot all have the same one
        )
        (data / "logs").mkdir(mode=0o700, exist_ok=True)
        self._run("api", API, environment, grace=API_GRACE, where=self.url)
        # this process is their supervisor; one more would make it hard to see who is who
        command = (sys.executable, "-P", "-m", "longshift.cli", "worker", "--no-supervisor")
        self._reports = config.model_copy(
            update={"database_url": SecretStr(database.url), "redis_url": SecretStr(redis.url)}
        )
        for number in range(1, config.workers + 1):
            self._run(f"worker-{number}", command, environment, grace=config.drain_grace + EXTRA_GRACE)
        asyncio.run(self._until_ready(database.url))
        stack = StackFile(
            pid=ground.own_pid(),
            url=self.url,
            api_key=self.key,
            database_url=database.url,
            redis_url=redis.url,
            artifacts_url=artifacts_url,
        )
        local.write_private(local.path_of(data), stack.model_dump_json())

    def _serve(self, name: str, url: str | None) -> Server | Foreign:
        part: Server | Foreign
        if url is not None:
            part = Foreign(name, url)
        elif name == "postgres":
            part = Server(name, LocalPostgres(self.data / name, guardian=self._guardian))
        else:
            part = Server(name, LocalRedis(self.data / name, guardian=self._guardian))
        self._care_for(part)
        if name == "redis":
            ground.check_redis(part.url, timeout=self.config.connect_timeout)
        self._tell(Status(name, State.READY, part.where, part.pid, "" if part.ours else "not ours"))
        return part

    def _run(
        self, name: str, command: tuple[str, ...], environment: dict[str, str], *, grace: timedelta, where: str = ""
    ) -> None:
        log = self.data / "logs" / f"{name}.log"
        self._care_for(
            Process(
                name,
                command,
                environment=environment,
                log=log,
                where=where or str(log),
                guardian=self._guardian,
                grace=grace,
            )
        )

    def _care_for(self, part: Part) -> None:
        self._shutdown.check()
        self._cares.append(Care(part, started_at=self._clock.monotonic()))
        part.start()

    async def _until_ready(self, database_url: str) -> None:
        """Until the API answers and every worker has given a sign of life; what dies meanwhile is started again."""
        end = self._clock.monotonic() + START_LIMIT.total_seconds()
        waiting = {care.part.name: care.part for care in self._cares if isinstance(care.part, Process)}
        db = Database(database_url, size=2, connect_timeout=self.config.connect_timeout, name="longshift-up")
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
                while waiting:
                    self._shutdown.check()
                    for name in await self._ready(waiting, db=db, http=http):
                        part = waiting.pop(name)
                        self._tell(Status(name, State.READY, part.where, part.pid))
                    self._look_after_all(starting=True)
                    if self._clock.monotonic() > end:
                        names = ", ".join(waiting)
                        raise Unavailable(f"not ready within {START_LIMIT}: {names}; see {self.data / 'logs'}")
                    await asyncio.sleep(POLL)
        finally:
            await db.close()

    async def _ready(self, waiting: dict[str, Process], *, db: Database, http: httpx.AsyncClient) -> list[str]:
        alive: set[int] = set()
        with suppress(Unavailable):
            alive = await workers.alive(db, host=socket.gethostname())
        ready = [name for name, part in waiting.items() if name != "api" and part.pid in alive]
        if "api" in waiting:
            with suppress(httpx.HTTPError):
                if (await http.get(f"{self.url}/readyz")).is_success and waiting["api"].pid is not None:
                    ready.append("api")
        return ready

    # -- life

    def _supervise(self) -> None:
        while not self._shutdown.requests:
            self._look_after_all()
            time.sleep(POLL)

    def _look_after_all(self, *, starting: bool = False) -> None:
        for care in self._cares:
            if care.part.ours and care.part.pid is None:
                self._look_after(care, starting=starting)

    def _look_after(self, care: Care, *, starting: bool) -> None:
        part, now = care.part, self._clock.monotonic()
        if care.due is None:
            if starting and isinstance(part, Process) and part.exit_code == 2:  # settings that will not become right
                raise ConfigError(f"{part.name}: {part.complaint() or part.verdict()}")
            care.deaths = 1 if now - care.started_at > SETTLED else care.deaths + 1
            pause = PAUSES[min(care.deaths, len(PAUSES)) - 1]
            care.due = now + pause
            self._report(part)
            detail = f"{part.verdict()}; starting again in {pause:g} s"
            self._tell(Status(part.name, State.DIED, part.where, detail=detail))
        elif now >= care.due:
            care.due, care.started_at = None, now
            try:
                part.start()
            except LongshiftError as error:
                self._tell(Status(part.name, State.DIED, part.where, detail=str(error)))
            else:
                self._tell(Status(part.name, State.RESTARTED, part.where, part.pid))

    def _report(self, part: Part) -> None:
        """What a worker held goes on elsewhere at once."""
        if isinstance(part, Process) and part.name != "api" and (code := part.exit_code) is not None:
            report = deaths.report_once(self._reports, process=part.identity, code=code)
            with ThreadPoolExecutor(1) as thread:  # this one may run an event loop: until all are ready
                thread.submit(asyncio.run, report).result()

    # -- stop

    def _stop(self) -> None:
        local.path_of(self.data).unlink(missing_ok=True)
        parts = [care.part for care in self._cares]
        self._stop_all([part for part in parts if part.name == "api"])
        self._drain([part for part in parts if isinstance(part, Process) and part.name != "api"])
        self._stop_all([part for part in reversed(parts) if not isinstance(part, Process)])

    def _drain(self, processes: list[Process]) -> None:
        """Stop the workers, all at once; another Ctrl-C ends what they still run."""
        requests = self._shutdown.requests
        for process in processes:
            process.send(signal.SIGTERM)
        end = self._clock.monotonic() + (self.config.drain_grace + EXTRA_GRACE).total_seconds()
        while any(process.pid is not None for process in processes) and self._clock.monotonic() < end:
            if self._shutdown.requests > requests:
                requests = self._shutdown.requests
                for process in processes:
                    process.send(signal.SIGTERM)
            time.sleep(POLL)
        self._stop_all(processes)

    def _stop_all(self, parts: list[Part] | list[Process]) -> None:
        for part in parts:
            if part.ours:
                part.stop()
                self._tell(Status(part.name, State.STOPPED))
