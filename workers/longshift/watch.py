"""One try of a step, as it is watched: when it last showed progress, and whether anybody still waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

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
