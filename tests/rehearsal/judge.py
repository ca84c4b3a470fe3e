"""How well a rule did: figures of a simulated outcome."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.figures import quantile
from tests.rehearsal.simulate import Outcome, needed

MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Seconds, unless said otherwise. Who needs what is said by ``needed``."""

    reaction: float | None
    """From the moment in which the fleet was first too small to the first decision to grow; None: it never was."""
    caught_up: float | None
    """From then until as many were ready as were needed; None: never too small, or never caught up."""
    oldest: float
    """The longest that ready work stood in the queue."""
    wait_p99: float
    highest: int
    """Replicas, at most."""
    overshoot: int
    """Replicas, at most, beyond the most that were ever needed."""
    short: float
    """Replica-minutes that were missing."""
    paid: float
    """Replica-minutes of all pods, also starting and draining."""
    used: float
    """Replica-minutes of work: what fully busy pods would have taken."""
    changes: int
    """Of the replica count."""
    interrupted: int
    """Turns that were moved to another worker."""

    @property
    def idle(self) -> float:
        """Share of what was paid for and not used."""
        return 1 - self.used / self.paid


def judge(outcome: Outcome, *, most: int) -> Verdict:
    """``most``: ``maxReplicaCount``."""
    need = needed(outcome.demand, outcome.model.slots, most=most)
    series = outcome.series
    small = next((now.at for now in series if need[int(now.at)] > now.ready), None)
    grown = next((at for at, _ in outcome.changes if small is not None and at >= small), None)
    caught = next(
        (now.at for now in series if small is not None and now.at > small and now.ready >= need[int(now.at)]), None
    )
    return Verdict(
        reaction=None if small is None or grown is None else grown - small,
        caught_up=None if small is None or caught is None else caught - small,
        oldest=max(now.oldest for now in series),
        wait_p99=quantile(outcome.waits, 0.99),
        highest=max(now.wanted for now in series),
        overshoot=max(0, max(now.wanted for now in series) - max(need)),
        short=sum(max(0, need[int(now.at)] - now.ready) for now in series) / MINUTE,
        paid=sum(now.paid for now in series) / MINUTE,
        used=sum(now.running for now in series) / outcome.model.slots / MINUTE,
        changes=len(outcome.changes),
        interrupted=outcome.interrupted,
    )
