"""The points at which a worker can die or be stopped: before and after each record, by name.

    before step.completed charge      the step's function has returned, its result is not recorded
    after step.completed charge       the result is durable, the worker has not learned it yet
    after step.completed charge#2     of the second call of that name in its branch
    after step.completed 0.1/read     of the second branch of the first ``turn.gather``
    before turn.started               the session is claimed, nothing is recorded
    before turn.started#2             the same of the second attempt: after a crash, or a wait that left the worker
    after wait.begun $sleep           ``turn.sleep``; likewise ``state.changed $state``, ``message.said $say``,
                                      ``step.completed $artifact``

    after ledger.begin pay            a call of the tool ``pay`` stands in the ledger as started, its worker does not know
    after tool.started pay            the same for the log, of an irreversible tool: the call comes next
    before ledger.end pay             the call has been made, its outcome is not recorded
    after ledger.end pay              the outcome is recorded, the step's result (``step.completed pay``) is not

A name is the kind of the event and its replay key, whose ``#0`` is left out and whose ``#n`` counts from 1 here. Events
without a key are numbered in the order of their turn. So a name is the same in every run of the same agent and input.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from uuid import UUID

from longshift.errors import UsageError
from longshift.events import Event, Kind, NewEvent
from longshift.model import TERMINAL

SIDES = ("before", "after")
ENDS = frozenset(f"turn.{status}" for status in TERMINAL)
"""The kinds of terminal events."""


class Names:
    """Names the events of turns as they are written."""

    def __init__(self, written: Iterable[Event] = ()) -> None:
        self._keyless: Counter[tuple[UUID | None, str]] = Counter(
            (event.turn_id, event.kind) for event in written if event.key is None
        )

    def upcoming(self, event: NewEvent) -> str:
        """The name of an event that would be written now."""
        if event.kind == Kind.TURN_STARTED:  # says itself the how-manieth it is, also to a worker that saw no other
            return _name(event.kind, None, json.loads(event.payload)["attempt"])
        if event.kind in ENDS:  # a second one is refused
            return _name(event.kind, None, 1)
        return _name(event.kind, event.key, self._keyless[event.turn_id, event.kind] + 1)

    def written(self, event: NewEvent) -> None:
        """It has become durable."""
        if event.key is None:
            self._keyless[event.turn_id, event.kind] += 1


def call_name(what: str, place: str) -> str:
    """The name of a ``begin`` or an ``end`` in the ledger, of the call at ``place`` (its replay key)."""
    return _name(f"ledger.{what}", place, 0)


def names_of(events: Sequence[Event]) -> list[str]:
    """The name of each event of a turn."""
    counted: Counter[str] = Counter()
    names = []
    for event in events:
        counted[event.kind] += event.key is None
        names.append(_name(event.kind, event.key, counted[event.kind]))
    return names


def points_of(events: Sequence[Event]) -> list[str]:
    """Both sides of each event of a turn, in its order."""
    return [f"{side} {name}" for name in names_of(events) for side in SIDES]


def check_point(point: str) -> str:
    """``point`` if it has the form of one.

    Raises:
        UsageError: it has not.
    """
    side, _, name = point.partition(" ")
    if side not in SIDES or not name:
        raise UsageError(
            f"{point!r} is no crash point: write 'before' or 'after' and an event, as in 'before step.completed charge'"
        )
    return point


def _name(kind: str, key: str | None, ordinal: int) -> str:
    what = str(kind)
    if key is not None:
        base, _, number = key.rpartition("#")
        what, ordinal = f"{kind} {base}", int(number) + 1
    return what if ordinal == 1 else f"{what}#{ordinal}"
