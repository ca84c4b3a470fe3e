"""What a run under a fault did that an undisturbed run does not do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from longshift.errors import OutcomeUnknown
from longshift.events import Event, Kind
from longshift.model import Effect, Json
from longshift.testing.bench import Result
from longshift.testing.points import names_of
from longshift.testing.world import Fault

REPEATED = (Kind.TURN_DIVERGED, Kind.TOOL_STARTED, Kind.STEP_RETRYING)
"""Kinds of events of which one step may have several."""


class Breach(StrEnum):
    """A way to break a promise."""

    DOUBLE = "double"  # an effect happened more often than in the undisturbed run
    LOST = "lost"  # or less often
    ONCE = "repeated"  # the function of a step that may run only once, or of an irreversible tool, ran more often
    OUTPUT = "output"  # the turn ended in another way, or with another output
    TWICE = "recorded twice"  # one step, two results in the log
    UNUSED = "unused"  # a recorded step was not asked for on the replay: code between steps went another way
    DIVERGED = "diverged"  # a recorded step was called with other arguments on the replay
    LATE = "late"  # a stale writer went on although it had been refused
    ENDLESS = "endless"  # the turn did not end


@dataclass(frozen=True, slots=True)
class Violation:
    """One promise, broken in one run; ``subject`` is the effect or step that it is about."""

    breach: Breach
    subject: str

    def __str__(self) -> str:
        match self.breach:
            case Breach.DOUBLE | Breach.LOST | Breach.ONCE:
                return f"{self.breach} {self.subject}"
            case Breach.OUTPUT:
                return "other output" if not self.subject else f"other ending ({self.subject})"
            case Breach.TWICE:
                return f"{self.subject} recorded twice"
            case Breach.UNUSED:
                return f"{self.subject} not asked for again"
            case Breach.DIVERGED:
                return f"other arguments for {self.subject}"
            case Breach.LATE:
                return f"{self.subject} after the refusal"
            case Breach.ENDLESS:
                return "no end"


@dataclass(frozen=True, slots=True)
class Ran:
    """One finished run: what is compared."""

    result: Result[Any]
    effects: Mapping[str, int]

    @property
    def ending(self) -> Event:
        return self.result.events[-1]

    @property
    def output(self) -> tuple[str, Json]:
        return self.ending.kind, self.ending.payload


@dataclass(frozen=True, slots=True)
class Row:
    """One run under a fault.

    Attributes:
        point: where it happened; for doubled wake-ups, empty.
        happened: in words.
        violations: what it broke.
        repeated: how often the function of each step ran *more* than undisturbed. That is allowed: a step's effect and
            its record are two things, and what lies between them is repeated.
        refused: what the fence refused.
    """

    fault: Fault
    point: str
    happened: str
    violations: tuple[Violation, ...]
    repeated: Mapping[str, int]
    refused: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        match self.fault:
            case Fault.CRASH:
                return repr(self.point)
            case Fault.PAUSE:
                return f"{self.point!r} (pause)"
            case Fault.DOUBLE:
                return str(self.fault)


def judge(fault: Fault, point: str, ran: Ran, undisturbed: Ran, *, once: Sequence[str]) -> Row:
    """Compare one run with the undisturbed one.

    What is left in doubt is told to the agent, and what it makes of that is its own affair: then it may end otherwise, and
    less may happen, but nothing twice.
    """
    repeated = dict(ran.result.calls - undisturbed.result.calls)
    doubts = sorted(_in_doubt(ran.result) - _in_doubt(undisturbed.result))
    lasting = [name for name in _irreversible(ran.result) if not doubts]
    effects, ending = _effects(ran, undisturbed), _ending(ran, undisturbed)
    if doubts:
        effects, ending = [each for each in effects if each.breach is not Breach.LOST], []
    return Row(
        fault=fault,
        point=point,
        happened="; ".join([_told(fault, ran.result), *(f"{name} in doubt" for name in doubts)]),
        violations=(
            *effects,
            *(Violation(Breach.ONCE, name) for name in dict.fromkeys([*once, *lasting]) if name in repeated),
            *ending,
            *_records(ran.result),
            *(Violation(Breach.LATE, what) for what in dict.fromkeys(ran.result.late)),
        ),
        repeated=repeated,
        refused=ran.result.refused,
    )


def _in_doubt(result: Result[Any]) -> set[str]:
    """The steps of which the agent was told that nobody knows their outcome."""
    failed = [event.payload for event in result.events if event.kind == Kind.STEP_FAILED]
    return {payload["name"] for payload in failed if payload["error"].get("code") == OutcomeUnknown.code}


def _irreversible(result: Result[Any]) -> list[str]:
    """The steps that called irreversible tools."""
    places = [call.place for call in result.tool_calls if call.effect is Effect.IRREVERSIBLE]
    return [place.rpartition("#")[0].rpartition("/")[2] for place in places]


def _told(fault: Fault, result: Result[Any]) -> str:
    match fault:
        case Fault.CRASH:
            return "died, another worker went on"
        case Fault.PAUSE:
            return f"refused: {', '.join(result.refused)}" if result.refused else "nothing was left to write"
        case Fault.DOUBLE:
            return f"{len(result.refused)} refused"


def _effects(ran: Ran, undisturbed: Ran) -> list[Violation]:
    found = []
    for name in sorted({*ran.effects, *undisturbed.effects}):
        here, there = ran.effects.get(name, 0), undisturbed.effects.get(name, 0)
        if here != there:
            found.append(Violation(Breach.DOUBLE if here > there else Breach.LOST, name))
    return found


def _ending(ran: Ran, undisturbed: Ran) -> list[Violation]:
    if ran.output == undisturbed.output:
        return []
    message = str((ran.result.error or {}).get("message", ""))
    return [Violation(Breach.OUTPUT, message)]


def _records(result: Result[Any]) -> list[Violation]:
    diverged = {event.key for event in result.events if event.kind == Kind.TURN_DIVERGED}
    names = Counter(
        name
        for event, name in zip(result.events, names_of(result.events), strict=True)
        if event.key is not None and event.kind not in REPEATED
    )
    return [
        *(Violation(Breach.TWICE, name) for name, count in names.items() if count > 1),
        *(Violation(Breach.UNUSED, _call(key)) for key in result.unused),
        *(Violation(Breach.DIVERGED, _call(key)) for key in sorted(filter(None, diverged))),
    ]


def _call(key: str) -> str:
    """A replay key as points have it."""
    base, _, number = key.rpartition("#")
    return base if number == "0" else f"{base}#{int(number) + 1}"
