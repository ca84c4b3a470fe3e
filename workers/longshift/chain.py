"""What a retried turn takes over from the turns before it: the recorded work, not the failures that ended them.

This module is pure: no I/O, no clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from uuid import UUID

from longshift.events import Event, Kind
from longshift.model import TurnStatus

_FORK = re.compile(r"(\d+)\.\d+\Z")
_DROPPED = frozenset({Kind.STEP_RETRYING})


def carried(events: Sequence[Event], *, turn_id: UUID) -> list[Event]:
    """``events`` of a chain of turns, as the turn ``turn_id`` at its end replays them.

    Of earlier turns these are left out, so that they run again: failures that the agent did not get over (of steps, of waits
    for which nothing came in time or nothing that could be read, of children), waits that had not ended, and tries that
    were counted.
    """
    by_turn: dict[UUID | None, list[Event]] = {}
    for event in events:
        by_turn.setdefault(event.turn_id, []).append(event)
    out = {id(each) for turn, own in by_turn.items() if turn != turn_id for each in _left_out(own)}
    return [event for event in events if id(event) not in out]


def _left_out(events: Sequence[Event]) -> list[Event]:
    ended = {event.key for event in events if event.kind == Kind.WAIT_ENDED}
    vain: set[str] = set()  # waits that are to begin anew
    later: list[tuple[str, ...]] = []  # branches of what was recorded after, the newest first
    out = []
    for event in reversed(events):
        if event.key is None:
            continue
        path = _path(event.key)
        failed = _failed(event) and not any(_goes_on(path, after) for after in later)
        if event.kind == Kind.WAIT_ENDED and failed:
            vain.add(event.key)
        if event.kind == Kind.WAIT_BEGUN:
            failed = event.key in vain or (event.key not in ended and _for_others(event))
        if failed or event.kind in _DROPPED:
            out.append(event)
        later.append(path)
    return out


def _failed(event: Event) -> bool:
    match event.kind:
        case Kind.STEP_FAILED:
            return True
        case Kind.WAIT_ENDED:
            reason = event.payload.get("reason")
            failed = reason == "child" and event.payload.get("status") != TurnStatus.SUCCEEDED
            return failed or reason == "timeout" or "misfit" in event.payload
    return False


def _for_others(event: Event) -> bool:
    """Not a timer, whose time passes also without its turn."""
    return any(cause in event.payload for cause in ("signal", "approval", "child", "call"))


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
