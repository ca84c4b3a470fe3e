"""Turns: submit, poll, list, cancel, retry; what they have produced so far."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import AwareDatetime

from longshift.db import views
from longshift.db.views import TurnFilter
from longshift.errors import Conflict, IdempotencyMismatch, NotFound
from longshift.model import Prefix, TurnRecord, TurnStatus, parse_id, show_id
from longshift.tracing import names
from longshift_api import deps, values
from longshift_api.deps import Caller, Edge, EdgeDep, Promise, in_path
from longshift_api.pages import METADATA_FILTER, Cursor, Limit, cut, metadata_of, only, read_cursor, reply
from longshift_api.problems import Refusal, documented
from longshift_api.replies import REPLAYED, etag, made, matches, retry_after
from longshift_api.schemas import TURN_ID, TurnPage, TurnView
from longshift_api.schemas_tools import StepPage, StepView
from longshift_api.sent import CancelBody, RetryBody, TurnBody
from longshift_api.spans import span_of, traceparent_of
from longshift_api.waiting import change_of, wanted_wait

router = deps.router("turns")
After = Annotated[int, Query(ge=0, le=2**62, description="steps with a greater seq")]
StepLimit = Annotated[int, Query(ge=1, le=1000)]
_FILTERS = ("limit", "cursor", "status", "agent", "session_id", "batch_id", "created_at[gte]")
_ACCEPTED = {
    202: {"model": TurnView, "description": "Accepted and committed", "headers": made("/v1/turns/" + TURN_ID)},
    **documented(404, 413, 415, 423),
}


@router.post(
    "/turns", summary="Submit a turn on a new session", status_code=202, response_model=None, responses=_ACCEPTED
)
async def submit(request: Request, body: TurnBody, edge: EdgeDep, caller: Caller, promise: Promise) -> Response:
    """Answered once the turn is committed: it will reach a terminal state, whatever happens to workers."""
    draft = body.draft(traceparent=traceparent_of(request))
    accepted = await edge.mailbox.submit(draft, tenant_id=caller.tenant_id, on_busy=body.on_busy, idempotency=promise)
    return await _accepted(request, edge, caller, accepted.resource_id.hex, replayed=accepted.replayed)


@router.post(
    "/sessions/{session_id}/turns",
    summary="Submit a turn to a session",
    status_code=202,
    response_model=None,
    responses=_ACCEPTED,
)
async def submit_to_session(
    session_id: str, request: Request, body: TurnBody, edge: EdgeDep, caller: Caller, promise: Promise
) -> Response:
    """Turns of a session run one at a time, in the order in which they were accepted; ``on_busy`` decides otherwise."""
    draft = body.draft(session_id=in_path(Prefix.SESSION, session_id), traceparent=traceparent_of(request))
    accepted = await edge.mailbox.submit(draft, tenant_id=caller.tenant_id, on_busy=body.on_busy, idempotency=promise)
    return await _accepted(request, edge, caller, accepted.resource_id.hex, replayed=accepted.replayed)


@router.get(
    "/turns",
    summary="List turns, newest first",
    response_model=None,
    responses={200: {"model": TurnPage}, **documented()},
    openapi_extra={"parameters": [METADATA_FILTER]},
)
async def list_turns(
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: Annotated[list[TurnStatus] | None, Query(description="may be repeated")] = None,
    agent: str | None = None,
    session_id: str | None = None,
    batch_id: str | None = None,
    since: Annotated[AwareDatetime | None, Query(alias="created_at[gte]")] = None,
) -> Response:
    only(request, _FILTERS, metadata=True)
    where = TurnFilter(
        status=status,
        agent=agent,
        session_id=parse_id(Prefix.SESSION, session_id) if session_id is not None else None,
        batch_id=parse_id(Prefix.BATCH, batch_id) if batch_id is not None else None,
        created_since=since,
        metadata=metadata_of(request),
    )
    rows = await views.turns(
        edge.db, tenant_id=caller.tenant_id, where=where, before=read_cursor(cursor), limit=limit + 1
    )
    page, following = cut(rows, limit, key=lambda turn: turn.id)
    known = await values.of_turns(edge, page)
    data = [TurnView.of(turn, values=known) for turn in page]
    return reply(TurnPage(data=data, has_more=following is not None, next=following))


@router.get(
    "/turns/{turn_id}",
    summary="Poll a turn",
    response_model=None,
    responses={
        200: {
            "model": TurnView,
            "description": "The turn",
            "headers": {
                "ETag": {"schema": {"type": "string"}, "description": "its version: give it as If-None-Match"},
                "Retry-After": {
                    "schema": {"type": "integer"},
                    "description": "seconds until another look is worth it; absent once it has ended",
                },
            },
        },
        304: {"description": "It still is as If-None-Match says"},
        **documented(404),
    },
    openapi_extra={
        "parameters": [
            {"name": "Prefer", "in": "header", "schema": {"type": "string"}, "example": "wait=30"},
            {"name": "If-None-Match", "in": "header", "schema": {"type": "string"}, "example": 'W/"3"'},
            {
                "name": "wait",
                "in": "query",
                "schema": {"type": "integer", "minimum": 0},
                "description": "seconds to hold the answer until the turn changes; at most 60; also `Prefer: wait=30`",
            },
        ]
    },
)
async def get_turn(turn_id: str, request: Request, edge: EdgeDep, caller: Caller) -> Response:
    """Cheap to repeat: with ``If-None-Match`` it is 304 while nothing changed, with ``wait`` it answers on a change.

    Large inputs and outputs are fetched, up to 1 MiB; where that is not possible they are null, and ``input_artifact`` and
    ``output_artifact`` say where they are.
    """
    turn = await _find(edge, caller, turn_id)
    seconds = wanted_wait(request)
    asked = "if-none-match" in request.headers
    if seconds and not turn.status.terminal and (not asked or matches(request, etag(turn.version))):
        turn = await change_of(edge, turn, seconds=seconds) or turn
    headers = _headers(edge, turn)
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
    if matches(request, etag(turn.version)):
        return Response(status_code=304, headers=headers)
    known = await values.of_turns(edge, [turn])
    found = await values.whole(edge, turn, known)
    if turn.status.terminal and not values.are_whole(found, known):  # or nobody would ever ask for them again
        headers["ETag"] = etag(turn.version, partial=True)
    return reply(await _view(edge, found, known), headers=headers)


@router.post(
    "/turns/{turn_id}/cancel",
    summary="Cancel a turn",
    status_code=202,
    response_model=None,
    responses={
        200: {"model": TurnView, "description": "It has ended"},
        202: {"model": TurnView, "description": "It runs; its worker has been told"},
        **documented(404, 413, 415),
    },
)
async def cancel_turn(turn_id: str, edge: EdgeDep, caller: Caller, body: CancelBody | None = None) -> Response:
    """At once if it never started, else as soon as its worker has heard it. An ended turn stays as it is."""
    turn = await edge.mailbox.cancel_turn(
        in_path(Prefix.TURN, turn_id), tenant_id=caller.tenant_id, reason=(body or CancelBody()).reason
    )
    return reply(await _view(edge, turn), status=200 if turn.status.terminal else 202, headers=_headers(edge, turn))


@router.post(
    "/turns/{turn_id}/retry",
    summary="Retry a turn",
    status_code=202,
    response_model=None,
    responses={
        202: {"model": TurnView, "description": "Accepted and committed", "headers": made("/v1/turns/" + TURN_ID)},
        **documented(404, 413, 415, conflict=("not_ended", f"{TURN_ID} is running: cancel it first, or wait")),
    },
)
async def retry_turn(
    turn_id: str, request: Request, edge: EdgeDep, caller: Caller, promise: Promise, body: RetryBody | None = None
) -> Response:
    """A new turn, last in the same session, with the same input and metadata. It goes on from the last step that the turn
    has recorded: what was completed is not done again, what failed is tried again.

    Only a turn that failed, was cancelled or has expired can be retried, and of one turn only one retry is open at a time.
    """
    turn = in_path(Prefix.TURN, turn_id)
    wanted = body or RetryBody()
    try:
        accepted = await edge.mailbox.retry_turn(
            turn,
            tenant_id=caller.tenant_id,
            agent_version=wanted.agent_version,
            deadline=wanted.deadline,
            idempotency=promise,
        )
    except IdempotencyMismatch:
        raise
    except Conflict as error:
        status = (await _find(edge, caller, turn_id)).status
        code = "succeeded" if status is TurnStatus.SUCCEEDED else "retried" if status.terminal else "not_ended"
        raise Refusal(409, code, str(error)) from None
    return await _accepted(request, edge, caller, accepted.resource_id.hex, replayed=accepted.replayed)


@router.get(
    "/turns/{turn_id}/steps",
    summary="What a turn has produced so far",
    response_model=None,
    responses={200: {"model": StepPage}, **documented(404)},
)
async def turn_steps(
    turn_id: str, request: Request, edge: EdgeDep, caller: Caller, after: After = 0, limit: StepLimit = 100
) -> Response:
    """The recorded steps of a turn that runs, waits or has ended, however it ended, and of the turns that it retries."""
    only(request, ("after", "limit"))
    turn = await _find(edge, caller, turn_id)
    found, cut_short = await edge.archive.steps(turn, after=after, limit=limit + 1)
    page = found[:limit]
    following = page[-1].seq if page else after
    data = [StepView.of(step) for step in page]
    return reply(StepPage(data=data, has_more=cut_short or len(found) > limit, next=following))


async def _accepted(request: Request, edge: Edge, caller: Caller, turn_id: str, *, replayed: bool) -> Response:
    edge.metrics.accepted.inc(0 if replayed else 1)
    turn = await _find(edge, caller, turn_id)
    span = span_of(request)
    span.set({names.TURN_ID: show_id(Prefix.TURN, turn.id), names.SESSION_ID: show_id(Prefix.SESSION, turn.session_id)})
    if turn.traceparent not in (None, span.traceparent):  # a retry, or a repeated request
        span.link(turn.traceparent)
    view = await _view(edge, turn)
    headers = _headers(edge, turn) | {"Location": view.links["self"]} | (REPLAYED if replayed else {})
    return reply(view, status=202, headers=headers)


async def _find(edge: Edge, caller: Caller, turn_id: str) -> TurnRecord:
    turn = await views.turn(edge.db, in_path(Prefix.TURN, turn_id), tenant_id=caller.tenant_id)
    if turn is None:
        raise NotFound(f"there is no turn {turn_id}")
    return turn


async def _view(edge: Edge, turn: TurnRecord, known: values.Values | None = None) -> TurnView:
    """``known``: what is known of its large values, if that was looked up."""
    if known is None:
        known = await values.of_turns(edge, [turn])
    queued = turn.status is TurnStatus.QUEUED and turn.position is not None and turn.position > 1
    return TurnView.of(
        turn,
        values=known,
        blocked_by=await views.blocked_by(edge.db, turn.id) if queued else None,
        waiting_for=await edge.archive.waiting_for(turn, now=edge.clock.now())
        if turn.status is TurnStatus.WAITING
        else None,
    )


def _headers(edge: Edge, turn: TurnRecord) -> dict[str, str]:
    headers = {"ETag": etag(turn.version), "Cache-Control": "private, no-cache"}
    if not turn.status.terminal:
        headers["Retry-After"] = str(retry_after(turn, edge.clock.now()))
    return headers
