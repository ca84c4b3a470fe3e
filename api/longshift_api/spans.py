"""A span for each request below ``/v1``, which continues the caller's trace; and what turns hang below."""

from __future__ import annotations

import re

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longshift.tracing import NO_SPAN, Kind, Span, Traces, names
from longshift_api.deps import Edge
from longshift_api.measuring import METHODS

OTHER_METHOD = "_OTHER"
"""Of a method that a client made up; the name is that of the semantic conventions of OpenTelemetry for HTTP."""
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")


class Traced:
    """The outermost part of the application, so that all that is logged of a request says its trace."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        edge: Edge | None = getattr(scope["app"].state, "edge", None) if scope["type"] == "http" else None
        if edge is None or not edge.traces.is_on or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        await self._traced(edge.traces, scope, receive, send)

    async def _traced(self, traces: Traces, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), "")
        with traces.span(
            method if method != OTHER_METHOD else "HTTP",
            parent=given if TRACEPARENT.match(given) else None,
            kind=Kind.SERVER,
            attributes={names.HTTP_METHOD: method},
        ) as span:
            scope.setdefault("state", {})["span"] = span

            async def seen(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _answered(span, scope, status=message["status"])
                await send(message)

            await self._app(scope, receive, seen)


def _answered(span: Span, scope: Scope, *, status: int) -> None:
    """The route is known by now: its template, since paths have ids and whatever else clients write."""
    route = getattr(scope.get("route"), "path", None)
    if route is not None and scope["method"] in METHODS:
        span.rename(f"{scope['method']} {route}")
    span.set(
        {
            names.HTTP_ROUTE: route,
            names.HTTP_STATUS: status,
            names.REQUEST_ID: scope.get("state", {}).get("request_id"),
        }
    )
    if status >= 500:
        span.fail(str(status))


def span_of(request: Request) -> Span:
    """The span of the request; of one that is not traced, one that hears nothing."""
    span: Span = request.scope.get("state", {}).get("span", NO_SPAN)
    return span


def traceparent_of(request: Request) -> str | None:
    """Below what a turn hangs that this request submits: its span, or (nothing is traced here) the caller's."""
    given = request.headers.get("traceparent", "")
    return span_of(request).traceparent or (given if TRACEPARENT.match(given) else None)
