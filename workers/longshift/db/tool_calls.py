"""The ledger of tool calls: what was started under which key, by whom, and how it ended.

Who **begins** a call must hold the session's lease, proved as in ``log.py``: by a lock on the session's row. Who **ends** one
need not any more: the outcome of a call that was made is a fact, and recording it removes doubt. So there are two rules more:

* an outcome that stands is never replaced, but for one: that it *is done* wins over *failed* and *unknown*, unless an
  operator has decided. Anything less than done counts only while the start it belongs to is the last one.
* a call of an irreversible tool that has no outcome begins again only for who began it, or ``over`` a start whose worker is
  proven gone (``starter_gone``).

Locks: sessions by id, then calls by (session, id).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.db.idempotency import Idempotency, remember
from longshift.errors import Conflict, NotFound
from longshift.events import encode
from longshift.model import (
    CallOutcome,
    CallStatus,
    Claim,
    Dedupe,
    Effect,
    Json,
    NewCall,
    Prefix,
    Settlement,
    ToolCallRecord,
    show_id,
)

COLUMNS = ", ".join(f"c.{name}" for name in ToolCallRecord.__dataclass_fields__)

_CALL = {"id": "uuid", "tenant": "uuid", "session": "uuid", "turn": "uuid", "tool": "text", "effect": "text"}
_CALL |= {
    "dedupe": "text",
    "place": "text",
    "input": "text",
    "worker": "uuid",
    "epoch": "bigint",
    "timeout": "interval",
}


def _rows(**more: str) -> str:
    types = _CALL | more
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in types.items())
    names = ", ".join(
        {"tenant": "tenant_id", "session": "session_id", "turn": "turn_id", "worker": "worker_id"}.get(name, name)
        for name in types
    )
    return f"SELECT * FROM unnest({arrays}) AS x({names})"


# a row that exists is seen: whoever made it held the lease, and let go of it before this holder claimed it
BEGIN = text(f"""
WITH r AS MATERIALIZED ({_rows(over="bigint")}),
l AS MATERIALIZED (
    SELECT s.id, s.lease_epoch AS epoch FROM sessions s
      JOIN (SELECT DISTINCT session_id, epoch, worker_id FROM r) h
        ON s.id = h.session_id AND s.lease_epoch = h.epoch AND s.lease_worker = h.worker_id
     ORDER BY s.id FOR NO KEY UPDATE OF s SKIP LOCKED),
k AS MATERIALIZED (
    SELECT c.id, l.epoch FROM l JOIN r ON r.session_id = l.id AND r.epoch = l.epoch JOIN tool_calls c ON c.id = r.id
     ORDER BY c.session_id, c.id FOR NO KEY UPDATE OF c),
u AS (
    UPDATE tool_calls c SET status = 'started', attempts = c.attempts + 1, started_at = clock_timestamp(), ended_at = NULL,
           settled_at = NULL, settled_by = NULL, note = NULL, error = NULL,
           turn_id = r.turn_id, place = r.place, worker_id = r.worker_id, epoch = r.epoch,
           timeout = r.timeout
      FROM k JOIN r ON r.id = k.id AND r.epoch = k.epoch
     WHERE c.id = k.id
       AND (c.status = 'failed' OR (c.status IN ('started', 'unknown') AND c.epoch = r.over)
         OR (c.status = 'started' AND (c.effect <> 'irreversible' OR (c.epoch = r.epoch AND c.worker_id = r.worker_id))))
    RETURNING c.id, c.epoch, c.attempts),
i AS (
    INSERT INTO tool_calls (id, tenant_id, session_id, turn_id, tool, effect, dedupe, place, input, status, worker_id, epoch,
                            timeout)
    SELECT r.id, r.tenant_id, r.session_id, r.turn_id, r.tool, r.effect, r.dedupe, r.place, CAST(r.input AS json), 'started',
           r.worker_id, r.epoch, r.timeout
      FROM r JOIN l ON r.session_id = l.id AND r.epoch = l.epoch ORDER BY r.session_id, r.id
    ON CONFLICT DO NOTHING RETURNING id, epoch, attempts)
SELECT r.id, r.epoch, l.id IS NOT NULL AS held, coalesce(u.attempts, i.attempts, 0) AS attempts
  FROM r LEFT JOIN l ON l.id = r.session_id AND l.epoch = r.epoch
         LEFT JOIN u ON u.id = r.id AND u.epoch = r.epoch LEFT JOIN i ON i.id = r.id AND i.epoch = r.epoch""")

# an insert, because a failover may have lost the start; that the call was made is a fact nevertheless
END = text(f"""
WITH r AS MATERIALIZED ({_rows(status="text", result="text", artifact="uuid", error="text")})
INSERT INTO tool_calls AS c (id, tenant_id, session_id, turn_id, tool, effect, dedupe, place, input, status, worker_id, epoch,
                             timeout, ended_at, result, artifact_id, error)
SELECT r.id, r.tenant_id, r.session_id, r.turn_id, r.tool, r.effect, r.dedupe, r.place, CAST(r.input AS json), r.status,
       r.worker_id, r.epoch, r.timeout, clock_timestamp(), CAST(r.result AS json), r.artifact, CAST(r.error AS json)
  FROM r ORDER BY r.session_id, r.id
ON CONFLICT (id) DO UPDATE SET status = excluded.status, ended_at = excluded.ended_at, result = excluded.result,
   artifact_id = excluded.artifact_id, error = excluded.error
 WHERE (c.status IN ('started', 'unknown') AND (excluded.status = 'done' OR c.epoch = excluded.epoch))
    OR (c.status = 'failed' AND excluded.status = 'done' AND c.settled_at IS NULL)
RETURNING c.id""")

# Gone for certain is who was seen to end, or whose connection has ended by itself. That somebody was silent for the whole
# time-to-live proves nothing: it may be stopped, or cut off, and its call still be under way. (The server ends an idle
# connection after that time, so the lock is gone then, too.) Nor does time end a call whose thread was left behind.
STARTER_GONE = text("""
SELECT (c.started_at + c.timeout + CAST(:ttl AS interval) < clock_timestamp()
        AND coalesce(c.error ->> 'left_behind', '') <> 'true')
       OR coalesce(w.dead_at IS NOT NULL AND (w.reported OR w.dead_at < w.heartbeat_at + CAST(:ttl AS interval))
                   AND NOT EXISTS (SELECT 1 FROM pg_locks k
                                    WHERE k.locktype = 'advisory' AND k.granted AND k.objsubid = 1
                                      AND ((CAST(k.classid AS bigint) << 32) | CAST(k.objid AS bigint)) = w.lock_key),
                   false) AS gone
  FROM tool_calls c LEFT JOIN workers w ON w.id = c.worker_id
 WHERE c.id = :call AND c.epoch = :epoch""")

STANDING = text(f"SELECT {COLUMNS} FROM tool_calls c WHERE c.id = ANY(CAST(:calls AS uuid[]))")
FIND = text(f"SELECT {COLUMNS} FROM tool_calls c WHERE c.id = :call AND c.tenant_id = :tenant")
_PAGE = """
   AND (CAST(:before AS uuid) IS NULL
     OR (c.created_at, c.id) < (SELECT b.created_at, b.id FROM tool_calls b WHERE b.id = :before AND b.tenant_id = :tenant))
 ORDER BY c.created_at DESC, c.id DESC LIMIT :limit"""
OF_SESSION = text(f"""
SELECT {COLUMNS} FROM tool_calls c
 WHERE c.session_id = :session AND c.tenant_id = :tenant
   AND (CAST(:turn AS uuid) IS NULL OR c.turn_id = :turn)
   AND (CAST(:status AS text) IS NULL OR c.status = :status)
   AND (CAST(:tool AS text) IS NULL OR c.tool = :tool){_PAGE}""")
OPEN = text(f"SELECT {COLUMNS} FROM tool_calls c WHERE c.tenant_id = :tenant AND c.status = 'unknown'{_PAGE}")

LOCK_SESSION = text("""
SELECT s.id FROM sessions s JOIN tool_calls c ON c.session_id = s.id
 WHERE c.id = :call AND c.tenant_id = :tenant FOR NO KEY UPDATE OF s""")
SETTLE = text(f"""
UPDATE tool_calls c SET status = :status, result = CAST(:result AS json), note = :note, settled_at = clock_timestamp(),
       settled_by = :by, ended_at = clock_timestamp()
 WHERE c.id = :call AND c.tenant_id = :tenant AND c.status = 'unknown'
RETURNING {COLUMNS}""")
WAKE = text("""
UPDATE sessions SET mail_seq = mail_seq + 1, ready_at = CASE WHEN open_turns > 0 THEN clock_timestamp() ELSE ready_at END
 WHERE id = :session AND deleted_at IS NULL RETURNING id, queue""")

_SETTLED_AS = {
    Settlement.DONE: CallStatus.DONE,
    Settlement.NOT_DONE: CallStatus.FAILED,
    Settlement.GIVE_UP: CallStatus.GIVEN_UP,
}


@dataclass(frozen=True, slots=True)
class Start:
    """A call that the holder of ``claim`` is about to make.

    ``over``: the epoch of an earlier start, of which it is proven that it comes to nothing any more.
    """

    claim: Claim
    call: NewCall
    over: int | None = None

    @property
    def key(self) -> tuple[UUID, int]:
        return self.call.id, self.claim.epoch


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended that was started under ``epoch`` (default: that of ``claim``)."""

    claim: Claim
    call: NewCall
    outcome: CallOutcome
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What came of a start.

    Not ``held``: the session's row was locked, or the lease is gone. ``attempts``: so often it was started by now; 0: it was
    not, because of what is ``standing`` in the ledger.
    """

    held: bool
    attempts: int = 0
    standing: ToolCallRecord | None = None


async def begin(db: Database, starts: Sequence[Start]) -> dict[tuple[UUID, int], Begun]:
    """Start calls; the answers by ``Start.key``, which no two of them may have in common."""
    starts = sorted(starts, key=lambda start: (start.claim.session_id, start.call.id))
    columns = _columns([(start.claim, start.call) for start in starts])
    rows = await db.fetch(BEGIN, columns | {"over": [start.over for start in starts]})
    # in a statement of its own: the snapshot of the one before may be older than what kept a call from beginning
    known = await standing(db, [row.id for row in rows if row.held and not row.attempts])
    return {(row.id, row.epoch): Begun(row.held, row.attempts, known.get(row.id)) for row in rows}


async def end(db: Database, endings: Sequence[Ending]) -> dict[UUID, ToolCallRecord]:
    """Record outcomes, whoever has the lease by now. Returns those calls of which something else stands."""
    endings = sorted(endings, key=lambda ending: (ending.claim.session_id, ending.call.id))
    columns = _columns([(ending.claim, ending.call) for ending in endings]) | {
        "status": [ending.outcome.status.value for ending in endings],
        "result": [ending.outcome.result for ending in endings],
        "artifact": [ending.outcome.artifact_id for ending in endings],
        "error": [ending.outcome.error for ending in endings],
        "epoch": [ending.claim.epoch if ending.epoch is None else ending.epoch for ending in endings],
    }
    recorded = {row.id for row in await db.fetch(END, columns)}
    return await standing(db, [ending.call.id for ending in endings if ending.call.id not in recorded])


async def standing(db: Database, calls: Collection[UUID]) -> dict[UUID, ToolCallRecord]:
    """What the ledger has of these calls."""
    if not calls:
        return {}
    return {row.id: record(row) for row in await db.fetch(STANDING, {"calls": list(calls)})}


async def starter_gone(db: Database, call_id: UUID, *, epoch: int, lease_ttl: timedelta) -> bool:
    """Whether the start under ``epoch`` can come to nothing any more: the process behind it has ended for certain, or the
    call's own time is over, and the time-to-live of a lease after it.

    False also if the call was started again meanwhile.
    """
    rows = await db.fetch(STARTER_GONE, {"call": call_id, "epoch": epoch, "ttl": lease_ttl})
    return bool(rows and rows[0].gone)


async def wake(db: Database, session_id: UUID) -> list[tuple[UUID, str]]:
    """Let a session look at the ledger again: one of its turns may wait for what has just become known. What to ring."""
    return [(row.id, row.queue) for row in await db.fetch(WAKE, {"session": session_id})]


async def find(db: Database, call_id: UUID, *, tenant_id: UUID) -> ToolCallRecord | None:
    rows = await db.fetch(FIND, {"call": call_id, "tenant": tenant_id})
    return record(rows[0]) if rows else None


async def list_calls(
    db: Database,
    *,
    tenant_id: UUID,
    session_id: UUID | None = None,
    turn_id: UUID | None = None,
    status: CallStatus | None = None,
    tool: str | None = None,
    before: UUID | None = None,
    limit: int = 20,
) -> list[ToolCallRecord]:
    """The calls of a session, narrowed by ``turn_id``, ``status`` and ``tool``; without one, all of the tenant that are in
    doubt, for which there is an index. Newest first; ``before`` is the id of the last call of the page before."""
    params: dict[str, Any] = {"tenant": tenant_id, "before": before, "limit": limit}
    if session_id is not None:
        params |= {"session": session_id, "turn": turn_id, "status": status and status.value, "tool": tool}
        rows = await db.fetch(OF_SESSION, params)
    else:
        rows = await db.fetch(OPEN, params)
    return [record(row) for row in rows]


async def settle(
    db: Database,
    call_id: UUID,
    *,
    tenant_id: UUID,
    outcome: Settlement,
    result: Json = None,
    note: str | None = None,
    by: UUID,
    idempotency: Idempotency | None = None,
) -> tuple[ToolCallRecord, list[tuple[UUID, str]]]:
    """Decide what became of a call that is in doubt; of two who decide at once, one does. Its session is woken.

    Args:
        outcome: DONE takes ``result``, which is what the tool is taken to have returned.
        by: the API key of who decides.
        idempotency: an equal request that was granted before is granted again; its answer may have been lost.

    Returns:
        The call as it is now, and (session, queue) to ring.

    Raises:
        NotFound: there is no such call.
        Conflict: it is not in doubt (any more); the message says since when, and who decided.
        IdempotencyMismatch: the key was used with another body.
    """
    params = {
        "call": call_id,
        "tenant": tenant_id,
        "status": _SETTLED_AS[outcome].value,
        "result": encode(result) if outcome is Settlement.DONE else None,
        "note": note,
        "by": by,
    }
    async with db.transaction() as tx:
        repeated = idempotency is not None and await remember(tx, idempotency, tenant_id=tenant_id, resource_id=call_id)
        if not repeated:
            await tx.execute(LOCK_SESSION, {"call": call_id, "tenant": tenant_id})
            row = (await tx.execute(SETTLE, params)).first()
            if row is not None:
                rung = (await tx.execute(WAKE, {"session": row.session_id})).all()
                return record(row), [(woken.id, woken.queue) for woken in rung]
        known = (await tx.execute(FIND, {"call": call_id, "tenant": tenant_id})).first()
        if known is None:
            raise NotFound(f"there is no tool call {show_id(Prefix.CALL, call_id)}")
        if not repeated:  # raised in here: what is refused is not remembered
            raise Conflict(_why_not(record(known)))
    return record(known), []


def _why_not(call: ToolCallRecord) -> str:
    name = show_id(Prefix.CALL, call.id)
    if call.settled_at is not None and call.settled_by is not None:
        who, when = show_id(Prefix.KEY, call.settled_by), call.settled_at.isoformat(timespec="seconds")
        return f"tool call {name} is not in doubt any more: {who} settled it at {when}, and it is {call.status}"
    if call.status is CallStatus.STARTED:
        return (
            f"tool call {name} is under way since {call.started_at.isoformat(timespec='seconds')}: nobody doubts it yet"
        )
    return f"tool call {name} is not in doubt: it is {call.status}"


def _columns(calls: Sequence[tuple[Claim, NewCall]]) -> dict[str, list[Any]]:
    """The calls as parallel columns."""
    return {
        "id": [call.id for _, call in calls],
        "tenant": [claim.tenant_id for claim, _ in calls],
        "session": [claim.session_id for claim, _ in calls],
        "turn": [call.turn_id for _, call in calls],
        "tool": [call.tool for _, call in calls],
        "effect": [call.effect.value for _, call in calls],
        "dedupe": [call.dedupe.value for _, call in calls],
        "place": [call.place for _, call in calls],
        "input": [call.input for _, call in calls],
        "worker": [claim.worker_id for claim, _ in calls],
        "epoch": [claim.epoch for claim, _ in calls],
        "timeout": [call.timeout for _, call in calls],
    }


def record(row: Row[Any]) -> ToolCallRecord:
    values = {name: getattr(row, name) for name in ToolCallRecord.__dataclass_fields__}
    words = {"effect": Effect(row.effect), "dedupe": Dedupe(row.dedupe), "status": CallStatus(row.status)}
    return ToolCallRecord(**values | words)
