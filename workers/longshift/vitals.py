"""How a worker is: what it tells with its heartbeat, at its port, and by its gauges.

    ready       what it needs answers: Postgres, Redis, the artifact store, its heartbeat, its event loop
    stuck       it takes no work though there is some, or a turn of its makes no progress (``longshift.stuck``)
    draining    it takes no more, because it was asked to end

Redis and the store are asked now and then, Postgres only by whoever asks this worker: the heartbeat knows about it anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from longshift.clock import Clock
from longshift.config import Config
from longshift.health import PATIENCE, Check, Probes, Question, in_loop, live
from longshift.heartbeat import Heartbeat
from longshift.journal import Journal
from longshift.metrics import Page, Server, WorkerMetrics
from longshift.model import Condition, Prefix, show_id
from longshift.runner import Run
from longshift.stuck import Judge, Look, Silence
from longshift.underway import UnderWay

LOOK_EVERY = timedelta(seconds=1)
ASK_EVERY = timedelta(seconds=10)
"""Between two questions to Redis and to the store, for those who look at the worker's row or its gauges."""


class Vitals:
    """Looks at one worker, from inside."""

    def __init__(
        self,
        *,
        config: Config,
        clock: Clock,
        metrics: WorkerMetrics,
        heartbeat: Heartbeat,
        journal: Journal,
        underway: UnderWay,
        questions: Mapping[str, Question],
        runs: Callable[[], Iterable[Run]],
        isolated: bool,
    ) -> None:
        """``questions``: to postgres, redis and artifacts. ``runs``: those of the worker. ``isolated``: it is a ward."""
        self._config, self._clock, self._metrics = config, clock, metrics
        self._heartbeat, self._journal, self._underway = heartbeat, journal, underway
        self._runs, self._isolated = runs, isolated
        self._probes = Probes(questions, clock=clock)
        self._judge = Judge(clock=clock, stuck_after=config.stuck_after, step_timeout=config.step_timeout)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Server | None = None
        self._claims = 0  # won so far
        self._won, self._lost = metrics.claims.labels("won"), metrics.claims.labels("lost")
        self._show()

    def _show(self) -> None:
        """The gauges, which are read when somebody asks for them, in a thread."""
        metrics, load = self._metrics, self._heartbeat.load
        metrics.slots.set(self._config.capacity)
        metrics.running.set_function(lambda: load.running)
        metrics.draining.set_function(lambda: load.draining)
        metrics.stuck.set_function(lambda: load.condition is Condition.STUCK)
        metrics.leader.set_function(lambda: self._heartbeat.leader)
        metrics.journal_open.set_function(lambda: self._journal.is_open)
        for name in ("redis", "artifacts"):
            metrics.ready.labels(name).set_function(partial(self._answers, name))
        metrics.ready.labels("postgres").set_function(lambda: self._postgres().ok)
        metrics.ready.labels("heartbeat").set_function(lambda: self._heartbeat.is_heard)
        metrics.ready.labels("loop").set_function(lambda: self._turning().ok)

    # -- what is found out by itself

    async def look_forever(self) -> None:
        """Write what is found into what the heartbeat tells."""
        while True:
            await asyncio.sleep(LOOK_EVERY.total_seconds())
            self.look()

    async def ask_forever(self) -> None:
        while True:
            await self._probes.ask("redis", "artifacts")
            await asyncio.sleep(ASK_EVERY.total_seconds())

    def look(self) -> None:
        """Judge the worker once, in its loop."""
        load = self._heartbeat.load
        missing = [name for name in ("redis", "artifacts") if not self._answers(name)]
        missing += [] if self._postgres().ok else ["postgres"]
        free = 0 if load.draining or self._isolated else self._config.capacity - load.running
        stuck = self._judge.look(
            Look(
                ready=not missing,
                overdue=load.overdue,
                free=free,
                claims=self._claims,
                turns=map(self._silence, self._runs()),
                thread_at=self._underway.thread_at,
            )
        )
        if missing:
            load.condition, load.complaint = Condition.UNREADY, f"no answer from {', '.join(sorted(missing))}"
        else:
            load.condition, load.complaint = (Condition.STUCK if stuck else Condition.OK), stuck

    def _silence(self, run: Run) -> Silence:
        record = run.record
        name = show_id(Prefix.TURN, record.id) if record is not None else show_id(Prefix.SESSION, run.lease.session_id)
        if run.execution is None:  # between a claim and the agent's first line, or at its end
            return Silence(name, run.moved_at, self._config.step_timeout.total_seconds())
        pace = run.execution.port.pace
        return Silence(name, pace.moved_at, pace.patience, pace.waits_for_thread, pace.queued, pace.threaded)

    def _answers(self, name: str) -> bool:
        """A dependency that nobody has asked yet is not held against it."""
        known = self._probes.known(name)
        return known is None or known.ok

    def _postgres(self) -> Check:
        """Without asking it."""
        if not self._journal.is_open:
            return Check(False, "turns are paused until it answers and stores again")
        return self._heart()

    def _heart(self) -> Check:
        limit = self._config.lock_grace.total_seconds()
        return Check(True) if self._heartbeat.is_heard else Check(False, f"no heartbeat was answered for {limit:g} s")

    def _turning(self) -> Check:
        page = live(self._heartbeat.load, clock=self._clock, limit=PATIENCE)
        return Check(page.status == 200, str(page.body.get("detail", "")))

    # -- what it is told

    def claimed(self, won: int, *, of: int) -> None:
        """Of so many sessions that it tried to claim, it has won so many."""
        self._claims += won
        self._won.inc(won)
        self._lost.inc(of - won)

    def observe(self, run: Run, *, waited: timedelta) -> None:
        """A session was claimed that had been ready for so long."""
        self._metrics.ready_to_claim.observe(waited.total_seconds())
        woken_at = run.woken_at
        if woken_at is not None:
            run.on_started = lambda: self._metrics.wakeup_to_start.observe(self._clock.monotonic() - woken_at)

    # -- what is asked at its port, in threads

    def serve(self) -> None:
        """Answer at the port of the settings, if there is one; from the loop."""
        self._loop = asyncio.get_running_loop()
        if self._config.metrics_port is not None:
            pages = {"/livez": self._livez, "/readyz": self._readyz, "/stuckz": self._stuckz}
            self._server = Server(self._metrics, pages)
            self._server.try_listen(self._config.metrics_port, host=self._config.host)

    async def close(self) -> None:
        """Answer no more, and ask no more."""
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
        await self._probes.close()

    def _livez(self) -> Page:
        return live(self._heartbeat.load, clock=self._clock, limit=self._config.loop_limit)

    def _readyz(self) -> Page:
        assert self._loop is not None
        asked = in_loop(self._loop, self._probes.ask, within=PATIENCE + timedelta(seconds=1))
        checks = asked or {name: Check(False, "the event loop does not come to it") for name in self._probes.names}
        checks |= {"heartbeat": self._heart(), "loop": self._turning()}
        if checks["postgres"].ok and not self._journal.is_open:
            checks["postgres"] = self._postgres()
        healthy = all(check.ok for check in checks.values())
        status = "draining" if self._heartbeat.load.draining else "ok" if healthy else "unavailable"
        shown = {name: check.shown() for name, check in checks.items()}
        return Page(200 if status == "ok" else 503, {"status": status, "checks": shown, "work": self._work()})

    def _stuckz(self) -> Page:
        alive, load = self._livez(), self._heartbeat.load
        if alive.status != 200:
            return alive
        if load.condition is not Condition.STUCK:
            return Page(200, {"status": "ok", "work": self._work()})
        return Page(503, {"status": "stuck", "detail": load.complaint, "work": self._work()})

    def _work(self) -> dict[str, Any]:
        load = self._heartbeat.load
        return {
            "worker_id": show_id(Prefix.WORKER, self._heartbeat.worker_id),
            "queues": list(self._config.queues),
            "slots": self._config.capacity,
            "running": load.running,
            "draining": load.draining,
            "leader": self._heartbeat.leader,
        }
