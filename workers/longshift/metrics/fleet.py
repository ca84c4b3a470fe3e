"""What holds for the fleet as a whole, wherever it is read: the exporter's gauges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from longshift.metrics.families import Metrics, values


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue."""

    runnable: int = 0
    running: int = 0
    oldest_seconds: float = 0.0
    slots: int = 0
    workers: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """One look at the database.

    Attributes:
        turns: open ones, by status.
        workers: that live, by condition: ok, unready, stuck or draining.
        suspects: sessions whose turn may have crashed a process.
        approvals: that wait for an answer.
        in_doubt: tool calls that wait for an operator.
        unserved: open turns, by agent and version ('' for any), that no live worker serves.
    """

    queues: Mapping[str, Queue] = field(default_factory=dict)
    turns: Mapping[str, int] = field(default_factory=dict)
    workers: Mapping[str, int] = field(default_factory=dict)
    suspects: int = 0
    approvals: int = 0
    in_doubt: int = 0
    unserved: Mapping[tuple[str, str], int] = field(default_factory=dict)


class FleetMetrics(Metrics, Collector):
    """The metrics of an exporter: one look at the database for each scrape."""

    def __init__(self, look: Callable[[], Figures | None], *, revision: str | None = None) -> None:
        """``look`` is called in the thread of a scrape; None: the database does not answer."""
        super().__init__(revision=revision)
        self._look = look
        self._up = self.read(
            "longshift_exporter_up", "0 while Postgres does not answer: then there are no other figures."
        )
        self._queues = {
            name: self.read(f"longshift_queue_{name}", text, "queue")
            for name, text in {
                "runnable": "Sessions that are ready to run and that no worker holds.",
                "running": "Sessions that a worker holds.",
                "oldest_seconds": "How long the session that has been ready longest has waited for a worker.",
                "slots": "Turns that its live workers run at a time, at most; those that drain do not count.",
                "workers": "Live workers that serve it and do not drain.",
                "waiting": "Turns that wait for time, a signal, an approval or a child, and hold no worker.",
            }.items()
        }
        self._turns = self.read("longshift_turns_open", "Turns that have not ended.", "status")
        self._workers = self.read(
            "longshift_workers",
            "Live workers, by what they say of themselves: ok, unready, stuck or draining.",
            "condition",
        )
        self._suspects = self.read(
            "longshift_suspects", "Sessions whose turn may have crashed a process; they run apart from others."
        )
        self._approvals = self.read("longshift_approvals_open", "Approvals that wait for somebody's answer.")
        self._in_doubt = self.read(
            "longshift_tool_calls_in_doubt",
            "Irreversible tool calls of which only an operator can find out what became.",
        )
        self._unserved = self.read(
            "longshift_turns_unserved",
            "Open turns whose agent, in the version that they are pinned to, no live worker serves.",
            "agent",
            "version",
        )
        self.collect_by(self)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Without a look at the database."""
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        found = self._look()
        yield values(self._up, [((), 0.0 if found is None else 1.0)])
        if found is None:
            return
        for name, family in self._queues.items():
            yield values(family, (((queue,), getattr(of, name)) for queue, of in found.queues.items()))
        yield values(self._turns, (((status,), count) for status, count in found.turns.items()))
        yield values(self._workers, (((condition,), count) for condition, count in found.workers.items()))
        yield values(self._suspects, [((), found.suspects)])
        yield values(self._approvals, [((), found.approvals)])
        yield values(self._in_doubt, [((), found.in_doubt)])
        yield values(self._unserved, found.unserved.items())
