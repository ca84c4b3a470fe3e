"""What a turn has produced so far, and what it waits for: read from its session's log. No statement here writes.

A retry goes on from what the turns before it recorded, so a turn is read together with those that it retries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database
from longshift.events import Event, Kind
from longshift.model import Json, Prefix, TurnRecord, parse_id, show_id

# of one root, at most one turn is open at a time: those that were accepted before this one are those that it goes on from
_CHAIN = """
WITH chain AS (
    SELECT t.id, t.first_seq FROM turns t WHERE t.id = :turn
    UNION ALL
    SELECT t.id, t.first_seq FROM turns t
     WHERE :turn <> :root AND t.session_id = :session AND t.root_turn_id = :root AND t.created_at < :created)"""
_FROM = "(SELECT coalesce(min(first_seq), 1) FROM chain)"  # nothing of the chain comes before

CHAIN = text(f"{_CHAIN} SELECT id, {_FROM} AS first_seq FROM chain")
# what is newest under a key counts, as for a replay; what an earlier turn would have tried again is begun anew
WAITS = text(f"""{_CHAIN},
newest AS (
    SELECT DISTINCT ON (e.key) e.key, e.seq, e.kind FROM events e
     WHERE e.session_id = :session AND e.seq >= {_FROM} AND e.turn_id IN (SELECT id FROM chain)
       AND (e.kind IN ('wait.begun', 'wait.ended', 'step.completed', 'step.failed')
         OR (e.kind = 'step.retrying' AND e.turn_id = :turn) OR (e.kind = 'value.recorded' AND e.key LIKE '%$race#%'))
     ORDER BY e.key, e.seq DESC)
SELECT n.key, n.seq, n.kind, e.payload, clock_timestamp() AS now
  FROM newest n JOIN events e ON e.session_id = :session AND e.seq = n.seq
 WHERE n.kind IN ('wait.begun', 'step.retrying', 'value.recorded') ORDER BY n.seq""")

WaitKind = Literal["timer", "signal", "approval", "child", "call", "retry"]
_BEGUN = (Kind.WAIT_BEGUN, Kind.STEP_RETRYING, Kind.VALUE_RECORDED)
_RACE = re.compile(r"(?P<scope>(?:.*/)?)\$race#\d+\Z", re.DOTALL)
_BRANCH = re.compile(r"(?<![^/])\d+\.\d+/")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One recorded step, as the log has it."""

    seq: int
    turn_id: UUID
    key: str
    name: str
    completed: bool  # else it failed for good
    result: Json
    artifact: Mapping[str, Json] | None  # where the result is, if it is large: {"id", "size", "sha256", "preview"}
    error: Mapping[str, Json] | None  # {"type", "message", ...}
    attempts: int | None  # None: not recorded
    ms: int | None  # how long it took, all tries together
    at: datetime  # when it ended
    call: str | None  # the tool call behind it, as ``call_<32 hex digits>``


@dataclass(frozen=True, slots=True)
class Wait:
    """One thing that a waiting turn waits for."""

    kind: WaitKind
    name: str | None  # of a signal or an approval, or of the step that is tried again
    id: str | None  # of an approval, a child turn, or a tool call that is in doubt
    until: datetime | None  # when it goes on without; None: with its deadline


@dataclass(frozen=True, slots=True)
class _Newest:
    """The newest event under its key."""

    seq: int
    kind: str
    key: str
    payload: Mapping[str, Json]


STEPS = (Kind.STEP_COMPLETED, Kind.STEP_FAILED)
"""What a turn has produced."""
WAITED = (Kind.WAIT_BEGUN, Kind.WAIT_ENDED, Kind.STEP_RETRYING, Kind.VALUE_RECORDED, *STEPS)
"""What says what a turn waits for."""


async def chain(db: Database, turn: TurnRecord) -> tuple[list[UUID], int]:
    """The turn and those that it retries, and the seq at which the first of them began."""
    rows = await db.fetch(CHAIN, _chain(turn))
    return [row.id for row in rows], rows[0].first_seq


async def waiting_for(db: Database, turn: TurnRecord) -> list[Wait]:
    """What a waiting turn waits for, in the order in which it began to."""
    rows = await db.fetch(WAITS, _chain(turn))
    found = [_Newest(row.seq, row.kind, row.key, row.payload) for row in rows]
    return _waits(found, now=rows[0].now) if rows else []


def waits_of(events: Iterable[Event], turn: TurnRecord, *, now: datetime) -> list[Wait]:
    """The same of events that have been read: of the chain, of the kinds ``WAITED``, in the order of the log."""
    newest: dict[str, _Newest] = {}
    for event in events:
        tried = event.kind == Kind.STEP_RETRYING and event.turn_id != turn.id
        value = event.kind == Kind.VALUE_RECORDED and "$race#" not in (event.key or "")
        if event.key is not None and not tried and not value:
            newest.pop(event.key, None)
            newest[event.key] = _Newest(event.seq, event.kind, event.key, event.payload)
    return _waits([found for found in newest.values() if found.kind in _BEGUN], now=now)


def _waits(rows: Sequence[_Newest], *, now: datetime) -> list[Wait]:
    races = {found["scope"]: row.seq for row in rows if (found := _RACE.match(row.key))}  # the newest of each scope
    return [wait for row in rows if not _lost(row, races) and (wait := _wait(row, now=now)) is not None]


def _chain(turn: TurnRecord) -> dict[str, Any]:
    return {
        "turn": turn.id,
        "root": turn.root_turn_id,
        "session": turn.session_id,
        "created": turn.created_at,
    }


def step_of(row: Event) -> StepRecord:
    """The step that an event of one of ``STEPS`` records."""
    assert row.turn_id is not None
    assert row.key is not None
    payload, error = row.payload, row.payload.get("error")
    completed = row.kind == Kind.STEP_COMPLETED
    call = payload.get("call") or (error or {}).get("call")
    return StepRecord(
        seq=row.seq,
        turn_id=row.turn_id,
        key=row.key,
        name=payload["name"],
        completed=completed,
        result=payload.get("result"),
        artifact=payload.get("artifact"),
        error=error,
        attempts=payload.get("attempts", 1 if completed else None),
        ms=payload.get("ms"),
        at=datetime.fromisoformat(payload["at"]) if "at" in payload else row.created_at,
        call=show_id(Prefix.CALL, parse_id(Prefix.CALL, call)) if call else None,
    )


def _lost(row: _Newest, races: Mapping[str, int]) -> bool:
    """Whether a wait is over because its branch has lost a race. A scope has one group of branches at a time, so when a race
    in it is decided, all that its branches had begun is over."""
    return any(row.seq < races.get(row.key[: branch.start()], 0) for branch in _BRANCH.finditer(row.key))


def _wait(row: _Newest, *, now: datetime) -> Wait | None:
    """None: it has ended without a record, as a timer does, or it is no wait."""
    payload = row.payload
    until = datetime.fromisoformat(payload["until"]) if payload.get("until") else None
    match payload:
        case {"winner": _}:
            return None
        case {"signal": str(name)}:
            return Wait("signal", name, None, until)
        case {"approval": str(name), "id": str(approval)}:
            return Wait("approval", name, approval, until)
        case {"child": str(turn)}:
            return Wait("child", None, turn, until)
        case {"call": str(call)}:
            return Wait("call", None, call, until)
    if until is not None and until <= now:
        return None
    if row.kind == Kind.STEP_RETRYING:
        return Wait("retry", payload["name"], None, until)
    return Wait("timer", None, None, until)
