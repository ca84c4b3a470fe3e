"""What a restore reads: the newest checkpoint of a session, and of the events after it those that a context shows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.events import FOLDED, Context
from longshift.model import Claim, Json

KEEP = 2
PAGE = 1000
_SHOWN = "kind IN ({})".format(", ".join(f"'{kind.value}'" for kind in sorted(FOLDED)))

NEWEST = text("""
SELECT (SELECT archived_through FROM sessions WHERE id = :session) AS archived_through,
       c.seq, c.event_id, c.context
  FROM (SELECT 1) AS one
  LEFT JOIN LATERAL (SELECT * FROM checkpoints WHERE session_id = :session AND seq <= :through
                      ORDER BY seq DESC LIMIT 1) c ON true""")
# the first and the last, too, whatever they are: what is folded must end, and what is continued must begin, where it should;
# and none of what is archived: of such rows only some may be there
TAIL = text(f"""
SELECT seq, id, turn_id, kind, CASE WHEN {_SHOWN} THEN CAST(payload AS text) END AS payload FROM events
 WHERE session_id = :session AND seq BETWEEN :first AND :through AND ({_SHOWN} OR seq IN (:first, :through))
   AND seq > (SELECT archived_through FROM sessions WHERE id = :session)
 ORDER BY seq LIMIT :limit""")
ARCHIVED = text("SELECT archived_through, archived_event_id FROM sessions WHERE id = :session")
SAVE = text(f"""
WITH s AS (
    UPDATE sessions SET checkpoint_seq = :seq
     WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker AND checkpoint_seq <= :seq RETURNING id),
i AS (
    INSERT INTO checkpoints (session_id, seq, event_id, context) SELECT s.id, :seq, :event, CAST(:context AS json) FROM s
    ON CONFLICT DO NOTHING)
DELETE FROM checkpoints c USING s WHERE c.session_id = s.id AND c.seq < (
    SELECT min(seq) FROM (SELECT seq FROM checkpoints WHERE session_id = :session ORDER BY seq DESC LIMIT {KEEP - 1}) k)""")


@dataclass(frozen=True, slots=True)
class Ground:
    """What a restore begins with.

    Attributes:
        context: the newest checkpoint; an empty one: there is none.
        archived_through: events up to there are in the cold tier.
    """

    context: Context
    archived_through: int


@dataclass(frozen=True, slots=True)
class Shown:
    """An event as a fold needs it; ``payload`` is JSON text, None if the event leaves no trace in a context."""

    seq: int
    id: UUID
    turn_id: UUID | None
    kind: str
    payload: str | None


async def ground(db: Database, session_id: UUID, *, through: int) -> Ground:
    """The newest checkpoint at or before seq ``through``."""
    [row] = await db.fetch(NEWEST, {"session": session_id, "through": through})
    context = Context() if row.seq is None else _context(row)
    return Ground(context, row.archived_through or 0)


async def tail(db: Database, session_id: UUID, *, first: int, through: int) -> AsyncIterator[Sequence[Shown]]:
    """Of the events ``first`` to ``through``, page by page: these two, and all that a context shows."""
    while first <= through:
        params = {"session": session_id, "first": first, "through": through, "limit": PAGE}
        rows = await db.fetch(TAIL, params)
        yield [Shown(row.seq, row.id, row.turn_id, row.kind, row.payload) for row in rows]
        if len(rows) < PAGE:
            return
        first = rows[-1].seq + 1


async def archived(db: Database, session_id: UUID) -> tuple[int, UUID | None]:
    """Where the archived part of a log ends: (seq, event id)."""
    rows = await db.fetch(ARCHIVED, {"session": session_id})
    return (rows[0].archived_through, rows[0].archived_event_id) if rows else (0, None)


async def save(db: Database, claim: Claim, context: Context) -> None:
    """Keep ``context``, if the lease still stands; older checkpoints beyond two are removed."""
    await db.execute(
        SAVE,
        {
            "session": claim.session_id,
            "epoch": claim.epoch,
            "worker": claim.worker_id,
            "seq": context.seq,
            "event": context.event_id,
            "context": _whole(context),
        },
    )


def _context(row: Row[Any]) -> Context:
    context = Context(row.seq, row.event_id)
    context.messages = [_text(message) for message in row.context["history"]]
    context.remembered = {name: _text(value) for name, value in row.context["state"].items()}
    return context


def _whole(context: Context) -> str:
    state = ",".join(f"{_text(name)}:{value}" for name, value in context.remembered.items())
    return f'{{"history":[{",".join(context.messages)}],"state":{{{state}}}}}'


def _text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
