"""Approvals: a turn asks somebody whether it may go on, and of two answers the first counts.

The holder of the session opens one when the turn begins to wait, and closes it when the time is over; who answers, closes or
ends the turn first wins, because all of them have the session's row locked. An answer is no mail: the turn finds it in the
row, and is woken like by mail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db.database import Database
from longshift.errors import AlreadyAnswered, InvalidInput, NotFound
from longshift.events import encode
from longshift.model import ApprovalRecord, Claim, Json, Prefix, show_id

_COLUMNS = """a.id, a.tenant_id, a.session_id, a.turn_id, a.name, a.show, a.created_at, a.expires_at, a.answered_at, a.answer,
 a.answered_by, a.closed_at"""
_OPEN = "a.answered_at IS NULL AND a.closed_at IS NULL"

FIND = text(f"SELECT {_COLUMNS} FROM approvals a WHERE a.id = :id AND a.tenant_id = :tenant")
LISTED = f"""
SELECT {_COLUMNS} FROM approvals a
 WHERE a.tenant_id = :tenant AND (CAST(:before AS uuid) IS NULL OR a.id < :before)
   AND (CAST(:session AS uuid) IS NULL OR a.session_id = :session)"""
ALL = text(f"{LISTED} ORDER BY a.id DESC LIMIT :limit")
OPEN = text(f"{LISTED} AND {_OPEN} ORDER BY a.id DESC LIMIT :limit")
OPEN_OF_NAME = text(f"""
SELECT a.id FROM approvals a
 WHERE a.session_id = :session AND a.name = :name AND {_OPEN} ORDER BY a.id LIMIT 1""")

LOCK = text("""
SELECT s.id FROM sessions s JOIN approvals a ON a.session_id = s.id
 WHERE a.id = :id AND a.tenant_id = :tenant FOR NO KEY UPDATE OF s""")
ANSWER = text(f"""
WITH a AS (
    UPDATE approvals a SET answered_at = clock_timestamp(), answer = CAST(:answer AS json), answered_by = :by
     WHERE a.id = :id AND {_OPEN} RETURNING {_COLUMNS}),
s AS (
    UPDATE sessions s SET mail_seq = s.mail_seq + 1,
           ready_at = CASE WHEN s.open_turns > 0 THEN clock_timestamp() ELSE s.ready_at END
      FROM a WHERE s.id = a.session_id RETURNING s.id, s.queue)
SELECT a.*, s.queue FROM a JOIN s ON s.id = a.session_id""")

_HELD = """
    SELECT id, tenant_id FROM sessions
     WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker FOR NO KEY UPDATE"""
ASK = text(f"""
WITH s AS MATERIALIZED ({_HELD}),
i AS (
    INSERT INTO approvals (id, tenant_id, session_id, turn_id, name, show, expires_at)
    SELECT :id, s.tenant_id, s.id, :turn, :name, CAST(:show AS json), :expires FROM s ON CONFLICT DO NOTHING)
SELECT id FROM s""")
CLOSE = text(f"""
WITH s AS MATERIALIZED ({_HELD}),
a AS (
    UPDATE approvals a SET closed_at = clock_timestamp() FROM s
     WHERE a.id = ANY(CAST(:ids AS uuid[])) AND a.session_id = s.id AND {_OPEN})
SELECT id FROM s""")

Rung = list[tuple[UUID, str]]


def verdict(payload: Json) -> dict[str, Json]:
    """What is stored of an answer: ``{granted, comment}``; ``payload`` is that, or just whether it is granted.

    Raises:
        InvalidInput: it does not say whether.
    """
    given = payload if isinstance(payload, Mapping) else {"granted": payload}
    granted, comment = given.get("granted"), given.get("comment")
    if not isinstance(granted, bool) or not (comment is None or isinstance(comment, str)):
        raise InvalidInput('an approval is answered with {"granted": true or false, "comment": a text or null}')
    return {"granted": granted, "comment": comment}


async def find(db: Database, approval_id: UUID, *, tenant_id: UUID) -> ApprovalRecord | None:
    rows = await db.fetch(FIND, {"id": approval_id, "tenant": tenant_id})
    return _record(rows[0]) if rows else None


async def listed(
    db: Database,
    *,
    tenant_id: UUID,
    open_only: bool = True,
    session_id: UUID | None = None,
    before: UUID | None = None,
    limit: int = 20,
) -> list[ApprovalRecord]:
    """Newest first; ``before`` is the id of the last one of the page before."""
    params = {"tenant": tenant_id, "session": session_id, "before": before, "limit": limit}
    return [_record(row) for row in await db.fetch(OPEN if open_only else ALL, params)]


async def answer(
    db: Database, approval_id: UUID, *, tenant_id: UUID, answer: Json, by: UUID | None = None
) -> tuple[ApprovalRecord, Rung]:
    """Decide, and wake the turn. Returns the approval as it now is, and the (session, queue) to ring.

    Args:
        db: where it is.
        approval_id: which one.
        tenant_id: whose it must be.
        answer: ``{granted, comment}``, or just whether it is granted.
        by: the API key of whoever decides.

    Raises:
        NotFound: there is no such approval.
        AlreadyAnswered: somebody was first, or nobody waits for it any more.
        InvalidInput: ``answer`` does not say whether.
    """
    decided = verdict(answer)
    async with db.transaction() as tx:
        if (await tx.execute(LOCK, {"id": approval_id, "tenant": tenant_id})).first() is None:
            raise NotFound(f"there is no approval {show_id(Prefix.APPROVAL, approval_id)}")
        row = await decide(tx, approval_id, decided, by=by)
        if row is None:
            found = (await tx.execute(FIND, {"id": approval_id, "tenant": tenant_id})).one()
            raise AlreadyAnswered(_told(_record(found)))
    return _record(row), [(row.session_id, row.queue)]


async def open_of_name(tx: AsyncConnection, session_id: UUID, *, name: str) -> UUID | None:
    """The oldest open approval of this name in a session that the caller has locked."""
    row = (await tx.execute(OPEN_OF_NAME, {"session": session_id, "name": name})).first()
    return row.id if row is not None else None


async def decide(
    tx: AsyncConnection, approval_id: UUID, decided: Mapping[str, Json], *, by: UUID | None
) -> Row[Any] | None:
    """Answer an approval of a session that the caller has locked; None: it was not open."""
    return (await tx.execute(ANSWER, {"id": approval_id, "answer": encode(decided), "by": by})).first()


async def ask(
    db: Database,
    approval_id: UUID,
    *,
    claim: Claim,
    turn_id: UUID,
    name: str,
    show: Json,
    expires_at: datetime | None,
) -> bool:
    """Open an approval, unless it is there already; False: the lease is gone."""
    params = {"id": approval_id, "turn": turn_id, "name": name, "show": encode(show), "expires": expires_at}
    return bool(await db.fetch(ASK, params | _holder(claim)))


async def close(db: Database, ids: Sequence[UUID], *, claim: Claim) -> bool:
    """Nobody waits for an answer any more: whatever has none gets none. False: the lease is gone."""
    return bool(await db.fetch(CLOSE, {"ids": list(ids)} | _holder(claim)))


def _holder(claim: Claim) -> dict[str, Any]:
    return {"session": claim.session_id, "epoch": claim.epoch, "worker": claim.worker_id}


def _record(row: Row[Any]) -> ApprovalRecord:
    return ApprovalRecord(**{name: getattr(row, name) for name in ApprovalRecord.__dataclass_fields__})


def _told(found: ApprovalRecord) -> str:
    """Why it cannot be answered."""
    name = f"approval {show_id(Prefix.APPROVAL, found.id)} ({found.name!r})"
    if found.answered_at is None or found.answer is None:
        closed = f" at {found.closed_at.isoformat()}" if found.closed_at is not None else ""
        return f"{name} was closed{closed}: its time was over, or its turn has ended"
    said = "granted" if found.answer["granted"] else "denied"
    who = f" by key {show_id(Prefix.KEY, found.answered_by)}" if found.answered_by is not None else ""
    return f"{name} was {said}{who} at {found.answered_at.isoformat()}"
