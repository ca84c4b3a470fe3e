"""How late turns wake that wait without a worker, with very many of them waiting.

A few turns are run by real workers until they wait; the others are copies of their rows (session, turn, events) with ids of
their own, because to let 100,000 of them begin would take longer than all that is measured. Half of the rest wait for a
timer that is far away, half for a signal.

Lateness is from the moment at which a sleep was over, or a signal was sent, to the agent's next line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psycopg

from longshift.model import new_id
from tests.benchmarks.figures import Report
from tests.benchmarks.idle import count
from tests.benchmarks.stack import PATIENCE, Site, Stack, until

TARGET_STEADY, TARGET_BURST = 1.0, 4.0
"""Seconds, p99: what the design asks for."""
LEAD = 1.5
"""Seconds in which the copies are made, before the first of them is due."""

COPY = """
WITH model AS MATERIALIZED (SELECT * FROM turns WHERE id = %(model)s),
n AS MATERIALIZED (
    SELECT uuidv7() AS session, uuidv7() AS turn, g AS place,
           CAST(%(first)s AS timestamptz) + interval '1 second' * CAST(%(apart)s AS float) * (g - 1) AS due
      FROM generate_series(1, %(count)s) g),
s AS (
    INSERT INTO sessions (id, tenant_id, queue, next_position, open_turns, head_waiting, lease_epoch, leased_at, ready_at)
    SELECT n.session, s.tenant_id, s.queue, 1, 1, true, s.lease_epoch, s.leased_at, n.due
      FROM n, sessions s WHERE s.id = (SELECT session_id FROM model)),
t AS (
    INSERT INTO turns (id, session_id, tenant_id, position, status, agent, agent_version, queue, input, root_turn_id, attempts,
                       version, first_seq, deadline, metadata, created_at, started_at, batch_id, batch_index)
    SELECT n.turn, n.session, m.tenant_id, 1, m.status, m.agent, m.agent_version, m.queue, m.input, n.turn, m.attempts,
           m.version, m.first_seq, m.deadline, m.metadata, m.created_at, m.started_at, %(batch)s, n.place
      FROM n, model m)
INSERT INTO events (session_id, seq, id, epoch, turn_id, kind, key, schema_version, payload)
SELECT n.session, e.seq, uuidv7(), e.epoch, n.turn, e.kind, e.key, e.schema_version,
       CASE WHEN n.due IS NOT NULL AND e.kind IN ('wait.begun', 'turn.waiting')
            THEN CAST(jsonb_set(CAST(e.payload AS jsonb), '{until}', to_jsonb(n.due)) AS json) ELSE e.payload END
  FROM n, events e WHERE e.session_id = (SELECT session_id FROM model)"""
ADD_BATCH = "INSERT INTO batches (id, tenant_id, total) SELECT %s, tenant_id, %s FROM turns WHERE id = %s"


async def run(stack: Stack, *, short: bool) -> Report:
    total, rate, seconds, burst, signals = (1_000, 50, 2, 100, 20) if short else (100_000, 200, 20, 1_000, 500)
    report = Report("timers", f"waking turns that wait without a worker, with {total:,} of them waiting, 2 workers")
    async with stack.site() as site:
        await site.start(2)
        await site.warm_up()
        sleeper, waiter = await model(site, "timer", 86_400.0), await model(site, "listener", "news")
        begun = time.perf_counter()
        rest = total - rate * seconds - burst - signals
        await copies(site, sleeper, rest // 2, due=datetime.now(UTC) + timedelta(days=1))
        await copies(site, waiter, rest - rest // 2, due=None)
        listeners = await copies(site, waiter, signals, due=None)
        await asyncio.to_thread(execute, site.database_url, "VACUUM (ANALYZE) sessions, turns, events", {})
        report.notes.append(f"{total:,} turns that wait: copies of two, made in {time.perf_counter() - begun:.0f} s")
        report.add("at rest: Postgres", "statements/s", [await at_rest(site, short=short)])
        steady = await lateness(site, sleeper, rate * seconds, apart=1 / rate)
        report.add(f"{rate} timers a second, {seconds} s", "s late", steady)
        bursts = await lateness(site, sleeper, burst, apart=0)
        report.add(f"{burst:,} timers at once", "s late", bursts)
        report.add(f"{signals} signals, one after another", "s late", await heard(site, listeners))
        steady_p99, burst_p99 = report.figures[1].p99, report.figures[2].p99
        report.notes.append(
            f"Targets: p99 <= {TARGET_STEADY:g} s steadily ({_met(steady_p99, TARGET_STEADY)}), <= {TARGET_BURST:g} s at once "
            f"({_met(burst_p99, TARGET_BURST)})."
        )
    return report


async def at_rest(site: Site, *, short: bool) -> float:
    await asyncio.sleep(0.5 if short else 12.0)  # what went before has reached the statistics
    statements, _ = await count(site, 1.0 if short else 20.0)
    return statements


def _met(figure: float, target: float) -> str:
    return "met" if figure <= target else "missed"


async def model(site: Site, agent: str, value: float | str) -> UUID:
    """A turn of ``agent`` that has left its worker and waits."""
    batch = await site.submit(agent, [value])

    async def waiting() -> UUID | None:
        rows = await site.query("SELECT id FROM turns WHERE batch_id = %s AND status = 'waiting'", batch)
        return rows[0].id if rows else None

    found = await until(waiting, description=f"{agent} waits", limit=60)
    assert found is not None
    return found


async def copies(site: Site, model: UUID, number: int, *, due: object, apart: float = 0.0) -> UUID:
    """``number`` turns that wait like ``model``, due ``apart`` seconds one after another; the batch that they are."""
    batch = new_id()
    await site.query(f"{ADD_BATCH} RETURNING id", batch, number, model)
    params = {"model": model, "count": number, "first": due, "apart": apart, "batch": batch}
    await asyncio.to_thread(execute, site.database_url, COPY, params)
    return batch


def execute(url: str, statement: str, params: Mapping[str, object]) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode(), params)


async def lateness(site: Site, model: UUID, number: int, *, apart: float) -> list[float]:
    """How late each of ``number`` timers was, in seconds."""
    first = (await site.query("SELECT clock_timestamp() + interval '1 second' * %s AS at", LEAD))[0].at
    batch = await copies(site, model, number, due=first, apart=apart)
    return [float(turn.output) for turn in await site.results(batch)]


async def heard(site: Site, batch: UUID) -> list[float]:
    """How late each of the turns of a batch heard the signal that is sent to it."""
    for row in await site.query("SELECT session_id FROM turns WHERE batch_id = %s", batch):
        await site.mailbox.signal(row.session_id, tenant_id=site.tenant, name="news", payload=time.time())
        await asyncio.sleep(0.005)
    await until(lambda: site.has_ended(batch), description="all have heard", limit=PATIENCE)
    return [float(turn.output) for turn in await site.results(batch)]
