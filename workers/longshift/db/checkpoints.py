"""Checkpoints: the folded context of a session at some seq, so that a restore reads only what came after."""

from __future__ import annotations

import json
from dataclasses import asdict
from uuid import UUID

from sqlalchemy import text

from longshift.db.database import Database
from longshift.events import Context, storable_json
from longshift.model import Claim

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
    return Context(
        seq=row.seq, event_id=row.event_id, history=row.context["history"], state=row.context["state"]
    ), row.size


async def save(db: Database, claim: Claim, context: Context) -> None:
    """Keep ``context``, if the lease still stands; older checkpoints beyond two are removed."""
    folded = asdict(context)
    await db.execute(
        SAVE,
        {
            "session": claim.session_id,
            "epoch": claim.epoch,
            "worker": claim.worker_id,
            "seq": context.seq,
            "event": context.event_id,
            "context": storable_json(
                json.dumps({"history": folded["history"], "state": folded["state"]}, ensure_ascii=False)
            ),
        },
    )
