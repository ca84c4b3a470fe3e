"""Counts of what went on in a run, from the evidence alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from tests.chaos.evidence import Evidence, end_of


def numbers_of(found: Evidence) -> dict[str, Any]:
    """By name, in the order of the report."""
    events = [event for log in found.events.values() for event in log]
    kinds = Counter(event["kind"] for event in events)
    begun: dict[tuple[str, str], list[int]] = defaultdict(list)
    for effect in found.effects:
        if effect.what == "begun":
            begun[effect.turn, effect.step].append(effect.attempt)
    return {
        "sessions": len(found.events),
        "turns by their end": dict(sorted(Counter(end_of(turn) for turn in found.turns.values()).items())),
        "events": len(events),
        "steps recorded": kinds["step.completed"] + kinds["step.failed"],
        "runs of steps": sum(map(len, begun.values())),
        "steps that more than one attempt ran": sum(len(set(attempts)) > 1 for attempts in begun.values()),
        "values in the cold tier": sum("artifact" in event["payload"] for event in events),
        "sessions whose log is archived": found.archived,
        "attempts": kinds["turn.started"],
        "waits that left the worker": kinds["turn.waiting"],
        "attempts interrupted by a drain": kinds["turn.rescheduled"],
        "attempts rescued from a worker that was gone": _rescues(found),
        "submissions answered more than once": sum(len(ids) > 1 for ids in found.by_key.values()),
        "events seen by followers": sum(len(stream.seqs) for stream in found.streams),
        "times that followers resumed": sum(stream.resumed for stream in found.streams),
    }


def _rescues(found: Evidence) -> int:
    """Starts of turns whose attempt before had neither waited nor been interrupted in good order."""
    count = 0
    for log in found.events.values():
        last: dict[str, str] = {}
        for event in log:
            left = last.get(event["turn_id"]) in ("turn.waiting", "turn.rescheduled")
            count += event["kind"] == "turn.started" and event["payload"]["attempt"] > 1 and not left
            last[event["turn_id"]] = event["kind"]
    return count
