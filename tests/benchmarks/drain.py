"""What a turn notices of the SIGTERM of its worker: from the end of the step that runs to the next step elsewhere.

Three workers with default settings run turns of steps of 50 to 500 ms; the one that holds most is told to stop. Every step
of every turn must have begun once: neither a finished nor a running one is repeated.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from uuid import UUID

from tests.benchmarks import checks, effects
from tests.benchmarks.checks import History
from tests.benchmarks.effects import BEGUN, DONE, Effect
from tests.benchmarks.figures import Report
from tests.benchmarks.process import Process
from tests.benchmarks.recovery import fill_up
from tests.benchmarks.stack import PATIENCE, Site, Stack, until
from tests.support.waiting import wait_until

HOLDERS = "SELECT w.pid FROM sessions s JOIN workers w ON w.id = s.lease_worker WHERE s.open_turns > 0"


@dataclass(frozen=True, slots=True)
class Drain:
    """One SIGTERM. ``pid``: of the process that ran the turns; ``at``: seconds since 1970; ``took``: until it had ended."""

    pid: int
    at: float
    took: float
    exit_code: int


async def run(stack: Stack, *, short: bool) -> Report:
    drains, turns, steps, fleet = (1, 20, 8, 2) if short else (15, 60, 20, 3)
    report = Report("drain", f"SIGTERM of a worker, {fleet} workers, {turns} turns with steps of 50 to 500 ms")
    async with stack.site() as site:
        file, seen = stack.effects_file(), []
        for number in range(drains):
            await fill_up(site, fleet, {})
            seen.append(await drain(site, file, turns=turns, steps=steps, random=Random(number)))
        history = await checks.history(site, file)
    report.violations += history.violations(turns=turns * drains)
    again = [step for step, runs in history.runs.items() if runs > 1]
    report.require(not again, f"{len(again)} steps began more than once, the first: {again[:1]}")
    codes = [each.exit_code for each in seen if each.exit_code]
    report.require(not codes, f"drained workers ended with {codes}")
    gaps = [handed_over(history, each) for each in seen]
    report.require(any(gaps), "no turn was handed over")
    every = report.add(
        "end of the running step to the next step elsewhere", "s", [gap for some in gaps for gap in some]
    )
    report.add("turns that one drain handed over", "", [len(some) for some in gaps])
    report.add("SIGTERM until the worker has ended", "s", [each.took for each in seen])
    if every.samples:
        report.notes.append(f"{drains} drains, {len(every.samples)} turns: p99 {every.p99:.3f} s")
    return report


async def drain(site: Site, file: Path, *, turns: int, steps: int, random: Random) -> Drain:
    """SIGTERM the worker that holds most while all turns run; returns when all have ended."""
    before = len(effects.read(file))
    works = [{"steps": [random.randint(50, 500) for _ in range(steps)], "file": str(file)} for _ in range(turns)]
    batch = await site.submit("work", works)

    def all_run() -> bool:
        return len({effect.turn for effect in effects.read(file)[before:]}) == turns

    await wait_until(all_run, description="all turns run", limit=60)
    victim, pid = await _holder(site)
    at = time.time()
    await site.end([victim])
    took = time.time() - at
    await until(lambda: site.has_ended(batch), description="the turns end", limit=PATIENCE)
    return Drain(pid, at, took, victim.process.returncode)


async def _holder(site: Site) -> tuple[Process, int]:
    """The worker that holds most, and the pid under which it runs them."""
    serving = await site.serving()
    held = Counter(row.pid for row in await site.query(HOLDERS) if row.pid in serving)
    pid = held.most_common(1)[0][0]
    return serving[pid], pid


def handed_over(history: History, drained: Drain) -> list[float]:
    """Seconds that each turn stood still: from the end of its last step on the drained worker, but not before the SIGTERM."""
    last: dict[UUID, float] = {}
    gaps: dict[UUID, float] = {}
    for effect in history.effects:
        if effect.pid == drained.pid and effect.what == DONE:
            last[effect.turn] = effect.at
        elif _goes_on(effect, drained) and effect.turn in last:
            gaps.setdefault(effect.turn, effect.at - max(last[effect.turn], drained.at))
    return list(gaps.values())


def _goes_on(effect: Effect, drained: Drain) -> bool:
    return effect.what == BEGUN and effect.pid != drained.pid and effect.at > drained.at
