"""The ledger of tool calls as a dict, under the rules of ``longshift.db.tool_calls``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from longshift.errors import Conflict, NotFound
from longshift.events import encode
from longshift.model import (
    CallOutcome,
    CallStatus,
    Effect,
    Json,
    NewCall,
    Prefix,
    Settlement,
    ToolCallRecord,
    show_id,
)

OPEN = (CallStatus.STARTED, CallStatus.UNKNOWN)
SETTLED_AS = {
    Settlement.DONE: CallStatus.DONE,
    Settlement.NOT_DONE: CallStatus.FAILED,
    Settlement.GIVE_UP: CallStatus.GIVEN_UP,
}


class Ledger:
    """Calls of tools by their key; give one to several runs of a session, and read it afterwards."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}  # large results, and what else their turns kept
        self._rows: dict[UUID, ToolCallRecord] = {}

    def __iter__(self) -> Iterator[ToolCallRecord]:
        """In the order in which they were started first."""
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, call_id: UUID) -> ToolCallRecord | None:
        return self._rows.get(call_id)

    def settle(
        self, call_id: UUID, outcome: Settlement, *, result: Json = None, note: str | None = None, now: datetime
    ) -> None:
        """Decide what became of a call that is in doubt, as an operator does.

        Raises:
            NotFound, Conflict: there is no such call, or it is not in doubt.
        """
        row = self._rows.get(call_id)
        if row is None:
            raise NotFound(f"there is no tool call {show_id(Prefix.CALL, call_id)}")
        if row.status is not CallStatus.UNKNOWN:
            raise Conflict(f"tool call {show_id(Prefix.CALL, call_id)} is not in doubt: it is {row.status}")
        kept = json.loads(encode(result)) if outcome is Settlement.DONE else None
        row = replace(row, status=SETTLED_AS[outcome], result=kept, note=note)
        self._rows[call_id] = replace(row, settled_at=now, ended_at=now)

    # -- for those who hold a lease, which is theirs to check

    def begin(
        self, call: NewCall, *, session_id: UUID, tenant_id: UUID, epoch: int, over: int | None, now: datetime
    ) -> int | ToolCallRecord:
        row = self._rows.get(call.id)
        if row is not None and not _may_begin(row, epoch=epoch, over=over):
            return row
        attempts = 1 if row is None else row.attempts + 1
        fresh = _new(call, session_id=session_id, tenant_id=tenant_id, epoch=epoch, now=now)
        if row is not None:
            fresh = replace(
                row,
                status=CallStatus.STARTED,
                started_at=now,
                ended_at=None,
                settled_at=None,
                note=None,
                error=None,
                turn_id=call.turn_id,
                place=call.place,
                worker_id=fresh.worker_id,
                epoch=epoch,
                timeout=call.timeout,
            )
        self._rows[call.id] = replace(fresh, attempts=attempts)
        return attempts

    # -- for anybody

    def end(
        self, call: NewCall, outcome: CallOutcome, *, session_id: UUID, tenant_id: UUID, epoch: int, now: datetime
    ) -> ToolCallRecord | None:
        """What stands instead, if that is something else."""
        row = self._rows.get(call.id)
        if row is not None and not _may_end(row, outcome, epoch=epoch):
            return row
        row = row or _new(call, session_id=session_id, tenant_id=tenant_id, epoch=epoch, now=now)
        self._rows[call.id] = replace(
            row,
            status=outcome.status,
            ended_at=now,
            result=None if outcome.result is None else json.loads(outcome.result),
            artifact_id=outcome.artifact_id,
            error=None if outcome.error is None else json.loads(outcome.error),
        )
        return None

    def starter_gone(self, call_id: UUID, *, epoch: int, dead: bool, lease_ttl: timedelta, now: datetime) -> bool:
        """``dead``: the worker that held ``epoch`` has certainly ended."""
        row = self._rows.get(call_id)
        if row is None or row.epoch != epoch:
            return False
        return dead or (not row.left_behind and row.started_at + row.timeout + lease_ttl < now)


def _may_begin(row: ToolCallRecord, *, epoch: int, over: int | None) -> bool:
    if row.status is CallStatus.FAILED or (row.status in OPEN and row.epoch == over):
        return True
    return row.status is CallStatus.STARTED and (row.effect is not Effect.IRREVERSIBLE or row.epoch == epoch)


def _may_end(row: ToolCallRecord, outcome: CallOutcome, *, epoch: int) -> bool:
    done = outcome.status is CallStatus.DONE
    if row.status in OPEN:
        return done or row.epoch == epoch
    return row.status is CallStatus.FAILED and done and row.settled_at is None


def _new(call: NewCall, *, session_id: UUID, tenant_id: UUID, epoch: int, now: datetime) -> ToolCallRecord:
    return ToolCallRecord(
        id=call.id,
        tenant_id=tenant_id,
        session_id=session_id,
        turn_id=call.turn_id,
        tool=call.tool,
        effect=call.effect,
        dedupe=call.dedupe,
        place=call.place,
        input=json.loads(call.input),
        status=CallStatus.STARTED,
        attempts=1,
        worker_id=UUID(int=epoch),
        epoch=epoch,
        timeout=call.timeout,
        created_at=now,
        started_at=now,
        ended_at=None,
        result=None,
        artifact_id=None,
        error=None,
        settled_at=None,
        settled_by=None,
        note=None,
    )
