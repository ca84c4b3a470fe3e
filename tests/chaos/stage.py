"""The stage: servers, API replicas and workers, as real processes, and everything that can be done to them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from longshift.config import Config
from longshift.db import migrations
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.testing.meddler import Meddler
from longshift.testing.waiting import wait_until
from tests.chaos.evidence import Death
from tests.chaos.objects import FaultyStore, Mood
from tests.chaos.schedule import RESTARTED_AFTER, Fault, FaultKind
from tests.chaos.slots import Slot, signal_all, tree
from tests.support.fleet import KEY, Fleet
from tests.support.object_store import ObjectServer

QUICK: Mapping[str, object] = {
    "heartbeat": 0.3,
    "lock_grace": 1,
    "lease_ttl": 3,
    "sweep": 0.1,
    "rering": 0.5,
    "drain_grace": 5,
    "loop_limit": 3,
    "step_timeout": 20,
}
"""Settings under which two minutes hold many deaths and rescues."""
SMALL: Mapping[str, object] = {
    "capacity": 8,
    "threads": 8,
    "pool_size": 4,
    "hot_verify": 1,
    "inline": 1024,
    "checkpoint_events": 20,
    "archive_after": 2,
}
"""A fleet that is always a little short of room, believes no copy of a context that it has not compared with the log, and sends
to the cold tier what it can: large values, and the logs of sessions that nobody has used for two seconds."""
DROPPED = DOUBLED = 0.1
"""Shares of all wake-ups."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos", "AWS_EC2_METADATA_DISABLED": "true"}
POISONED = frozenset({70, 41, -signal.SIGSEGV, 128 + signal.SIGSEGV})
"""Exit codes of a process that a poison turn has ended: its loop was blocked, ``os._exit``, a segmentation fault."""
UNAVAILABLE = 4
"""Exit code of a process that cannot start because a server does not answer."""
DRAIN_LIMIT = 45.0
"""Seconds from SIGTERM to the end of a process: the grace, and time for agents that do not listen."""
API = ("longshift_api",)


class Stage:
    """``async with Stage(folder, ...) as stage``; ``urls`` are the API replicas."""

    def __init__(
        self, folder: Path, *, guardian: Guardian, seed: int, workers: int, replicas: int, quick: bool, poison: bool
    ) -> None:
        self.folder = folder
        self._guardian = guardian
        self._seed = seed
        self._poison = poison
        defaults = Config.model_fields
        usual = {name: defaults[name].default.total_seconds() for name in QUICK}
        self.settings: dict[str, object] = {**(QUICK if quick else usual), **SMALL}
        self.slots = [Slot("worker", n) for n in range(workers)] + [Slot("api", n) for n in range(replicas)]
        self.urls = [""] * replicas
        self.injected: Counter[FaultKind] = Counter()
        self.missed: Counter[FaultKind] = Counter()  # nobody there to suffer it
        self.deaths: list[Death] = []
        self.poisoned = self.failed_starts = self.starts = 0
        self._busy = {target: asyncio.Lock() for target in ("redis", "postgres", "store")}
        self._faults: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    @property
    def ttl(self) -> float:
        return float(str(self.settings["lease_ttl"]))

    # -- life

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
        for task in list(self._faults):
            task.cancel()
        await asyncio.gather(*self._faults, return_exceptions=True)
        everybody = [process for slot in self.slots if slot.process for process in tree(slot.process.pid)]
        await self._stack.aclose()
        signal_all(everybody, signal.SIGKILL)  # a worker whose supervisor was ended may still drain

    async def _start(self) -> None:
        os.environ.update(CREDENTIALS)
        logs = self.folder / "logs"
        logs.mkdir(parents=True)
        self._postgres = LocalPostgres(self.folder / "postgres", guardian=self._guardian)
        self._redis = LocalRedis(self.folder / "redis", guardian=self._guardian)
        self._stack.callback(self._postgres.stop)
        self._stack.callback(self._redis.stop)
        self.database_url = await asyncio.to_thread(self._postgres.start)
        await asyncio.to_thread(self._redis.start)
        await asyncio.to_thread(migrations.upgrade, self.database_url)
        self.meddler = self._stack.enter_context(
            Meddler(self._redis.url, drop=DROPPED, double=DOUBLED, seed=self._seed)
        )
        objects = self._stack.enter_context(ObjectServer())
        self.store = await self._stack.enter_async_context(FaultyStore(objects.endpoint, seed=self._seed))
        self.settings["artifacts_url"] = objects.url("chaos").replace(objects.endpoint, self.store.endpoint)
        self.fleet = self._stack.enter_context(
            Fleet(
                logs,
                database_url=self.database_url,
                redis_url=self.meddler.url,
                guardian=self._guardian,
                settings=self.settings,
            )
        )
        for slot in self.slots:
            self._launch(slot)

    def _launch(self, slot: Slot) -> None:
        slot.incarnation += 1
        slot.killed = slot.child_killed = slot.paused = slot.was_ready = False
        slot.drained_at, slot.restart_at = None, 0.0
        self.starts += 1
        if slot.kind == "worker":
            slot.process = self.fleet.start_worker(
                slot.name,
                environment={"CHAOS_FOLDER": str(self.fleet.folder)},
                ready=False,
                supervised=slot.supervised,
                agents="tests.chaos.agents",
            )
        else:
            port = _free_port()  # another one each time: a connection may have taken the last one's
            slot.process = self.fleet._start(slot.name, API, {"port": port, "api_key": KEY}, environment={})
            self.urls[slot.number] = f"http://127.0.0.1:{port}"

    async def keep_up(self) -> None:
        """Fill the slots of processes that have ended, for ever."""
        while True:
            for slot in self.slots:
                self._look_after(slot)
            await asyncio.sleep(0.1)

    def _look_after(self, slot: Slot) -> None:
        now = time.monotonic()
        if slot.process is None:
            if now >= slot.restart_at:
                self._launch(slot)
        elif not slot.process.alive:
            self._mourn(slot)
            slot.process = None
            slot.restart_at = slot.restart_at or now + RESTARTED_AFTER[0]
        elif slot.drained_at is not None and now - slot.drained_at > DRAIN_LIMIT and not slot.killed:
            self.deaths.append(Death(slot.name, 0, f"still there {DRAIN_LIMIT:g} s after SIGTERM"))
            self._signal(slot, signal.SIGKILL)

    def _mourn(self, slot: Slot) -> None:
        """Was somebody supposed to die here?"""
        process = slot.process
        assert process is not None
        code = process.exit_code()
        self._guardian.forget(process.pid)
        log = process.log()
        in_order = {0}
        if slot.supervised and (
            slot.child_killed or self._poison
        ):  # its child was dead, or starting, when SIGTERM came
            in_order = {0, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGKILL}
        if slot.killed or (slot.drained_at is not None and code in in_order):
            return
        if slot.READY[slot.kind] not in log or code == UNAVAILABLE:
            self.failed_starts += 1  # a server was away, or the process was told to stop while it started
        elif self._poison and slot.kind == "worker" and code in POISONED:
            self.poisoned += 1
        else:
            self.deaths.append(Death(slot.name, code, log.splitlines()[-1][:500] if log else ""))

    async def all_ready(self, *, limit: float) -> None:
        """Every slot is filled with a process that serves; needs ``keep_up``.

        Raises:
            AssertionError: not within ``limit`` seconds.
        """
        await wait_until(lambda: all(slot.ready for slot in self.slots), description="the fleet is up", limit=limit)

    async def shut_down(self) -> None:
        """SIGTERM to everybody, as an operator would; who does not end, or not with code 0, is among ``deaths``."""
        for slot in self.slots:
            if slot.up:
                slot.drained_at = time.monotonic()
                self._signal(slot, signal.SIGTERM)
        with suppress(AssertionError):  # who is left is named below
            await wait_until(
                lambda: not any(slot.up for slot in self.slots), description="all processes end", limit=DRAIN_LIMIT
            )
        for slot in self.slots:
            if slot.up:
                self.deaths.append(Death(slot.name, 0, f"still there {DRAIN_LIMIT:g} s after the last SIGTERM"))
            elif slot.process is not None:
                self._mourn(slot)
                slot.process = None

    # -- faults

    def inject(self, fault: Fault) -> None:
        """Begin a fault; it ends by itself."""
        task = asyncio.create_task(self._inject(fault), name=str(fault))
        self._faults.add(task)
        task.add_done_callback(self._faults.discard)

    async def faults_over(self) -> None:
        """All that was begun has ended.

        Raises:
            Exception: a server could not be started again.
        """
        while self._faults:
            await asyncio.gather(*self._faults)

    async def _inject(self, fault: Fault) -> None:
        kind = fault.kind
        if kind.target in self._busy:
            async with self._busy[kind.target]:
                self.injected[kind] += 1
                await self._disturb(kind, fault.seconds)
            return
        slot = self._victim(fault)
        if slot is None:
            self.missed[kind] += 1
            return
        self.injected[kind] += 1
        match kind:
            case FaultKind.WORKER_KILL if slot.supervised and (child := slot.child()) is not None:
                slot.child_killed = True  # its supervisor starts another one
                signal_all([child], signal.SIGKILL)
            case FaultKind.WORKER_KILL | FaultKind.WORKER_VANISH | FaultKind.API_KILL:
                slot.killed, slot.restart_at = True, time.monotonic() + fault.seconds
                self._signal(slot, signal.SIGKILL)
            case FaultKind.WORKER_DRAIN | FaultKind.API_STOP:
                slot.drained_at, slot.restart_at = time.monotonic(), time.monotonic() + fault.seconds
                self._signal(slot, signal.SIGTERM)
            case _:
                await self._pause(slot, fault.seconds)

    def _victim(self, fault: Fault) -> Slot | None:
        """The one that the schedule names, or the next one that stands; the last one that stands is spared."""
        slots = [slot for slot in self.slots if slot.kind == fault.kind.target]
        order = slots[fault.victim :] + slots[: fault.victim]
        standing = [s for s in order if s.ready and not s.killed and not s.paused and s.drained_at is None]
        return standing[0] if len(standing) > 1 else None

    async def _pause(self, slot: Slot, seconds: float) -> None:
        incarnation = slot.incarnation
        slot.paused = True
        self._signal(slot, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            if slot.incarnation == incarnation:
                slot.paused = False
                self._signal(slot, signal.SIGCONT)

    def _signal(self, slot: Slot, number: signal.Signals) -> None:
        """SIGTERM to the process itself, anything else to it and its children, as the end of a machine would."""
        if slot.process is None or not slot.process.alive:
            return
        everybody = tree(slot.process.pid)
        signal_all(everybody[:1] if number == signal.SIGTERM else everybody, number)

    async def _disturb(self, kind: FaultKind, seconds: float) -> None:
        match kind:
            case FaultKind.REDIS_FLUSH:
                await asyncio.to_thread(self._flush)
            case FaultKind.REDIS_RESTART:
                await asyncio.to_thread(self._redis.restart)
            case FaultKind.REDIS_KILL:
                await self._kill_and_start(self._redis, seconds)
            case FaultKind.REDIS_HANG:
                await _hang(self._redis.pid, seconds)
            case FaultKind.POSTGRES_RESTART:
                await asyncio.to_thread(self._postgres.restart)
            case FaultKind.POSTGRES_CRASH:
                await asyncio.to_thread(self._postgres.restart, immediate=True)
            case FaultKind.POSTGRES_KILL:
                await self._kill_and_start(self._postgres, seconds)
            case FaultKind.POSTGRES_HANG:
                await _hang(self._postgres.pid, seconds)
            case _:
                self.store.mood = Mood(kind.value.partition(".")[2])
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self.store.mood = Mood.WELL

    def _flush(self) -> None:
        with redis.Redis.from_url(self._redis.url) as client:
            client.flushall()

    async def _kill_and_start(self, server: LocalPostgres | LocalRedis, seconds: float) -> None:
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(server.restart)

    @property
    def redis_url(self) -> str:
        """Redis itself, not through the proxy that meddles with wake-ups."""
        return self._redis.url


async def _hang(pid: int | None, seconds: float) -> None:
    """SIGSTOP a server with all its processes for some seconds."""
    stopped = tree(pid) if pid is not None else []
    signal_all(stopped, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        signal_all(reversed(stopped), signal.SIGCONT)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
