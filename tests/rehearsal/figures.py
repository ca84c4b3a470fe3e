"""What a rehearsal measured, from the evidence and from what the kubelet saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.chaos.evidence import Evidence
from tests.rehearsal.demand import Segment
from tests.rehearsal.kubelet import Pod, pod_of


@dataclass(frozen=True, slots=True)
class Figures:
    """Samples in seconds, unless said otherwise."""

    turns: int
    pods: int
    drains: int
    killed: int
    """Pods that needed SIGKILL."""
    crashed: int
    first_turn: list[float]
    """From the change of the replica count to the first turn on each new worker."""
    ready: list[float]
    """From the start of a process to its being ready."""
    drained: list[float]
    """From SIGTERM to the end of the process."""
    interrupted: list[int]
    """Turns that each drain gave to other workers."""
    paused: list[float]
    """How long each of those stood still: from ``turn.rescheduled`` to ``turn.started``."""
    waited: list[float]
    """From the acceptance of a turn that stands first in its session to its start."""
    segments: list[Segment]
    """The demand, for the simulation."""

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "segments"}


def figures_of(found: Evidence, pods: Sequence[Pod], *, changes: Sequence[tuple[float, int]], begun: float) -> Figures:
    """``begun``: ``time.monotonic()`` at the beginning of the load, to which ``changes`` are relative."""
    drained = [pod for pod in pods if pod.told is not None and pod.ended is not None]
    paused = list(_pauses(found))
    ran = {(effect.turn, effect.attempt): effect.pid for effect in found.effects}
    owner = pod_of(pods)
    given: Counter[str] = Counter()
    for turn, attempt, _ in paused:
        pod = owner.get(ran.get((turn, attempt), -1))
        given[pod.name if pod is not None else "?"] += 1
    return Figures(
        turns=len(found.turns),
        pods=len(pods),
        drains=len(drained),
        killed=sum(pod.killed for pod in pods),
        crashed=sum(len(pod.crashes) for pod in pods),
        first_turn=list(_first_turns(found, pods, [begun + at for at, _ in changes])),
        ready=[round(pod.ready - pod.started, 3) for pod in pods if pod.ready is not None],
        drained=[round(pod.ended - pod.told, 3) for pod in drained if pod.told is not None and pod.ended is not None],
        interrupted=[given[pod.name] for pod in drained],
        paused=[seconds for _, _, seconds in paused],
        waited=list(_waits(found)),
        segments=sorted(_segments(found), key=lambda segment: segment.due),
    )


def _first_turns(found: Evidence, pods: Sequence[Pod], changes: Sequence[float]) -> Iterator[float]:
    """Of workers that a change of the count has started."""
    owner, seen = pod_of(pods), set[str]()
    for effect in found.effects:
        pod = owner.get(effect.pid)
        if effect.what != "entered" or pod is None or pod.name in seen:
            continue
        seen.add(pod.name)
        before = [at for at in changes if at <= pod.created]
        if before:
            yield round(effect.at - before[-1], 3)


def _pauses(found: Evidence) -> Iterator[tuple[str, int, float]]:
    """(turn, the attempt that a drain interrupted, seconds until the next one)."""
    for events in found.events.values():
        attempts: dict[str, int] = {}
        left: dict[str, datetime] = {}
        for event in events:
            turn, at = event["turn_id"], datetime.fromisoformat(event["created_at"])
            if event["kind"] == "turn.rescheduled":
                left[turn] = at
            elif event["kind"] == "turn.started":
                if turn in left:
                    yield turn, attempts[turn], (at - left.pop(turn)).total_seconds()
                attempts[turn] = event["payload"]["attempt"]


def _waits(found: Evidence) -> Iterator[float]:
    for turn in found.turns.values():
        if turn["position"] == 1 and turn["started_at"]:
            yield _between(turn["created_at"], turn["started_at"])


def _segments(found: Evidence) -> Iterator[Segment]:
    """What the fleet was asked to do, without what it made of it: a turn that was interrupted is one piece."""
    zero = min(datetime.fromisoformat(turn["created_at"]) for turn in found.turns.values()) if found.turns else None
    if zero is None:
        return
    for events in found.events.values():
        free = zero
        for turn, log in _by_turn(events).items():
            due = max(free, datetime.fromisoformat(found.turns[turn]["created_at"]))
            busy, held = 0.0, due
            for event in log:
                at = datetime.fromisoformat(event["created_at"])
                if event["kind"] == "turn.started":
                    held = at
                    continue
                if event["kind"] in ENDS_OF_HOLDING:
                    busy += (at - held).total_seconds()
                if event["kind"] == "turn.waiting":
                    yield Segment(round((due - zero).total_seconds(), 3), round(busy, 3))
                    busy, due = 0.0, _awaited(event, at)
            yield Segment(round((due - zero).total_seconds(), 3), round(busy, 3))
            free = datetime.fromisoformat(log[-1]["created_at"])


ENDS_OF_HOLDING = frozenset(
    {"turn.waiting", "turn.rescheduled", "turn.succeeded", "turn.failed", "turn.cancelled", "turn.expired"}
)


def _by_turn(events: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        found.setdefault(event["turn_id"], []).append(event)
    return found


def _awaited(event: Mapping[str, Any], at: datetime) -> datetime:
    """When the wait of a ``turn.waiting`` is over, as far as it knows."""
    until = event["payload"].get("until")
    return datetime.fromisoformat(until) if until else at


def _between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
