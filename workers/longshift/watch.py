"""One try of a step, as it is watched: when it last showed progress, and whether anybody still waits for it. And its turn: how
long that may go on without showing any."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import inf

from longshift.clock import Clock


class Watch:
    """Written by the thread or task that runs the step, read by the one that waits for it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.moved_at = clock.monotonic()
        self.over = False  # nobody waits any more
        self.expired = False  # for it took too long; if it runs in a thread, it still does

    def move(self) -> None:
        """The step shows progress."""
        self.moved_at = self.clock.monotonic()


class Pace:
    """When a turn last showed progress (a record, the start of a step, an ``emit``), and how long it may take to the next."""

    def __init__(self, clock: Clock, *, between: timedelta) -> None:
        """``between``: how long the agent's own code may take between two steps."""
        self._clock = clock
        self._between = between.total_seconds()
        self._limits: dict[object, float] = {}  # of the tries that run; inf: it waits for a thread
        self.moved_at = clock.monotonic()
        self.queued = False  # its agent is a plain one, and has no thread yet
        self.threaded = False  # it has one

    @contextmanager
    def queueing(self) -> Iterator[Callable[[], None]]:
        """Around a plain agent, which calls what it is given when it has got its thread, from there."""
        self.queued = True
        try:
            yield self._has_thread
        finally:
            self.queued = self.threaded = False

    def _has_thread(self) -> None:
        self.queued, self.threaded = False, True
        self.move()

    def move(self) -> None:
        """From any thread."""
        self.moved_at = self._clock.monotonic()

    def begin(self, what: object, seconds: float) -> None:
        """``what`` runs, and has so many seconds to show progress."""
        self._limits[what] = seconds
        self.move()

    def end(self, what: object) -> None:
        self._limits.pop(what, None)
        self.move()

    @property
    def patience(self) -> float:
        """Seconds that it may take to the next sign of progress."""
        return max((seconds for seconds in self._limits.values() if seconds < inf), default=self._between)

    @property
    def waits_for_thread(self) -> bool:
        return inf in self._limits.values()


class Silence:
    """Expires a timer when a watched try has shown no progress for too long."""

    def __init__(self, watch: Watch, longest: timedelta) -> None:
        self._watch = watch
        self._longest = longest.total_seconds()
        self._timer: asyncio.Timeout | None = None
        self._handle: asyncio.TimerHandle | None = None
        self.verdict = ""  # why it was ended, if it was

    @contextmanager
    def broken_by(self, timer: asyncio.Timeout) -> Iterator[None]:
        """Within this, silence that was begun may expire ``timer``."""
        self._timer = timer
        try:
            yield
        finally:
            self._timer = None
            if self._handle is not None:
                self._handle.cancel()

    def begin(self) -> None:
        """Count from now on."""
        if self._timer is not None:
            self._watch.move()
            self._look_in(self._longest)

    def _look_in(self, seconds: float) -> None:
        self._handle = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        if self._timer is None:
            return
        left = self._watch.moved_at + self._longest - self._watch.clock.monotonic()
        if left > 0:
            self._look_in(left)
        else:
            self.verdict = f"no progress for {self._longest:g} s"
            self._timer.reschedule(asyncio.get_running_loop().time())
