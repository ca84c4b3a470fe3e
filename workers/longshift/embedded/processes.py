"""Child processes that do not outlive their owner, and the lock that keeps two owners from one folder."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from longshift.clock import SYSTEM
from longshift.embedded import guardian as guardian_script
from longshift.embedded.guardian import born
from longshift.errors import ConfigError

POLL = 0.02  # seconds
TAIL = 4096  # bytes of a log that are searched for the reason of a failure


def wait_for(predicate: Callable[[], bool], *, limit: timedelta) -> bool:
    """Whether ``predicate`` came true within ``limit``; polls, and blocks the calling thread."""
    end = SYSTEM.monotonic() + limit.total_seconds()
    while not predicate():
        if SYSTEM.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


class Guardian:
    """Stops the processes it was told about when its owner, this process, ends in whatever way.

    One serves any number of children. ``close`` stops those that are still watched, which is an orderly way to end too.
    A child made by ``os.fork`` without ``exec`` holds the pipe open as well, and delays the verdict until it ends.
    """

    def __init__(self) -> None:
        self._orders: dict[int, str] = {}
        self._lock = threading.Lock()
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(
        self,
        pid: int,
        *,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: timedelta = timedelta(seconds=10),
        last: bool = False,
    ) -> None:
        """Stop ``pid`` when the owner is gone: ``stop_signal``, and SIGKILL after ``grace``.

        ``last`` is for servers that the other children use: they are stopped after all others have ended. A process
        that leads its group (``start_new_session=True``) takes the group with it. One that is gone already is ignored.
        """
        birth = born(pid)
        if birth is None:
            return
        order = {
            "watch": pid,
            "born": birth,
            "signal": int(stop_signal),
            "grace": grace.total_seconds(),
            "last": last,
        }
        with self._lock:
            self._orders[pid] = json.dumps(order)
            self._send(self._orders[pid])

    def forget(self, pid: int) -> None:
        """The process ended, or somebody else looks after it now."""
        with self._lock:
            if self._orders.pop(pid, None) is not None:
                self._send(json.dumps({"forget": pid}))

    def close(self) -> None:
        """Stop what is still watched, and the guardian; returns when all of it is gone."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", guardian_script.__file__]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/", bufsize=0
        )

    def _end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _send(self, line: str) -> None:
        try:
            self._write(line)
        except BrokenPipeError:  # somebody killed the guardian: a new one takes over all that is still watched
            self._end()
            self._process = self._start()
            for order in self._orders.values():
                self._write(order)

    def _write(self, line: str) -> None:
        if self._process.stdin is None:
            raise AssertionError("the guardian is started with a pipe")
        self._process.stdin.write(line.encode() + b"\n")


class FolderLock:
    """The right to run servers on one folder; the kernel takes it back when the process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Make the folder if need be, and take the lock; a no-op if this object has it.

        Raises:
            ConfigError: another process has it (the message names folder and pid), or the folder cannot be made.
        """
        if self._descriptor is not None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the folder {str(self.folder)!r}: {error.strerror}:"
                " set LONGSHIFT_DATA to one that you own"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode().strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"the folder {str(self.folder)!r} is in use by process {owner}:"
                " stop that one, or set LONGSHIFT_DATA to another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back; the file stays, for removing it would let two owners lock two files of the same name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Child:
    """One server process: started with its output in a log file, watched by the guardian, stopped by signal."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        guardian: Guardian,
        stop_signal: signal.Signals,
        grace: timedelta,
        given: str = "",
    ) -> None:
        self.log = log
        self._guardian = guardian
        self._stop_signal = stop_signal
        self._grace = grace
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal is for the owner, which stops things in order
                cwd=log.parent,
                env={"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath},
            )
        guardian.watch(self._process.pid, stop_signal=stop_signal, grace=grace, last=True)
        self._give(given)

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, stop_signal: signal.Signals | None = None) -> None:
        """Signal it and wait; SIGKILL when the grace is over. A no-op if it has ended."""
        if self.running():
            self._process.send_signal(stop_signal or self._stop_signal)
        try:
            self._process.wait(self._grace.total_seconds())
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._guardian.forget(self.pid)

    def _give(self, text: str) -> None:
        if self._process.stdin is None:
            raise AssertionError("started with a pipe")
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # it ended already: `running` will tell
            pipe.write(text.encode())


def stop_leftover(pid: int, *, signals: Sequence[signal.Signals], grace: timedelta) -> None:
    """Stop a process that is not our child: each signal in turn until it is gone, then SIGKILL.

    Raises:
        ConfigError: it still runs.
    """
    birth = born(pid)
    for number in (*signals, signal.SIGKILL):
        if birth is None or born(pid) != birth:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if wait_for(lambda: born(pid) != birth, limit=grace):
            return
    raise ConfigError(f"process {pid} of an earlier run does not end: stop it, then start again")


def last_line(log: Path) -> str:
    """The last line of a server's log, for a message; prefers one that says what went wrong."""
    if not log.exists():
        return "(no log)"
    lines = [line for line in log.read_bytes()[-TAIL:].decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if "FATAL" in line or "error" in line.lower()]
    return (fatal or lines or ["(empty log)"])[-1].strip()
