"""One run: load and faults side by side, then calm, then the check."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshift.embedded import Guardian
from tests.chaos.checker import Checked, check
from tests.chaos.clients import Client
from tests.chaos.edge import Edge
from tests.chaos.evidence import TERMINAL, Evidence
from tests.chaos.gather import gather_api, gather_files, gather_servers, look_at_redis
from tests.chaos.numbers import numbers_of
from tests.chaos.schedule import Fault, draw
from tests.chaos.stage import Stage

UP = 90.0
"""Seconds until the fleet must be up, at the start and after the last fault."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides a run."""

    seconds: float
    seed: int
    workers: int = 5
    replicas: int = 2
    clients: int = 24
    quick: bool = True
    poison: bool = True
    patience: float = 120.0  # seconds from the last fault until every turn must have ended

    @property
    def limit(self) -> float:
        """Seconds after which the whole run is stuck, whatever happens."""
        return self.seconds + 2 * UP + self.patience + 180

    def schedule(self, ttl: float) -> list[Fault]:
        return draw(self.seed, seconds=self.seconds, workers=self.workers, replicas=self.replicas, ttl=ttl)


@dataclass(slots=True)
class Result:
    """What a run found."""

    options: Options
    folder: Path
    found: Evidence
    checks: list[Checked]
    faults: dict[str, int]  # injected, by kind
    numbers: dict[str, Any]  # what else is worth a line, in the order of the report

    @property
    def violations(self) -> int:
        return sum(len(checked.violations) for checked in self.checks)


async def run(options: Options, folder: Path, *, guardian: Guardian, say: Callable[[str], None]) -> Result:
    """Run it; everything that was started has ended when this returns.

    Raises:
        Exception: the run itself failed, for example because a server could not be started again.
    """
    found = Evidence()
    begun = time.monotonic()
    async with Stage(
        folder,
        guardian=guardian,
        seed=options.seed,
        workers=options.workers,
        replicas=options.replicas,
        quick=options.quick,
        poison=options.poison,
    ) as stage:
        edge = Edge(stage.urls, found)
        last = Edge(stage.urls, found, statuses=edge.statuses)  # for the time after the clients have given up
        try:
            async with _beside(stage.keep_up()):
                await stage.all_ready(limit=UP)
                say(f"the fleet is up after {time.monotonic() - begun:.0f} s: {options.workers} workers")
                async with _beside(_progress(stage, found, say)):
                    calm = await _load(options, stage, edge, found)
                say(f"every client is done {calm:.1f} s after the last fault; reading everything")
                with suppress(AssertionError):  # whose work is not done is seen by what is left
                    await stage.all_ready(limit=UP)
                await asyncio.wait_for(gather_api(last, found), UP)
                await gather_servers(stage, found)
            await stage.shut_down()
        finally:
            await edge.close()
            await last.close()
        gather_files(stage, found)
        found.save(folder / "evidence.json")
        return _result(options, folder, stage, edge, found, calm=calm)


async def _load(options: Options, stage: Stage, edge: Edge, found: Evidence) -> float:
    """Clients and faults; seconds from the end of the last fault to the end of the last turn."""
    stopping = asyncio.Event()
    clients = [
        Client(f"c{number}", edge, found, seed=options.seed, poison=options.poison) for number in range(options.clients)
    ]
    tasks = [asyncio.create_task(client.run(stopping)) for client in clients]
    try:
        begun = time.monotonic()
        for fault in options.schedule(stage.ttl):
            await _sleep_or_fail(begun + fault.at - time.monotonic(), tasks)
            stage.inject(fault)
        await _sleep_or_fail(begun + options.seconds - time.monotonic(), tasks)
        stopping.set()
        await stage.faults_over()
        calm = time.monotonic()
        _, late = await asyncio.wait(tasks, timeout=options.patience)
        edge.over.set()
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _fail_with(tasks)
        return time.monotonic() - calm
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _sleep_or_fail(seconds: float, tasks: list[asyncio.Task[None]]) -> None:
    """Clients run until they are stopped: one that ends early has met a mistake of ours."""
    await asyncio.wait(tasks, timeout=max(0.0, seconds), return_when=asyncio.FIRST_EXCEPTION)
    _fail_with(tasks)


def _fail_with(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _progress(stage: Stage, found: Evidence, say: Callable[[str], None]) -> None:
    begun = time.monotonic()
    while True:
        await asyncio.sleep(5)
        await look_at_redis(stage, found)
        ended = len({seen.turn for seen in found.seen if seen.status in TERMINAL})
        up = sum(slot.ready and not slot.paused for slot in stage.slots)
        say(
            f"{time.monotonic() - begun:5.0f} s  {len(found.asked)} turns accepted, {ended} seen to end, "
            f"{stage.injected.total()} faults, {up} of {len(stage.slots)} processes up, "
            f"{len(found.bad_answers)} bad answers, {len(stage.deaths)} unexplained deaths"
        )


@asynccontextmanager
async def _beside(service: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``service`` while the block lasts. What it raises ends the block."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(service)
        yield
        task.cancel()


def _result(options: Options, folder: Path, stage: Stage, edge: Edge, found: Evidence, *, calm: float) -> Result:
    numbers = {
        "seconds from the last fault to the end of the last turn": round(calm, 1),
        "wake-ups passed, dropped, doubled": [stage.meddler.passed, stage.meddler.dropped, stage.meddler.doubled],
        "requests to the object store disturbed": {m.value: n for m, n in sorted(stage.store.disturbed.items())},
        "processes started": stage.starts,
        "processes that did not come up": stage.failed_starts,
        "processes ended by poison turns": stage.poisoned,
        "faults that found no victim": stage.missed.total(),
        "answers and failures of requests": dict(sorted(edge.statuses.items())),
        **numbers_of(found),
    }
    faults = {kind.value: count for kind, count in sorted(stage.injected.items())}
    return Result(options, folder, found, check(found), faults, numbers)
