"""One turn among a thousand ends its process, every time it runs: what it does to the others, there and elsewhere.

The crowd has one worker process for itself; a second process, on a queue of its own, carries a steady load, with the poison
in the crowd and without it by turns. Every repetition is as long, and every load the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from uuid import UUID

from tests.benchmarks import checks
from tests.benchmarks.checks import Ended, History
from tests.benchmarks.figures import Figure, Report, quantile
from tests.benchmarks.stack import Settings, Site, Stack, until

CODE = "crash_loop"
HOW = ("segfault", "exit")
"""By repetition: ``ctypes.string_at(0)``, ``os._exit``."""
TURN = "SELECT id FROM turns WHERE batch_id = %s AND batch_index = %s"


@dataclass(frozen=True)
class Plan:
    """``window``: seconds of load. ``limit``: after which the crowd, or its poison, does not end any more."""

    crowd: int = 1000
    steps: tuple[int, int] = (1000, 2000)  # ms of each of five
    repetitions: int = 2
    window: float = 60.0
    rate: float = 20.0  # turns of the load a second
    limit: float = 240.0
    settings: Settings = field(default_factory=dict)


SHORT = Plan(
    crowd=6,
    steps=(50, 200),
    repetitions=1,
    window=2.0,
    limit=30,
    settings={"heartbeat": 0.2, "lock_grace": 0.6, "lease_ttl": 2},
)


@dataclass(frozen=True, slots=True)
class Case:
    """One crowd. Seconds from its submission; ``latencies`` of the load, ``over`` what its turns took beyond their steps."""

    innocents: Sequence[Ended]
    poison: Ended | None
    begun: float
    latencies: Sequence[float]
    over: Sequence[float]


async def run(stack: Stack, *, short: bool) -> Report:
    plan = SHORT if short else Plan()
    report = Report("poison", f"one turn among {plan.crowd:,} in one process ends it whenever it runs")
    clean, poisoned = [], []
    for number in range(plan.repetitions):
        clean.append(await case(stack, plan, report, crash="", seed=number))
        poisoned.append(await case(stack, plan, report, crash=HOW[number % len(HOW)], seed=number))
    report.add("innocents that succeeded", "", [sum(t.status == "succeeded" for t in c.innocents) for c in poisoned])
    report.add("starts of an innocent", "", [t.attempts for c in poisoned for t in c.innocents])
    report.add("starts of the poison", "", [c.poison.attempts for c in poisoned if c.poison])
    report.add("until the last innocent has ended", "s", [_until_last(c) for c in poisoned])
    report.add("... without the poison", "s", [_until_last(c) for c in clean])
    isolated = [c.poison.ended - c.begun for c in poisoned if c.poison and c.poison.ended]
    if isolated:
        report.add("until the poison has failed", "s", isolated)
    if not all(c.latencies for c in (*clean, *poisoned)):
        return report  # and it says why
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        beside = _elsewhere(report, f"a turn of the other process, {name}", poisoned, clean, share)
        report.ratio(f"{name} of the other process, with / without the poison", *beside)
    return report


def _elsewhere(
    report: Report, name: str, poisoned: Sequence[Case], clean: Sequence[Case], share: float
) -> tuple[Figure, Figure]:
    both = []
    for cases, when in ((poisoned, "with the poison"), (clean, "without")):
        both.append(report.add(f"{name}, {when}", "s", [quantile(c.latencies, share) for c in cases]))
        report.add("... of it beyond its steps", "s", [quantile(c.over, share) for c in cases])
    return both[0], both[1]


async def case(stack: Stack, plan: Plan, report: Report, *, crash: str, seed: int) -> Case:
    """Two processes, a crowd, and a load beside it; findings go to the report."""
    random = Random(seed)
    file = stack.effects_file()
    crowd = [_work(file, [random.randint(*plan.steps) for _ in range(5)]) for _ in range(plan.crowd)]
    place = random.randrange(plan.crowd)
    if crash:
        crowd[place] = _work(file, [200], crash=crash)
    async with stack.site() as site:
        mine: Settings = {"queues": "crowd", "capacity": max(plan.crowd, 2), **plan.settings}
        await asyncio.gather(site.start(settings=mine), site.start(settings={"queues": "bystander", **plan.settings}))
        keeper = asyncio.create_task(_keep(site))
        try:
            begun = time.time()
            batch = await site.submit("crowd", crowd)
            load = asyncio.create_task(_load(site, file, plan, Random(seed)))
            ended = await _ends(site, batch, plan.limit)
            await load
        finally:
            keeper.cancel()
        poison_id = (await site.query(TURN, batch, place))[0].id if crash else None
        history = await checks.history(site, file, agents=["crowd", "bystander"], settle=ended)
    found = [turn for turn in history.turns if turn.agent == "crowd"]
    beside = [turn for turn in history.turns if turn.agent == "bystander"]
    poison = next((turn for turn in found if turn.id == poison_id), None)
    innocents = [turn for turn in found if turn.id != poison_id]
    report.violations += _wrong(innocents, poison, history, plan)
    report.require(ended, f"the crowd has not ended within {plan.limit:g} s (crash: {crash or 'none'})")
    took = [(turn, turn.ended - turn.created) for turn in beside if turn.ended]
    report.require(len(took) == len(beside), f"{len(beside) - len(took)} turns of the load have not ended")
    return Case(innocents, poison, begun, [t for _, t in took], [t - turn.work / 1000 for turn, t in took])


def _work(file: Path, steps: list[int], *, crash: str = "") -> dict[str, object]:
    return {"steps": steps, "file": str(file), "crash": crash}


async def _keep(site: Site) -> None:
    """What a supervisor outside does: a new worker for one that has ended."""
    while True:
        site.replace_ended()
        await asyncio.sleep(0.05)


async def _load(site: Site, file: Path, plan: Plan, random: Random) -> None:
    """So many turns a second, whatever becomes of them; returns when they have ended."""
    begun, batches = time.monotonic(), []
    for number in range(round(plan.window * plan.rate)):
        await asyncio.sleep(max(0.0, begun + number / plan.rate - time.monotonic()))
        steps = [random.randint(50, 500) for _ in range(2)]
        batches.append(await site.submit("bystander", [_work(file, steps)]))
    for batch in batches:
        await _ends(site, batch, 30.0)


async def _ends(site: Site, batch: UUID, limit: float) -> bool:
    with suppress(AssertionError):
        return await until(lambda: site.has_ended(batch), description="a batch ends", limit=limit)
    return False


def _until_last(case: Case) -> float:
    """Of those that have ended, or there would be nothing to see of a case that failed."""
    return max((turn.ended - case.begun for turn in case.innocents if turn.ended), default=0.0)


def _wrong(innocents: Sequence[Ended], poison: Ended | None, history: History, plan: Plan) -> list[str]:
    """What is not as it must be, once or in every case."""
    counts = Counter(turn.status for turn in innocents)
    wanted = plan.crowd - (1 if poison else 0)
    wrong = [] if counts == {"succeeded": wanted} else [f"{wanted} innocents were to succeed, but: {dict(counts)}"]
    if poison is not None and (poison.status, poison.code) != ("failed", CODE):
        wrong.append(f"the poison was to fail as {CODE!r}, but it {poison.status}, with {poison.code!r}")
    return [*wrong, *history.out_of_order(), *history.forked(), *history.run_again(), *history.recorded_wrongly()]
