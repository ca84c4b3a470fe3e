"""What must be true of turns as their clients see them: accepted, ended once, as expected, in order."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime

from tests.chaos.evidence import TERMINAL, Asked, Evidence, end_of


def accepted_turns_end(found: Evidence) -> Iterator[str]:
    """P1: a turn answered with 202 exists and reaches a terminal state."""
    for asked in found.asked:
        turn = found.turns.get(asked.turn)
        if turn is None:
            yield f"{asked.turn} was accepted and is lost: the API does not know it"
        elif turn["status"] not in TERMINAL:
            yield f"{asked.turn} was accepted and never ended: it is {turn['status']}"
    yield from (f"never accepted: {request}" for request in found.unanswered)


def ends_are_final(found: Evidence) -> Iterator[str]:
    """An end, once answered, is the end, and so is its output."""
    ended: dict[str, tuple[str, object]] = {}
    finals = ((turn["id"], turn["status"], turn["output"]) for turn in found.turns.values())
    for turn, status, output in [*((s.turn, s.status, s.output) for s in found.seen), *finals]:
        before = ended.get(turn)
        if before is not None and before != (status, output):
            yield f"{turn} had ended as {before[0]} ({before[1]!r}) and was then {status} ({output!r})"
        if status in TERMINAL:
            ended.setdefault(turn, (status, output))


def ends_are_recorded_once(found: Evidence) -> Iterator[str]:
    """The log of a turn that started has one end, the last of its events; of one that never started it has nothing."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for events in found.events.values():
        for event in events:
            kinds[event["turn_id"]].append(event["kind"])
    for turn in found.turns.values():
        log = kinds.get(turn["id"], [])
        ends = [kind for kind in log if kind.removeprefix("turn.") in TERMINAL]
        if turn["status"] in TERMINAL and log and ends != [f"turn.{turn['status']}"]:
            yield f"{turn['id']} is {turn['status']}, its log has these ends: {ends or 'none'}"
        elif ends and log[-1] != ends[-1]:
            yield f"{turn['id']} goes on after its end: {log[-1]} comes after {ends[-1]}"
        elif turn["status"] == "succeeded" and not log:
            yield f"{turn['id']} succeeded without a log"


def same_key_same_answer(found: Evidence) -> Iterator[str]:
    """An idempotency key stands for one turn or batch, however often and wherever it was sent."""
    for key, ids in found.by_key.items():
        if len(set(ids)) > 1:
            yield f"the idempotency key {key} was answered with {sorted(set(ids))}"
    owners: dict[str, set[str]] = defaultdict(set)
    for key, ids in found.by_key.items():
        for id_ in ids:
            owners[id_].add(key)
    for id_, keys in owners.items():
        if len(keys) > 1:
            yield f"{id_} was the answer to different idempotency keys: {sorted(keys)}"


def nothing_was_made_up(found: Evidence) -> Iterator[str]:
    """Every turn that exists was asked for, once."""
    asked = Counter(each.turn for each in found.asked)
    yield from (f"{turn} exists and nobody was told of it" for turn in found.listed if turn not in asked)
    yield from (f"{turn} was the answer to {n} different requests" for turn, n in asked.items() if n > 1)
    yield from (f"{turn} is listed {n} times" for turn, n in Counter(found.listed).items() if n > 1)


def ends_are_as_asked(found: Evidence) -> Iterator[str]:
    """Who shall fail fails, who was told to end has ended, everybody else succeeds with the right answer."""
    for asked, turn in _ended(found, poison=False):
        end = end_of(turn)
        if end not in asked.expected:
            yield f"{asked.turn} ({turn['agent']}) ended as {end}, not {' or '.join(asked.expected)}: {turn['error']}"
        elif end == "succeeded" and asked.output is not None and turn["output"] != asked.output:
            yield f"{asked.turn} ({turn['agent']}) returned {turn['output']!r} instead of {asked.output!r}"


def poison_fails_alone(found: Evidence) -> Iterator[str]:
    """A turn that ends its process fails as ``crash_loop``, and nobody else does."""
    for asked, turn in _ended(found, poison=True):
        if end_of(turn) not in asked.expected:
            yield f"{asked.turn} ({turn['input']!r}) ended as {end_of(turn)}, not {' or '.join(asked.expected)}"
    for asked, turn in _ended(found, poison=False):
        if end_of(turn) == "failed:crash_loop":
            yield f"{asked.turn} is innocent and failed as crash_loop"


def turns_start_in_order(found: Evidence) -> Iterator[str]:
    """P3: positions follow the order of acceptance, and turns start in the order of their positions."""
    for asked in found.asked:
        turn, before = found.turns.get(asked.turn), found.turns.get(asked.after or "")
        if not turn or not before or None in (turn["position"], before["position"]):
            continue  # scheduled, and cancelled before it had a place
        if turn["position"] <= before["position"]:
            yield f"{turn['id']} was sent after {before['id']} had been accepted, and stands before it"
    for session, events in found.events.items():
        starts: dict[str, None] = {e["turn_id"]: None for e in events if e["kind"] == "turn.started"}
        known = [found.turns[turn] for turn in starts if turn in found.turns]
        for earlier, later in itertools.pairwise(known):
            if (earlier["position"] or 0) >= (later["position"] or 0):
                yield f"{session}: {later['id']} started after {earlier['id']} and stands before it"


def due_times_are_kept(found: Evidence) -> Iterator[str]:
    """Nothing runs before its ``run_after``."""
    for turn in found.turns.values():
        due, started = turn["run_after"], turn["started_at"]
        if due and started and datetime.fromisoformat(started) < datetime.fromisoformat(due):
            yield f"{turn['id']} started at {started}, not before {turn['run_after']} was asked for"


def _ended(found: Evidence, *, poison: bool) -> Iterator[tuple[Asked, dict[str, object]]]:
    for asked in found.asked:
        turn = found.turns.get(asked.turn)
        if turn is not None and asked.poison is poison and turn["status"] in TERMINAL:
            yield asked, turn
