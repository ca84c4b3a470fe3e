"""The shapes on the wire of what turns do to the world and of what they ask: tool calls, approvals, steps."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field

from longshift.db.steps import StepRecord
from longshift.model import ApprovalRecord, CallStatus, Dedupe, Effect, Prefix, ToolCallRecord, show_id
from longshift.offload import Pointer
from longshift_api.schemas import MOMENT, SESSION_ID, TURN_ID, Page, Shown, ValueView

CALL_ID = "call_6f1c0b7ad9e34f52a1b8c3d4e5f60718"
APPROVAL_ID = "apr_9b2e4d6f8a1c4e3fb5d7092468ace135"
KEY_ID = "key_01936f6e4b7a7c0e8f5d2f6a3b1c0da2"
WORKER_ID = "wrk_01936f6e4b7a7c0e8f5d2f6a3b1c0da3"


class ToolCallView(Shown):
    """One call of a tool, however often it was started: a line of the audit trail."""

    id: str = Field(examples=[CALL_ID], description="also the key that the tool is given")
    session_id: str
    turn_id: str = Field(description="the turn that started it last")
    tool: str
    effect: Effect = Field(description="what it does to the world: read, write or irreversible")
    dedupe: Dedupe = Field(description="within what an equal call is the same call")
    key: str = Field(description="replay key of the step that started it last")
    input: Any
    status: CallStatus = Field(
        description="`unknown`: nobody knows whether an irreversible call happened, an operator must say; "
        "`given_up`: the operator did not know either"
    )
    attempts: int = Field(description="how often it was started")
    worker_id: str = Field(description="the worker that started it last")
    timeout_s: float = Field(description="seconds that one call may take")
    created_at: datetime = Field(description="when it was started first")
    started_at: datetime = Field(description="when it was started last")
    ended_at: datetime | None = Field(description="when its outcome was recorded")
    result: Any = Field(description="null if there is none, or if it is large: see `artifact_id`")
    artifact_id: str | None = Field(description="where a large result is")
    error: dict[str, Any] | None
    settled_at: datetime | None = Field(description="when an operator said what had happened")
    settled_by: str | None = Field(description="the API key of that operator")
    note: str | None
    links: dict[str, str]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": CALL_ID,
                    "session_id": SESSION_ID,
                    "turn_id": TURN_ID,
                    "tool": "send_payment",
                    "effect": "irreversible",
                    "dedupe": "turn",
                    "key": "/send_payment#0",
                    "input": {"to": "ACME", "amount": 120},
                    "status": "unknown",
                    "attempts": 1,
                    "worker_id": WORKER_ID,
                    "timeout_s": 60.0,
                    "created_at": MOMENT,
                    "started_at": MOMENT,
                    "ended_at": MOMENT,
                    "result": None,
                    "artifact_id": None,
                    "error": {"type": "TimeoutError", "message": "no result within 60 s"},
                    "settled_at": None,
                    "settled_by": None,
                    "note": None,
                    "links": {"self": f"/v1/tool-calls/{CALL_ID}", "settle": f"/v1/tool-calls/{CALL_ID}/settle"},
                }
            ]
        }
    )

    @classmethod
    def of(cls, call: ToolCallRecord) -> Self:
        call_id, session_id = show_id(Prefix.CALL, call.id), show_id(Prefix.SESSION, call.session_id)
        turn_id = show_id(Prefix.TURN, call.turn_id)
        artifact_id = show_id(Prefix.ARTIFACT, call.artifact_id) if call.artifact_id else None
        here = f"/v1/tool-calls/{call_id}"
        links = {"self": here, "turn": f"/v1/turns/{turn_id}", "session": f"/v1/sessions/{session_id}"}
        if artifact_id is not None:
            links["artifact"] = f"/v1/artifacts/{artifact_id}"
        if call.status is CallStatus.UNKNOWN:
            links["settle"] = f"{here}/settle"
        return cls(
            id=call_id,
            session_id=session_id,
            turn_id=turn_id,
            tool=call.tool,
            effect=call.effect,
            dedupe=call.dedupe,
            key=call.place,
            input=call.input,
            status=call.status,
            attempts=call.attempts,
            worker_id=show_id(Prefix.WORKER, call.worker_id),
            timeout_s=call.timeout.total_seconds(),
            created_at=call.created_at,
            started_at=call.started_at,
            ended_at=call.ended_at,
            result=call.result,
            artifact_id=artifact_id,
            error=dict(call.error) if call.error is not None else None,
            settled_at=call.settled_at,
            settled_by=show_id(Prefix.KEY, call.settled_by) if call.settled_by else None,
            note=call.note,
            links=links,
        )


class ApprovalView(Shown):
    """A turn asks somebody whether it may go on."""

    id: str = Field(examples=[APPROVAL_ID])
    session_id: str
    turn_id: str
    name: str
    show: Any = Field(description="what the one who decides should see")
    status: Literal["open", "answered", "closed"] = Field(
        description="`closed`: it got no answer in time, or its turn has ended"
    )
    granted: bool | None
    comment: str | None
    created_at: datetime
    expires_at: datetime | None = Field(description="when the turn goes on without an answer; null: with its deadline")
    answered_at: datetime | None
    answered_by: str | None = Field(description="the API key of the answer")
    closed_at: datetime | None
    links: dict[str, str]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": APPROVAL_ID,
                    "session_id": SESSION_ID,
                    "turn_id": TURN_ID,
                    "name": "publish",
                    "show": {"title": "What is a lease?"},
                    "status": "answered",
                    "granted": True,
                    "comment": "well done",
                    "created_at": MOMENT,
                    "expires_at": None,
                    "answered_at": MOMENT,
                    "answered_by": KEY_ID,
                    "closed_at": None,
                    "links": {"self": f"/v1/approvals/{APPROVAL_ID}", "turn": f"/v1/turns/{TURN_ID}"},
                }
            ]
        }
    )

    @classmethod
    def of(cls, approval: ApprovalRecord) -> Self:
        approval_id, session_id = show_id(Prefix.APPROVAL, approval.id), show_id(Prefix.SESSION, approval.session_id)
        turn_id = show_id(Prefix.TURN, approval.turn_id)
        answer = approval.answer or {}
        waits = approval.closed_at is None
        return cls(
            id=approval_id,
            session_id=session_id,
            turn_id=turn_id,
            name=approval.name,
            show=approval.show,
            status="answered" if approval.answered_at is not None else "open" if waits else "closed",
            granted=answer.get("granted"),
            comment=answer.get("comment"),
            created_at=approval.created_at,
            expires_at=approval.expires_at,
            answered_at=approval.answered_at,
            answered_by=show_id(Prefix.KEY, approval.answered_by) if approval.answered_by else None,
            closed_at=approval.closed_at,
            links={
                "self": f"/v1/approvals/{approval_id}",
                "turn": f"/v1/turns/{turn_id}",
                "session": f"/v1/sessions/{session_id}",
            },
        )


class StepView(Shown):
    """One recorded step."""

    seq: int = Field(description="seq of its event in the session")
    turn_id: str = Field(description="the turn that recorded it: this one, or one that it retries")
    key: str = Field(description="replay key: its place in the turn")
    name: str = Field(description="with `$` as the first character it is one of Longshift's own")
    status: Literal["completed", "failed"]
    result: Any = Field(description="null if `artifact` says where it is")
    artifact: ValueView | None = Field(None, description="where the result is, if it is larger than 32 KiB of JSON")
    error: dict[str, Any] | None = Field(description="`type` and `message` of what the step raised last")
    attempts: int | None = Field(description="tries that it took; null: not recorded")
    ms: int | None = Field(description="milliseconds that it took, all tries together")
    at: datetime = Field(description="when it ended")
    tool_call_id: str | None = Field(description="the tool call behind it, where there is one")

    @classmethod
    def of(cls, step: StepRecord) -> Self:
        return cls(
            seq=step.seq,
            turn_id=show_id(Prefix.TURN, step.turn_id),
            key=step.key,
            name=step.name,
            status="completed" if step.completed else "failed",
            result=step.result,
            artifact=_value(Pointer.of(step.artifact)) if step.artifact is not None else None,
            error=dict(step.error) if step.error is not None else None,
            attempts=step.attempts,
            ms=step.ms,
            at=step.at,
            tool_call_id=step.call,
        )


def _value(pointer: Pointer) -> ValueView:
    return ValueView.of(pointer.id, size=pointer.size, sha256=pointer.sha256, preview=pointer.preview)


class ToolCallPage(Page):
    data: Sequence[ToolCallView]


class ApprovalPage(Page):
    data: Sequence[ApprovalView]


class StepPage(Shown):
    data: Sequence[StepView]
    has_more: bool
    next: int = Field(description="give it as `after` for what comes next, now or later")
