"""The log of a session or a turn: a page of JSON, or a stream by ``Accept: text/event-stream``.

A stream can be resumed from any place: ``id`` is the event's ``seq``, given back as ``Last-Event-ID`` or ``?after=``.

    (event's kind)   a fact of the log; its id is its seq          open    the first frame: where the stream begins
    delta            text while it is made; lossy, no id           reset   history was rewritten: begin again from 0
    done             the turn has ended, and so does the stream

Events that are in the cold tier come from there; nobody can tell, except by the time that the first of them takes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query, Request, Response
from starlette.responses import StreamingResponse

from longshift.db import views
from longshift.errors import InvalidInput, NotFound
from longshift.events import Event
from longshift.hot import log_channel, turn_channel
from longshift.model import Json, Prefix, show_id
from longshift_api import deps
from longshift_api.deps import Caller, Edge, EdgeDep, in_path
from longshift_api.pages import reply
from longshift_api.problems import documented
from longshift_api.schemas import EventPage, EventView
from longshift_api.waiting import next_message, recheck

router = deps.router("events")
PING = 15.0
PAGE = 500
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: nginx must not hold frames back
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": EventPage,
        "description": "A page, or a stream",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'id: 3\nevent: step.completed\ndata: {"seq": 3, ...}\n\n',
            }
        },
    },
    **documented(404),
}
_LAST_EVENT_ID = {
    "parameters": [{"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}, "example": "3"}]
}
After = Annotated[int, Query(ge=0, le=2**62, description="events with a greater seq")]
EventLimit = Annotated[int, Query(ge=1, le=1000)]


@dataclass(frozen=True, slots=True)
class Source:
    """Whose events: of a session, or of one turn in it."""

    tenant_id: UUID
    session_id: UUID
    turn_id: UUID | None = None

    @property
    def turn_ids(self) -> list[UUID] | None:
        return None if self.turn_id is None else [self.turn_id]


@router.get(
    "/sessions/{session_id}/events",
    summary="Events of a session",
    response_model=None,
    responses=_RESPONSES,
    openapi_extra=_LAST_EVENT_ID,
)
async def session_events(
    session_id: str, request: Request, edge: EdgeDep, caller: Caller, after: After = 0, limit: EventLimit = 100
) -> Response:
    """A page; with ``Accept: text/event-stream`` a stream, which goes on until the client leaves."""
    session = in_path(Prefix.SESSION, session_id)
    if await views.session(edge.db, session, tenant_id=caller.tenant_id) is None:
        raise NotFound(f"there is no session {session_id}")
    return await _answer(request, edge, Source(caller.tenant_id, session), after=after, limit=limit)


@router.get(
    "/turns/{turn_id}/events",
    summary="Events of a turn",
    response_model=None,
    responses=_RESPONSES,
    openapi_extra=_LAST_EVENT_ID,
)
async def turn_events(
    turn_id: str, request: Request, edge: EdgeDep, caller: Caller, after: After = 0, limit: EventLimit = 100
) -> Response:
    """A page; with ``Accept: text/event-stream`` a stream, which ends with the turn, by ``event: done``."""
    turn = await views.turn(edge.db, in_path(Prefix.TURN, turn_id), tenant_id=caller.tenant_id)
    if turn is None:
        raise NotFound(f"there is no turn {turn_id}")
    return await _answer(request, edge, Source(caller.tenant_id, turn.session_id, turn.id), after=after, limit=limit)


async def _answer(request: Request, edge: Edge, source: Source, *, after: int, limit: int) -> Response:
    after = _last_event_id(request, default=after)
    if "text/event-stream" in request.headers.get("accept", ""):
        frames = stream(edge, source, after=after)
        return StreamingResponse(frames, media_type="text/event-stream", headers=_HEADERS)
    found = await edge.archive.read(source.session_id, after=after, limit=limit + 1, turn_ids=source.turn_ids)
    page = found.events[:limit]
    following = page[-1].seq if page else after
    data = [EventView.of(event) for event in page]
    return reply(EventPage(data=data, has_more=found.cut or len(found.events) > limit, next=following))


def _last_event_id(request: Request, *, default: int) -> int:
    given = request.headers.get("last-event-id")
    if given is None:
        return default
    if not given.isascii() or not given.isdigit() or len(given) > 18:
        raise InvalidInput("Last-Event-ID must be the id of a frame of this stream: a whole number")
    return int(given)


async def stream(edge: Edge, source: Source, *, after: int) -> AsyncIterator[str]:
    """Frames from the event after ``after`` on, until the turn ends (of a session: for ever) or the process stops."""
    session = await views.session(edge.db, source.session_id, tenant_id=source.tenant_id)
    if session is not None and after > session.last_seq:  # the client has seen what does not exist (any more)
        after = 0
        yield "retry: 1000\n" + frame("reset", {"last_seq": session.last_seq}, id_=0)
    else:
        yield "retry: 1000\n" + frame("open", {"after": after}, id_=after)
    channels = [log_channel(source.session_id)] + ([turn_channel(source.turn_id)] if source.turn_id else [])
    async with edge.hot.listen(*channels) as messages:
        pinged = edge.clock.monotonic()
        while not edge.stopping.is_set():
            ended = await _end_of(edge, source)  # before the log is read: what a turn wrote before its end is all there
            async for event in _unread(edge, source, after=after):
                after = event.seq
                yield frame(event.kind, EventView.of(event).model_dump_json(), id_=event.seq)
            if ended is not None:
                yield frame("done", ended)
                return
            look_at = edge.clock.monotonic() + recheck(edge)
            while (now := edge.clock.monotonic()) < look_at and not edge.stopping.is_set():
                if now - pinged >= PING:
                    pinged = now
                    yield ": ping\n\n"
                message = await next_message(edge, messages, within=min(look_at - now, pinged + PING - now))
                delta = _delta(message, source)
                if delta is not None:
                    yield frame("delta", delta)
                elif message is not None and _is_news(message, after):
                    break


async def _unread(edge: Edge, source: Source, *, after: int) -> AsyncIterator[Event]:
    while True:
        page = await edge.archive.read(source.session_id, after=after, limit=PAGE, turn_ids=source.turn_ids)
        for event in page.events:
            yield event
        if len(page.events) < PAGE and not page.cut:
            return
        after = page.events[-1].seq


async def _end_of(edge: Edge, source: Source) -> dict[str, Json] | None:
    """What ``done`` says, if the turn has ended."""
    if source.turn_id is None:
        return None
    turn = await views.turn(edge.db, source.turn_id, tenant_id=source.tenant_id)
    if turn is not None and not turn.status.terminal:
        return None
    return {"turn_id": show_id(Prefix.TURN, source.turn_id), "status": turn.status.value if turn else None}


def _delta(message: str | None, source: Source) -> dict[str, Json] | None:
    """The text in a message, if it is a delta of this source."""
    if message is None or not message.startswith("{"):
        return None
    value = json.loads(message)
    if "delta" not in value or (source.turn_id is not None and value["turn"] != source.turn_id.hex):
        return None
    turn_id = show_id(Prefix.TURN, UUID(hex=value["turn"]))
    return {"text": value["delta"], "turn_id": turn_id, "step": value["step"], "attempt": value["attempt"]}


def _is_news(message: str, after: int) -> bool:
    """Whether a message means that the log has grown beyond ``after``, or that the turn has changed."""
    if not message.startswith("{"):
        return True
    return int(json.loads(message).get("seq", 0)) > after


def frame(kind: str, data: dict[str, Json] | str, *, id_: int | None = None) -> str:
    """One server-sent event. JSON has no line breaks, so ``data`` is one line."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return ("" if id_ is None else f"id: {id_}\n") + f"event: {kind}\ndata: {text}\n\n"
