"""Tool calls: the audit trail of a session, and what an operator has to say about calls whose outcome is in doubt.

Settling needs the scope ``admin``. Whoever settles states as a fact what nobody could know, and ``not_done`` lets an
irreversible call happen again. A key that may only submit can be in the hands of an application, or of an agent.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request, Response

from longshift.db import tool_calls, views
from longshift.errors import Conflict, IdempotencyMismatch, NotFound
from longshift.model import CallStatus, Prefix, ToolCallRecord, parse_id
from longshift_api import deps
from longshift_api.deps import Caller, Edge, EdgeDep, OperatorRoute, Promise, in_path
from longshift_api.pages import Cursor, Limit, cut, only, read_cursor, reply
from longshift_api.problems import Refusal, documented
from longshift_api.replies import IDEMPOTENCY_KEY
from longshift_api.schemas_tools import CALL_ID, KEY_ID, ToolCallPage, ToolCallView
from longshift_api.sent import SettleBody

router = deps.router("tool calls", route_class=OperatorRoute)
_SETTLED = (
    f"tool call {CALL_ID} is not in doubt any more: {KEY_ID} settled it at 2026-01-31T12:00:00+00:00, and it is done"
)


@router.get(
    "/sessions/{session_id}/tool-calls",
    summary="The audit trail of a session",
    response_model=None,
    responses={200: {"model": ToolCallPage}, **documented(404)},
)
async def session_calls(
    session_id: str,
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    limit: Limit = 20,
    cursor: Cursor = None,
    turn_id: Annotated[str | None, Query(description="started last by this turn")] = None,
    status: CallStatus | None = None,
    tool: str | None = None,
) -> Response:
    """What the session's turns have called, newest first: when, by which worker, how often, and what came of it."""
    only(request, ("limit", "cursor", "turn_id", "status", "tool"))
    session = in_path(Prefix.SESSION, session_id)
    if await views.session(edge.db, session, tenant_id=caller.tenant_id) is None:
        raise NotFound(f"there is no session {session_id}")
    rows = await tool_calls.list_calls(
        edge.db,
        tenant_id=caller.tenant_id,
        session_id=session,
        turn_id=parse_id(Prefix.TURN, turn_id) if turn_id is not None else None,
        status=status,
        tool=tool,
        before=read_cursor(cursor),
        limit=limit + 1,
    )
    return _page(rows, limit)


@router.get(
    "/tool-calls",
    summary="Tool calls that wait for an operator",
    response_model=None,
    responses={200: {"model": ToolCallPage}, **documented()},
)
async def open_calls(
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: Annotated[Literal["unknown"], Query(description="others are listed by their session")] = "unknown",
) -> Response:
    """Irreversible calls of which nobody knows whether they happened, of all sessions, newest first."""
    only(request, ("limit", "cursor", "status"))
    rows = await tool_calls.list_calls(
        edge.db,
        tenant_id=caller.tenant_id,
        before=read_cursor(cursor),
        limit=limit + 1,
    )
    return _page(rows, limit)


@router.get(
    "/tool-calls/{call_id}",
    summary="One tool call",
    response_model=None,
    responses={200: {"model": ToolCallView}, **documented(404)},
)
async def get_call(call_id: str, edge: EdgeDep, caller: Caller) -> Response:
    return reply(ToolCallView.of(await _find(edge, caller, call_id)))


@router.post(
    "/tool-calls/{call_id}/settle",
    summary="Settle a tool call that is in doubt",
    response_model=None,
    responses={
        200: {"model": ToolCallView, "description": "Settled"},
        **documented(404, 413, 415, conflict=("already_settled", _SETTLED)),
    },
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
)
async def settle_call(call_id: str, body: SettleBody, edge: EdgeDep, caller: Caller, promise: Promise) -> Response:
    """Of several who settle, the first counts; the others get 409 with who and when. The turn that waits for it goes on.

    Needs a key with the scope `admin`: `not_done` lets an irreversible call happen again.
    """
    call = in_path(Prefix.CALL, call_id)
    result = body.checked_result()
    try:
        settled = await edge.mailbox.settle(
            call,
            tenant_id=caller.tenant_id,
            outcome=body.outcome,
            result=result,
            note=body.note,
            by=caller.key_id,
            idempotency=promise,
        )
    except IdempotencyMismatch:
        raise
    except Conflict as error:
        known = await _find(edge, caller, call_id)
        raise Refusal(409, "already_settled" if known.settled_at else "not_in_doubt", str(error)) from None
    return reply(ToolCallView.of(settled))


def _page(rows: list[ToolCallRecord], limit: int) -> Response:
    page, following = cut(rows, limit, key=lambda call: call.id)
    data = [ToolCallView.of(call) for call in page]
    return reply(ToolCallPage(data=data, has_more=following is not None, next=following))


async def _find(edge: Edge, caller: Caller, call_id: str) -> ToolCallRecord:
    call = await tool_calls.find(edge.db, in_path(Prefix.CALL, call_id), tenant_id=caller.tenant_id)
    if call is None:
        raise NotFound(f"there is no tool call {call_id}")
    return call
