"""What the rehearsal runs on: a real Postgres and Redis, one API process, and pods that run ``longshift worker``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg.rows import dict_row

from longshift.config import Config
from longshift.db import migrations
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.testing.fleet import FAST, Process
from tests.chaos.evidence import Death
from tests.rehearsal.kubelet import Container, Kubelet, Pod, pod_of
from tests.support.fleet import KEY, Fleet

QUEUE = "default"
BACKLOG = "SELECT * FROM backlog WHERE queue = %s"
OPEN = "SELECT coalesce(sum(open_turns), 0) FROM sessions"
HELD = "SELECT w.pid, count(*) FROM sessions s JOIN workers w ON w.id = s.lease_worker GROUP BY w.pid"
DEFAULTS: Mapping[str, object] = {
    name: getattr(Config.model_fields[name].default, "total_seconds", lambda: None)()
    for name in FAST
    if name != "hot_verify"
}
"""The settings that test fleets have otherwise; here times are those of production."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at one moment. ``at``: seconds of ``time.monotonic()``; the middle five are columns of ``backlog``."""

    at: float
    runnable: int
    running: int
    oldest: float
    slots: int
    workers: int
    wanted: int
    pods: int  # that were not told to end
    ready: int


class Stage:
    """``async with Stage(folder, ...) as stage``; nothing of it is left afterwards."""

    def __init__(self, folder: Path, *, guardian: Guardian, slots: int, grace: float) -> None:
        """``slots``: turns that one worker runs at a time; ``grace``: see ``Kubelet``."""
        self.folder = folder
        self.deaths: list[Death] = []
        self.settings = {**DEFAULTS, "capacity": slots, "hot_verify": 1, "inline": 1024}
        self.kubelet = Kubelet(self._start_worker, is_ready=_is_ready, grace=grace)
        self._guardian = guardian
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kubelet.kill_all()
        await self._stack.aclose()

    async def _start(self) -> None:
        logs = self.folder / "logs"
        logs.mkdir(parents=True)
        postgres = LocalPostgres(self.folder / "postgres", guardian=self._guardian)
        redis = LocalRedis(self.folder / "redis", guardian=self._guardian)
        self._stack.callback(postgres.stop)
        self._stack.callback(redis.stop)
        self.database_url = await asyncio.to_thread(postgres.start)
        self.redis_url = await asyncio.to_thread(redis.start)
        await asyncio.to_thread(migrations.upgrade, self.database_url)
        self.fleet = self._stack.enter_context(
            Fleet(
                logs,
                database_url=self.database_url,
                redis_url=self.redis_url,
                guardian=self._guardian,
                settings=self.settings,
            )
        )
        await asyncio.to_thread(self.fleet.start_api)
        self.url = self.fleet.client.url
        self._database = await psycopg.AsyncConnection.connect(self.database_url, autocommit=True, row_factory=dict_row)
        self._stack.push_async_callback(self._database.close)

    def _start_worker(self, name: str) -> Container:
        return self.fleet.start_worker(
            name,
            supervised=True,
            ready=False,
            environment={"CHAOS_FOLDER": str(self.fleet.folder)},
            agents="tests.chaos.agents",
        )

    async def query(self, statement: str, *parameters: object) -> list[dict[str, Any]]:
        """What an autoscaler may do: read the view."""
        return await (await self._database.execute(statement.encode(), parameters)).fetchall()

    async def sample(self, at: float) -> Sample:
        rows = await self.query(BACKLOG, QUEUE)
        row: Mapping[str, Any] = rows[0] if rows else Counter()
        kubelet = self.kubelet
        return Sample(
            at=at,
            runnable=row["runnable"],
            running=row["running"],
            oldest=round(row["oldest_seconds"], 3),
            slots=row["slots"],
            workers=row["workers"],
            wanted=kubelet.replicas,
            pods=len(kubelet.current),
            ready=kubelet.ready,
        )

    async def open_turns(self) -> int:
        return int((await self.query(OPEN))[0]["coalesce"])

    async def set_costs(self) -> None:
        """What ``LONGSHIFT_POD_NAME`` lets each worker do for its own pod: its deletion cost is what it runs."""
        pods: Mapping[int, Pod] = pod_of(self.kubelet.current)
        held: Counter[str] = Counter()
        for row in await self.query(HELD):
            if row["pid"] in pods:
                held[pods[row["pid"]].name] += row["count"]
        for pod in self.kubelet.current:
            pod.cost = held[pod.name]

    def mourn(self) -> None:
        """After the run: what ended otherwise than it was told to."""
        for pod in self.kubelet.pods:
            self.deaths += [Death(pod.name, code, "ended by itself") for code in pod.crashes]
            if pod.killed:
                self.deaths.append(Death(pod.name, pod.exit_code or 0, "did not end within its grace: SIGKILL"))
            elif pod.ended is None or pod.exit_code not in (0, None):
                self.deaths.append(Death(pod.name, pod.exit_code or 0, "was told to end"))


def _is_ready(container: Container) -> bool:
    assert isinstance(container, Process)
    return "worker ready" in container.log()


__all__ = ["KEY", "QUEUE", "Sample", "Sequence", "Stage"]
