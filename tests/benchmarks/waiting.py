"""How many turns one worker process can have waiting, and what one costs.

In a step: the turn waits on I/O and stays in the process. Between steps (``turn.sleep``): the turn leaves it. Memory is
the growth of the resident set of the process over what it had when warm, by waiting turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from tests.benchmarks.figures import Report, quantile
from tests.benchmarks.stack import Site, Stack, until

HOUR = 3600.0


@dataclass
class Seen:
    """Of one case, by repetition."""

    kib: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)
    busy_lag: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


async def run(stack: Stack, *, short: bool) -> Report:
    repetitions = 1 if short else 3
    sizes = (500,) if short else (1000, 5000, 10_000)
    report = Report("waiting", "turns waiting in one worker process")
    cases = [(f"{size:,} in a step", "waits", size) for size in sizes]
    cases += [(f"{size:,} that left (turn.sleep)", "sleeps", size) for size in sizes]
    cases.insert(len(sizes), (f"{sizes[0]:,} in a step, on a socket", "sockets", sizes[0]))
    seen = {name: Seen() for name, _, _ in cases}
    for _ in range(repetitions):
        for name, kind, size in cases:
            await case(stack, kind, size, seen[name], short=short)
    for name, found in seen.items():
        report.add(f"{name}: memory of each", "KiB", found.kib)
        report.add(f"{name}: until all wait", "s", found.seconds)
    for name, found in seen.items():
        report.add(f"{name}: loop lag p99 while they come", "ms", found.busy_lag)
        report.add(f"{name}: loop lag p99 once all wait", "ms", found.lag)
        report.add(f"{name}: a step of another turn, p50", "ms", found.step)
    return report


async def case(stack: Stack, kind: str, size: int, seen: Seen, *, short: bool) -> None:
    """One fresh worker process, filled with ``size`` turns."""
    async with stack.site() as site, silent_server() as port:
        worker = (await site.start(settings={"capacity": size + 100}))[0]
        await site.warm_up()
        before = worker.memory()
        probe = asyncio.create_task(site.run("lag", [1.0 if short else 2.0]))
        begun = time.perf_counter()
        waiting = await _fill(site, kind, size, port=port)
        await until(waiting, description="all turns wait", limit=300)
        seen.seconds.append(time.perf_counter() - begun)
        seen.busy_lag.append(quantile((await probe)[0].output["lags"], 0.99))
        seen.kib.append((worker.memory() - before) / 1024 / size)
        quiet = (await site.run("lag", [0.5 if short else 1.0]))[0].output
        seen.lag.append(quantile(quiet["lags"], 0.99))
        seen.step.append(quantile(quiet["steps"], 0.5))
        site.kill(worker)  # its turns would wait for an hour


async def _fill(site: Site, kind: str, size: int, *, port: int) -> Callable[[], Awaitable[bool]]:
    """Submit the turns; what is returned says whether all of them wait."""
    if kind == "sleeps":
        batch = await site.submit("sleeps", [HOUR] * size)
        return lambda: _waiting(site, batch, size)
    tally = site.stack.folder / f"tally-{time.monotonic_ns()}"
    tally.touch()
    waiter = {"seconds": HOUR, "tally": str(tally), "port": port if kind == "sockets" else 0}
    await site.submit("waits", [waiter] * size)
    return lambda: _has_size(tally, size)


async def _waiting(site: Site, batch: UUID, size: int) -> bool:
    rows = await site.query("SELECT count(*) AS n FROM turns WHERE batch_id = %s AND status = 'waiting'", batch)
    return bool(rows[0].n == size)


async def _has_size(file: Path, size: int) -> bool:
    return file.stat().st_size >= size  # noqa: ASYNC240  # no more than a system call


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """The port of a server that accepts and never answers."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0, backlog=1000)
    async with server:
        yield int(server.sockets[0].getsockname()[1])
        for writer in writers:
            writer.close()
