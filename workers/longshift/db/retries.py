"""A turn that has ended without success, once more: a new turn at the end of its session's order, with the same root.

It replays what the turns before it have recorded (``longshift.chain``), so that it goes on from the last step. Of a turn and
all its retries at most one is open, and none follows one that has succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.db.idempotency import Idempotency, remember
from longshift.db.intake import LOCK_SESSIONS, Accepted, Entry, add_turns, admit
from longshift.db.leases import URGENT
from longshift.errors import Conflict, NotFound
from longshift.model import NewTurn, Prefix, TurnStatus, show_id

TURN = text("""
SELECT id, session_id, root_turn_id, agent, queue, input, input_artifact, metadata, traceparent, attempts,
       parent_turn_id FROM turns
 WHERE id = :turn AND tenant_id = :tenant""")
CHAIN = text("""
SELECT id, status, first_seq FROM turns WHERE session_id = :session AND root_turn_id = :root ORDER BY id""")
# not by their root: the retry of a turn that never started has one of its own
FAMILY = text(f"""
WITH RECURSIVE before AS (
    SELECT id, retry_of FROM turns WHERE id = :turn
    UNION ALL
    SELECT t.id, t.retry_of FROM before b JOIN turns t ON t.id = b.retry_of),
family AS (
    SELECT id FROM before WHERE retry_of IS NULL
    UNION ALL
    SELECT t.id FROM family f JOIN turns t ON t.session_id = :session AND t.retry_of = f.id)
SELECT t.id, t.status, EXISTS (SELECT 1 FROM mail m WHERE m.session_id = :session AND m.turn_id = t.id AND {URGENT}) AS ending
  FROM turns t WHERE t.id IN (SELECT id FROM family) ORDER BY t.id""")


async def retry(
    db: Database,
    turn_id: UUID,
    *,
    tenant_id: UUID,
    now: datetime,
    lifetime: timedelta,
    agent_version: str | None = None,
    deadline: datetime | None = None,
    idempotency: Idempotency | None = None,
) -> Accepted:
    """Accept a turn that goes on where ``turn_id`` ended; ``resource_id`` is the new one's.

    ``agent_version`` None: the newest that a worker has, so that a mended agent goes on with its broken turns.

    Raises:
        NotFound: no such turn, or its session is deleted.
        Conflict: it has not ended, or it succeeded, or another turn has already taken its place.
        IdempotencyMismatch: the key was used with another body.
    """
    ring: list[tuple[UUID, str]] = []
    async with db.transaction() as tx:
        old = (await tx.execute(TURN, {"turn": turn_id, "tenant": tenant_id})).first()
        if old is None:
            raise NotFound(f"there is no turn {show_id(Prefix.TURN, turn_id)}")
        new = _again(old, agent_version=agent_version, deadline=deadline)
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=new.id)
            if known is not None:
                return Accepted(known, replayed=True)
        await tx.execute(LOCK_SESSIONS, {"sessions": [old.session_id]})
        _check((await tx.execute(FAMILY, {"session": old.session_id, "turn": turn_id})).all(), turn_id)
        entry = Entry(new, old.session_id, create=False)
        places = await admit(tx, [entry], tenant_id=tenant_id, now=now, reject=False, ring=ring)
        await add_turns(tx, [entry], places, tenant_id=tenant_id, lifetime=lifetime)
    return Accepted(new.id, ring)


async def chain(db: Database, session_id: UUID, root: UUID) -> tuple[list[UUID], int]:
    """The turns with this root that have started, and the seq at which the first of them did (0: none)."""
    rows = [row for row in await db.fetch(CHAIN, {"session": session_id, "root": root}) if row.first_seq is not None]
    return [row.id for row in rows], min((row.first_seq for row in rows), default=0)


def _again(old: Row[Any], *, agent_version: str | None, deadline: datetime | None) -> NewTurn:
    return NewTurn(
        agent=old.agent,
        input=old.input,
        input_artifact=old.input_artifact,
        queue=old.queue,
        agent_version=agent_version,
        deadline=deadline,
        metadata=old.metadata,
        traceparent=old.traceparent,
        retry_of=old.id,
        parent_turn_id=old.parent_turn_id,
        # one that never started has recorded nothing to go on from
        root_turn_id=old.root_turn_id if old.attempts or old.root_turn_id != old.id else None,
    )


def _check(family: Sequence[Row[Any]], turn_id: UUID) -> None:
    """Raises Conflict: it is not the time for a retry, or too late."""
    name = show_id(Prefix.TURN, turn_id)
    for row in family:
        status, other = TurnStatus(row.status), show_id(Prefix.TURN, row.id)
        if status.terminal and status is not TurnStatus.SUCCEEDED:
            continue
        if row.id == turn_id:
            if status.terminal:
                raise Conflict(f"{name} has succeeded: there is nothing to retry")
            raise Conflict(f"{name} is {status}: cancel it first, or let it end")
        if status.terminal:
            raise Conflict(f"{name} was retried by {other}, which has succeeded")
        raise Conflict(f"{name} is already being retried by {other}, which is {status}")
