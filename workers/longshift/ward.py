"""A ward: a child process of a worker in which suspects run, away from everybody else. ``python -m longshift.ward``

It is an ordinary worker but for three things: it is woken by nobody and claims suspects, in groups of the size that their
sessions allow; it ends when it has had none for a while; and it drains when its standard input ends, because then the
worker that started it is gone.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from longshift import config as settings
from longshift import parent, telemetry
from longshift.agent import Agents, load_agents
from longshift.clock import SYSTEM, Clock
from longshift.config import Config
from longshift.ending import end_process
from longshift.errors import LongshiftError
from longshift.tracing import open_traces
from longshift.worker import Worker

IDLE = timedelta(seconds=20)
"""Without a suspect for so long, a ward ends."""
LOOK = timedelta(milliseconds=500)


async def serve(config: Config, agents: Agents, *, clock: Clock = SYSTEM) -> int:
    """Run suspects until there are none, the parent is gone, or a signal comes; the exit code."""
    loop, over, failures = asyncio.get_running_loop(), asyncio.Event(), []

    def fail() -> None:
        failures.append("a part of the ward has ended")
        over.set()

    traces = open_traces(config, service="longshift-worker")
    traces.share()
    worker = Worker(config, agents, on_failure=fail, on_drain=over.set, isolated=True, traces=traces)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    parent.when_gone(lambda: loop.call_soon_threadsafe(over.set))
    try:
        await worker.start()
        await _until_idle(worker, over, clock=clock)
        await worker.drain()
    finally:
        await worker.stop()
    return 1 if failures else 0


async def _until_idle(worker: Worker, over: asyncio.Event, *, clock: Clock) -> None:
    busy = clock.monotonic()
    while not over.is_set() and clock.monotonic() - busy < IDLE.total_seconds():
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), LOOK.total_seconds())
        if worker.running:
            busy = clock.monotonic()


def main() -> int:
    telemetry.setup()
    sys.path.insert(0, str(Path.cwd()))
    try:
        config = settings.load()
        return end_process(asyncio.run(serve(config, load_agents(config.agents))))
    except LongshiftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
