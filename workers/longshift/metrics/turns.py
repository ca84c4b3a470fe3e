"""What becomes of turns, steps and tool calls in a worker."""

from __future__ import annotations

from longshift.metrics.families import DAYS, WORK, Metrics


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
