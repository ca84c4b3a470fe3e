"""A fleet of real processes on this machine, seen as its users see it: HTTP from outside, signals to processes.

    with LocalFleet(tmp_path, agents="my_agents") as fleet:     a Postgres and a Redis of its own, migrated
        fleet.start_api()                                       the API; ``fleet.client`` talks to it
        a, b = fleet.start_worker("a"), fleet.start_worker("b")
        turn = fleet.client.submit("checkout", {"order": 7})
        a.pause()                                               SIGSTOP: past its lease, b takes over
        ended = fleet.client.wait(turn)
        a.resume()                                              its late writes are refused

Every process is ended by its pid when the fleet closes, and also if the process that owns the fleet is killed. What a
process logs is in ``FOLDER/NAME.log``.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from longshift.config import child_environment
from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.errors import UsageError
from longshift.model import TERMINAL, Json
from longshift.testing.waiting import wait_until_sync

FAST: Mapping[str, object] = {
    "heartbeat": 0.2,
    "lock_grace": 0.6,
    "lease_ttl": 2,
    "sweep": 0.1,
    "rering": 0.5,
    "drain_grace": 10,
    "hot_verify": 1,
}
"""Settings of every process unless others are given: a dead worker is noticed within two seconds, and no context is taken
from a copy that is not compared with the log."""
API = ("longshift_api",)
SUPERVISED: tuple[str, ...] = ("longshift.cli", "worker")
WORKER = (*SUPERVISED, "--no-supervisor")
EXPORTER = ("longshift.cli", "exporter")
CRASHING_WORKER = ("longshift.testing.worker",)


@dataclass
class Process:
    """One process of a fleet; ``pid`` is the worker or API itself."""

    name: str
    popen: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def metrics_url(self) -> str:
        """Where it serves ``/metrics``, ``/livez`` and the like; it was started with ``metrics_port=0``."""
        served = [line for line in self.log().splitlines() if '"metrics are served"' in line]
        if not served:
            raise UsageError(f"{self.name} serves no metrics: start it with metrics_port=0, and wait until it serves")
        return f"http://127.0.0.1:{json.loads(served[-1])['port']}"

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait()

    def pause(self) -> None:
        """SIGSTOP: it does nothing more, and does not know it. Past its lease, others take over."""
        self.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: it goes on in the middle of whatever it did."""
        self.popen.send_signal(signal.SIGCONT)

    def drain(self) -> None:
        """SIGTERM: running steps get their grace, then every turn leaves."""
        self.popen.send_signal(signal.SIGTERM)

    def exit_code(self, *, limit: float = 30) -> int:
        """Wait for its end, at most ``limit`` seconds."""
        return self.popen.wait(limit)

    def end(self) -> None:
        """Make sure that it is gone, however it is."""
        if self.alive:
            self.resume()
            self.drain()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(5)
        if self.alive:
            self.kill()


@dataclass
class Client:
    """The API as a client sees it. Answers are the JSON of the contract; anything but success is an AssertionError.

    What is read is asked again if the answer says that this may help, as every client of the contract would.
    """

    url: str
    api_key: str = field(repr=False)
    http: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=70)

    def close(self) -> None:
        self.http.close()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        def ask() -> httpx.Response | None:
            answer = self.http.request(method, path, **more)
            again = method == "GET" and answer.status_code == 503 and answer.json()["retryable"]
            return None if again else answer

        answer = wait_until_sync(ask, description=f"{method} {path} is answered")
        if answer is None or not answer.is_success:
            raise AssertionError(f"{method} {path}: {answer and (answer.status_code, answer.text)}")
        return answer

    def get(self, path: str, **params: object) -> Json:
        return self.request("GET", path, params=params).json()

    def submit(self, agent: str, value: Json, *, session: str | None = None, **more: Json) -> Json:
        """The accepted turn; ``more`` goes into the body, such as ``metadata``."""
        path = f"/v1/sessions/{session}/turns" if session else "/v1/turns"
        return self.request("POST", path, json={"agent": agent, "input": value, **more}).json()

    def submit_batch(self, turns: Sequence[Mapping[str, Json]]) -> Json:
        """The accepted batch; each of ``turns`` is ``{"agent", "input", ...}``."""
        lines = "\n".join(json.dumps(turn) for turn in turns)
        return self.request("POST", "/v1/batches", content=lines, headers={"Content-Type": "application/jsonl"}).json()

    def turn(self, turn: Json) -> Json:
        """The turn as it is now."""
        return self.get(f"/v1/turns/{turn['id']}")

    def cancel(self, turn: Json) -> Json:
        return self.request("POST", f"/v1/turns/{turn['id']}/cancel").json()

    def wait(self, turn: Json, *, status: str | None = None, limit: float = 30) -> Json:
        """The turn as soon as it has ended, or as soon as it has the ``status``."""

        def arrived() -> Json:
            seen = self.turn(turn)
            return seen if seen["status"] == status or seen["status"] in TERMINAL else None

        found = wait_until_sync(arrived, description=f"{turn['id']} is {status or 'at its end'}", limit=limit)
        if status is not None and found["status"] != status:
            raise AssertionError(f"{turn['id']} is not {status}, but {found['status']}: {found.get('error')}")
        return found

    def wait_batch(self, batch: Json, *, limit: float = 60) -> list[Json]:
        """Its turns, in order, when all have ended."""

        def ended() -> bool:
            return bool(self.get(f"/v1/batches/{batch['id']}")["status"] == "ended")

        wait_until_sync(ended, description=f"{batch['id']} has ended", limit=limit)
        return self.results(batch)

    def results(self, batch: Json) -> list[Json]:
        """Those turns of a batch that have ended, in its order."""
        text = self.request("GET", f"/v1/batches/{batch['id']}/results").text
        return [json.loads(line) for line in text.splitlines()]

    def events(self, turn: Json) -> list[Json]:
        """The whole log of the turn's session."""
        found: list[Json] = []
        while True:
            after = found[-1]["seq"] if found else 0
            page = self.get(f"/v1/sessions/{turn['session_id']}/events", after=after, limit=1000)
            found += page["data"]
            if not page["has_more"]:
                return found


class LocalFleet:
    """All processes of one test or module; use it in a ``with``.

    Attributes:
        folder: of logs, artifacts and (if they are its own) servers.
        settings: on top of ``FAST``, for the processes that start from now on.
        database_url, redis_url: where the servers are.
        postgres, redis: the servers, if they are its own; to restart or kill them.
        processes, clients: in the order of their start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        agents: str,
        database_url: str | None = None,
        redis_url: str | None = None,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        path: Sequence[Path] | None = None,
        api_key: str | None = None,
        guardian: Guardian | None = None,
    ) -> None:
        """Nothing starts before the ``with``.

        Args:
            folder: exists; what is in it is the fleet's.
            agents: modules that the workers load, comma-separated.
            database_url: a migrated database; None: a PostgreSQL of its own.
            redis_url: None: a Redis of its own.
            settings: ``longshift.config.Config`` for all processes, by name: ``{"lease_ttl": 5}``.
            environment: further variables for all processes.
            path: folders in which the modules of ``agents`` are; default: the current one.
            api_key: of the default tenant; default: a new one.
            guardian: ends the processes if this one dies; default: a new one.
        """
        self.folder, self.agents = folder, agents
        self.settings: Mapping[str, object] = settings or {}
        self.environment: Mapping[str, str] = environment or {}
        self.api_key = api_key or f"lsk_{secrets.token_hex(16)}"
        self.processes: list[Process] = []
        self.clients: list[Client] = []
        self._given = database_url, redis_url
        self._path = [Path.cwd()] if path is None else list(path)
        self._guardian = guardian
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.guardian = self._guardian or stack.enter_context(Guardian())
            database_url, redis_url = self._given
            self.database_url = database_url or self._start_postgres(stack)
            self.redis_url = redis_url or self._start_redis(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process, then the servers."""
        with self._stack:
            for client in self.clients:
                client.close()
            self.stop(*self.processes)

    @property
    def client(self) -> Client:
        """Talks to the API process that was started first."""
        if not self.clients:
            raise UsageError("this fleet has no API yet: call start_api() first")
        return self.clients[0]

    def start_api(self, name: str = "api", **settings: object) -> Process:
        """Start an API process, with a client of its own in ``clients``; returns when it is ready."""
        port = _free_port()
        process = self._start(name, API, {"port": port, "api_key": self.api_key, **settings}, environment={})
        client = Client(f"http://127.0.0.1:{port}", self.api_key)
        self.clients.append(client)

        def ready() -> bool:
            with suppress(httpx.TransportError):
                return client.http.get("/readyz").status_code == 200
            return False

        self._wait(process, ready)
        return process

    def start_worker(
        self,
        name: str,
        *,
        crash_at: str | None = None,
        crash_after: int | None = None,
        ready: bool = True,
        supervised: bool = False,
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Process:
        """Start a worker.

        Args:
            name: of its log, too.
            crash_at: it dies by SIGKILL when a turn comes to this point: see ``longshift.testing.points``.
            crash_after: it dies as soon as a session's log has so many events.
            ready: return when it serves.
            supervised: the process is the supervisor of the worker, as in production; else it is the worker itself, and
                its death is noticed by its silence.
            environment: further variables.
            settings: as for the fleet; for example ``redis_url=meddler.url`` or ``queues="slow"``.
        """
        command = SUPERVISED if supervised else WORKER
        if crash_at is not None:
            command = (*CRASHING_WORKER, "--crash-at", crash_at)
        elif crash_after is not None:
            command = (*CRASHING_WORKER, "--crash-after", str(crash_after))
        process = self._start(name, command, {"agents": self.agents, **settings}, environment=environment or {})
        if ready:
            self.wait_ready(process)
        return process

    def start_exporter(self, name: str = "exporter", **settings: object) -> Process:
        """Start the process that serves the figures of the fleet; returns when it does."""
        process = self._start(name, EXPORTER, {"metrics_port": 0, **settings}, environment={})
        self._wait(process, lambda: '"metrics are served"' in process.log())
        return process

    def wait_ready(self, process: Process) -> None:
        """Wait until a worker serves."""
        self._wait(process, lambda: "worker ready" in process.log())

    def stop(self, *processes: Process) -> None:
        """End some processes, all of them at once: SIGTERM, after five seconds SIGKILL."""
        for process in processes:
            if process.alive:
                process.resume()
                process.drain()
        for process in processes:
            process.end()
            self.guardian.forget(process.pid)

    def _start_postgres(self, stack: ExitStack) -> str:
        from longshift.db import migrations

        self.postgres = LocalPostgres(self.folder / "postgres", guardian=self.guardian)
        stack.callback(self.postgres.stop)
        url = self.postgres.start()
        migrations.upgrade(url)
        return url

    def _start_redis(self, stack: ExitStack) -> str:
        self.redis = LocalRedis(self.folder / "redis", guardian=self.guardian)
        stack.callback(self.redis.stop)
        return self.redis.start()

    def _start(
        self, name: str, module: Sequence[str], settings: Mapping[str, object], *, environment: Mapping[str, str]
    ) -> Process:
        log_file = self.folder / f"{name}.log"
        with log_file.open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self._environment({**FAST, **self.settings, **settings}) | dict(environment),
            )
        self.guardian.watch(popen.pid)
        process = Process(name, popen, log_file)
        self.processes.append(process)
        return process

    def _environment(self, settings: Mapping[str, object]) -> dict[str, str]:
        """That of this process, without its own Longshift settings."""
        inherited = child_environment()
        given = {
            "database_url": self.database_url,
            "redis_url": self.redis_url,
            "artifacts_url": (self.folder / "artifacts").resolve().as_uri(),
            **settings,
        }
        path = [*map(str, self._path), *filter(None, [inherited.get("PYTHONPATH")])]
        return {
            **{name: value for name, value in inherited.items() if not name.startswith("LONGSHIFT_")},
            **{f"LONGSHIFT_{name.upper()}": str(value) for name, value in given.items()},
            **self.environment,
            "PYTHONPATH": os.pathsep.join(path),
        }

    def _wait(self, process: Process, ready: Callable[[], bool]) -> None:
        wait_until_sync(lambda: ready() or not process.alive, description=f"{process.name} is ready", limit=60)
        if not process.alive:
            raise AssertionError(f"{process.name} has ended instead of serving:\n{process.log()}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
