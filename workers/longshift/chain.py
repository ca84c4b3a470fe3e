"""What a retried turn takes over from the turns before it: the recorded work, not the failures that ended them.

This module is pure: no I/O, no clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from uuid import UUID

from longshift.events import Event, Kind

_FORK = re.compile(r"(\d+)\.\d+\Z")
_DROPPED = frozenset({Kind.STEP_RETRYING})


def carried(events: Sequence[Event], *, turn_id: UUID) -> list[Event]:
    """``events`` of a chain of turns, as the turn ``turn_id`` at its end replays them.

    Of earlier turns these are left out, so that they run again: steps whose failure the agent did not get over, waits that
    ended because nothing came in time, and tries that were counted.
    """
    by_turn: dict[UUID | None, list[Event]] = {}
    for event in events:
        by_turn.setdefault(event.turn_id, []).append(event)
    out = {id(each) for turn, own in by_turn.items() if turn != turn_id for each in _left_out(own)}
    return [event for event in events if id(event) not in out]


def _left_out(events: Sequence[Event]) -> list[Event]:
    timed_out = {
        event.key for event in events if event.kind == Kind.WAIT_ENDED and event.payload.get("reason") == "timeout"
    }
    later: list[tuple[str, ...]] = []  # branches of what was recorded after, the newest first
    out = []
    for event in reversed(events):
        if event.key is None:
            continue
        path = _path(event.key)
        failed = event.kind == Kind.STEP_FAILED and not any(_goes_on(path, after) for after in later)
        waited = event.kind in (Kind.WAIT_BEGUN, Kind.WAIT_ENDED) and event.key in timed_out
        if failed or waited or event.kind in _DROPPED:
            out.append(event)
        if not waited:
            later.append(path)
    return out


def _path(key: str) -> tuple[str, ...]:
    """The branches that a call stands in, from the outermost: ``0.1/~0/read#2`` is in ``("0.1", "~0")``."""
    return tuple(key.split("/")[:-1])


def _goes_on(failed: tuple[str, ...], after: tuple[str, ...]) -> bool:
    """Whether something recorded later in branch ``after`` shows that the agent got over a failure in ``failed``.

    It does in the same branch and in one around it, and in a later ``turn.gather`` of one around it; not in a branch that
    only runs beside it.
    """
    common = 0
    while common < min(len(failed), len(after)) and failed[common] == after[common]:
        common += 1
    if common == len(after):
        return True
    if common == len(failed):  # a branch inside the one that failed: begun later
        return True
    one, other = _FORK.match(failed[common]), _FORK.match(after[common])
    return one is not None and other is not None and int(one[1]) < int(other[1])
