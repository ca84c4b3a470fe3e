"""Which fault comes when: a pure function of the seed, the length of the run and the size of the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from random import Random

GAP = 2.5
"""Seconds between two faults, on average."""
QUIET_START = 2.0
"""Seconds at the start without a fault, so that there is something to disturb."""


class FaultKind(StrEnum):
    WORKER_KILL = "worker.kill"  # SIGKILL of the worker; its supervisor, where it has one, lives on
    WORKER_VANISH = "worker.vanish"  # SIGKILL of its supervisor and its wards too: a machine is gone
    WORKER_DRAIN = "worker.drain"  # SIGTERM
    WORKER_PAUSE = "worker.pause"  # SIGSTOP, for less than the time-to-live
    WORKER_FREEZE = "worker.freeze"  # SIGSTOP, past the time-to-live
    API_KILL = "api.kill"
    API_STOP = "api.stop"  # SIGTERM
    REDIS_FLUSH = "redis.flush"
    REDIS_RESTART = "redis.restart"
    REDIS_KILL = "redis.kill"  # and started again after a while
    REDIS_HANG = "redis.hang"  # SIGSTOP: it accepts and never answers
    POSTGRES_RESTART = "postgres.restart"  # "fast": sessions are ended, everything is written
    POSTGRES_CRASH = "postgres.crash"  # "immediate": nothing is written, recovery at the start
    POSTGRES_KILL = "postgres.kill"  # SIGKILL of the postmaster, and started again after a while
    POSTGRES_HANG = "postgres.hang"  # SIGSTOP of all its processes
    STORE_SLOW = "store.slow"
    STORE_ERRORS = "store.errors"  # 500 and 503
    STORE_RESETS = "store.resets"

    @property
    def target(self) -> str:
        """``worker``, ``api``, ``redis``, ``postgres`` or ``store``."""
        return self.value.partition(".")[0]


DECK: Mapping[FaultKind, int] = {
    FaultKind.WORKER_KILL: 5,
    FaultKind.WORKER_VANISH: 3,
    FaultKind.WORKER_DRAIN: 4,
    FaultKind.WORKER_PAUSE: 4,
    FaultKind.WORKER_FREEZE: 4,
    FaultKind.API_KILL: 2,
    FaultKind.API_STOP: 1,
    FaultKind.REDIS_FLUSH: 2,
    FaultKind.REDIS_RESTART: 1,
    FaultKind.REDIS_KILL: 1,
    FaultKind.REDIS_HANG: 1,
    FaultKind.POSTGRES_RESTART: 1,
    FaultKind.POSTGRES_CRASH: 1,
    FaultKind.POSTGRES_KILL: 1,
    FaultKind.POSTGRES_HANG: 1,
    FaultKind.STORE_SLOW: 1,
    FaultKind.STORE_ERRORS: 2,
    FaultKind.STORE_RESETS: 1,
}
"""How often each fault comes in one round; rounds follow each other, each in an order of its own."""

LASTS: Mapping[FaultKind, tuple[float, float]] = {
    FaultKind.WORKER_PAUSE: (0.2, 0.7),  # parts of the time-to-live
    FaultKind.WORKER_FREEZE: (1.2, 2.0),  # times the time-to-live
    FaultKind.REDIS_KILL: (0.5, 4.0),
    FaultKind.REDIS_HANG: (1.0, 5.0),
    FaultKind.POSTGRES_KILL: (0.2, 3.0),
    FaultKind.POSTGRES_HANG: (1.0, 5.0),
    FaultKind.STORE_SLOW: (2.0, 6.0),
    FaultKind.STORE_ERRORS: (2.0, 6.0),
    FaultKind.STORE_RESETS: (2.0, 6.0),
}
"""Seconds that a fault lasts, from and to. Of other kinds it is the pause before the process is started again."""
RESTARTED_AFTER = (0.1, 1.5)
TIMES_TTL = frozenset({FaultKind.WORKER_PAUSE, FaultKind.WORKER_FREEZE})


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of the schedule."""

    at: float  # seconds after the load began
    kind: FaultKind
    victim: int  # number of the worker or API replica; 0 for a server
    seconds: float

    def __str__(self) -> str:
        who = f" {self.victim}" if self.kind.target in ("worker", "api") else ""
        return f"{self.at:6.1f} s  {self.kind}{who}  {self.seconds:.1f} s"


def draw(seed: int, *, seconds: float, workers: int, replicas: int, ttl: float) -> list[Fault]:
    """The schedule of a run of ``seconds``. ``ttl``: after so many seconds of silence a worker is declared dead."""
    chance = Random(f"schedule {seed}")
    faults: list[Fault] = []
    deck: list[FaultKind] = []
    at = QUIET_START
    while True:
        at += chance.uniform(0.2, 2 * GAP - 0.2)
        if at >= seconds:
            return faults
        if not deck:
            deck = [kind for kind, count in DECK.items() for _ in range(count)]
            chance.shuffle(deck)
        kind = deck.pop()
        count = {"worker": workers, "api": replicas}.get(kind.target, 1)
        lasts = chance.uniform(*LASTS.get(kind, RESTARTED_AFTER)) * (ttl if kind in TIMES_TTL else 1)
        faults.append(Fault(round(at, 2), kind, chance.randrange(count), round(lasts, 2)))
