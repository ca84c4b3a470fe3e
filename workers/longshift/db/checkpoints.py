"""Checkpoints: the folded context of a session at some seq, so that a restore reads only what came after."""

from __future__ import annotations

import json
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database
from longshift.events import Context
from longshift.model import Claim, Json

KEEP = 2
LATEST = text("""
SELECT seq, event_id, context, octet_length(CAST(context AS text)) AS size FROM checkpoints
 WHERE session_id = :session AND seq <= :through ORDER BY seq DESC LIMIT 1""")
SAVE = text(f"""
WITH s AS (
    UPDATE sessions SET checkpoint_seq = :seq
     WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker AND checkpoint_seq < :seq RETURNING id),
i AS (
    INSERT INTO checkpoints (session_id, seq, event_id, context) SELECT s.id, :seq, :event, CAST(:context AS json) FROM s)
DELETE FROM checkpoints c USING s WHERE c.session_id = s.id AND c.seq < (
    SELECT min(seq) FROM (SELECT seq FROM checkpoints WHERE session_id = :session ORDER BY seq DESC LIMIT {KEEP - 1}) k)""")


async def latest(db: Database, session_id: UUID, *, through: int) -> tuple[Context, int] | None:
    """The newest checkpoint at or before seq ``through``, and its size in bytes."""
    rows = await db.fetch(LATEST, {"session": session_id, "through": through})
    if not rows:
        return None
    row = rows[0]
    context = Context(row.seq, row.event_id)
    context.messages = [_text(message) for message in row.context["history"]]
    context.remembered = {name: _text(value) for name, value in row.context["state"].items()}
    return context, row.size


def _text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


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


def _whole(context: Context) -> str:
    state = ",".join(f"{_text(name)}:{value}" for name, value in context.remembered.items())
    return f'{{"history":[{",".join(context.messages)}],"state":{{{state}}}}}'
