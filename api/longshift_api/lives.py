"""What becomes of sessions: archive, restore, delete (with the scope ``admin``), export."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Response
from starlette.responses import StreamingResponse

from longshift.export import export
from longshift.lifecycle import Moved
from longshift.model import Prefix
from longshift_api import deps
from longshift_api.deps import Caller, EdgeDep, OperatorRoute, in_path
from longshift_api.pages import reply
from longshift_api.problems import documented
from longshift_api.schemas import SESSION_ID, DeletedView, MovedView

router = deps.router("sessions", route_class=OperatorRoute)
LINES = "application/jsonl"
_IN_USE = ("in_use", f"{SESSION_ID} has an open turn: wait until it has ended, or cancel it")


@router.post(
    "/sessions/{session_id}/archive",
    summary="Archive a session's log",
    response_model=None,
    responses={200: {"model": MovedView}, **documented(404, conflict=_IN_USE)},
)
async def archive_session(session_id: str, edge: EdgeDep, caller: Caller) -> Response:
    """Move its events to the cold tier, as happens by itself when it is idle for long. It works as before: a turn needs the
    context only, and old events are read from there."""
    session = in_path(Prefix.SESSION, session_id)
    moved = await edge.lifecycle.archive(session, tenant_id=caller.tenant_id)
    return reply(_moved(session_id, moved, through=moved.through))


@router.post(
    "/sessions/{session_id}/restore",
    summary="Restore a session's log",
    response_model=None,
    responses={200: {"model": MovedView}, **documented(404, conflict=_IN_USE)},
)
async def restore_session(session_id: str, edge: EdgeDep, caller: Caller) -> Response:
    """Put its archived events back into Postgres, verified. No session needs this to work."""
    session = in_path(Prefix.SESSION, session_id)
    moved = await edge.lifecycle.restore(session, tenant_id=caller.tenant_id)
    return reply(_moved(session_id, moved, through=0))


@router.delete(
    "/sessions/{session_id}",
    summary="Delete a session",
    response_model=None,
    responses={200: {"model": DeletedView}, **documented(404, conflict=_IN_USE)},
)
async def delete_session(session_id: str, edge: EdgeDep, caller: Caller) -> Response:
    """With its turns, events, artifacts and whatever else it has, in all tiers: the answer says how much that was. Its id is
    not given out again. Turns that belong to a batch stay in it, emptied."""
    session = in_path(Prefix.SESSION, session_id)
    removed = await edge.lifecycle.delete(session, tenant_id=caller.tenant_id)
    counts = {name: getattr(removed, name) for name in DeletedView.model_fields if name != "session_id"}
    return reply(DeletedView(session_id=session_id, **counts))


@router.get(
    "/sessions/{session_id}/export",
    summary="Export a session",
    response_model=None,
    responses={
        200: {
            "description": "JSON lines, the last of which has counts and a hash of the others",
            "content": {LINES: {"example": '{"type":"session","format":1, ...}\n'}},
        },
        **documented(404),
    },
)
async def export_session(session_id: str, edge: EdgeDep, caller: Caller) -> Response:
    """All that is known of it, archived events included; of artifacts what describes them. Streamed: an export whose last
    line is not of the type `end` was cut off."""
    session = in_path(Prefix.SESSION, session_id)
    lines = export(edge.db, edge.archive, session, tenant_id=caller.tenant_id)
    first = await anext(lines)  # what is missing must be an error, not half an answer
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.jsonl"', "Cache-Control": "no-store"}

    async def all_of_them() -> AsyncIterator[bytes]:
        yield first
        async for line in lines:
            yield line

    return StreamingResponse(all_of_them(), media_type=LINES, headers=headers)


def _moved(session_id: str, moved: Moved, *, through: int) -> MovedView:
    return MovedView(session_id=session_id, events=moved.events, archived_through=through, bytes=moved.bytes)
