"""What must be true of a fleet that only drains: more than after a crash."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.chaos.checker import Checked
from tests.chaos.evidence import Evidence


def steps_begin_once(found: Evidence) -> Iterator[str]:
    """P8: a drain lets running steps end, so that none begins in two attempts, finished or not."""
    attempts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for effect in found.effects:
        if effect.what == "begun":
            attempts[effect.turn, effect.step].add(effect.attempt)
    for (turn, step), numbers in attempts.items():
        if len(numbers) > 1:
            yield f"{turn}: {step} began in the attempts {sorted(numbers)}"


def attempts_end_in_order(found: Evidence) -> Iterator[str]:
    """No attempt is taken from a worker that is gone: each one before the last waited, or was given back by a drain."""
    for session, events in found.events.items():
        last: dict[str, str] = {}
        for event in events:
            left = last.get(event["turn_id"]) in ("turn.waiting", "turn.rescheduled")
            if event["kind"] == "turn.started" and event["payload"]["attempt"] > 1 and not left:
                yield f"{session}: attempt {event['payload']['attempt']} at {event['turn_id']} was a rescue"
            last[event["turn_id"]] = event["kind"]


CHECKS: Mapping[Callable[[Evidence], Iterator[str]], Callable[[Evidence], int]] = {
    steps_begin_once: lambda e: sum(effect.what == "begun" for effect in e.effects),
    attempts_end_in_order: lambda e: sum(event["kind"] == "turn.started" for log in e.events.values() for event in log),
}


def check_drains(found: Evidence) -> list[Checked]:
    return [
        Checked(function.__name__.replace("_", " "), function.__doc__ or "", looked_at(found), tuple(function(found)))
        for function, looked_at in CHECKS.items()
    ]


def check_moves(interrupted: Sequence[int]) -> Checked:
    """``interrupted``: turns that each drain gave to other workers. A rehearsal in which nothing moved says nothing."""
    nothing = () if any(interrupted) else ("no drain met a turn that had to move: nothing was rehearsed",)
    return Checked("drains moved turns", "A scale-down under load moves turns.", sum(interrupted), nothing)
