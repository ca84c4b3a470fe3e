"""A worker that holds hundreds of turns is stopped (SIGSTOP) past its TTL, others take over all of them, and it goes on.

What it then writes under its old leases must be refused, every time: while its turns run elsewhere, and when they have
ended. Its next heartbeat tells it that it was declared dead, and from then on it refuses its writes itself; in half of the
rounds that heartbeat is held up for a moment, so that all of its writes go out. A witness in the process counts those
that do.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from uuid import UUID

from tests.benchmarks import checks, effects, witness
from tests.benchmarks.checks import History
from tests.benchmarks.effects import BEGUN, DONE
from tests.benchmarks.figures import Report
from tests.benchmarks.process import Process
from tests.benchmarks.stack import PATIENCE, Settings, Site, Stack, until
from tests.benchmarks.witness import Seen
from tests.support.waiting import wait_until

AGENTS = "tests.benchmarks.agents,tests.benchmarks.witness"
HELD = """
SELECT s.id, s.lease_epoch AS epoch, w.pid FROM sessions s JOIN workers w ON w.id = s.lease_worker
 WHERE s.open_turns > 0"""
FOUND = "SELECT count(*) AS n FROM events WHERE id = ANY(%s)"


SHARE = 0.8
"""Of the turns: so many must be the stopped worker's, and as many of its late writes be tried."""


@dataclass(frozen=True, slots=True)
class Kind:
    """When the worker goes on, and whether it can write before it learns that it is dead."""

    after_the_end: bool
    news_is_late: bool

    def __str__(self) -> str:
        when = "its turns have ended elsewhere" if self.after_the_end else "its turns run elsewhere"
        return f"{when}, {'it learns late' if self.news_is_late else 'it learns at once'}"


KINDS = [Kind(after, late) for late in (True, False) for after in (False, True)]


@dataclass(frozen=True, slots=True)
class Round:
    """One stop. ``held``: the leases of the stopped process, by session. Times in seconds since 1970."""

    pid: int
    held: dict[UUID, int]
    stopped: float
    resumed: float


async def run(stack: Stack, *, short: bool) -> Report:
    turns, steps = (60, 16) if short else (250, 40)
    settings: Settings = {"heartbeat": 0.3, "lease_ttl": 2, "lock_grace": 1} if short else {}
    how = "impatient time settings" if short else "default time settings"
    report = Report("stale", f"SIGSTOP of a worker with {turns} turns until all run elsewhere, then SIGCONT, {how}")
    seen = Tally()
    for number, kind in enumerate(KINDS[:1] if short else KINDS):
        async with stack.site() as site:
            bench = Bench(site, turns=turns, steps=steps, settings=settings, random=Random(number))
            at = await bench.stop_and_go(kind)
            history = await checks.history(site, bench.file, agents=["witnessed"], exempt=[at.pid])
            report.violations += history.violations(turns=turns)
            await seen.add(site, at, history, witness.read(bench.witness))
            report.notes.append(f"{kind}: {seen.asked[-1]} late writes of {seen.held[-1]} leases reached Postgres")
            wanted = turns * SHARE if kind.news_is_late else 0
            report.require(seen.held[-1] >= turns * SHARE, f"{kind}: the stopped worker held {seen.held[-1]} turns")
            report.require(seen.asked[-1] >= wanted, f"{kind}: too few late writes were tried: {seen.asked[-1]}")
    report.require(sum(seen.committed) == 0, f"{sum(seen.committed)} late writes were acknowledged")
    report.require(sum(seen.found) == 0, f"{sum(seen.found)} late writes are in the log")
    report.add("turns that the stopped worker held", "", seen.held)
    report.add("results that came late", "", seen.results)
    report.add("late writes that reached Postgres", "", seen.asked)
    report.add("... of these refused", "", seen.refused)
    report.add("steps begun in vain by the stale worker", "", seen.in_vain)
    report.add("stopped for", "s", seen.stopped)
    report.notes.append(f"in all {sum(seen.asked)} late writes reached Postgres, {sum(seen.refused)} were refused")
    return report


class Tally:
    """Counts, by round."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.results: list[int] = []
        self.asked: list[int] = []
        self.committed: list[int] = []
        self.found: list[int] = []
        self.refused: list[int] = []
        self.in_vain: list[int] = []
        self.stopped: list[float] = []

    async def add(self, site: Site, at: Round, history: History, writes: list[Seen]) -> None:
        """A write is late if it was first asked for after the SIGCONT, under a lease from before the SIGSTOP."""
        mine = [w for w in writes if w.pid == at.pid and at.held.get(w.session) == w.epoch]
        before = {w.event for w in mine if w.at < at.resumed}
        late = [w for w in mine if w.at >= at.resumed and w.event not in before]
        asked = {w.event for w in late if w.what == "asked"}
        own = [e for e in history.effects if e.pid == at.pid and e.at >= at.resumed and e.session in at.held]
        self.held.append(len(at.held))
        self.results.append(sum(e.what == DONE for e in own))
        self.asked.append(len(asked))
        self.committed.append(len({w.event for w in late if w.what == "committed"}))
        self.found.append((await site.query(FOUND, list(asked)))[0].n)
        self.refused.append(self.asked[-1] - max(self.committed[-1], self.found[-1]))
        self.in_vain.append(sum(e.what == BEGUN for e in own))
        self.stopped.append(at.resumed - at.stopped)


class Bench:
    """One worker that will be stopped, and one that takes over."""

    def __init__(self, site: Site, *, turns: int, steps: int, settings: Settings, random: Random) -> None:
        self.site = site
        self.turns = turns
        self.file = site.stack.effects_file()
        self.witness = site.stack.effects_file()
        self._settings: Settings = {"agents": AGENTS, "witness": self.witness, **settings}
        self._gate = site.stack.effects_file()
        same = {"file": str(self.file), "gate": str(self._gate)}
        self._works = [{"steps": [random.randint(50, 500) for _ in range(steps)], **same} for _ in range(turns)]

    async def stop_and_go(self, kind: Kind) -> Round:
        """Returns when all turns have ended, and the stopped worker has learned that it lost its leases."""
        site = self.site
        await site.start(settings={**self._settings, "witness_hold_up": 1.0 if kind.news_is_late else 0.0})
        ((pid, victim),) = (await site.serving()).items()
        batch = await site.submit("witnessed", self._works)
        await wait_until(lambda: self._all_in(0), description="all turns run", limit=60)
        await site.start(settings=self._settings)
        self._gate.touch()
        await wait_until(lambda: self._all_in(1), description="all turns go on", limit=60)
        victim.pause()
        stopped = time.time()
        held = {row.id: row.epoch for row in await site.query(HELD) if row.pid == pid}
        await wait_until(lambda: self._all_elsewhere(held, pid), description="all run elsewhere", limit=90)
        if kind.after_the_end:
            await until(lambda: site.has_ended(batch), description="the turns end", limit=PATIENCE)
        resumed = time.time()
        victim.resume()
        await wait_until(lambda: _losses(victim) >= len(held), description="all leases are lost", limit=60)
        await until(lambda: site.has_ended(batch), description="the turns end", limit=PATIENCE)
        return Round(pid, held, stopped, resumed)

    def _all_in(self, step: int) -> bool:
        return len({effect.turn for effect in effects.read(self.file) if effect.step == step}) == self.turns

    def _all_elsewhere(self, held: Collection[UUID], pid: int) -> bool:
        return {e.session for e in effects.read(self.file) if e.pid != pid} >= set(held)


def _losses(worker: Process) -> int:
    """How many leases the worker has learned to be lost."""
    return worker.log.read_text().count('"message": "lease lost"')
