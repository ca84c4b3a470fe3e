"""A local stack as a user starts it, and the command line as a user calls it: real processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from longshift.cli import main
from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync

AGENTS = '''
import asyncio
import hashlib
from pathlib import Path
from longshift import Turn, agent, emit, step

@step
async def add(a: int, b: int) -> int:
    emit(f"adding {a} and {b}")
    return a + b

@agent("double")
async def double(turn: Turn, n: int) -> int:
    """Twice the number."""
    return await add(n, n)

@agent("sleepy")
async def sleepy(turn: Turn, seconds: float) -> str:
    await add(1, 1)
    await asyncio.sleep(seconds)
    return "slept"

@agent("haul")
async def haul(turn: Turn, path: str) -> str:
    """The hash of a file, after it has been to the cold tier and back."""
    digest = hashlib.sha256()
    async for chunk in turn.stream(await turn.artifact("hauled", Path(path))):
        digest.update(chunk)
    return digest.hexdigest()

@agent("broken")
async def broken(turn: Turn, n: int) -> int:
    raise ValueError("no such luck")
'''
COMMAND = (sys.executable, "-P", "-m", "longshift.cli")


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def environment(**settings: str) -> dict[str, str]:
    """That of this process without its Longshift settings, and with ``settings``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGSHIFT_")}
    return kept | {f"LONGSHIFT_{name.upper()}": value for name, value in settings.items()}


def call(*arguments: str, folder: Path, given: str = "", **settings: str) -> Said:
    """Run one command in ``folder``; a traceback is never what a user may see."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment(**settings),
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def call_inline(*arguments: str, folder: Path, given: str = "", **settings: str) -> Said:
    """Run one command in ``folder``, in this process: a test has many of them, and each would take a second."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with ExitStack() as stack:
        stack.enter_context(chdir(folder))
        stack.enter_context(patch.dict(os.environ, environment(**settings), clear=True))
        stack.enter_context(patch.object(sys, "argv", ["longshift", *arguments]))
        stack.enter_context(patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode()))))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


class LocalStack:
    """``longshift up --json`` as a process."""

    def __init__(self, folder: Path, *arguments: str, guardian: Guardian, **settings: str) -> None:
        self.folder = folder
        self._guardian = guardian
        self._out, self._err = folder / "up.out", folder / "up.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*COMMAND, "up", "--json", "--port", "0", *arguments],
                cwd=folder,
                env=environment(**settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        guardian.watch(self.process.pid, grace=timedelta(seconds=60))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    @property
    def error(self) -> str:
        return self._err.read_text()

    @property
    def ready(self) -> dict[str, Any]:
        """The line that says so; waits for it."""

        def found() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.error
            return next((line for line in self.lines if "ready" in line), None)

        line = wait_until_sync(found, description="the stack is ready", limit=60)
        assert line is not None
        return line

    def wait_for(self, part: str, state: str) -> dict[str, Any]:
        """The last line about ``part``, once it has ``state``."""

        def found() -> dict[str, Any] | None:
            last = [line for line in self.lines if line.get("part") == part]
            return last[-1] if last and last[-1]["state"] == state else None

        line = wait_until_sync(found, description=f"{part} is {state}", limit=30)
        assert line is not None
        return line

    def everything(self) -> list[psutil.Process]:
        """The process itself and all below it."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Signal it and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self._guardian.forget(self.process.pid)
        return code

    def call(self, *arguments: str, given: str = "", **settings: str) -> Said:
        """Run one command in the stack's folder, in this process."""
        return call_inline(*arguments, folder=self.folder, given=given, **settings)


def peak_memory(process: psutil.Process) -> int:
    """Bytes that the process has had resident at most since it began."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@contextmanager
def running(folder: Path, *arguments: str, guardian: Guardian, **settings: str) -> Iterator[LocalStack]:
    """A stack with the agents above, stopped afterwards."""
    (folder / "tiny.py").write_text(AGENTS)
    stack = LocalStack(folder, "--agents", "tiny", *arguments, guardian=guardian, **settings)
    try:
        yield stack
    finally:
        stack.stop()


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, reaped or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
