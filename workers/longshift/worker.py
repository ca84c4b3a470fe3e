"""A worker process: claims sessions when woken, runs their turns, keeps its sign of life, drains when asked to stop.

It is the ``Runtime`` that the Celery app feeds with wake-ups. Everything here runs in one event loop; the heartbeat has a
thread of its own, plain agents and steps have bounded pools.

A *ward* is the same thing with another way to get work: nobody wakes it, it claims suspects (``longshift.ward``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from longshift.agent import Agents
from longshift.aging import Aging
from longshift.archive import Archive
from longshift.artifacts import open_store
from longshift.claiming import Claims, Suspects
from longshift.clock import SYSTEM, Clock
from longshift.cold import Cold
from longshift.collector import Collector
from longshift.config import Config
from longshift.context import Tiers
from longshift.db import health as database_health
from longshift.db import leases, revision
from longshift.db.database import Database
from longshift.db.liveness import Liveness, Member
from longshift.delivery import deliver_mail, look_for_waits
from longshift.embedding import load_embedder
from longshift.ending import POOLS, end
from longshift.errors import Unavailable
from longshift.health import tick
from longshift.heartbeat import Heartbeat
from longshift.hot import Hot
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.ledger import Ledger
from longshift.lifecycle import Lifecycle
from longshift.mailbox import Mailbox
from longshift.mailroom import Mailroom
from longshift.metrics import WorkerMetrics
from longshift.model import TurnRecord, new_id
from longshift.notices import Notices
from longshift.observing import Observers
from longshift.podcost import PodCost
from longshift.port import Outside
from longshift.retrieval import Retrieval
from longshift.runner import Run, Runner
from longshift.sweeper import Sweeper
from longshift.tracing import OFF, Traces
from longshift.underway import UnderWay
from longshift.version import version
from longshift.vitals import Vitals
from longshift.warden import Warden

logger = logging.getLogger(__name__)

RECONCILE_EVERY = timedelta(seconds=5)
LAST_CALLS = 5.0
"""Seconds that calls of irreversible tools get if a drain was cut short; a drain itself waits for them until they time out."""
LAST_RECORDS = 2.0
"""Seconds that a turn gets to record the result of such a call."""
CUT_SHORT = 10.0
"""Seconds that turns whose steps are cut short get to end."""


class Worker:
    """The runtime of one worker process."""

    def __init__(
        self,
        config: Config,
        agents: Agents,
        *,
        clock: Clock = SYSTEM,
        on_failure: Callable[[], None] = lambda: None,
        on_drain: Callable[[], None] = lambda: None,
        isolated: bool = False,
        journal: Callable[..., Journal] = Journal,
        ledger: Callable[..., Ledger] = Ledger,
        traces: Traces = OFF,
    ) -> None:
        """``on_failure`` is called if a part of the worker ends by an error: the process must be replaced. ``on_drain``, in
        the event loop, if an operator asks the worker to drain and end, as by SIGTERM.

        ``isolated``: it is a ward; it claims suspects and nothing else, and neither leads the fleet nor has wards itself.

        ``traces``: where spans go; closed by ``stop``.
        """
        self._isolated = isolated
        self._on_failure, self._on_drain, self._make_journal, self._make_ledger = on_failure, on_drain, journal, ledger
        self._traces = traces
        self._config = config
        self._agents = agents
        self._clock = clock
        self._runs: dict[tuple[UUID, int], tuple[Run, asyncio.Task[None]]] = {}
        self.claiming = asyncio.Lock()  # held from a claim until what it won is in memory
        self.draining = False
        self.metrics = WorkerMetrics(revision=revision.newest())
        self._services: list[asyncio.Task[None]] = []

    # -- life

    async def start(self) -> None:
        """Connect, register, begin to serve.

        Raises:
            Unavailable: Postgres does not answer.
            ConfigError: a setting is missing or wrong.
        """
        self._build()
        await database_health.check_schema(self._db)
        # before its row: whoever sees a worker, `longshift up` for one, may submit to its agents
        await leases.serve(self._db, self._agents.describe())
        await self._retrieval.prepare()
        await asyncio.to_thread(self._heartbeat.register)
        self._journal.start_lanes()
        self._ledger.start_lanes()
        self._serve(
            tick=tick(self._heartbeat.load, clock=self._clock, lag=self.metrics.loop_lag.observe),
            vitals=self._vitals.look_forever(),
            dependencies=self._vitals.ask_forever(),
            mail=deliver_mail(self, self._db, self._journal, every=self._config.heartbeat),
            reconcile=self._reconcile(),
            notices=self._notices.run(),
            mailroom=self._mailroom.run(),
            waits=look_for_waits(self, self._journal),
        )
        if self._isolated:
            self._serve(suspects=self._suspects.run())
        else:
            self._serve(
                claims=self._claims.run(),
                sweeper=self._sweeper.run(),
                collector=self._collector.run(),
                aging=self._aging.run(),
                warden=self._warden.run(),
            )
            self._vitals.serve()
            if self._config.pod_name is not None:
                pod, namespace = self._config.pod_name, self._config.pod_namespace
                self._serve(podcost=PodCost(lambda: self.running, pod=pod, namespace=namespace).run())
        self._heartbeat.start(asyncio.get_running_loop())
        logger.info("worker ready", extra={"worker_id": self.worker_id.hex, "agents": len(self._agents)})

    def _build(self) -> None:
        """Make all parts. Nothing connects yet, so that ``stop`` finds whatever it has to close, however far ``start`` came."""
        config = self._config
        url = config.require("database_url")
        self._db = Database(
            url,
            size=config.pool_size,
            connect_timeout=config.connect_timeout,
            timeout=config.database_timeout,
            name="longshift-worker",
        )
        self._hot = Hot(config.require("redis_url"), context_ttl=config.hot_ttl)
        self._store = open_store(config.require("artifacts_url"), connect_timeout=config.connect_timeout)
        self._journal = self._make_journal(
            self._db, batch_rows=config.batch_rows, batch_bytes=config.batch_bytes, metrics=self.metrics
        )
        self._ledger = self._make_ledger(self._db, self._journal)
        embedding = load_embedder(config.embedder) if config.embedder is not None else None
        self._retrieval = Retrieval(self._db, embedding, clock=self._clock)
        self._underway = UnderWay(self._clock)
        self._notices = Notices(self._hot)
        self._mailroom = Mailroom(self._db, self._notices)
        self._threads = [ThreadPoolExecutor(config.threads, thread_name_prefix=name) for name in POOLS]
        cold = Cold(self._db, self._store)
        archive = Archive(self._db, cold)
        self._runner = Runner(self._outside(cold, archive), self._agents, queues=config.queues)
        self._heartbeat = self._beating(url)
        self.worker_id = self._heartbeat.worker_id
        self._vitals = self._looking()
        self._claims = Claims(self, self._db, self._journal, vitals=self._vitals, config=config, clock=self._clock)
        self._suspects = Suspects(
            self, self._db, self._journal, load=self._heartbeat.load, config=config, clock=self._clock
        )
        self._build_leading(cold, archive)

    def _outside(self, cold: Cold, archive: Archive) -> Outside:
        """What all turns share."""
        config = self._config
        return Outside(
            db=self._db,
            journal=self._journal,
            notices=self._notices,
            mailroom=self._mailroom,
            mailbox=Mailbox(self._db, self._hot, cold=cold, config=config, clock=self._clock),
            cold=cold,
            retrieval=self._retrieval,
            clock=self._clock,
            step_threads=self._threads[0],
            agent_threads=self._threads[1],
            step_timeout=config.step_timeout,
            inline=config.inline,
            max_event=config.max_event,
            max_value=config.max_value,
            ledger=self._ledger,
            underway=self._underway,
            lease_ttl=config.lease_ttl,
            lock_grace=config.lock_grace,
            is_beating=lambda: self._heartbeat.is_heard,
            observers=Observers(self._traces, self.metrics.turns, clock=self._clock),
            tiers=Tiers(
                contexts=self._hot.contexts,
                archive=archive,
                metrics=self.metrics,
                verify=config.hot_verify,
                checkpoint_events=config.checkpoint_events,
            ),
        )

    def _beating(self, url: str) -> Heartbeat:
        config = self._config
        return Heartbeat(
            Liveness(
                url,
                connect_timeout=config.connect_timeout,
                silence=config.lease_ttl,
                stuck_after=config.stuck_after,
            ),
            config=config,
            member=Member(
                host=socket.gethostname(),
                pid=os.getpid(),
                queues=config.queues,
                capacity=config.capacity,
                process=config.process or new_id(),
                isolated=self._isolated,
                version=version(),
                revision=revision.newest(),
                serves=[(each.name, each.version) for each in self._agents],
            ),
            clock=self._clock,
            on_reborn=self._reborn,
            on_silence=self._journal.suspect,
            on_drain=self._on_drain,
        )

    def _looking(self) -> Vitals:
        return Vitals(
            config=self._config,
            clock=self._clock,
            metrics=self.metrics,
            heartbeat=self._heartbeat,
            journal=self._journal,
            underway=self._underway,
            questions={
                "postgres": partial(database_health.check, self._db),
                "redis": self._hot.check,
                "artifacts": self._store.check,
            },
            runs=lambda: self.runs,
            isolated=self._isolated,
        )

    def _build_leading(self, cold: Cold, archive: Archive) -> None:
        """The services of which one worker of the fleet is active."""
        config, clock, heartbeat = self._config, self._clock, self._heartbeat

        def leads() -> bool:
            return heartbeat.leader

        self._warden = Warden(self._db, self._hot, load=heartbeat.load, leads=leads, config=config)
        self._sweeper = Sweeper(
            self._db, self._hot, heartbeat=heartbeat, config=config, clock=clock, metrics=self.metrics
        )
        self._collector = Collector(cold, leads=leads, keep_uploads=config.keep_uploads, metrics=self.metrics)
        lifecycle = Lifecycle(self._db, cold, archive, self._hot.contexts)
        self._aging = Aging(self._db, lifecycle, leads=leads, config=config, clock=clock)

    def _serve(self, **services: Coroutine[Any, Any, None]) -> None:
        for name, service in services.items():
            task = asyncio.create_task(service, name=name)
            task.add_done_callback(self._report)
            self._services.append(task)

    @property
    def running(self) -> int:
        """Sessions that run here."""
        return len(self._runs)

    @property
    def runs(self) -> list[Run]:
        return [run for run, _ in self._runs.values()]

    async def drain(self) -> None:
        """Take no more; let running steps finish within the grace, leave every turn at its last step."""
        self.draining = self._heartbeat.load.draining = True
        self._warden.close()
        logger.info("draining", extra={"turns": len(self._runs)})
        await self.leave_all()
        await self._underway.finished()  # also the calls of turns that have ended without them
        await self._warden.closed()

    async def leave_all(self) -> None:
        """Take every turn that runs here to its last step, and give its session back."""
        for run, _ in self._runs.values():
            run.drain()
        tasks = [task for _, task in self._runs.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=self._config.drain_grace.total_seconds())
        await self._cut_short([run for run, _ in self._runs.values() if not run.calling])
        if self._runs:
            await self._underway.finished()
            await asyncio.wait([task for _, task in self._runs.values()], timeout=LAST_RECORDS)
            await self._cut_short([run for run, _ in self._runs.values()])

    async def _cut_short(self, runs: Sequence[Run]) -> None:
        left = [(run, self._runs[run.lease.key][1]) for run in runs if not self._runs[run.lease.key][1].done()]
        if left:
            logger.warning("steps cut short by the end of the grace", extra={"turns": len(left)})
            for run, _ in left:
                run.cut_short()
            await asyncio.wait([task for _, task in left], timeout=CUT_SHORT)

    async def stop(self) -> None:
        """Close everything; turns that are still here come again elsewhere."""
        await self._vitals.close()
        await end(self._services)
        await end(task for _, task in list(self._runs.values()))
        await self._underway.close(within=LAST_CALLS)
        with suppress(Unavailable):
            await self._notices.flush()
            await self._hot.contexts.flush()  # whoever runs these sessions next will look for them
        await self._ledger.close()
        await self._journal.close()
        await asyncio.to_thread(self._heartbeat.stop)
        await asyncio.to_thread(self._traces.close)
        for pool in self._threads:
            pool.shutdown(wait=False, cancel_futures=True)
        await self._store.close()
        await self._hot.close()
        await self._db.close()

    # -- claims

    async def wake(self, session_ids: Sequence[UUID]) -> None:
        """Try to claim the sessions; waits while there is no free slot, so that others may take the next wake-up."""
        if session_ids and not self.draining:
            await self._claims.wake(session_ids)

    def run(self, won: leases.Won, *, woken_at: float | None = None) -> None:
        """Run the turns of a session that was claimed for this worker, which was woken for it then."""
        lease = Lease(won.claim)
        run = Run(lease, claimed_at=self._clock.monotonic(), crashes=won.crashes, woken_at=woken_at)
        self._vitals.observe(run, waited=won.waited)
        if self.draining:
            run.drain()
        self._journal.hold(lease)
        task = asyncio.create_task(self._run_session(run, won.turn), name=f"session-{lease.session_id.hex}")
        self._runs[lease.key] = (run, task)
        self._heartbeat.load.running = len(self._runs)

    async def _run_session(self, run: Run, record: TurnRecord | None) -> None:
        try:
            await self._runner.run_session(run, record)
        except Exception:
            logger.exception("session failed", extra={"session_id": run.lease.session_id.hex})
        finally:
            if (
                self._runs.get(run.lease.key, (None,))[0] is run
            ):  # an epoch can come again after a failover that lost it
                del self._runs[run.lease.key]
            if run.deferred and run.record is not None:
                self.metrics.turns.deferred.labels(agent=run.record.agent).inc()
            if run.unserved:
                self._claims.leave_alone(run.lease.session_id)
            self._heartbeat.load.running = len(self._runs)
            self._claims.freed()

    # -- services

    async def _reconcile(self) -> None:
        """Release leases that the database has and memory has not: the reply to their claim was lost."""
        while True:
            await asyncio.sleep(RECONCILE_EVERY.total_seconds())
            with suppress(Unavailable):
                standing = await leases.held(self._db, worker_id=self.worker_id)
                async with self.claiming:  # the reply to a claim may have been on its way while we read
                    orphans = standing - {lease.key for lease in self._journal.held}
                if orphans:
                    released = await leases.reconcile(self._db, worker_id=self.worker_id, orphans=orphans)
                    logger.warning("orphaned leases released", extra={"sessions": len(released)})
                    await self._hot.ring(released)

    def _reborn(self, worker_id: UUID) -> None:
        """This worker was declared dead: what it held is somebody else's now."""
        self.worker_id = worker_id
        for lease in self._journal.held:
            if lease.claim.worker_id != worker_id:
                self._journal.lose(lease)

    def _report(self, task: asyncio.Task[None]) -> None:
        """A service never ends by itself."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("service ended", extra={"service": task.get_name()}, exc_info=error)
            self._on_failure()
