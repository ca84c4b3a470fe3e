"""What becomes of turns, steps and tool calls in a worker."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import Histogram

from longshift.metrics.families import DAYS, WORK, Metrics
from longshift.model import Effect, StepKind, TurnStatus


class AttemptOutcome(StrEnum):
    """How an attempt left its worker."""

    ENDED = "ended"  # with its turn
    WAITING = "waiting"  # the turn needs time, or something of others
    INTERRUPTED = "interrupted"  # the worker drains
    LOST = "lost"  # the lease is somebody else's, or whether it stands is not known


class StepOutcome(StrEnum):
    """How a step ended. Of one that was interrupted nothing is recorded, and so nothing is counted."""

    COMPLETED = "completed"
    FAILED = "failed"


REPLAYED = "replayed"
"""Of a call: how it had ended stood in the ledger, so that it was not made. The other outcomes are the ledger's own words."""


class TurnMetrics:
    """A part of a worker's metrics. Agents are named as registered; steps and tools are not named: there is no end of them."""

    def __init__(self, of: Metrics) -> None:
        self.ended = of.counter(
            "longshift_turns_ended_total",
            "Turns that ended here: succeeded, failed, cancelled or expired.",
            "agent",
            "status",
        )
        self.seconds = of.histogram(
            "longshift_turn_seconds",
            "Time from a turn's first start to its end, whatever it waited for.",
            "agent",
            buckets=DAYS,
        )
        self.attempts = of.histogram(
            "longshift_attempt_seconds",
            "Time of an attempt at a turn, by how it left the worker: ended, waiting, interrupted or lost.",
            "agent",
            "outcome",
            buckets=WORK,
        )
        self.steps = of.histogram(
            "longshift_step_seconds",
            "Time of a step that really ran, its tries and the record included: completed or failed.",
            "agent",
            "kind",
            "outcome",
            buckets=WORK,
        )
        self.retries = of.counter(
            "longshift_step_retries_total", "Tries of steps beyond their first one.", "agent", "kind"
        )
        self.tool_calls = of.counter(
            "longshift_tool_calls_total",
            "Calls of tools, by what the ledger says of them: done, failed, unknown, given_up, or replayed (answered from it).",
            "effect",
            "outcome",
        )
        self.deferred = of.counter(
            "longshift_turns_deferred_total", "Turns given back because this worker does not have their agent.", "agent"
        )
        self._agents: dict[str, AgentMetrics] = {}

    def of(self, agent: str) -> AgentMetrics:
        """Those of ``agent``."""
        found = self._agents.get(agent)
        if found is None:
            found = self._agents[agent] = AgentMetrics(self, agent)
        return found

    def call_ended(self, effect: Effect, outcome: str) -> None:
        self.tool_calls.labels(effect.value, outcome).inc()


class AgentMetrics:
    """Those of the turns of one agent. The labels of steps are looked up once, for steps are many."""

    def __init__(self, metrics: TurnMetrics, agent: str) -> None:
        self._metrics, self._agent = metrics, agent
        self._steps: dict[tuple[StepKind, StepOutcome], Histogram] = {}

    def turn_ended(self, status: TurnStatus, *, seconds: float | None) -> None:
        """``seconds`` since its first start; None: it never started."""
        self._metrics.ended.labels(self._agent, status.value).inc()
        if seconds is not None:
            self._metrics.seconds.labels(self._agent).observe(max(0.0, seconds))

    def attempt_ended(self, outcome: AttemptOutcome, *, seconds: float) -> None:
        self._metrics.attempts.labels(self._agent, outcome.value).observe(seconds)

    def step_ended(self, kind: StepKind, outcome: StepOutcome, *, seconds: float) -> None:
        child = self._steps.get((kind, outcome))
        if child is None:
            child = self._metrics.steps.labels(self._agent, kind.value, outcome.value)
            self._steps[kind, outcome] = child
        child.observe(seconds)

    def step_retried(self, kind: StepKind) -> None:
        self._metrics.retries.labels(self._agent, kind.value).inc()
