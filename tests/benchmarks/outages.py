"""Redis gone for a minute, Postgres gone for a minute, under load: what lives on, what is repeated, how it comes back.

Turns run that are long enough to see all of the outage, and others are submitted over HTTP at a steady rate, before, during
and after it. A submission that was not accepted is sent again, under its idempotency key, once the server is back, as a
client of the contract would: each key must have become one turn, and each turn must succeed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Literal
from uuid import UUID

import httpx

from longshift.model import Prefix, new_id, parse_id
from longshift.testing.waiting import wait_until
from tests.benchmarks import checks, effects
from tests.benchmarks.checks import History
from tests.benchmarks.effects import BEGUN
from tests.benchmarks.figures import Report
from tests.benchmarks.stack import API_KEY, PATIENCE, Site, Stack, until

ACCEPTED = 202
Server = Literal["redis", "postgres"]
MOST_REPEATED = 0.05
"""Of the steps that run when Postgres goes."""
OPEN = "SELECT count(*) AS n FROM turns WHERE ended_at IS NULL"


@dataclass(frozen=True)
class Plan:
    """``away``: seconds. ``turns`` of so many ``steps`` see all of the outage; ``rate``: further ones, a second."""

    away: float = 60.0
    before: float = 5.0
    after: float = 5.0
    turns: int = 150
    steps: int = 280
    rate: float = 10.0
    workers: int = 3


SHORT = Plan(away=1.0, before=0.3, after=0.3, turns=30, steps=8, workers=2)


@dataclass(slots=True)
class Submission:
    """One key. ``status``: of the answer, 0 if there was none. ``took``: seconds until it came."""

    key: str
    at: float
    work: Mapping[str, object]
    status: int = 0
    retryable: bool = False
    took: float = 0.0
    turn: UUID | None = None


@dataclass(slots=True)
class Outage:
    """One of them, from outside. Times in seconds since 1970."""

    server: Server
    gone: float
    back: float
    away: tuple[float, float]  # from when to when it was certainly not there: its stop and its start take their time
    submissions: list[Submission]
    died: int
    history: History
    turns: int

    @property
    def meanwhile(self) -> list[Submission]:
        """Sent and answered while the server was away."""
        first, last = self.away
        return [s for s in self.submissions if first <= s.at and s.at + s.took <= last]


async def run(stack: Stack, *, short: bool) -> Report:
    plan = SHORT if short else Plan()
    report = Report("outages", f"a server is gone for {plan.away:g} s under load, default time settings")
    servers: tuple[Server, ...] = ("redis", "postgres")
    for server in servers:
        async with stack.site() as site:
            _judge(report, await Trial(site, plan).run(server), plan)
    return report


class Trial:
    """A load, and an outage in the middle of it."""

    def __init__(self, site: Site, plan: Plan) -> None:
        self.site, self.plan = site, plan
        self.file = site.stack.effects_file()
        self._random = Random(1)
        self._submissions: list[Submission] = []
        self._posts: set[asyncio.Task[None]] = set()

    async def run(self, server: Server) -> Outage:
        site, plan = self.site, self.plan
        url, workers = await asyncio.gather(site.start_api(), site.start(plan.workers))
        serving = await site.serving()
        await site.submit("work", [self._work(plan.steps) for _ in range(plan.turns)])
        await wait_until(self._all_run, description="all turns run", limit=60)
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=30) as http:
            load = asyncio.create_task(self._submit(http))
            await asyncio.sleep(plan.before)
            gone = time.time()
            async with site.stack.without(server):
                stopped = time.time()
                await asyncio.sleep(plan.away)
                away = stopped, time.time()
            back = time.time()
            await asyncio.sleep(plan.after)
            load.cancel()
            await asyncio.gather(*self._posts)
            first = [replace(each) for each in self._submissions]
            await self._submit_again(http)
        await until(self._all_ended, description="all turns end", limit=PATIENCE)
        died = sum(worker.has_ended for worker in workers) + len(serving.keys() - (await site.serving()).keys())
        history = await checks.history(site, self.file)
        return Outage(server, gone, back, away, first, died, history, plan.turns + len(first))

    def _work(self, steps: int) -> dict[str, object]:
        return {"steps": [self._random.randint(50, 500) for _ in range(steps)], "file": str(self.file)}

    def _all_run(self) -> bool:
        return len({effect.turn for effect in effects.read(self.file)}) == self.plan.turns

    async def _all_ended(self) -> bool:
        return bool((await self.site.query(OPEN))[0].n == 0)

    async def _submit(self, http: httpx.AsyncClient) -> None:
        """At a steady rate, whatever becomes of the requests before."""
        begun = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, begun + number / self.plan.rate - time.monotonic()))
            submission = Submission(key=new_id().hex, at=time.time(), work=self._work(2))
            self._submissions.append(submission)
            task = asyncio.create_task(_post(http, submission))
            self._posts.add(task)
            task.add_done_callback(self._posts.discard)

    async def _submit_again(self, http: httpx.AsyncClient) -> None:
        refused = [submission for submission in self._submissions if submission.status != ACCEPTED]

        async def accepted() -> bool:
            for submission in refused:
                if submission.status != ACCEPTED:
                    await _post(http, submission)
            return all(submission.status == ACCEPTED for submission in refused)

        await until(accepted, description="everything is accepted at last", limit=60)


async def _post(http: httpx.AsyncClient, submission: Submission) -> None:
    begun = time.monotonic()
    try:
        answer = await http.post(
            "/v1/turns",
            json={"agent": "work", "input": submission.work},
            headers={"Idempotency-Key": submission.key},
        )
    except httpx.TransportError:
        submission.status = 0
        return
    finally:
        submission.took = time.monotonic() - begun
    submission.status = answer.status_code
    if answer.status_code == ACCEPTED:
        submission.turn = parse_id(Prefix.TURN, answer.json()["id"])
    else:
        submission.retryable = bool(answer.json().get("retryable"))


def _judge(report: Report, seen: Outage, plan: Plan) -> None:
    """Figures and findings of one outage."""
    name, history = f"{seen.server} gone", seen.history
    running = running_at(history, seen.gone)
    again = [step for step in running if history.runs[step] > 1]
    share = len(again) / max(1, len(running))
    found = history.violations(turns=seen.turns)
    report.require(seen.died == 0, f"{name}: {seen.died} workers died")
    report.require(len(running) >= plan.turns // 2, f"{name}: no more than {len(running)} steps ran when it went")
    report.require(share < MOST_REPEATED, f"{name}: {len(again)} of {len(running)} running steps ran again")
    if seen.server == "redis":
        repeated = [step for step, runs in history.runs.items() if runs > 1]
        found += [f"{len(repeated)} steps ran again"] if repeated else []
        wanted = all(s.status == ACCEPTED for s in seen.submissions)
    else:
        wanted = all(s.status == 503 and s.retryable for s in seen.meanwhile)
        found += [f"answers that are no 503: {Counter(s.status for s in seen.submissions)}"] if _odd(seen) else []
    answers = Counter(s.status for s in seen.meanwhile)
    report.require(wanted and bool(seen.meanwhile), f"{name}: submissions were answered {dict(answers)}")
    report.violations += [f"{name}: {what}" for what in found]
    report.add(f"{name}: steps that ran when it went", "", [len(running)])
    report.add(f"{name}: ... of these run again", "%", [share * 100])
    report.add(f"{name}: turns submitted meanwhile", "", [len(seen.meanwhile)])
    report.add(f"{name}: ... until the answer", "s", [s.took for s in seen.meanwhile])
    report.add(f"{name}: steps recorded meanwhile", "", [sum(seen.gone < f.at < seen.back for f in history.facts)])
    first, last = comeback(history, seen)
    report.add(f"{name}: its return to the first progress of a turn that had waited", "s", [first])
    report.add(f"{name}: ... to the last", "s", [last])
    accepted = sum(s.status == ACCEPTED for s in seen.submissions)
    report.notes.append(
        f"{name} for {seen.back - seen.gone:.1f} s: {seen.turns:,} turns accepted and ended ({plan.turns} of them ran when "
        f"it went), {len(seen.submissions) - accepted} submissions sent again, {seen.died} workers died"
    )


def _odd(seen: Outage) -> bool:
    return any(s.status not in (ACCEPTED, 503) for s in seen.submissions)


def running_at(history: History, moment: float) -> list[tuple[UUID, int]]:
    """Steps (turn, number) that had begun and were not recorded."""
    before = {(f.turn, f.step) for f in history.facts if f.step is not None and f.at <= moment}
    begun = [e for e in history.effects if e.what == BEGUN and e.at <= moment]
    return [(e.turn, e.step) for e in begun if (e.turn, e.step_name) not in before]


def comeback(history: History, seen: Outage) -> tuple[float, float]:
    """Seconds from the return of the server to the first and the last of the turns that had waited for it.

    Without Postgres every turn waits that runs; without Redis those that were accepted meanwhile.
    """
    if seen.server == "redis":
        waited = {s.turn for s in seen.meanwhile if s.turn is not None}
    else:
        waited = {turn for turn, _ in running_at(history, seen.gone)}
    moved: dict[UUID, float] = {}
    for fact in history.facts:
        if fact.turn in waited and fact.at > seen.back:
            moved.setdefault(fact.turn, fact.at - seen.back)
    return min(moved.values(), default=0.0), max(moved.values(), default=0.0)
