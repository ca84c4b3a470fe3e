"""The checks of the benchmarks find what they are there to find: each history here is sound but for one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from uuid import UUID

import pytest

from tests.benchmarks.checks import Ended, Fact, History
from tests.benchmarks.effects import BEGUN, DONE, Effect
from tests.benchmarks.kills import Kill, harm

SESSION = UUID(int=1)
FIRST, SECOND = UUID(int=11), UUID(int=12)
HERE, THERE = 100, 200
"""Pids."""


def effect(what: str, turn: UUID, step: int, *, attempt: int = 1, pid: int = HERE, at: float = 0.0) -> Effect:
    return Effect(what, turn, SESSION, 0 if turn == FIRST else 1, step, attempt, pid, at)


def ran(turn: UUID, step: int, *, attempt: int = 1, pid: int = HERE, at: float = 0.0) -> list[Effect]:
    return [effect(what, turn, step, attempt=attempt, pid=pid, at=at) for what in (BEGUN, DONE)]


def fact(kind: str, turn: UUID, *, step: int | None = None, attempt: int = 1, at: float = 0.0) -> Fact:
    return Fact(turn, attempt, attempt, kind, at, None if step is None else f"part-{step}")


def ended(turn: UUID, *, status: str = "succeeded") -> Ended:
    return Ended(turn, "work", status, 1, 2, 100.0, None, 0.0, 0.0, 1.0)


def sound() -> History:
    """Two turns of a session. The first one's second step was interrupted at 1.5 by the end of HERE, and ran again THERE."""
    effects = [
        *ran(FIRST, 0, at=1.0),
        effect(BEGUN, FIRST, 1, at=1.4),
        *ran(FIRST, 1, attempt=2, pid=THERE, at=4.0),
        *ran(SECOND, 0, pid=THERE, at=5.0),
        *ran(SECOND, 1, pid=THERE, at=6.0),
    ]
    facts = [
        fact("turn.started", FIRST),
        fact("step.completed", FIRST, step=0, at=1.1),
        fact("turn.started", FIRST, attempt=2, at=3.9),
        fact("step.completed", FIRST, step=1, attempt=2, at=4.2),
        fact("turn.succeeded", FIRST, attempt=2, at=4.3),
        fact("turn.started", SECOND, at=4.5),
        *(fact("step.completed", SECOND, step=step) for step in (0, 1)),
        fact("turn.succeeded", SECOND),
    ]
    return History(effects, facts, [ended(FIRST), ended(SECOND)])


def test_nothing_is_found_in_a_sound_history() -> None:
    assert sound().violations(turns=2) == []


def _lost(history: History) -> History:
    return replace(history, turns=[ended(FIRST), ended(SECOND, status="running")])


def _missing(history: History) -> History:
    return replace(history, turns=history.turns[:1])


def _finished_step_again(history: History) -> History:
    again = ran(FIRST, 0, attempt=2, pid=THERE)
    return replace(history, effects=[*history.effects[:3], *again, *history.effects[3:]])


def _overlap(history: History) -> History:
    late = effect(DONE, FIRST, 1)
    return replace(history, effects=[*history.effects[:4], late, *history.effects[4:]])


def _wrong_order(history: History) -> History:
    return replace(history, effects=[*history.effects[5:7], *history.effects[:5], *history.effects[7:]])


def _fork(history: History) -> History:
    forked = effect(BEGUN, SECOND, 1, pid=HERE)
    return replace(history, effects=[*history.effects, forked])


def _recorded_twice(history: History) -> History:
    return replace(history, facts=[*history.facts, fact("step.completed", SECOND, step=1)])


def _ended_twice(history: History) -> History:
    return replace(history, facts=[*history.facts, fact("turn.failed", SECOND)])


def _step_skipped(history: History) -> History:
    return replace(history, facts=[f for f in history.facts if (f.turn, f.step) != (SECOND, "part-1")])


def _never_ran(history: History) -> History:
    return replace(history, effects=[e for e in history.effects if (e.turn, e.step) != (SECOND, 1)])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_lost, "2 turns were to succeed"),
        (_missing, "2 turns were to succeed"),
        (_finished_step_again, "finished steps run again"),
        (_overlap, "after a later attempt had begun"),
        (_wrong_order, "after a later turn of its session had begun"),
        (_fork, "attempts by more than one process"),
        (_recorded_twice, "steps recorded twice"),
        (_ended_twice, "turns that ended twice"),
        (_step_skipped, "without all their steps"),
        (_never_ran, "steps recorded that never began"),
        (lambda history: replace(history, gaps=1), "gaps in their seq"),
        (lambda history: replace(history, late=1), "an older epoch"),
        (lambda history: replace(history, unsettled=1), "still held"),
    ],
)
def test_what_is_wrong_in_a_history_is_found_and_nothing_else(spoil: Callable[[History], History], said: str) -> None:
    found = spoil(sound()).violations(turns=2)

    assert len(found) == 1, found
    assert said in found[0]


def test_a_step_that_ran_again_and_was_recorded_again_is_found_as_both() -> None:
    history = _finished_step_again(sound())
    facts = [*history.facts[:3], fact("step.completed", FIRST, step=0, attempt=2), *history.facts[3:]]

    found = " ".join(replace(history, facts=facts).violations(turns=2))

    assert "finished steps run again" in found
    assert "steps recorded twice" in found


def test_a_kill_counts_the_steps_it_interrupted_and_the_seconds_until_their_turns_went_on() -> None:
    kills = [Kill(HERE, 1.5, "alone", led=False), Kill(THERE, 9.0, "group", led=True)]

    first, second = harm(sound(), kills)

    assert (first.interrupted, second.interrupted) == (1, 0)
    (recovery,) = first.recoveries
    assert [round(s, 3) for s in (recovery.claimed, recovery.begun or 0, recovery.progress)] == [2.4, 2.5, 2.7]
    assert not recovery.disturbed
