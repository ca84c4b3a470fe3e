"""No-op turns per second, from submit to having all results, beside bare Celery tasks on the same Redis.

Longshift commits each turn three times in Postgres (accepted, started, ended); a bare Celery task is a message in Redis
that is gone once it is taken. The comparison says what durability costs, not who is better.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from tests.benchmarks.celery_peer import Peer
from tests.benchmarks.figures import Report
from tests.benchmarks.stack import Site, Stack


async def run(stack: Stack, *, short: bool) -> Report:
    repetitions, total = (1, 300) if short else (5, 5000)
    report = Report("turns", f"{total:,} no-op turns in one batch, from submit to all results")
    rates: dict[str, list[float]] = {}
    accepting: list[float] = []
    cpu: list[float] = []
    async with stack.site() as one, stack.site() as two:
        await asyncio.gather(one.start(1), two.start(2))
        await asyncio.gather(one.warm_up(), two.warm_up())
        with Peer(stack) as peer:
            contestants: dict[str, Callable[[], Awaitable[float]]] = {
                "1 worker process": lambda: ours(one, total, accepting, cpu),
                "2 worker processes": lambda: ours(two, total, [], []),
                "Celery, 1 process, no results": lambda: asyncio.to_thread(peer.run, "solo", total, results=False),
                "Celery, 2 processes, no results": lambda: asyncio.to_thread(peer.run, "prefork", total, results=False),
                "Celery, 1 process, results in Redis": lambda: asyncio.to_thread(peer.run, "solo", total, results=True),
            }
            for _ in range(repetitions):
                for name, contestant in contestants.items():
                    rates.setdefault(name, []).append(await contestant())
    figures = [report.add(name, "1/s", samples) for name, samples in rates.items()]
    report.add("1 worker process: its processor time of a turn", "us", cpu)
    report.add(f"a batch of {total:,} accepted", "s", accepting)
    if not short:
        async with stack.site() as site:
            await ten_thousand(site, report, repetitions=repetitions)
    for celery in figures[2:]:
        report.ratio(f"{figures[0].name} / {celery.name}", figures[0], celery)
    report.ratio(f"{figures[1].name} / {figures[3].name}", figures[1], figures[3])
    report.notes.append("The client is one more process on the same cores, in every case.")
    return report


async def ours(site: Site, total: int, accepting: list[float], cpu: list[float]) -> float:
    before = sum(worker.cpu() for worker in site.workers)
    begun = time.perf_counter()
    batch = await site.submit("noop", list(range(total)))
    accepting.append(time.perf_counter() - begun)
    await site.results(batch)
    took = time.perf_counter() - begun
    cpu.append((sum(worker.cpu() for worker in site.workers) - before) * 1e6 / total)
    return total / took


async def ten_thousand(site: Site, report: Report, *, repetitions: int) -> None:
    """How long the acceptance of a large batch takes while the workers are at rest: none lives here any more."""
    await site.end(await site.start(1))  # it has registered the agents
    took = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        await site.submit("noop", list(range(10_000)))
        took.append(time.perf_counter() - begun)
    report.add("a batch of 10,000 accepted, no worker", "s", took)
