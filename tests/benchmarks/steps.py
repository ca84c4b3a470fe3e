"""Durable steps per second of one worker process, beside the layers below it, and the latency of a single step.

    worker       500 turns run steps in one worker process: agent, replay, JSON, journal, Postgres
    journal      500 coroutines append ready-made events: group commit and Postgres, no agents
    statement    ``log.append`` with 500 rows at a time, one after another on one connection
    by psycopg   the same SQL without SQLAlchemy and asyncio
    insert       a plain multi-row INSERT of the same rows: no fence, no lock

Same server, same payloads, taken in turns.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import count

import psycopg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import text

from longshift.clock import SYSTEM
from longshift.db import intake, leases, log
from longshift.db.database import Database
from longshift.db.liveness import Liveness, Member
from longshift.db.log import Append
from longshift.events import Kind, NewEvent, encode
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.model import NewTurn, new_id
from tests.benchmarks.agents import RESULT
from tests.benchmarks.figures import Report, quantile
from tests.benchmarks.stack import Site, Stack

IN_FLIGHT = 500
INSERT = """
INSERT INTO events (session_id, seq, id, epoch, turn_id, kind, key, schema_version, payload)
SELECT session_id, seq, id, epoch, turn_id, kind, key, 1, CAST(payload AS json)
  FROM unnest(CAST(:session AS uuid[]), CAST(:seq AS bigint[]), CAST(:id AS uuid[]), CAST(:epoch AS bigint[]),
              CAST(:turn AS uuid[]), CAST(:kind AS text[]), CAST(:key AS text[]), CAST(:payload AS text[]))
       AS t(session_id, seq, id, epoch, turn_id, kind, key, payload)"""
PAYLOAD = encode(
    {"name": "nothing", "digest": "0123456789abcdef", "at": datetime.now(UTC).isoformat(), "ms": 0, "result": RESULT}
)
# the middle eight tenths of the steps: before, turns are still being claimed; after, the first ones have ended
MIDDLE = """
SELECT extract(epoch FROM percentile_disc(0.9) WITHIN GROUP (ORDER BY e.created_at)
                        - percentile_disc(0.1) WITHIN GROUP (ORDER BY e.created_at)) AS seconds, count(*) * 0.8 AS steps
  FROM events e JOIN turns t ON t.id = e.turn_id WHERE t.batch_id = %s AND e.kind = 'step.completed'"""


async def run(stack: Stack, *, short: bool) -> Report:
    repetitions, each, seconds = (1, 15, 0.5) if short else (7, 60, 3.0)
    report = Report("steps", f"durable steps/s, {IN_FLIGHT} turns in flight, payload {len(PAYLOAD)} bytes")
    async with stack.site() as site, stack.site() as quiet:
        await site.start(settings={"capacity": IN_FLIGHT})
        await site.warm_up()
        below = Below(quiet)
        await below.start()
        contestants: dict[str, Callable[[], Awaitable[float]]] = {
            "worker, one process": lambda: worker(site, each, cpu),
            "journal alone": lambda: below.journal(seconds),
            "statement (log.append)": lambda: below.statement(seconds),
            "statement by psycopg": lambda: asyncio.to_thread(below.by_psycopg, log.APPEND.text, seconds),
            "plain multi-row insert": lambda: below.insert(seconds),
        }
        cpu: list[float] = []
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(repetitions):
            for name, contestant in contestants.items():
                rates[name].append(await contestant())
        figures = [report.add(name, "rows/s" if "worker" not in name else "steps/s", rates[name]) for name in rates]
        for figure in figures[1:]:
            report.ratio(f"worker / {figure.name}", figures[0], figure)
        report.ratio("journal / statement (log.append)", figures[1], figures[2])
        report.add("worker: processor time of a step", "us", cpu)
        await latency(site, below, report, repetitions=repetitions, count=100 if short else 1000)
        await below.stop()
    report.notes.append("worker: the middle 80 % of the steps, by the database's clock")
    return report


async def worker(site: Site, each: int, cpu: list[float]) -> float:
    before = site.workers[0].cpu()
    batch = await site.submit("steps", [each] * IN_FLIGHT)
    await site.results(batch)
    cpu.append((site.workers[0].cpu() - before) * 1e6 / (each * IN_FLIGHT))
    row = (await site.query(MIDDLE, batch))[0]
    return float(row.steps) / float(row.seconds)


async def latency(site: Site, below: Below, report: Report, *, repetitions: int, count: int) -> None:
    """Steps of one turn, one after another, on a worker that does nothing else; and single rows by ``log.append``."""
    p50, p99, bare = [], [], []
    for _ in range(repetitions):
        bare.append(quantile(await below.single(count), 0.5))
        took = (await site.run("latency", [count]))[0].output
        p50.append(quantile(took, 0.5))
        p99.append(quantile(took, 0.99))
    step = report.add("one turn: p50 of a step", "ms", p50)
    report.add("one turn: p99 of a step", "ms", p99)
    statement = report.add("log.append of one row: p50", "ms", bare)
    report.ratio("one turn: p50 of a step / of the statement", step, statement)


class Below:
    """The layers below the worker, on a database in which no worker lives."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._one = Database(site.database_url, size=1, name="benchmark-one")
        self._numbers = count()

    async def start(self) -> None:
        """Claim as many sessions as turns are in flight."""
        site, worker_id = self._site, new_id()
        liveness = Liveness(site.database_url)
        member = Member(host="benchmark", pid=0, queues=["default"], capacity=IN_FLIGHT, process=new_id())
        await asyncio.to_thread(liveness.register, worker_id, member)
        await asyncio.to_thread(liveness.close)
        entries = [intake.Entry(NewTurn("none", {}, "default"), new_id()) for _ in range(IN_FLIGHT)]
        await intake.submit(
            site.db,
            entries,
            tenant_id=site.tenant,
            resource_id=new_id(),
            now=SYSTEM.now(),
            lifetime=timedelta(days=1),
        )
        won = await leases.claim(site.db, [entry.session_id for entry in entries], worker_id=worker_id)
        self._leases = sorted((Lease(each.claim) for each in won), key=lambda lease: lease.session_id)
        self._journal = Journal(site.db)
        self._journal.start_lanes()
        for lease in self._leases:
            self._journal.hold(lease)

    async def stop(self) -> None:
        await self._journal.close()
        await self._one.close()

    async def journal(self, seconds: float) -> float:
        end = time.perf_counter() + seconds
        done = 0

        async def steps(lease: Lease) -> None:
            nonlocal done
            while time.perf_counter() < end:
                await self._journal.append(lease, [self._event(lease)])
                done += 1

        begun = time.perf_counter()
        await asyncio.gather(*(steps(lease) for lease in self._leases))
        return done / (time.perf_counter() - begun)

    async def statement(self, seconds: float) -> float:
        async def write() -> int:
            answers = await log.append(self._one, self._writes())
            return len(answers)

        return await self._repeat(write, seconds)

    async def single(self, count: int) -> list[float]:
        """Milliseconds of statements with one row."""
        took = []
        for _ in range(count):
            writes = self._writes(1)
            begun = time.perf_counter()
            await log.append(self._one, writes)
            took.append((time.perf_counter() - begun) * 1000)
        return took

    async def insert(self, seconds: float) -> float:
        plain = text(INSERT)

        async def write() -> int:
            rows = log._run(self._writes())
            del rows["worker"]
            return await self._one.execute(plain, rows)

        return await self._repeat(write, seconds)

    def by_psycopg(self, sql: str, seconds: float) -> float:
        statement = re.sub(r"(?<!:):(\w+)", r"%(\1)s", sql).encode()
        done, begun = 0, time.perf_counter()
        with psycopg.connect(self._site.database_url, autocommit=True, prepare_threshold=1) as connection:
            connection.adapters.register_dumper(list, ListBinaryDumper)  # as longshift.db does
            while time.perf_counter() - begun < seconds:
                done += len(connection.execute(statement, log._run(self._writes())).fetchall())
        return done / (time.perf_counter() - begun)

    async def _repeat(self, write: Callable[[], Awaitable[int]], seconds: float) -> float:
        done, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            done += await write()
        return done / (time.perf_counter() - begun)

    def _writes(self, leases: int = IN_FLIGHT) -> list[Append]:
        """A row for each session. The log's end moves with it, so that the journal can go on where this stops."""
        writes = []
        for lease in self._leases[:leases]:
            event = self._event(lease)
            writes.append(Append(lease.claim, lease.seq + 1, (event,)))
            lease.seq, lease.event_id = lease.seq + 1, event.id
        return writes

    def _event(self, lease: Lease) -> NewEvent:
        return NewEvent(Kind.STEP_COMPLETED, lease.session_id, PAYLOAD, f"nothing#{next(self._numbers)}")
