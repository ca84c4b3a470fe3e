"""Counts the branches of a turn, and those that wait: when all do, the turn may leave its worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from longshift.clock import Clock

EVICT_AFTER = timedelta(seconds=1)
"""Waits shorter than this stay on the worker: leaving and coming back costs two commits and a claim."""


class Waits:
    """The branches of one turn; a task that the agent started by itself counts from its first durable call on."""

    def __init__(self, clock: Clock, on_idle: Callable[[], None]) -> None:
        self._clock = clock
        self._branches = 1
        self._waits: dict[object, datetime] = {}
        self._on_idle = on_idle

    def close(self) -> None:
        """Tell nobody any more. Without the callback this is no cycle: what a turn held goes with it, not with a later
        run of the garbage collector."""
        self._on_idle = _nobody

    @property
    def until(self) -> datetime | None:
        """When the first of the waits ends; None: nothing waits."""
        return min(self._waits.values(), default=None)

    def begin_branches(self, more: int = 1) -> None:
        self._branches += more

    def end_branch(self) -> None:
        self._branches -= 1
        self._look()

    @contextmanager
    def waiting(self, until: datetime) -> Iterator[None]:
        token = object()
        self._waits[token] = until
        self._look()
        try:
            yield
        finally:
            del self._waits[token]

    @property
    def idle(self) -> bool:
        """Every branch waits, and not just for an instant."""
        until = self.until
        return until is not None and len(self._waits) >= self._branches and until - self._clock.now() >= EVICT_AFTER

    def _look(self) -> None:
        if self.idle:
            self._on_idle()


def _nobody() -> None:
    """Hears that every branch waits when the turn has left."""
