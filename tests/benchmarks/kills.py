"""What SIGKILL did to turns: which steps it interrupted, and when each of their turns went on elsewhere.

Said afterwards, from the effects and the log, so that it is exact: a killed process writes nothing any more, hence a step
that it had begun and that its attempt has no result of was running at the moment of the kill.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from tests.benchmarks.checks import Attempt, Fact, History
from tests.benchmarks.effects import BEGUN, Effect

How = Literal["alone", "group"]
"""The process that runs the turns alone (a parent can tell), or all that belongs to the worker (nobody can)."""


@dataclass(frozen=True, slots=True)
class Kill:
    """``at``: seconds since 1970. ``led``: it was the sweeper's leader."""

    pid: int
    at: float
    how: How
    led: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """Of one turn whose running step was interrupted: seconds from the kill.

    ``claimed``: until ``turn.started`` was recorded under a later lease. ``begun``: until a step began elsewhere.
    ``progress``: until a step's result, or the turn's end, was recorded under a later lease.
    """

    turn: UUID
    claimed: float
    begun: float | None  # None: no step was left to do
    progress: float
    disturbed: bool  # who took it over was killed as well, before it got anywhere


@dataclass(frozen=True, slots=True)
class Harm:
    """What one kill did. ``interrupted``: steps; ``recoveries``: of their turns."""

    kill: Kill
    interrupted: int
    recoveries: Sequence[Recovery]

    @property
    def undisturbed(self) -> list[Recovery]:
        return [recovery for recovery in self.recoveries if not recovery.disturbed]


def harm(history: History, kills: Iterable[Kill]) -> list[Harm]:
    """By kill; one that interrupted nothing is in it too."""
    recorded = {(fact.turn, fact.step, fact.attempt) for fact in history.facts if fact.step is not None}
    running: dict[int, dict[Attempt, Effect]] = defaultdict(dict)  # by process: the step that each attempt died in
    next_begun: dict[UUID, list[Effect]] = defaultdict(list)
    for effect in history.effects:
        if effect.what == BEGUN:
            next_begun[effect.turn].append(effect)
            if (effect.turn, effect.step_name, effect.attempt) not in recorded:
                running[effect.pid][effect.turn, effect.attempt] = effect
    found = []
    for kill in kills:
        died = running[kill.pid]
        recoveries = [_recovery(kill, attempt, history.of_turn[attempt[0]], next_begun[attempt[0]]) for attempt in died]
        found.append(Harm(kill, len(died), [recovery for recovery in recoveries if recovery is not None]))
    return found


def _recovery(kill: Kill, attempt: Attempt, facts: Sequence[Fact], begun: Sequence[Effect]) -> Recovery | None:
    """None: it has not gone on (the history says so itself)."""
    turn, number = attempt
    later = [fact for fact in facts if fact.attempt > number]
    progress = next((fact for fact in later if fact.is_progress), None)
    if progress is None:
        return None
    elsewhere = next((effect.at - kill.at for effect in begun if effect.attempt > number), None)
    return Recovery(turn, later[0].at - kill.at, elsewhere, progress.at - kill.at, progress.attempt > number + 1)
