"""Many sessions under SIGKILL of workers that hold leases: nothing lost, nothing twice, and how long each kill costs.

Sessions of five turns, each of two or three steps of 50 to 500 ms, arrive as others end, so that a fixed number is open at
a time: what is measured is the recovery of a turn, not its place in a queue. Every few seconds a worker that runs turns is
killed and replaced at once, by turns its process alone (whatever watches it can tell) and all of it (nobody can: a lost
machine). The killing begins when the fleet has been up for a TTL; from then on few workers ever are that old.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from longshift.catalogue import Draft
from longshift.db.liveness import LEADER
from longshift.model import new_id
from tests.benchmarks import checks
from tests.benchmarks.figures import Report
from tests.benchmarks.kills import Harm, How, Kill, harm
from tests.benchmarks.process import Process
from tests.benchmarks.recovery import LEADING
from tests.benchmarks.stack import Settings, Site, Stack, until

TURNS = 5
SHORTEST, LONGEST = 50, 500
"""Milliseconds of a step."""
PROGRESS = "a turn, until its next step is recorded (progress)"
OPEN = "SELECT count(*) AS n FROM sessions WHERE open_turns > 0"
HOLDERS = "SELECT DISTINCT w.pid FROM sessions s JOIN workers w ON w.id = s.lease_worker WHERE w.dead_at IS NULL"


@dataclass(frozen=True)
class Plan:
    """``at_once``: sessions open at a time. ``every``: seconds between two kills, of which at ``most`` so many happen and
    at ``least`` so many must have interrupted a step. ``first``: seconds before them; a TTL and a little more, because until
    the fleet has been watched for so long nobody's silence is believed."""

    sessions: int = 10_000
    at_once: int = 120
    workers: int = 5
    first: float = 17
    every: float = 2.7
    least: int = 100
    most: int = 1_000_000
    limit: float = 2400.0  # seconds after which it is stuck
    settings: Settings = field(default_factory=lambda: {"capacity": 48})


SHORT = Plan(
    sessions=30,
    at_once=30,
    workers=3,
    first=0,
    every=0.8,
    least=1,
    most=2,
    limit=90,
    settings={"capacity": 48, "heartbeat": 0.2, "lock_grace": 0.6, "lease_ttl": 2},
)


async def run(stack: Stack, *, short: bool) -> Report:
    plan = SHORT if short else Plan()
    how = "impatient time settings" if short else "default time settings"
    about = f"{plan.sessions:,} sessions x {TURNS} turns, a kill every {plan.every:g} s, {how}"
    report = Report("faults", about)
    async with stack.site() as site:
        await site.start(plan.workers, settings=plan.settings)
        chaos = Chaos(site, plan)
        begun = time.time()
        with suppress(TimeoutError):  # the history says which turns have not ended
            await asyncio.wait_for(asyncio.gather(chaos.feed(), chaos.kill_until_fed()), plan.limit)
        took = time.time() - begun
        history = await checks.history(site, chaos.file)
        total = plan.sessions * TURNS
        report.violations += history.violations(turns=total)
        seen = harm(history, chaos.kills)
        _figures(report, seen)
        counted = sum(bool(each.interrupted) for each in seen)
        report.require(counted >= plan.least, f"{counted} kills interrupted a step, {plan.least} were wanted")
        report.add("all of it", "s", [took])
        report.add("turns", "1/s", [total / took])
        false = sum(log.read_text().count("declared dead, going on") for log in site.logs)
    report.notes.append(f"{len(chaos.kills)} kills, {counted} of them in a running step (only these count)")
    report.notes.append(f"{total:,} turns, {len(history.facts):,} events, {len(history.effects):,} effects checked")
    report.notes.append(f"living workers declared dead: {false}")
    return report


class Chaos:
    """The one who submits, and the one who kills."""

    def __init__(self, site: Site, plan: Plan) -> None:
        self.site, self.plan = site, plan
        self.file = site.stack.effects_file()
        self.kills: list[Kill] = []
        self._random = Random(1)
        self._fed = asyncio.Event()

    async def feed(self) -> None:
        """Submit sessions as others end, until all have ended."""
        left = self.plan.sessions
        while left:
            room = self.plan.at_once - await self._open()
            if room > 0:
                count = min(room, left)
                await self.site.mailbox.submit_batch(list(self._drafts(count)), tenant_id=self.site.tenant)
                left -= count
            await asyncio.sleep(0.1)
        await until(self._none_open, description="all turns end", limit=self.plan.limit)
        self._fed.set()

    async def kill_until_fed(self) -> None:
        await asyncio.sleep(self.plan.first)
        while not self._fed.is_set() and len(self.kills) < self.plan.most:
            try:
                await asyncio.wait_for(self._fed.wait(), self.plan.every * self._random.uniform(0.8, 1.2))
            except TimeoutError:
                await self._kill("alone" if len(self.kills) % 2 else "group")

    async def _kill(self, how: How) -> None:
        serving = await self.site.serving()
        holders = {row.pid for row in await self.site.query(HOLDERS)} & serving.keys()
        if not holders:
            return
        pid = self._random.choice(sorted(holders))
        led = pid in {row.pid for row in await self.site.query(LEADING, LEADER)}
        self.kills.append(Kill(pid, time.time(), how, led))
        kill(serving[pid], pid, how)
        self.site.replace_ended()

    def _drafts(self, sessions: int) -> Iterator[Draft]:
        for session_id in [new_id() for _ in range(sessions)]:
            for place in range(TURNS):
                yield Draft("work", self._input(place), session_id=session_id)

    def _input(self, place: int) -> dict[str, object]:
        steps = [self._random.randint(SHORTEST, LONGEST) for _ in range(self._random.choice((2, 3)))]
        return {"place": place, "steps": steps, "file": str(self.file)}

    async def _open(self) -> int:
        return int((await self.site.query(OPEN))[0].n)

    async def _none_open(self) -> bool:
        return await self._open() == 0


def kill(worker: Process, pid: int, how: How) -> None:
    if how == "alone":
        worker.kill(pid)
    else:
        worker.kill_group()


def _figures(report: Report, seen: list[Harm]) -> None:
    counted = [each for each in seen if each.interrupted]
    report.add("steps that one kill interrupted", "", [each.interrupted for each in counted])
    last = {each.kill: max(r.progress for r in each.undisturbed) for each in counted if each.undisturbed}
    cases = {
        "a kill, until the last of its turns progresses": list(last.values()),
        "... of the process alone": [s for kill, s in last.items() if kill.how == "alone"],
        "... of all that belongs to the worker": [s for kill, s in last.items() if kill.how == "group"],
        "... of the sweeper's leader": [s for kill, s in last.items() if kill.led],
        "... of another": [s for kill, s in last.items() if not kill.led],
        "a turn, until it is claimed": [r.claimed for each in counted for r in each.undisturbed],
        "a turn, until its next step begins": [
            r.begun for each in counted for r in each.undisturbed if r.begun is not None
        ],
        "a turn, until its next step is recorded (progress)": [
            r.progress for each in counted for r in each.undisturbed
        ],
    }
    for name, samples in cases.items():
        if samples:
            report.add(name, "s", samples)
    if len(every := [r.progress for each in counted for r in each.recoveries]) > len(cases[PROGRESS]):
        report.add("... those too whose next worker was killed before that", "s", every)
