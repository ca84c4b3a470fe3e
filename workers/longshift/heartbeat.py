"""A worker's heartbeat: a thread with a connection of its own, so that a stalled event loop is noticed and not mistaken.

each beat   writes heartbeat_at, the age of the loop's last tick, how much is running, and what the worker says of itself
drain       an operator has asked for the worker's end: it is told, once
zero rows   somebody declared this worker dead: it takes a new id, and all its turns are dropped
no answer   Postgres is away: the journal is told; nobody is declared dead for it
no tick     the loop has stalled past its limit: all stacks are written, and the process ends with code 70
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from longshift.clock import Clock
from longshift.config import Config
from longshift.db.liveness import Liveness, Member, Pulse
from longshift.errors import Unavailable
from longshift.model import Condition, new_id

logger = logging.getLogger(__name__)
STALLED = 70
"""Exit code of a process whose event loop stopped (EX_SOFTWARE)."""


@dataclass(slots=True)
class Load:
    """What the loop tells the thread: written by one, read by the other."""

    tick: float
    running: int = 0
    draining: bool = False
    condition: Condition | None = None
    complaint: str | None = None
    suspects: bool = False  # the other way round: some wait for a ward
    overdue: bool = False  # and: work of our queues has been ready for too long


class Heartbeat:
    """The thread, and the worker's identity, which it may have to change."""

    def __init__(
        self,
        liveness: Liveness,
        *,
        config: Config,
        member: Member,
        clock: Clock,
        on_reborn: Callable[[UUID], None],
        on_silence: Callable[[str], None],
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        self._liveness = liveness
        self._config = config
        self._member = member
        self._clock = clock
        self._on_reborn = on_reborn
        self._on_silence = on_silence
        self._on_drain = on_drain
        self._asked_to_drain = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.load = Load(tick=clock.monotonic())
        self.worker_id = new_id()
        self._watching_since: datetime | None = None
        self.seen_at: datetime | None = None
        """When (database clock) it last saw Postgres."""
        self._last_beat, self._last_beat_at = clock.monotonic(), clock.now()
        self._heard = self._last_beat, self._last_beat_at  # when the last beat that was answered had begun

    @property
    def leader(self) -> bool:
        """Whether this worker is the fleet's sweeper."""
        return self._liveness.leader

    @property
    def watching_since(self) -> datetime | None:
        """Since when (database clock) this worker has seen Postgres without a break: only then may it call others silent."""
        return None if self._was_away() else self._watching_since

    @property
    def is_heard(self) -> bool:
        """Whether a beat that began less than ``lock_grace`` ago was answered: nobody can have declared this worker dead.

        From any thread; by both clocks, as below.
        """
        monotonic, wall = self._heard
        grace = self._config.lock_grace
        by_ticks = timedelta(seconds=self._clock.monotonic() - monotonic)
        return by_ticks < grace and abs(self._clock.now() - wall) < grace

    def _was_away(self) -> bool:
        """Whether there was no beat for a while. By both clocks: on a machine that sleeps, the monotonic one may sleep, too."""
        grace = self._config.lock_grace
        by_ticks = timedelta(seconds=self._clock.monotonic() - self._last_beat)
        return by_ticks > grace or abs(self._clock.now() - self._last_beat_at) > grace

    def register(self) -> None:
        """Make the worker's row; blocking.

        Raises:
            Unavailable: Postgres does not answer.
        """
        self._register(self.worker_id)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end the thread; blocking."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)
        try:
            self._liveness.retire(self.worker_id)
        except Unavailable:
            logger.warning("could not sign off, the sweeper will notice")
        self._liveness.close()

    def _register(self, worker_id: UUID) -> None:
        self._liveness.register(worker_id, self._member)

    def _run(self) -> None:
        watch = Watchdog(self._config.loop_limit, tick=self.load.tick)
        interval = self._config.heartbeat.total_seconds()
        while not self._stop.wait(interval):
            if watch.stalled(self.load.tick, after=interval):
                _die(watch.silent)
            try:
                self._beat()
            except Unavailable as error:
                self._watching_since = self.seen_at = None
                self._tell(self._on_silence, str(error))
            except Exception:
                logger.exception("heartbeat failed")

    def _beat(self) -> None:
        beat, at = self._clock.monotonic(), self._clock.now()
        if self._was_away():
            self._watching_since = None
        age = timedelta(seconds=max(0.0, beat - self.load.tick))
        load = self.load
        pulse = Pulse(load.running, age, load.draining, self._watching_since, load.condition, load.complaint)
        may_lead = not (load.draining or self._member.isolated)
        answer = self._liveness.beat(self.worker_id, pulse, want_leader=may_lead)
        self._watch(self._liveness.connected_at if answer is None else answer.now)
        load.suspects = answer is not None and answer.suspects
        load.overdue = answer is not None and answer.overdue
        if answer is None:
            reborn = new_id()
            self._register(reborn)
            logger.error("declared dead, going on under a new id", extra={"worker_id": self.worker_id.hex})
            self.worker_id = reborn
            self._tell(self._on_reborn, reborn)
        else:
            self._heard = beat, at
            if answer.drain and not self._asked_to_drain:
                self._asked_to_drain = True
                logger.warning("an operator has asked this worker to drain")
                self._tell(self._on_drain)

    def _watch(self, now: datetime | None) -> None:
        if self._watching_since is None or self._was_away():
            self._watching_since = now
        self._last_beat, self._last_beat_at = self._clock.monotonic(), self._clock.now()
        self.seen_at = now

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


class Watchdog:
    """Adds up the time for which the loop has not ticked *while this thread was running*.

    A process that was stopped (SIGSTOP) and continued finds an old tick at once; the loop gets its chance first.
    """

    def __init__(self, limit: timedelta, *, tick: float) -> None:
        self._limit = limit.total_seconds()
        self._tick = tick
        self.silent = 0.0

    def stalled(self, tick: float, *, after: float) -> bool:
        self.silent = 0.0 if tick != self._tick else self.silent + after
        self._tick = tick
        return self.silent >= self._limit


def _die(silent: float) -> None:
    try:
        logger.critical("event loop stalled, ending the process", extra={"seconds": silent})
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    finally:  # also without a standard error to write to
        os._exit(STALLED)
