"""What a fleet is asked to do, as a list of segments: recorded in rehearsals, or made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

DATA = Path(__file__).parent / "data"
MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of work that wants a slot: a turn, or what it does between two waits. Seconds since the beginning."""

    due: float  # accepted; or the turn before it, or the wait, is over
    busy: float  # for so long it holds a slot


@dataclass(frozen=True, slots=True)
class Demand:
    name: str
    about: str
    segments: tuple[Segment, ...]  # by ``due``
    seconds: float  # until the end of the watch

    @property
    def slot_seconds(self) -> float:
        return sum(segment.busy for segment in self.segments)


def recorded(name: str) -> tuple[Demand, Mapping[str, Any]]:
    """What a rehearsal wrote with ``--record``: its demand, and all of the file."""
    found: Mapping[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    segments = tuple(Segment(due, busy) for due, busy in found["segments"])
    return Demand(name, found["about"], segments, found["series"][-1][0]), found


def _busy_slots(name: str, about: str, minutes: float, busy: Callable[[float], float], *, each: float = 30.0) -> Demand:
    """Turns of ``each`` seconds on average, that come so that an endless fleet would have ``busy(minute)`` slots in use."""
    random, at, segments = Random(name), 0.0, []
    highest = max(busy(second / MINUTE) for second in range(int(minutes * MINUTE)))
    while at < minutes * MINUTE:
        at += random.expovariate(highest / each)
        if random.random() < busy(at / MINUTE) / highest:
            segments.append(Segment(at, random.expovariate(1 / each)))
    return Demand(name, about, tuple(segments), minutes * MINUTE)


def step() -> Demand:
    return _busy_slots(
        "step", "40 busy slots, 500 from minute 10 to 40", 60, lambda minute: 500 if 10 <= minute < 40 else 40
    )


def ramp() -> Demand:
    def busy(minute: float) -> float:
        return 40 + 560 * max(0.0, 1 - abs(minute - 35) / 25)

    return _busy_slots("ramp", "40 busy slots, rising to 600 in 25 minutes, and back", 70, busy)


def spikes() -> Demand:
    return _busy_slots(
        "spikes", "60 busy slots, 400 for a minute in every ten", 60, lambda minute: 400 if minute % 10 < 1 else 60
    )


def sawtooth() -> Demand:
    return _busy_slots(
        "sawtooth", "from 50 busy slots to 500 within 8 minutes, again and again", 60, lambda m: 50 + 450 * (m % 8) / 8
    )


def calm() -> Demand:
    return _busy_slots("calm", "300 busy slots all the time", 60, lambda _: 300)


def day() -> Demand:
    return _busy_slots(
        "day", "a working day in three hours: 30 to 500 and back", 180, lambda m: 265 - 235 * math.cos(m / 90 * math.pi)
    )


def burst() -> Demand:
    random = Random("burst")
    turns = tuple(Segment(5 * MINUTE, random.expovariate(1 / 30)) for _ in range(10_000))
    return Demand("burst", "a batch of 10,000 turns of 30 s on an idle fleet", turns, 40 * MINUTE)


def tide() -> Demand:
    """Turns that are long, as those of agents that think: an interrupted one costs more."""
    return _busy_slots(
        "tide",
        "turns of 5 minutes: 50 busy slots, 400 from minute 10 to 40",
        75,
        lambda minute: 400 if 10 <= minute < 40 else 50,
        each=300,
    )


SYNTHETIC: tuple[Callable[[], Demand], ...] = (calm, step, ramp, spikes, sawtooth, burst, tide, day)
