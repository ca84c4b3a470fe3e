"""The parts of a local stack: servers of ours, servers of others, and processes that run our own code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.model import new_id
from longshift.telemetry import masked

_SENTENCE = re.compile(r"error: (.+)")
_TAIL = 64 * 1024


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DIED = "died"
    RESTARTED = "restarted"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Status:
    """One line about one part."""

    part: str
    state: State
    where: str = ""
    pid: int | None = None
    detail: str = ""


class Part(Protocol):
    """What a stack starts, looks after and stops. ``pid`` is None unless it runs."""

    name: str
    where: str

    @property
    def pid(self) -> int | None: ...

    @property
    def ours(self) -> bool:
        """Whether it is looked after; somebody else's server is not."""

    def start(self) -> None:
        """Start it. Raises ``ConfigError`` if it cannot."""

    def verdict(self) -> str:
        """How it ended."""

    def stop(self) -> None: ...


class Server:
    """An embedded Postgres or Redis."""

    ours = True

    def __init__(self, name: str, server: LocalPostgres | LocalRedis) -> None:
        self.name = name
        self.where = str(server.folder)
        self.url = ""
        self._server = server

    @property
    def pid(self) -> int | None:
        return self._server.pid

    def start(self) -> None:
        self.url = self._server.start()
        if isinstance(self._server, LocalRedis):
            self.where = masked(self.url)

    def verdict(self) -> str:
        return f"see {self._server.log}"

    def stop(self) -> None:
        self._server.stop()


class Foreign:
    """A server that the settings name; we only use it."""

    ours = False
    pid: int | None = None

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.where = masked(url)

    def start(self) -> None:
        """It runs already, or the first use will tell."""

    def verdict(self) -> str:
        return ""

    def stop(self) -> None:
        """Not ours to stop."""


class Process:
    """The API or a worker: a child with its output in a log file, watched by the guardian."""

    ours = True

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        log: Path,
        where: str,
        guardian: Guardian,
        grace: timedelta,
    ) -> None:
        self.name = name
        self.where = where
        self._command = command
        self._environment = environment
        self._log = log
        self._guardian = guardian
        self._grace = grace
        self._begin = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.identity = new_id()  # of the process that runs now: its death is reported by it

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it. None while it runs."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        self.forget()
        self.identity = new_id()
        with self._log.open("ab") as output:
            self._begin = output.tell()
            self._process = subprocess.Popen(
                self._command,
                env=self._environment | {"LONGSHIFT_PROCESS": str(self.identity)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is for the stack, which stops things in order
            )
        self._guardian.watch(self._process.pid, grace=self._grace)

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Ask it to end, wait for its grace, then kill it."""
        if self._process is None:
            return
        self.send(signal.SIGTERM)
        try:
            self._process.wait(self._grace.total_seconds())
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self._process.wait()
        self.forget()

    def forget(self) -> None:
        """The guardian need not watch a process that has ended."""
        if self._process is not None:
            self._guardian.forget(self._process.pid)

    def verdict(self) -> str:
        code = self.exit_code or 0
        how = f"exit code {code}"
        with suppress(ValueError):
            how = signal.Signals(-code).name if code < 0 else how
        complaint = self.complaint()
        return f"{how}: {complaint}" if complaint and code > 0 else f"{how}, see {self._log}"

    def complaint(self) -> str | None:
        """The last error in its log since it was started."""
        with self._log.open("rb") as log:
            log.seek(max(self._begin, self._log.stat().st_size - _TAIL))
            lines = log.read().decode(errors="replace").splitlines()
        return next(filter(None, map(_error_in, reversed(lines))), None)


def _error_in(line: str) -> str | None:
    if found := _SENTENCE.fullmatch(line):
        return found[1]
    with suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and entry.get("level") in ("error", "critical"):
            return str(entry.get("message"))
    return None
