"""What must be true of every turn, whatever happened to its workers: said of events (HTTP) and effects (the file)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

from longshift.model import Json
from tests.support.fleet import Effect

RECORDED = {
    "step.completed",
    "step.failed",
    "value.recorded",
    "wait.begun",
    "wait.ended",
    "state.changed",
    "message.said",
}


def assert_gap_free(events: Sequence[Json]) -> None:
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


def assert_recorded_once(events: Sequence[Json]) -> None:
    """No key was recorded twice in a turn, and no turn ended twice."""
    recorded = [event for event in events if event["kind"] in RECORDED]
    keys = Counter((event["turn_id"], event["key"], event["kind"] == "wait.ended") for event in recorded)
    assert [key for key, count in keys.items() if count > 1] == []
    ends = Counter(event["turn_id"] for event in events if event["kind"] in ENDS)
    assert all(count == 1 for count in ends.values())


ENDS = {"turn.succeeded", "turn.failed", "turn.cancelled", "turn.expired"}


def completed_in(events: Iterable[Json]) -> dict[tuple[str, str], int]:
    """For each (turn, step name) the attempt whose lease recorded its result."""
    attempts: dict[int, int] = {}
    found: dict[tuple[str, str], int] = {}
    for event in events:
        if event["kind"] == "turn.started":
            attempts[event["epoch"]] = event["payload"]["attempt"]
        elif event["kind"] == "step.completed":
            found[event["turn_id"], event["payload"]["name"]] = attempts[event["epoch"]]
    return found


def assert_no_finished_step_ran_again(events: Sequence[Json], effects: Iterable[Effect]) -> None:
    """No attempt after the one that recorded a step's result has begun the step once more."""
    completed = completed_in(events)
    again = [
        (e.turn, e.step, e.attempt)
        for e in effects
        if e.what == "begun" and e.attempt > completed.get((e.turn, e.step), 1_000_000)
    ]
    assert again == []


def runs_of(effects: Iterable[Effect]) -> Counter[tuple[str, str]]:
    """How often each (turn, step name) began."""
    return Counter((e.turn, e.step) for e in effects if e.what == "begun")


def digest(value: Json) -> str:
    """The same for the same JSON, here and in the process of an agent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
