"""What must be true of the logs of sessions, and of what agents did to the world: said of events and effects."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from uuid import UUID

from longshift.events import Context, Event, apply
from longshift.model import Json, Prefix, parse_id
from tests.chaos.evidence import TERMINAL, Evidence
from tests.chaos.plans import context_of
from tests.support.fleet import Effect

ONCE = {"step.completed", "step.failed", "value.recorded", "wait.begun", "wait.ended", "state.changed", "message.said"}
"""Kinds of which a turn has at most one under each key."""
STEPS = {"step.completed", "step.failed"}


def seq_is_gap_free(found: Evidence) -> Iterator[str]:
    """P7: 1, 2, 3 ... in each session."""
    for session, events in found.events.items():
        seqs = [event["seq"] for event in events]
        if seqs != list(range(1, len(seqs) + 1)):
            wrong = next(place for place, seq in enumerate([*seqs, None], 1) if seq != place)
            yield f"{session}: the log has {len(seqs)} events, and not seq {wrong} where it belongs"
        ids = Counter(event["id"] for event in events)
        yield from (f"{session}: event {id_} stands there {n} times" for id_, n in ids.items() if n > 1)


def streams_miss_nothing(found: Evidence) -> Iterator[str]:
    """P7: who follows a session, and resumes where it was cut off, sees each event once, in order."""
    for stream in found.streams:
        log = [event["seq"] for event in found.events.get(stream.session, [])]
        if stream.seqs != log[: len(stream.seqs)]:
            yield f"{stream.session}: a follower saw {_short(stream.seqs)}, the log is 1 to {len(log)}"
        if stream.resets:
            yield f"{stream.session}: a follower was told {stream.resets} times that history was rewritten"


def results_are_recorded_once(found: Evidence) -> Iterator[str]:
    """P4: no result, value or message of a turn stands in the log twice."""
    for session, events in found.events.items():
        keys = Counter((event["turn_id"], event["key"]) for event in events if event["kind"] in ONCE)
        yield from (f"{session}: {turn} recorded {key} {n} times" for (turn, key), n in keys.items() if n > 1)


def turns_run_one_at_a_time(found: Evidence) -> Iterator[str]:
    """P3: in the log of a session no turn's events stand between those of another."""
    for session, events in found.events.items():
        running: str | None = None
        for event in events:
            if running is not None and event["turn_id"] != running:
                yield f"{session}: {event['turn_id']} wrote {event['kind']} (seq {event['seq']}) while {running} was open"
            ended = event["kind"].removeprefix("turn.") in TERMINAL
            running = None if ended else event["turn_id"]


def epochs_grow(found: Evidence) -> Iterator[str]:
    """P2: once a later holder has written, no earlier one does; each attempt is one holder's, counted up."""
    for session, events in found.events.items():
        for before, after in itertools.pairwise(events):
            if after["epoch"] < before["epoch"]:
                yield f"{session}: seq {after['seq']} was written under epoch {after['epoch']}, after {before['epoch']}"
        attempts: dict[str, list[int]] = defaultdict(list)
        for event in events:
            if event["kind"] == "turn.started":
                attempts[event["turn_id"]].append(event["payload"]["attempt"])
        for turn, numbers in attempts.items():
            if numbers != list(range(1, len(numbers) + 1)):
                yield f"{session}: the attempts at {turn} are {numbers}"


def attempts_do_not_overlap(found: Evidence) -> Iterator[str]:
    """P3: runs of steps whose results were recorded by different attempts of a session never overlap."""
    recorded, runs = _recorded(found), _runs(found)
    for session, turns in _sessions(found).items():
        spans = sorted(
            (begun, done, turn, name, attempt)
            for turn in turns
            for (name, attempt), (begun, done) in runs.get(turn, {}).items()
            if recorded.get((turn, name)) == attempt
        )
        reach: dict[tuple[str, int], tuple[float, str]] = {}
        for begun, done, turn, name, attempt in spans:
            for (other, number), (until, step) in reach.items():
                if (other, number) != (turn, attempt) and until > begun:
                    yield f"{session}: {turn}/{name} (attempt {attempt}) ran while {other}/{step} (attempt {number}) did"
            latest = reach.get((turn, attempt), (0.0, ""))
            reach[turn, attempt] = max(latest, (done, name))


def finished_steps_do_not_run_again(found: Evidence) -> Iterator[str]:
    """P4, P8: no attempt after the one that recorded a step's result begins the step once more."""
    recorded = _recorded(found)
    begun = Counter((e.turn, e.step, e.attempt) for e in found.effects if e.what == "begun")
    tries = {(e.turn, e.step): int(e.more.get("tries", 1)) for e in found.effects if e.what == "begun"}
    for (turn, name, attempt), count in begun.items():
        by = recorded.get((turn, name))
        if by is not None and attempt > by:
            yield f"{turn}: attempt {attempt} ran {name} again, which attempt {by} had recorded"
        if count > tries[turn, name]:
            yield f"{turn}: attempt {attempt} ran {name} {count} times"


def recorded_steps_have_run(found: Evidence) -> Iterator[str]:
    """The attempt that recorded the result of a step has run it to its end."""
    runs = _runs(found)
    noting = {(turn, name) for turn, steps in runs.items() for name, _ in steps}
    for (turn, name), attempt in _recorded(found, kinds={"step.completed"}).items():
        if (turn, name) in noting and (name, attempt) not in runs[turn]:
            yield f"{turn}: attempt {attempt} recorded {name} and never ran it"


def effects_keep_their_key(found: Evidence) -> Iterator[str]:
    """A service that does nothing twice for the same key is called with one key for each effect."""
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    for effect in found.effects:
        if effect.what == "effect":
            keys[effect.turn, effect.step].add(effect.more["key"])
    for (turn, name), found_keys in keys.items():
        if len(found_keys) > 1:
            yield f"{turn}: the effect {name!r} happened {len(found_keys)} times, under different keys"
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for place, several in keys.items():
        for key in several:
            owners[key].add(place)
    yield from (f"the key {key} was used for {sorted(who)}" for key, who in owners.items() if len(who) > 1)


def irreversible_effects_happen_once(found: Evidence) -> Iterator[str]:
    """An irreversible tool is never called twice, and has been called if its turn succeeded."""
    sent = Counter((effect.turn, effect.step) for effect in found.effects if effect.what == "sent")
    yield from (f"{turn}: {name} was sent {n} times" for (turn, name), n in sent.items() if n > 1)
    by_turn = Counter(turn for turn, _ in sent)
    for turn in found.turns.values():
        parts = turn["input"].get("parts", ()) if isinstance(turn["input"], dict) else ()
        if turn["status"] == "succeeded" and by_turn[turn["id"]] != parts.count("send"):
            yield f"{turn['id']} succeeded, and sent {by_turn[turn['id']]} of {parts.count('send')}"


def values_stay(found: Evidence) -> Iterator[str]:
    """``turn.now()``, ``turn.uuid()`` and ``turn.random`` are the same in every attempt."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for effect in found.effects:
        if effect.what == "value":
            values[effect.turn, effect.step].add(repr(effect.more["value"]))
    for (turn, name), several in values.items():
        if len(several) > 1:
            yield f"{turn}: the values of {name} were {' and '.join(sorted(several))}"


def contexts_are_the_fold(found: Evidence) -> Iterator[str]:
    """P5: what an agent saw of its session when it began, and when it ended, is the fold of the log up to there."""
    seen: dict[tuple[str, str], list[Effect]] = defaultdict(list)
    for effect in found.effects:
        if effect.what in ("entered", "left"):
            seen[effect.turn, effect.what].append(effect)
    for events in found.events.values():
        context = Context()
        for event in events:
            turn = event["turn_id"]
            if event["kind"] == "turn.succeeded":
                yield from _unlike(context, seen.get((turn, "left"), []))
            if event["seq"] != context.seq + 1:
                break  # a gap is a violation of its own
            apply(context, _event(event))
            if event["kind"] == "turn.started" and event["payload"]["attempt"] == 1:
                yield from _unlike(context, seen.get((turn, "entered"), []))


def _unlike(context: Context, effects: Iterable[Effect]) -> Iterator[str]:
    expected = context_of(context.history, context.state)
    for effect in effects:
        if effect.more["context"] != expected:
            yield (
                f"{effect.turn}: attempt {effect.attempt} {effect.what} with another context than the fold of the log"
                f" up to seq {context.seq}"
            )


def _event(event: Json) -> Event:
    return Event(
        session_id=parse_id(Prefix.SESSION, event["session_id"]),
        seq=event["seq"],
        id=UUID(event["id"]),
        epoch=event["epoch"],
        turn_id=parse_id(Prefix.TURN, event["turn_id"]) if event["turn_id"] else None,
        kind=event["kind"],
        key=event["key"],
        payload=event["payload"],
        created_at=datetime.fromisoformat(event["created_at"]),
    )


def _recorded(found: Evidence, *, kinds: Iterable[str] = frozenset(STEPS)) -> dict[tuple[str, str], int]:
    """For each (turn, step) the attempt that first recorded its result."""
    result: dict[tuple[str, str], int] = {}
    for events in found.events.values():
        attempts: dict[str, int] = {}
        for event in events:
            if event["kind"] == "turn.started":
                attempts[event["turn_id"]] = event["payload"]["attempt"]
            elif event["kind"] in kinds:
                result.setdefault((event["turn_id"], event["payload"]["name"]), attempts.get(event["turn_id"], 0))
    return result


def _runs(found: Evidence) -> dict[str, dict[tuple[str, int], tuple[float, float]]]:
    """By turn: for each (step, attempt) that ran to its end, when its last try began and ended."""
    begun: dict[tuple[str, str, int], float] = {}
    runs: dict[str, dict[tuple[str, int], tuple[float, float]]] = defaultdict(dict)
    for effect in found.effects:
        place = (effect.turn, effect.step, effect.attempt)
        if effect.what == "begun":
            begun[place] = effect.at
        elif effect.what == "done" and place in begun:
            runs[effect.turn][effect.step, effect.attempt] = (begun[place], effect.at)
    return runs


def _sessions(found: Evidence) -> dict[str, set[str]]:
    sessions: dict[str, set[str]] = defaultdict(set)
    for turn in found.turns.values():
        sessions[turn["session_id"]].add(turn["id"])
    return sessions


def _short(seqs: list[int]) -> str:
    text = ", ".join(map(str, seqs))
    return text if len(text) < 100 else f"{text[:50]} ... {text[-40:]}"
