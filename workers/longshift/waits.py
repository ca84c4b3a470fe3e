"""Counts the branches of a turn, and those that wait: when all do, the turn may leave its worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from longshift.clock import Clock

EVICT_AFTER = timedelta(seconds=1)
"""Waits shorter than this stay on the worker: leaving and coming back costs two commits and a claim."""


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """One branch that waits."""

    until: datetime | None  # None: for as long as it takes
    stops_clock: bool


class Waits:
    """The branches of one turn; a task that the agent started by itself counts from its first durable call on."""

    def __init__(self, clock: Clock, on_idle: Callable[[], None]) -> None:
        self._clock = clock
        self._branches = 1
        self._pending: dict[Pending, None] = {}
        self._on_idle = on_idle

    def close(self) -> None:
        """Tell nobody any more. Without the callback this is no cycle: what a turn held goes with it, not with a later
        run of the garbage collector."""
        self._on_idle = _nobody

    @property
    def until(self) -> datetime | None:
        """When the first of the waits ends by itself; None: none does."""
        return min((pending.until for pending in self._pending if pending.until is not None), default=None)

    @property
    def stops_clock(self) -> bool:
        """Whether the turn's deadline comes no nearer while all of it waits."""
        return any(pending.stops_clock for pending in self._pending)

    def begin_branches(self, more: int = 1) -> None:
        self._branches += more

    def end_branch(self) -> None:
        self._branches -= 1
        self._look()

    def begin(self, until: datetime | None, *, stops_clock: bool = False) -> Pending:
        """A branch waits from now on."""
        pending = Pending(until, stops_clock)
        self._pending[pending] = None
        self._look()
        return pending

    def end(self, pending: Pending) -> None:
        """It does no longer, also if its code has yet to notice; saying so again changes nothing."""
        self._pending.pop(pending, None)

    @contextmanager
    def waiting(self, until: datetime) -> Iterator[None]:
        pending = self.begin(until)
        try:
            yield
        finally:
            self.end(pending)

    @property
    def idle(self) -> bool:
        """Every branch waits, and not just for an instant."""
        if not self._pending or len(self._pending) < self._branches:
            return False
        until = self.until
        return until is None or until - self._clock.now() >= EVICT_AFTER

    def _look(self) -> None:
        if self.idle:
            self._on_idle()


def _nobody() -> None:
    """Hears that every branch waits when the turn has left."""
