"""How long turns stand still when their worker is killed: SIGKILL of all its processes, as when a machine is lost.

A fleet that has been up for more than a TTL runs turns made of short steps. A worker that holds turns is killed; for
each of those turns the clock runs from the kill to the first step recorded under another lease. Workers are killed one
after another until two are left; then the fleet is filled up again and left alone for a TTL, because a sweeper believes
only what it has watched for that long.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from longshift.config import load
from longshift.db.liveness import LEADER
from tests.benchmarks.figures import Report
from tests.benchmarks.stack import Site, Stack, until

BEAT = 0.05
"""Seconds of a step: what can pass for progress is that coarse."""
TURNS = 12

HELD = """
SELECT s.id, s.lease_epoch AS epoch, w.pid, (SELECT max(seq) FROM events e WHERE e.session_id = s.id) AS seq
  FROM sessions s JOIN workers w ON w.id = s.lease_worker JOIN turns t ON t.session_id = s.id WHERE t.batch_id = %s"""
PROGRESS = """
SELECT session_id, min(extract(epoch FROM created_at)) AS at FROM events
 WHERE session_id = ANY(%s) AND epoch > %s AND kind = 'step.completed' GROUP BY session_id"""
LEADING = """
SELECT w.pid FROM pg_locks a JOIN pg_locks b ON a.pid = b.pid AND b.locktype = 'advisory'
  JOIN workers w ON w.lock_key = (CAST(b.classid AS bigint) << 32) | CAST(b.objid AS bigint)
 WHERE a.locktype = 'advisory' AND (CAST(a.classid AS bigint) << 32) | CAST(a.objid AS bigint) = %s
   AND a.database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


@dataclass
class Kills:
    """Seconds, by kill."""

    first: list[float] = field(default_factory=list)  # of the turn that moved first
    last: list[float] = field(default_factory=list)  # of the turn that moved last
    all: list[float] = field(default_factory=list)  # of every turn
    leader: list[float] = field(default_factory=list)  # the last one's, where the sweeper's leader was killed
    follower: list[float] = field(default_factory=list)


async def run(stack: Stack, *, short: bool) -> Report:
    kills, fleet = (1, 2) if short else (20, 6)
    settings = {"heartbeat": 0.3, "lease_ttl": 3, "lock_grace": 1} if short else {}
    how = f"settings for the impatient: {settings}" if short else "default settings"
    report = Report("recovery", f"from the end of a worker to progress of its turns elsewhere, {how}")
    seen = Kills()
    async with stack.site() as site:
        while len(seen.last) < kills:
            await fill_up(site, fleet, settings)
            await asyncio.sleep(load(**settings).lease_ttl.total_seconds() + 2)  # by then each has watched for a TTL
            for _ in range(min(kills - len(seen.last), max(1, fleet - 2))):
                await kill(site, seen)
    report.add("SIGKILL: until the last of its turns moves", "s", seen.last)
    report.add("SIGKILL: until the first of its turns moves", "s", seen.first)
    every = report.add("SIGKILL: every turn", "s", seen.all)
    if seen.leader and seen.follower:
        report.add("SIGKILL of the sweeper's leader, last turn", "s", seen.leader)
        report.add("SIGKILL of another worker, last turn", "s", seen.follower)
    report.notes.append(f"{len(seen.last)} kills, {len(seen.all)} turns: p99 {every.p99:.2f} s, steps of {BEAT:g} s")
    return report


async def fill_up(site: Site, size: int, settings: Mapping[str, object]) -> None:
    """Replace the missing workers."""
    if (missing := size - len(site.workers)) > 0:
        await site.start(missing, settings=settings)
        await site.warm_up()


async def kill(site: Site, seen: Kills) -> None:
    batch = await site.submit("steady", [{"count": 2000, "seconds": BEAT}] * TURNS)
    held = await _running(site, batch)
    pid = Counter(row.pid for row in held).most_common(1)[0][0]
    victim = (await site.serving())[pid]
    orphans = {row.id: row for row in held if row.pid == pid}
    led = pid in {row.pid for row in await site.query(LEADING, LEADER)}
    epoch = max(row.epoch for row in held)
    killed_at = time.time()
    site.kill(victim)

    async def moved() -> dict[UUID, float] | None:
        rows = await site.query(PROGRESS, list(orphans), epoch)
        return {row.session_id: float(row.at) - killed_at for row in rows} if len(rows) == len(orphans) else None

    gaps = await until(moved, description="the turns go on", limit=90)
    assert gaps is not None
    await site.mailbox.cancel_batch(batch, tenant_id=site.tenant)
    seen.all += gaps.values()
    seen.first.append(min(gaps.values()))
    seen.last.append(max(gaps.values()))
    (seen.leader if led else seen.follower).append(max(gaps.values()))
    await _over(site, batch)


async def _running(site: Site, batch: UUID) -> list[HeldRow]:
    """All turns of the batch run and have recorded a step or two."""

    async def all_run() -> list[HeldRow]:
        rows = [HeldRow(row.id, row.epoch, row.pid) for row in await site.query(HELD, batch) if (row.seq or 0) >= 3]
        return rows if len(rows) == TURNS else []

    return await until(all_run, description="all turns run", limit=60)


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A session, its lease, and the process that holds it."""

    id: UUID
    epoch: int
    pid: int


async def _over(site: Site, batch: UUID) -> None:
    async def ended() -> bool:
        return await site.has_ended(batch)

    await until(ended, description="the cancelled turns end", limit=60)
