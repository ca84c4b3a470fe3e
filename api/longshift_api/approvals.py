"""Approvals: what turns ask people, and the answers, of which the first counts.

Answering needs the scope ``submit``: it is a part of the work, done by an application for the people who use it. Whoever may
not let an agent go on must not have the key with which its turns are submitted.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request, Response

from longshift.db import approvals
from longshift.errors import NotFound
from longshift.model import Prefix, parse_id
from longshift_api import deps
from longshift_api.deps import Caller, EdgeDep, Promise, in_path
from longshift_api.pages import Cursor, Limit, cut, only, read_cursor, reply
from longshift_api.problems import documented
from longshift_api.replies import IDEMPOTENCY_KEY
from longshift_api.schemas_tools import APPROVAL_ID, KEY_ID, ApprovalPage, ApprovalView
from longshift_api.sent import AnswerBody

router = deps.router("approvals")
_ANSWERED = f"approval {APPROVAL_ID} ('publish') was granted by key {KEY_ID} at 2026-01-31T12:00:00+00:00"


@router.get(
    "/approvals",
    summary="List approvals, newest first",
    response_model=None,
    responses={200: {"model": ApprovalPage}, **documented()},
)
async def list_approvals(
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: Annotated[Literal["open", "all"], Query(description="open: those that wait for an answer")] = "open",
    session_id: str | None = None,
    turn_id: str | None = None,
) -> Response:
    only(request, ("limit", "cursor", "status", "session_id", "turn_id"))
    rows = await approvals.listed(
        edge.db,
        tenant_id=caller.tenant_id,
        open_only=status == "open",
        session_id=parse_id(Prefix.SESSION, session_id) if session_id is not None else None,
        turn_id=parse_id(Prefix.TURN, turn_id) if turn_id is not None else None,
        before=read_cursor(cursor),
        limit=limit + 1,
    )
    page, following = cut(rows, limit, key=lambda approval: approval.id)
    data = [ApprovalView.of(approval) for approval in page]
    return reply(ApprovalPage(data=data, has_more=following is not None, next=following))


@router.get(
    "/approvals/{approval_id}",
    summary="One approval",
    response_model=None,
    responses={200: {"model": ApprovalView}, **documented(404)},
)
async def get_approval(approval_id: str, edge: EdgeDep, caller: Caller) -> Response:
    approval = await approvals.find(edge.db, in_path(Prefix.APPROVAL, approval_id), tenant_id=caller.tenant_id)
    if approval is None:
        raise NotFound(f"there is no approval {approval_id}")
    return reply(ApprovalView.of(approval))


@router.post(
    "/approvals/{approval_id}",
    summary="Answer an approval",
    response_model=None,
    responses={
        200: {"model": ApprovalView, "description": "Answered; its turn goes on"},
        **documented(404, 413, 415, conflict=("already_answered", _ANSWERED)),
    },
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
)
async def answer_approval(
    approval_id: str, body: AnswerBody, edge: EdgeDep, caller: Caller, promise: Promise
) -> Response:
    """Of several answers the first counts; the others get 409, which says what was decided, by whom and when.

    409 also if nobody waits for the answer any more: its time was over, or its turn has ended.
    """
    approval = await edge.mailbox.answer(
        in_path(Prefix.APPROVAL, approval_id),
        tenant_id=caller.tenant_id,
        answer={"granted": body.granted, "comment": body.comment},
        by=caller.key_id,
        idempotency=promise,
    )
    return reply(ApprovalView.of(approval))
