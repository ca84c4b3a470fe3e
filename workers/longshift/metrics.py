"""What a process counts and measures, in one registry of its own: names are a public interface."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.contexts = Counter(
            "longshift_contexts_restored",
            "Contexts restored at the start of a turn, by where they came from: local, hot, warm or cold.",
            ["tier"],
            registry=self.registry,
        )
        self.drift = Counter(
            "longshift_context_drift",
            "Hot copies of contexts that were not the fold of the log; each was discarded and rebuilt.",
            ["reason"],
            registry=self.registry,
        )
        self.restore_seconds = Histogram(
            "longshift_context_restore_seconds",
            "Time to restore a context.",
            ["tier"],
            registry=self.registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
        )
