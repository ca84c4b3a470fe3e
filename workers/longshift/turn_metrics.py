"""What is counted and measured of turns, steps and calls of tools; in the registry of the process that runs them."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram

from longshift.model import Effect, StepKind, TurnStatus

STEPS = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
ATTEMPTS = (0.02, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200, 28800)
TURNS = (0.05, 0.25, 1, 5, 15, 60, 300, 1800, 7200, 28800, 86400, 604800)
"""Seconds: from no-ops to the longest default, the timeout of a step, a working day, the deadline of a turn."""


class AttemptOutcome(StrEnum):
    """How an attempt left its worker."""

    ENDED = "ended"  # with its turn
    WAITING = "waiting"  # the turn needs time, or something of others
    INTERRUPTED = "interrupted"  # the worker drains
    LOST = "lost"  # the lease is somebody else's


class StepOutcome(StrEnum):
    """How a step ended; of one that was interrupted nothing is recorded, and so nothing is counted."""

    COMPLETED = "completed"
    FAILED = "failed"


REPLAYED = "replayed"
"""Of a call: the ledger knew how it had ended, so that it was not made. The other outcomes are the ledger's own words."""


class TurnMetrics:
    """The metrics of one process. Labels of an agent are looked up once: a step has no time for that."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.ended = Counter(
            "longshift_turns_ended", "Turns that this worker has ended.", ["agent", "status"], registry=registry
        )
        self.turn_seconds = Histogram(
            "longshift_turn_seconds",
            "From the first start of a turn to its end, waits included.",
            ["agent"],
            registry=registry,
            buckets=TURNS,
        )
        self.attempt_seconds = Histogram(
            "longshift_attempt_seconds",
            "Time that an attempt at a turn held its worker.",
            ["agent", "outcome"],
            registry=registry,
            buckets=ATTEMPTS,
        )
        self.step_seconds = Histogram(
            "longshift_step_seconds",
            "From the start of a step that ran here to its durable record; replayed steps do not count.",
            ["agent", "kind", "outcome"],
            registry=registry,
            buckets=STEPS,
        )
        self.step_retries = Counter(
            "longshift_step_retries",
            "Tries of steps that failed and were followed by another one.",
            ["agent", "kind"],
            registry=registry,
        )
        self.tool_calls = Counter(
            "longshift_tool_calls",
            "Calls of tools by what the ledger says of them: done, failed, unknown; replayed: not made, it had ended before.",
            ["effect", "outcome"],
            registry=registry,
        )
        self._agents: dict[str, AgentMetrics] = {}

    def of(self, agent: str) -> AgentMetrics:
        """Those with the label ``agent``: the name of one that is registered."""
        found = self._agents.get(agent)
        if found is None:
            found = self._agents[agent] = AgentMetrics(self, agent)
        return found

    def call_ended(self, effect: Effect, outcome: str) -> None:
        self.tool_calls.labels(effect=effect.value, outcome=outcome).inc()


class AgentMetrics:
    """The same for the turns of one agent."""

    def __init__(self, metrics: TurnMetrics, agent: str) -> None:
        self._metrics, self._agent = metrics, agent
        self._steps: dict[tuple[StepKind, StepOutcome], Histogram] = {}

    def turn_ended(self, status: TurnStatus, *, seconds: float | None) -> None:
        """``seconds`` since its first start; None: it never started."""
        self._metrics.ended.labels(agent=self._agent, status=status.value).inc()
        if seconds is not None:
            self._metrics.turn_seconds.labels(agent=self._agent).observe(max(0.0, seconds))

    def attempt_ended(self, outcome: AttemptOutcome, *, seconds: float) -> None:
        self._metrics.attempt_seconds.labels(agent=self._agent, outcome=outcome.value).observe(seconds)

    def step_ended(self, kind: StepKind, outcome: StepOutcome, *, seconds: float) -> None:
        child = self._steps.get((kind, outcome))
        if child is None:
            child = self._metrics.step_seconds.labels(agent=self._agent, kind=kind.value, outcome=outcome.value)
            self._steps[kind, outcome] = child
        child.observe(seconds)

    def step_retried(self, kind: StepKind) -> None:
        self._metrics.step_retries.labels(agent=self._agent, kind=kind.value).inc()
