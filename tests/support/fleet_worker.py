"""A worker process whose runtime records what happens to it, and a Redis that can be stopped and started again.

Run as a script it is the worker: one JSON argument holds the settings, each event becomes a line of a JSONL file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from longshift.embedded import Guardian
from longshift.embedded.redis import _binary
from longshift.testing.waiting import wait_until_sync

ROOT = Path(__file__).parents[2]
DEADLINE = 20.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class RedisServer:
    """An empty Redis on a port of its own; ``kill`` and ``start`` as often as needed."""

    folder: Path
    guardian: Guardian
    password: str | None = None
    unix: bool = False
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        credentials = f":{self.password}@" if self.password else ""
        if self.unix:
            return f"unix://{credentials}{self.folder}/redis.sock?db=0"
        return f"redis://{credentials}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        arguments = ["--bind", "127.0.0.1", "--port", str(0 if self.unix else self.port), "--save", "", "--dir"]
        arguments += [str(self.folder)]
        arguments += ["--requirepass", self.password] if self.password else []
        arguments += ["--unixsocket", str(self.folder / "redis.sock")] if self.unix else []
        self.process = subprocess.Popen([_binary(), *arguments], stdout=subprocess.DEVNULL)
        self.guardian.watch(self.process.pid)
        wait_until_sync(self._answers, description="Redis is up")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        family, address = (
            (socket.AF_UNIX, str(self.folder / "redis.sock"))
            if self.unix
            else (socket.AF_INET, ("127.0.0.1", self.port))
        )
        with socket.socket(family) as client:
            return client.connect_ex(address) == 0


@dataclass(frozen=True)
class Behaviour:
    """How the runtime of the worker behaves."""

    start: Literal["ready", "refuses", "fails", "hangs"] = "ready"
    wake: Literal["returns", "blocks", "waits", "raises", "asks_to_stop", "exits"] = "returns"
    drain: Literal["returns", "blocks", "raises"] = "returns"
    concurrency: int = 8


@dataclass
class Worker:
    """The process, seen from a test."""

    folder: Path
    process: subprocess.Popen[bytes]

    def events(self, kind: str) -> list[dict[str, Any]]:
        journal = self.folder / "events.jsonl"
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == kind]

    def woken(self) -> list[str]:
        return [session for event in self.events("wake") for session in event["sessions"]]

    def go(self) -> None:
        """End the wake-ups of a runtime that ``waits``."""
        (self.folder / "go").touch()

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def wait_for(self, kind: str, count: int = 1) -> None:
        wait_until_sync(
            lambda: len(self.events(kind)) >= count or self.process.poll() is not None, description=f"{count}x {kind}"
        )
        assert len(self.events(kind)) >= count, self.output()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE)


def start_worker(redis_url: str, folder: Path, behaviour: Behaviour, *, guardian: Guardian) -> Worker:
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"redis_url": redis_url, "folder": str(folder), **asdict(behaviour)})
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "workers")])},
        )
    guardian.watch(process.pid)
    return Worker(folder, process)


# ------------------------------------------------------------------------------------------- the process


class RecordingRuntime:
    """A runtime that writes down each call and then behaves as it was told."""

    def __init__(self, folder: Path, behaviour: Behaviour) -> None:
        self._journal = (folder / "events.jsonl").open("a", buffering=1)
        self._go = folder / "go"
        self._behaviour = behaviour
        self.stop_process: Callable[[int], None]

    def record(self, event: str, **fields: object) -> None:
        self._journal.write(json.dumps({"event": event, "at": time.monotonic_ns(), **fields}) + "\n")

    async def start(self) -> None:
        from longshift.errors import Unavailable

        self.record("start")
        match self._behaviour.start:
            case "refuses":
                raise Unavailable("Postgres does not answer at 127.0.0.1:1")
            case "fails":
                raise RuntimeError("a bug")
            case "hangs":
                await asyncio.Event().wait()
        self.record("started")

    async def wake(self, session_ids: Sequence[UUID]) -> None:
        self.record("wake", sessions=[session.hex for session in session_ids])
        match self._behaviour.wake:
            case "blocks":
                await asyncio.Event().wait()
            case "waits":
                while not self._go.exists():  # noqa: ASYNC110  # made by another process
                    await asyncio.sleep(0.01)
            case "raises":
                raise RuntimeError("a bug")
            case "asks_to_stop":
                self.stop_process(3)
            case "exits":
                raise SystemExit(4)

    async def drain(self) -> None:
        self.record("drain")
        match self._behaviour.drain:
            case "blocks":
                await asyncio.Event().wait()
            case "raises":
                raise RuntimeError("a bug")

    async def stop(self) -> None:
        self.record("stop")


def main(settings: dict[str, Any]) -> int:
    from longshift import fleet

    redis_url, folder = settings.pop("redis_url"), Path(settings.pop("folder"))
    behaviour = Behaviour(**settings)
    logging.basicConfig(level=logging.DEBUG)
    runtime = RecordingRuntime(folder, behaviour)
    app = fleet.create_app(
        redis_url=redis_url, queues=["default", "other"], runtime=runtime, concurrency=behaviour.concurrency
    )
    runtime.stop_process = app.request_stop
    return fleet.run(app)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
