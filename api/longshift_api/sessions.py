"""Sessions: lasting identities. Turns and signals go to them."""

from fastapi import Request, Response

from longshift.db import aging, views
from longshift.db.keys import Scope
from longshift.errors import NotFound
from longshift.model import Prefix, show_id
from longshift_api import deps
from longshift_api.auth import require
from longshift_api.deps import Caller, EdgeDep, Promise, in_path
from longshift_api.pages import Cursor, Limit, cut, only, read_cursor, reply
from longshift_api.problems import documented
from longshift_api.replies import IDEMPOTENCY_KEY, REPLAYED, made
from longshift_api.schemas import SESSION_ID, SessionPage, SessionView, SignalView
from longshift_api.sent import SessionBody, SessionChange, SignalBody

router = deps.router("sessions")


@router.post(
    "/sessions",
    summary="Create a session",
    status_code=201,
    response_model=None,
    responses={
        200: {"model": SessionView, "description": "The session of this id exists already"},
        201: {"model": SessionView, "description": "Created", "headers": made("/v1/sessions/" + SESSION_ID)},
        **documented(404, 413, 415),
    },
)
async def create_session(edge: EdgeDep, caller: Caller, promise: Promise, body: SessionBody | None = None) -> Response:
    """The client may choose the id, and may then repeat the request safely."""
    wanted = body or SessionBody()
    session_id, new = await edge.mailbox.create_session(
        wanted.id,
        tenant_id=caller.tenant_id,
        metadata=wanted.metadata,
        ttl=wanted.lifetime,
        idempotency=promise,
    )
    session = await views.session(edge.db, session_id, tenant_id=caller.tenant_id)
    if session is None:
        raise NotFound(f"there is no session {show_id(Prefix.SESSION, session_id)}")
    view = SessionView.of(session)
    headers = {"Location": view.links["self"]}
    if not new and promise is not None:
        headers |= REPLAYED
    return reply(view, status=201 if new or promise is not None else 200, headers=headers)


@router.get(
    "/sessions",
    summary="List sessions, newest first",
    response_model=None,
    responses={200: {"model": SessionPage}, **documented()},
)
async def list_sessions(
    request: Request, edge: EdgeDep, caller: Caller, limit: Limit = 20, cursor: Cursor = None
) -> Response:
    only(request, ("limit", "cursor"))
    rows = await views.sessions(edge.db, tenant_id=caller.tenant_id, before=read_cursor(cursor), limit=limit + 1)
    page, following = cut(rows, limit, key=lambda session: session.id)
    data = [SessionView.of(session) for session in page]
    return reply(SessionPage(data=data, has_more=following is not None, next=following))


@router.get(
    "/sessions/{session_id}",
    summary="One session",
    response_model=None,
    responses={200: {"model": SessionView}, **documented(404)},
)
async def get_session(session_id: str, edge: EdgeDep, caller: Caller) -> Response:
    session = await views.session(edge.db, in_path(Prefix.SESSION, session_id), tenant_id=caller.tenant_id)
    if session is None:
        raise NotFound(f"there is no session {session_id}")
    return reply(SessionView.of(session))


@router.patch(
    "/sessions/{session_id}",
    summary="Change a session",
    response_model=None,
    responses={200: {"model": SessionView}, **documented(404, 413, 415)},
)
async def change_session(session_id: str, body: SessionChange, edge: EdgeDep, caller: Caller) -> Response:
    """Its metadata (replaced as a whole), its time to live.

    `ttl` needs a key with the scope `admin`, as deleting does: a session whose time is over is deleted.
    """
    session = in_path(Prefix.SESSION, session_id)
    set_ttl = "ttl" in body.model_fields_set
    if set_ttl:
        require(caller, Scope.ADMIN)
    await aging.change(
        edge.db,
        session,
        tenant_id=caller.tenant_id,
        metadata=body.metadata,
        ttl=body.lifetime,
        set_ttl=set_ttl,
        default=edge.config.session_ttl,
    )
    return await get_session(session_id, edge, caller)


@router.post(
    "/sessions/{session_id}/signals",
    summary="Send a signal",
    status_code=202,
    response_model=None,
    responses={202: {"model": SignalView, "description": "Accepted"}, **documented(404, 413, 415)},
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
)
async def send_signal(session_id: str, body: SignalBody, edge: EdgeDep, caller: Caller, promise: Promise) -> Response:
    """For whichever turn of the session waits for this name, now or later; it is consumed once.

    While an approval of this name is open in the session, the signal is its answer: `true`, `false`, or
    `{"granted": true, "comment": "..."}`.
    """
    session = in_path(Prefix.SESSION, session_id)
    accepted = await edge.mailbox.signal(
        session,
        tenant_id=caller.tenant_id,
        name=body.name,
        payload=body.payload,
        idempotency=promise,
        by=caller.key_id,
    )
    answered = accepted.approval_id
    view = SignalView(
        id=accepted.resource_id.hex,
        session_id=show_id(Prefix.SESSION, session),
        name=body.name,
        approval_id=show_id(Prefix.APPROVAL, answered) if answered is not None else None,
    )
    return reply(view, status=202, headers=REPLAYED if accepted.replayed else None)
