"""A fleet of real processes, seen as its users see it: HTTP from outside, signals to processes, a file of effects.

    fleet = Fleet(folder, database_url=..., redis_url=..., guardian=...)
    fleet.start_api()              the API on a port of its own; ``fleet.client`` talks to the first one
    fleet.start_worker("a")        a worker; returns when it serves

What the agents do to the world they write into one append-only file, a line at a time, so that the order of the lines
is the order in which it happened, whichever process did it. ``close`` ends every process, by its pid.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from longshift.embedded import Guardian
from tests.support.waiting import wait_until_sync

ROOT = Path(__file__).parents[2]
KEY = "lsk_acceptance_tests_only_0123456789"
SUPERVISED = ["longshift.cli", "worker"]
WORKER = [*SUPERVISED, "--no-supervisor"]
AGENTS = "tests.acceptance.agents"
TERMINAL = {"succeeded", "failed", "cancelled", "expired"}
FAST = {"heartbeat": 0.2, "lock_grace": 0.6, "lease_ttl": 2, "sweep": 0.1, "rering": 0.5, "drain_grace": 10}
"""Settings under which a dead worker is noticed within two seconds."""
Json = Any
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Process:
    """One process of the fleet."""

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

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait()

    def pause(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def drain(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def exit_code(self, *, limit: float = 30) -> int:
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
    """The API as a client sees it. Answers are the JSON of the contract; anything but success raises.

    What is read is asked again if the answer says that this may help, as every client of the contract would.
    """

    url: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=70)

    def close(self) -> None:
        self.http.close()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        def ask() -> httpx.Response | None:
            answer = self.http.request(method, path, **more)
            again = method == "GET" and answer.status_code == 503 and answer.json()["retryable"]
            return None if again else answer

        answer = wait_until_sync(ask, description=f"{method} {path} is answered")
        assert answer is not None
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    def get(self, path: str, **params: object) -> Json:
        return self.request("GET", path, params=params).json()

    def submit(self, agent: str, value: Json, *, session: str | None = None, **more: Json) -> Json:
        path = f"/v1/sessions/{session}/turns" if session else "/v1/turns"
        return self.request("POST", path, json={"agent": agent, "input": value, **more}).json()

    def submit_batch(self, turns: Sequence[Mapping[str, Json]]) -> Json:
        lines = "\n".join(json.dumps(turn) for turn in turns)
        return self.request("POST", "/v1/batches", content=lines, headers={"Content-Type": "application/jsonl"}).json()

    def turn(self, turn: Json) -> Json:
        return self.get(f"/v1/turns/{turn['id']}")

    def cancel(self, turn: Json) -> Json:
        return self.request("POST", f"/v1/turns/{turn['id']}/cancel").json()

    def wait(self, turn: Json, *, status: str | None = None, limit: float = 30) -> Json:
        """The turn as soon as it has ended, or as soon as it has the ``status``."""

        def arrived() -> Json:
            seen = self.turn(turn)
            return seen if seen["status"] == status or seen["status"] in TERMINAL else None

        found = wait_until_sync(arrived, description=f"{turn['id']} is {status or 'at its end'}", limit=limit)
        assert status is None or found["status"] == status, found
        return found

    def wait_batch(self, batch: Json, *, limit: float = 60) -> list[Json]:
        """Its turns, in order, when all have ended."""

        def ended() -> bool:
            return bool(self.get(f"/v1/batches/{batch['id']}")["status"] == "ended")

        wait_until_sync(ended, description=f"{batch['id']} has ended", limit=limit)
        return self.results(batch)

    def results(self, batch: Json) -> list[Json]:
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


@dataclass(frozen=True)
class Effect:
    """One line of the file of effects."""

    what: str
    turn: str
    step: str
    attempt: int
    pid: int
    at: float  # time.monotonic() of the machine
    more: Mapping[str, Json]


@dataclass
class Fleet:
    """All processes of one test or module."""

    folder: Path
    database_url: str
    redis_url: str
    guardian: Guardian
    settings: Mapping[str, object] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    @property
    def client(self) -> Client:
        return self.clients[0]

    def start_api(self, name: str = "api", **settings: object) -> Process:
        """Start an API process, with a client of its own in ``clients``."""
        port = free_port()
        process = self._start(name, ["longshift_api"], {"port": port, "api_key": KEY, **settings})
        client = Client(f"http://127.0.0.1:{port}")
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
        environment: Mapping[str, str] | None = None,
        ready: bool = True,
        supervised: bool = False,
        **settings: object,
    ) -> Process:
        """Start a worker; ``ready``: return when it serves. ``supervised``: the process is the worker's supervisor."""
        settings = {"agents": AGENTS, **settings}
        command = SUPERVISED if supervised else WORKER
        process = self._start(name, command, settings, environment=environment or {})
        if ready:
            self.wait_ready(process)
        return process

    def wait_ready(self, process: Process) -> None:
        self._wait(process, lambda: "worker ready" in process.log())

    def effects(self, *turns: Json, what: str | None = None) -> list[Effect]:
        """What agents wrote down, in the order of its happening; all of it, or that of some turns."""
        file, wanted = self.folder / "effects.jsonl", {turn["id"] for turn in turns}
        lines = file.read_text().splitlines() if file.exists() else []
        found = [_effect(json.loads(line)) for line in lines]
        return [e for e in found if (not wanted or e.turn in wanted) and (what is None or e.what == what)]

    def open_gate(self, name: str) -> None:
        """Let agents pass that wait at the gate ``name``."""
        (self.folder / f"gate-{name}").touch()

    def stop(self, *processes: Process) -> None:
        """End some processes, all of them at once."""
        for process in processes:
            if process.alive:
                process.resume()
                process.drain()
        for process in processes:
            process.end()
            self.guardian.forget(process.pid)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.stop(*self.processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, object],
        *,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        log_file = self.folder / f"{name}.log"
        with log_file.open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self._environment({**FAST, **self.settings, **settings}) | dict(environment or {}),
            )
        self.guardian.watch(popen.pid)
        process = Process(name, popen, log_file)
        self.processes.append(process)
        return process

    def _environment(self, settings: Mapping[str, object]) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("LONGSHIFT_")}
        given = {
            "database_url": self.database_url,
            "redis_url": self.redis_url,
            "artifacts_url": (self.folder / "artifacts").as_uri(),
            **settings,
        }
        return {
            **ours,
            **{f"LONGSHIFT_{name.upper()}": str(value) for name, value in given.items()},
            "ACCEPTANCE_FOLDER": str(self.folder),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "workers", "api")),
        }

    def _wait(self, process: Process, ready: Callable[[], bool]) -> None:
        wait_until_sync(lambda: ready() or not process.alive, description=f"{process.name} is ready", limit=60)
        assert process.alive, process.log()


def _effect(line: dict[str, Json]) -> Effect:
    known = {name: line.pop(name) for name in ("what", "turn", "step", "attempt", "pid", "at")}
    return Effect(**known, more=line)


def seconds_between(times: Iterable[float]) -> float:
    """From the first to the last."""
    listed = sorted(times)
    return listed[-1] - listed[0]


def now() -> float:
    """The clock of ``Effect.at``."""
    return time.monotonic()
