"""What the participants saw, to be compared with what the database says in the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db import upkeep
from longshift.db.database import Database

TERMINAL = {"turn.succeeded": "succeeded", "turn.cancelled": "cancelled", "turn.expired": "expired"}
EVENTS = text("SELECT session_id, seq, id, epoch, turn_id, kind, key FROM events ORDER BY session_id, seq")
TURNS = text("SELECT id, session_id, position, status, attempts, first_seq, input, batch_id FROM turns")
COUNTERS = text("""
SELECT s.id FROM sessions s WHERE s.open_turns <> (
    SELECT count(*) FROM turns t WHERE t.session_id = s.id AND t.status IN ('queued', 'running', 'waiting'))""")
UNREAD = text("""
SELECT m.id FROM mail m JOIN turns t ON t.id = m.turn_id
 WHERE m.kind <> 'signal' AND m.consumed_at IS NULL AND t.status IN ('succeeded', 'cancelled', 'expired')""")


@dataclass
class Witness:
    """``violations`` counts broken promises; the rest is memory."""

    violations: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    accepted: set[UUID] = field(default_factory=set)
    acknowledged: set[tuple[UUID, UUID]] = field(default_factory=set)  # (session, event)
    recorded: dict[tuple[UUID, str], int] = field(default_factory=dict)  # (turn, step) -> epoch of its holder
    ended: dict[UUID, str] = field(default_factory=dict)

    def violated(self, promise: str, example: object) -> None:
        self.violations[promise] += 1
        self.examples.setdefault(promise, repr(example)[:300])

    def step_starts(self, turn_id: UUID, step: str, *, epoch: int) -> None:
        """P4: only a holder who has been overtaken may start what is already recorded."""
        known = self.recorded.get((turn_id, step))
        if known is not None and known <= epoch:
            self.violated("P4 a recorded step was started again", (turn_id, step, known, epoch))

    def step_recorded(self, turn_id: UUID, step: str, *, epoch: int) -> None:
        if (turn_id, step) in self.recorded:
            self.violated("P4 a step was recorded twice", (turn_id, step))
        self.recorded[turn_id, step] = epoch

    def turn_ended(self, turn_id: UUID, status: str) -> None:
        if turn_id in self.ended:
            self.violated("P4 a turn ended twice", turn_id)
        self.ended[turn_id] = status


async def check(db: Database, witness: Witness) -> None:
    """Compare the final database with the promises and with what was acknowledged."""
    turns = {row.id: row for row in await db.fetch(TURNS)}
    logs: dict[UUID, list[Row[tuple[object, ...]]]] = {}
    for row in await db.fetch(EVENTS):
        logs.setdefault(row.session_id, []).append(row)
    _check_turns(turns, witness)
    for events in logs.values():
        _check_log(events, turns, witness)
    _check_rows(turns, logs, witness)
    stored = {(row.session_id, row.id) for events in logs.values() for row in events}
    for missing in witness.acknowledged - stored:
        witness.violated("an acknowledged event is not in the log", missing)
    for row in await db.fetch(COUNTERS):
        witness.violated("open_turns is wrong", row.id)
    # a cancel may come while its turn is just ending: then nobody reads it, and the sweeper takes it away
    await upkeep.forget(db, keys_after=timedelta(0), workers_after=timedelta(days=1), limit=100_000)
    for row in await db.fetch(UNREAD):
        witness.violated("mail of an ended turn is unread", row.id)


def _check_turns(turns: dict[UUID, Row[tuple[object, ...]]], witness: Witness) -> None:
    for missing in witness.accepted - turns.keys():
        witness.violated("P1 an accepted turn is missing", missing)
    for extra in turns.keys() - witness.accepted:
        witness.violated("a repeated submit made a second turn", extra)
    for turn in turns.values():
        if turn.status not in TERMINAL.values():
            witness.violated("P1 a turn never ended", tuple(turn))


def _check_log(
    events: list[Row[tuple[object, ...]]], turns: dict[UUID, Row[tuple[object, ...]]], witness: Witness
) -> None:
    session = events[0].session_id
    if [row.seq for row in events] != list(range(1, len(events) + 1)):
        witness.violated("P7 a gap in seq", session)
    if any(a.epoch > b.epoch for a, b in pairwise(events)):
        witness.violated("P2 an older epoch wrote after a newer one", session)
    current, last_position = None, 0
    steps: Counter[tuple[UUID, str]] = Counter()
    ends: Counter[UUID] = Counter()
    for row in events:
        if row.kind == "turn.started":
            if turns[row.turn_id].position < last_position:
                witness.violated("P3 turns started out of order", (session, row.turn_id))
            if current not in (None, row.turn_id):
                witness.violated("P3 turns overlap", (session, current, row.turn_id))
            current, last_position = row.turn_id, turns[row.turn_id].position
        elif row.turn_id != current:
            witness.violated("P3 an event outside its turn", (session, row.seq, row.kind))
        if row.kind == "step.completed":
            steps[row.turn_id, row.key] += 1
        if row.kind in TERMINAL:
            ends[row.turn_id] += 1
            current = None
    for step in (step for step, n in steps.items() if n > 1):
        witness.violated("P4 a step is twice in the log", step)
    for turn in (turn for turn, n in ends.items() if n > 1):
        witness.violated("P4 two terminal events", turn)


def _check_rows(
    turns: dict[UUID, Row[tuple[object, ...]]],
    logs: dict[UUID, list[Row[tuple[object, ...]]]],
    witness: Witness,
) -> None:
    """A turn's row says what its session's log says: they change in the same statement."""
    for turn in turns.values():
        own = [row for row in logs.get(turn.session_id, ()) if row.turn_id == turn.id]
        starts = [row.seq for row in own if row.kind == "turn.started"]
        end = [TERMINAL[row.kind] for row in own if row.kind in TERMINAL]
        if turn.attempts != len(starts) or turn.first_seq != (starts[0] if starts else None):
            witness.violated("attempts or first_seq differ from the log", tuple(turn))
        if starts and turn.status in TERMINAL.values() and end != [turn.status]:
            witness.violated("a turn's status differs from the log", tuple(turn))
        done = sum(row.kind == "step.completed" for row in own)
        if turn.status == "succeeded" and done != turn.input["steps"]:
            witness.violated("a turn succeeded without all its steps", tuple(turn))
