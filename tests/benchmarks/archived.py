"""How long a turn on an archived session takes to its first line, when each request to the object store takes 50 ms longer.

Sessions of 1,000 events of 1 KiB, 64 of them messages, so that the context has 64 KiB. Each is used once, since a turn leaves
its context in Redis and a checkpoint in Postgres. One worker, which has one slot.

    warm          the log is in Postgres, with a checkpoint 100 events back; Redis has nothing
    cold          archived, and the worker is idle: it claims the session before anybody could prepare it
    pre-warmed    archived, and the only slot is taken for 2 s when the turn is accepted

Two figures of each: from the submit to the agent's first line, which for the last one has the queue in it; and from the claim
to the first line, which is what the tier costs.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from unittest.mock import patch
from urllib.parse import urlsplit
from uuid import UUID

from longshift.archive import Archive
from longshift.artifacts import open_store
from longshift.catalogue import Draft
from longshift.clock import SYSTEM
from longshift.cold import Cold
from longshift.config import load
from longshift.context import restore
from longshift.db import intake, views
from longshift.lifecycle import Lifecycle
from longshift.mailbox import Mailbox
from longshift.model import Json, TurnRecord, new_id
from longshift.warming import Warmer
from tests.benchmarks.figures import Figure, Report
from tests.benchmarks.restore import MESSAGES, fill, save_checkpoint
from tests.benchmarks.stack import Site, Stack, until
from tests.support.fault_proxy import FaultProxy
from tests.support.object_store import BUCKET, ObjectServer

LATENCY = 0.05
EVENTS = 1000
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}


@dataclass
class Times:
    """Milliseconds, of each session."""

    submit: list[float] = field(default_factory=list)
    claim: list[float] = field(default_factory=list)

    def add_to(self, report: Report, name: str) -> Figure:
        report.add(f"{name}: submit to first line", "ms", self.submit)
        return report.add(f"{name}: claim to first line", "ms", self.claim)


@dataclass
class Bench:
    """A site whose object store is slow, for the worker and for the client; archives are made without the delay."""

    site: Site
    mailbox: Mailbox
    lifecycle: Lifecycle

    async def session(self, *, archived: bool) -> UUID:
        """A fresh one."""
        session, _ = await intake.create_session(self.site.db, new_id(), tenant_id=self.site.tenant, metadata={})
        fill(self.site, total=EVENTS, messages=MESSAGES, session=session)
        if archived:
            await self.lifecycle.archive(session)
            return session
        early = await restore(self.site.db, session, through=EVENTS - EVENTS // 10)
        save_checkpoint(self.site, session, early.context)
        return session

    async def measure(self, session: UUID, times: Times, *, queue: float = 0) -> None:
        """One turn on ``session``; behind one that takes the worker for ``queue`` seconds."""
        ahead = await self._submit("steady", {"count": 1, "seconds": queue}) if queue else None
        if ahead is not None:
            await until(lambda: self._is(ahead, "running"), description="the slot is taken", limit=10)
        begun = SYSTEM.now().timestamp()
        turn = await self._submit("first", None, session=session)
        await until(lambda: self._is(turn, "succeeded"), description="the turn has ended", limit=queue + 30)
        [row] = await self.site.query("SELECT leased_at FROM sessions WHERE id = %s", session)
        line = (await self._turn(turn)).output
        times.submit.append((line - begun) * 1000)
        times.claim.append((line - row.leased_at.timestamp()) * 1000)

    async def _submit(self, agent: str, given: Json, *, session: UUID | None = None) -> UUID:
        draft = Draft(agent=agent, input=given, session_id=session)
        return (await self.mailbox.submit(draft, tenant_id=self.site.tenant)).resource_id

    async def _turn(self, turn: UUID) -> TurnRecord:
        found = await views.turn(self.site.db, turn, tenant_id=self.site.tenant)
        assert found is not None
        return found

    async def _is(self, turn: UUID, status: str) -> bool:
        return (await self._turn(turn)).status == status


async def run(stack: Stack, *, short: bool) -> Report:
    count, queue = (2, 0.5) if short else (10, 2.0)
    report = Report("archived", "to the first line of a turn on an archived session, 50 ms to the object store")
    warm, cold, warmed, behind = Times(), Times(), Times(), Times()
    with patch.dict(os.environ, CREDENTIALS):
        async with slow_bench(stack) as bench:
            await bench.measure(await bench.session(archived=False), Times())  # the worker has everything imported
            for _ in range(count):
                await bench.measure(await bench.session(archived=False), warm)
                await bench.measure(await bench.session(archived=True), cold)
                await bench.measure(await bench.session(archived=False), behind, queue=queue)
                await bench.measure(await bench.session(archived=True), warmed, queue=queue)
    plain, slow = warm.add_to(report, "warm"), cold.add_to(report, "cold")
    queued = behind.add_to(report, f"warm, behind a queue of {queue:g} s")
    ready = warmed.add_to(report, f"pre-warmed, behind a queue of {queue:g} s")
    report.ratio("cold / warm, from the claim", slow, plain)
    report.ratio("pre-warmed / warm, both behind the queue, from the claim", ready, queued)
    return report


@asynccontextmanager
async def slow_bench(stack: Stack) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as opened:
        server = opened.enter_context(ObjectServer())
        proxy = opened.enter_context(FaultProxy(urlsplit(server.endpoint).port or 0, latency=LATENCY))
        slow = f"s3://{BUCKET}/archived?region=us-east-1&endpoint_url={proxy.url}"
        site = await opened.enter_async_context(stack.site())
        far, near = open_store(slow), open_store(server.url("archived"))
        for store in (far, near):
            opened.push_async_callback(store.close)
        cold = Cold(site.db, far)
        warmer = Warmer(site.db, site.hot.contexts, Archive(site.db, cold))
        mailbox = Mailbox(site.db, site.hot, cold=cold, config=load(), warmer=warmer)
        opened.push_async_callback(mailbox.close)
        await site.start(1, settings={"artifacts_url": slow, "capacity": 1})
        direct = Cold(site.db, near)
        yield Bench(site, mailbox, Lifecycle(site.db, direct, Archive(site.db, direct)))
