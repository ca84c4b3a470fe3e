"""What is seen of a turn while it runs: spans for who follows one, figures and log fields for who watches many.

    Observers         of a worker
      TurnObserver    of one attempt at a turn
        Seen          of one step that really runs: replayed ones are seen by nobody

Nothing durable hangs on any of it. An ``Observer`` as such sees nothing.
"""

from __future__ import annotations

import json
from contextvars import Token
from datetime import datetime
from types import TracebackType
from typing import Self

from longshift import telemetry
from longshift.clock import SYSTEM, Clock
from longshift.errors import StepFailed
from longshift.metrics import Metrics, TurnMetrics
from longshift.metrics.turns import AttemptOutcome, StepOutcome
from longshift.model import Claim, Effect, Prefix, TurnRecord, TurnStatus, show_id
from longshift.steps import StepDefinition
from longshift.tooling import ToolSpec
from longshift.tracing import NO_SPAN, NOTHING, OFF, Attributes, Kind, Span, Traces, names


class Seen:
    """A step from its start to its durable record; this one is not looked at."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """``StepFailed``: its failure is recorded. Anything else: it was interrupted, and nothing is."""

    def retried(self) -> None:
        """A try has failed, and another one will follow."""

    def postponed(self) -> None:
        """That one does not follow here and now: the turn may leave its worker until then."""


UNSEEN = Seen()


class Observer:
    """Sees one attempt at a turn, from the claim on: use it in a ``with``. Lines that are logged inside say which turn it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """What has begun, and was said neither to have ended nor to have left, was lost."""

    def started(self, at: datetime) -> None:
        """It stands in the log that the attempt has begun."""

    def ended(self, status: TurnStatus, *, error: str | None = None) -> None:
        """The end of the turn is recorded, by whichever way it came to it; ``error``: JSON text with its code."""

    def left(self, status: TurnStatus) -> None:
        """That the turn leaves this worker is recorded: it waits, or is queued again."""

    @property
    def traceparent(self) -> str | None:
        """Below what the turns hang that this one starts."""
        return None

    def step(self, step: StepDefinition, key: str) -> Seen:
        """A step runs; ``key`` is its replay key. In a trace that is not sampled it costs no more than without traces."""
        return UNSEEN

    def call(self, tool: ToolSpec, call_id: str) -> Span:
        """The own code of a tool runs; ``call_id`` as shown."""
        return NO_SPAN

    def call_ended(self, effect: Effect, outcome: str) -> None:
        """It stands in the ledger how a call has ended."""

    def model(self, name: str, *, provider: str | None, attributes: Attributes = NOTHING) -> Span:
        """A request to a model is under way; the span is told what comes back."""
        return NO_SPAN


class Observers:
    """Makes the observers of one worker."""

    def __init__(self, traces: Traces = OFF, metrics: TurnMetrics | None = None, *, clock: Clock = SYSTEM) -> None:
        self.traces, self.clock = traces, clock
        self.metrics = metrics or TurnMetrics(Metrics())

    def attempt(self, record: TurnRecord, claim: Claim | None = None, *, woken_at: float | None = None) -> TurnObserver:
        """Of the next attempt at ``record``, under ``claim``; ``woken_at``: when it became known here that there is work
        (monotonic), if that was for this turn."""
        return TurnObserver(self, record, claim, woken_at=woken_at)


class TurnObserver(Observer):
    """Of a turn on a worker."""

    def __init__(
        self, observers: Observers, record: TurnRecord, claim: Claim | None, *, woken_at: float | None
    ) -> None:
        self.metrics = observers.metrics
        self.traces = observers.traces
        self.monotonic = observers.clock.monotonic
        self.agent = observers.metrics.of(record.agent)
        self._now = observers.clock.now
        self._record, self._claim, self._woken_at = record, claim, woken_at
        self._taken_at = self.monotonic()
        self._first_start = record.started_at
        self._running = False
        self._span = NO_SPAN
        self._line: Token[telemetry.Fields] | None = None

    @property
    def traceparent(self) -> str | None:
        return self._span.traceparent or self._record.traceparent

    def __enter__(self) -> Self:
        self._line = telemetry.add(
            {
                "session_id": show_id(Prefix.SESSION, self._record.session_id),
                "turn_id": show_id(Prefix.TURN, self._record.id),
                "attempt": self._record.attempts + 1,
            }
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._running:
            self._left(AttemptOutcome.LOST)
        assert self._line is not None
        telemetry.remove(self._line)

    # -- the attempt

    def started(self, at: datetime) -> None:
        self._running = True
        self._first_start = self._first_start or at
        if not self.traces.is_on:
            return
        record = self._record
        parent, trace = record.traceparent, record.root_turn_id
        ahead = self._now().timestamp() - self.monotonic()
        if self._woken_at is not None:
            claim = self.traces.span(
                "claim", parent=parent, trace=trace, begun=ahead + self._woken_at, attributes=self._where()
            )
            claim.end(ahead + self._taken_at)
        self._span = self.traces.span(
            f"turn {record.agent}",
            parent=parent,
            trace=trace,
            kind=Kind.CONSUMER,
            begun=ahead + self._taken_at,
            attributes={
                **self._where(),
                names.OPERATION: "invoke_agent",
                names.AGENT_NAME: record.agent,
                names.AGENT_VERSION: record.agent_version,
                names.CONVERSATION_ID: show_id(Prefix.SESSION, record.session_id),
                names.BATCH_ID: show_id(Prefix.BATCH, record.batch_id) if record.batch_id is not None else None,
            },
        )
        self._span.__enter__()

    def ended(self, status: TurnStatus, *, error: str | None = None) -> None:
        since = self._first_start
        self.agent.turn_ended(status, seconds=(self._now() - since).total_seconds() if since is not None else None)
        if not self._running:
            return
        if self._span.is_recorded:
            self._span.set({names.TURN_STATUS: status.value})
            if status is TurnStatus.FAILED and error is not None:
                self._span.fail(str(json.loads(error).get("code")))
        self._left(AttemptOutcome.ENDED)

    def left(self, status: TurnStatus) -> None:
        if self._running:
            self._span.set({names.TURN_STATUS: status.value})
            self._left(AttemptOutcome.WAITING if status is TurnStatus.WAITING else AttemptOutcome.INTERRUPTED)

    def _left(self, outcome: AttemptOutcome) -> None:
        self._running = False
        self.agent.attempt_ended(outcome, seconds=self.monotonic() - self._taken_at)
        self._span.set({names.ATTEMPT_OUTCOME: outcome.value})
        self._span.__exit__(None, None, None)

    def _where(self) -> Attributes:
        record, claim = self._record, self._claim
        return {
            names.SESSION_ID: show_id(Prefix.SESSION, record.session_id),
            names.TURN_ID: show_id(Prefix.TURN, record.id),
            names.ATTEMPT: record.attempts + 1,
            names.WORKER_ID: show_id(Prefix.WORKER, claim.worker_id) if claim is not None else None,
            names.EPOCH: claim.epoch if claim is not None else None,
        }

    # -- what it does

    def step(self, step: StepDefinition, key: str) -> Seen:
        return Followed(self, step, key) if self._span.is_recorded else Measured(self, step)

    def call(self, tool: ToolSpec, call_id: str) -> Span:
        if not self._span.is_recorded:
            return NO_SPAN
        return self.traces.span(
            f"execute_tool {tool.name}",
            attributes={
                names.OPERATION: "execute_tool",
                names.TOOL_NAME: tool.name,
                names.TOOL_TYPE: "function",
                names.TOOL_CALL_ID: tool.call_id,
                names.TOOL_EFFECT: tool.effect.value,
                names.CALL_ID: call_id,
            },
        )

    def call_ended(self, effect: Effect, outcome: str) -> None:
        self.metrics.call_ended(effect, outcome)

    def model(self, name: str, *, provider: str | None, attributes: Attributes = NOTHING) -> Span:
        if not self._span.is_recorded:
            return NO_SPAN
        said = {names.OPERATION: "chat", names.REQUEST_MODEL: name, names.PROVIDER: provider, **attributes}
        return self.traces.span(f"chat {name}", kind=Kind.CLIENT, attributes=said)


class Measured(Seen):
    """A step whose time is taken."""

    __slots__ = ("_begun", "_observer", "_outcome", "_step", "_tries")

    def __init__(self, observer: TurnObserver, step: StepDefinition) -> None:
        self._observer, self._step = observer, step
        self._outcome: StepOutcome | None = StepOutcome.COMPLETED  # unless something is said
        self._tries = 1
        self._begun = observer.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._outcome = StepOutcome.FAILED if isinstance(error, StepFailed) else None
        if self._outcome is not None:
            seconds = self._observer.monotonic() - self._begun
            self._observer.agent.step_ended(self._step.kind, self._outcome, seconds=seconds)

    def retried(self) -> None:
        self._tries += 1
        self._observer.agent.step_retried(self._step.kind)

    def postponed(self) -> None:
        self._outcome = None


class Followed(Measured):
    """A step that has a span, too, which is the current one in its function."""

    __slots__ = ("_postponed", "_span")

    def __init__(self, observer: TurnObserver, step: StepDefinition, key: str) -> None:
        super().__init__(observer, step)
        self._postponed = False
        self._span = observer.traces.span(f"step {step.name}", attributes={names.STEP_KEY: key})

    def __enter__(self) -> Self:
        self._span.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        super().__exit__(kind, error, _)
        if self._span.is_recorded:
            self._span.set({names.STEP_OUTCOME: self._said(), names.STEP_TRIES: self._tries})
            if isinstance(error, StepFailed):
                self._span.fail(error.error_type)
        self._span.__exit__(None, None, None)

    def postponed(self) -> None:
        super().postponed()
        self._postponed = True
        self._tries -= 1  # the one that is to come is not one of these

    def _said(self) -> str:
        if self._outcome is not None:
            return self._outcome.value
        return "postponed" if self._postponed else "interrupted"


__all__ = ["Observer", "Observers", "Seen", "TurnObserver"]
