"""``longshift up`` as a child process that tells in JSON lines what it does."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from longshift.config import child_environment
from longshift.embedded import Guardian

START_LIMIT = 60.0  # seconds
STOP_LIMIT = 60.0

Tell = Callable[[dict[str, Any]], None]


class StackError(Exception):
    """It did not start."""


class Stack:
    """A running stack: where its API is, and the process ids of its workers, as it told them."""

    def __init__(self, process: Process, tell: Tell) -> None:
        self._process = process
        self._tell = tell
        self._ready = asyncio.Event()
        self.workers: dict[str, int] = {}
        self.stack_file = Path()
        self.url = ""

    @property
    def api_key(self) -> str:
        return str(json.loads(self.stack_file.read_text())["api_key"])

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            if told.get("ready"):
                self.url, self.stack_file = told["url"], Path(told["key_file"])
                self._ready.set()
            elif told["part"].startswith("worker-") and "pid" in told:
                self.workers[told["part"]] = told["pid"]
            self._tell(told)

    async def until_ready(self) -> None:
        ended = asyncio.create_task(self._process.wait())
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({ended, ready}, timeout=START_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.is_set():
            raise StackError(f"the stack did not start (exit code {self._process.returncode}); see the messages above")
        ended.cancel()

    async def stop(self) -> None:
        """Ask it to stop; if it does not, kill it: its guardian stops the rest."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT)
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def running(*, data: Path, agents: str, workers: int, capacity: int, tell: Tell) -> AsyncIterator[Stack]:
    """A stack on ``data``, stopped at the end. Workers find ``agents`` from the current directory."""
    command = ["up", "--json", "--workers", str(workers), "--port", "0", "--agents", agents, "--data", str(data)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "longshift.cli",
        *command,
        stdin=DEVNULL,
        stdout=PIPE,
        env=child_environment(capacity=capacity),
    )
    stack = Stack(process, tell)
    listening = asyncio.create_task(stack.listen())
    with Guardian() as guardian:  # stops the stack also if this process is killed
        guardian.watch(process.pid)
        try:
            await stack.until_ready()
            yield stack
        finally:
            await stack.stop()
            await listening
