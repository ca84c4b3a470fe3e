"""When a worker is stuck: it looks alive, and yet nothing comes of it.

    takes nothing   work of its queues is overdue, it has free slots, it is ready, and it wins no claim
    holds on        a turn of its has shown no progress for longer than what it is doing may take

Both only if that is so without a break, for a time: an idle worker is healthy, and so is a full one. While something that
the worker needs does not answer, nothing is stuck; the time of a break, or of a process that was stopped, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from longshift.clock import Clock

SLACK = timedelta(seconds=30)
"""Beyond the time limit of what a turn does: those limits are kept elsewhere, and that takes its time."""
BREAK = timedelta(seconds=10)
"""Not to have looked for so long is a break."""


@dataclass(frozen=True, slots=True)
class Silence:
    """One turn that runs here.

    Attributes:
        name: for people.
        moved_at: when it last showed progress (monotonic).
        patience: seconds that what it is doing may take.
        waits_for_thread: a plain step of its has none yet.
        queued: its agent is a plain one, and has no thread yet.
        threaded: its agent is a plain one, and has a thread until it ends.
    """

    name: str
    moved_at: float
    patience: float
    waits_for_thread: bool = False
    queued: bool = False
    threaded: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """A worker, as one look finds it.

    Attributes:
        ready: what it needs answers.
        overdue: work of its queues has been ready for longer than it may.
        free: slots that no turn has; 0 as well if it takes none, because it drains or is a ward.
        claims: how many it has won so far.
        turns: that run here.
        thread_at: when a plain step last began in a thread (monotonic).
    """

    ready: bool
    overdue: bool
    free: int
    claims: int
    turns: Iterable[Silence] = ()
    thread_at: float = 0.0


class Judge:
    """Remembers since when things are as they are."""

    def __init__(self, *, clock: Clock, stuck_after: timedelta, step_timeout: timedelta) -> None:
        self._clock = clock
        self._stuck_after = stuck_after.total_seconds()
        self._step_timeout = step_timeout.total_seconds()
        self._looked = clock.monotonic()
        self._ready_since: float | None = None
        self._starving_since: float | None = None
        self._claims = 0

    def look(self, at: Look) -> str | None:
        """Why the worker is stuck; None: it is not."""
        now = self._clock.monotonic()
        if now - self._looked > BREAK.total_seconds():
            self._ready_since = self._starving_since = None
        self._looked = now
        if not at.ready:
            self._ready_since = self._starving_since = None
            self._claims = at.claims
            return None
        if self._ready_since is None:
            self._ready_since = now
        return self._takes_nothing(at, now) or self._holds_on(at, now, since=self._ready_since)

    def _takes_nothing(self, at: Look, now: float) -> str | None:
        starving = at.overdue and at.free > 0 and at.claims == self._claims
        self._claims = at.claims
        if not starving:
            self._starving_since = None
            return None
        if self._starving_since is None:
            self._starving_since = now
        seconds = now - self._starving_since
        if seconds < self._stuck_after:
            return None
        return f"it has taken no work for {seconds:.0f} s, though some was ready and {at.free} slots were free"

    def _holds_on(self, at: Look, now: float, *, since: float) -> str | None:
        turns = list(at.turns)
        # whoever waits for a thread may have to wait until one of those that have one is done
        longest = max((turn.patience for turn in turns), default=0.0)
        agents_at = max((turn.moved_at for turn in turns if turn.threaded), default=0.0)
        for turn in turns:
            moved, patience = max(turn.moved_at, since), turn.patience
            if turn.waits_for_thread:
                moved, patience = max(moved, at.thread_at), max(longest, self._step_timeout)
            elif turn.queued:  # an agent has its thread for many steps: as long as one of them moves, there is hope
                moved, patience = max(moved, agents_at), max(longest, self._step_timeout)
            if now - moved > patience + SLACK.total_seconds():
                return f"{turn.name} has made no progress for {now - moved:.0f} s, and may take {patience:g} s"
        return None
