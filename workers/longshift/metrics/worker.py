"""What a worker counts and measures."""

from __future__ import annotations

from longshift.metrics.families import MOMENTS, ROWS, WAITS, Metrics
from longshift.metrics.turns import TurnMetrics

DRIFTS = ("unreadable", "digest", "ahead", "history", "fold", "local")
"""What can be wrong with a copy of a context: see ``longshift.context``."""


class WorkerMetrics(Metrics):
    """The metrics of one worker process."""

    def __init__(self, *, revision: str | None = None) -> None:
        super().__init__(revision=revision)
        self.turns = TurnMetrics(self)
        self._state()
        self._work()
        self._journal()
        self._tiers()

    def _state(self) -> None:
        self.slots = self.gauge("longshift_worker_slots", "Turns that it runs at a time, at most.")
        self.running = self.gauge("longshift_worker_running", "Turns that run here now.")
        self.draining = self.gauge("longshift_worker_draining", "1 while it drains.")
        self.stuck = self.gauge("longshift_worker_stuck", "1 while it is stuck.")
        self.leader = self.gauge(
            "longshift_worker_leader", "1 in the worker whose sweeper is active, the one of its fleet."
        )
        self.ready = self.gauge(
            "longshift_worker_ready",
            "1 if it answers: postgres, redis, artifacts, heartbeat (the worker's own was answered) or loop (it turns).",
            "dependency",
        )

    def _work(self) -> None:
        self.claims = self.counter(
            "longshift_claims_total",
            "Sessions of wake-ups that this worker tried to claim: won, or lost (another one was first, or there was nothing).",
            "result",
        )
        self.ready_to_claim = self.histogram(
            "longshift_ready_to_claim_seconds",
            "How long sessions that were claimed had been ready, by the clock of Postgres.",
            buckets=WAITS,
        )
        self.wakeup_to_start = self.histogram(
            "longshift_wakeup_to_start_seconds",
            "From a wake-up's arrival in this worker to the record that its turn has started.",
            buckets=WAITS,
        )
        self.rescued = self.counter(
            "longshift_leases_rescued_total", "Leases taken from dead workers by this worker's sweeper."
        )
        self.buried = self.counter(
            "longshift_workers_buried_total", "Workers declared dead for their silence by this worker's sweeper."
        )

    def _journal(self) -> None:
        self.batch_rows = self.histogram(
            "longshift_journal_batch_rows",
            "Events in one statement of the journal, by kind of write: append, start, finish or leave.",
            "kind",
            buckets=ROWS,
        )
        self.batch_seconds = self.histogram(
            "longshift_journal_batch_seconds",
            "Time of one statement of the journal that was answered.",
            "kind",
            buckets=MOMENTS,
        )
        self.journal_open = self.gauge(
            "longshift_journal_open", "0 while turns are paused because Postgres does not answer or cannot store."
        )
        self.fenced = self.counter(
            "longshift_writes_fenced_total",
            "Writes that Postgres refused because the lease was somebody else's by then.",
        )

    def _tiers(self) -> None:
        self.contexts = self.counter(
            "longshift_contexts_restored_total",
            "Contexts restored at the start of a turn, by where they came from: local, hot, warm or cold.",
            "tier",
        )
        self.restore_seconds = self.histogram(
            "longshift_context_restore_seconds", "Time to restore a context.", "tier", buckets=MOMENTS
        )
        self.drift = self.counter(
            "longshift_context_drift_total",
            "Copies of contexts that were not the fold of the log, by what was wrong; each was dropped and rebuilt.",
            "reason",
        )
        for reason in DRIFTS:  # from 0, or nobody would see an increase in the first one, which may be the only one
            self.drift.labels(reason=reason)
        self.collected = self.counter(
            "longshift_collected_total",
            "What the collector has removed because nothing refers to it: artifacts, blobs (their bytes, once for each tenant"
            " and content) and bytes.",
            "what",
        )
