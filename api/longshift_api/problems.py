"""Errors on the wire: RFC 9457 ``application/problem+json`` with ``code``, ``retryable`` and ``errors``.

    401 unauthorized            413 too_large                 422 invalid_input, unknown_agent, idempotency_mismatch
    403 forbidden               415 unsupported_media_type    423 session_busy (retryable)
    404 not_found               416 bad_range                 500 internal_error: nothing of the inside is shown
    405 method_not_allowed      503 unavailable (retryable)   500 artifact_corrupt: a backup is needed, not another try
    409 already_settled, not_in_doubt (tool calls), already_answered (approvals), not_ended, succeeded, retried (retry),
        in_use (archive, restore and delete of a session: retryable)

A busy session is 423, not 409, because common clients repeat a 409 by themselves.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longshift import telemetry
from longshift.db.database import UniqueConflict
from longshift.errors import (
    ArtifactCorrupt,
    Conflict,
    IdempotencyMismatch,
    InvalidInput,
    LongshiftError,
    NotFound,
    SessionBusy,
    Unavailable,
    UnknownAgent,
)
from longshift.model import Json, new_id

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = "2"
_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}\Z")

STATUS: Mapping[type[LongshiftError], int] = {
    UnknownAgent: 422,  # the path was right, the body names something that does not exist
    NotFound: 404,
    InvalidInput: 422,
    IdempotencyMismatch: 422,
    SessionBusy: 423,
    Conflict: 409,
    ArtifactCorrupt: 500,
    Unavailable: 503,
}


class Refusal(LongshiftError):
    """The request cannot be served as it is, for a reason that only HTTP knows."""

    def __init__(self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.problem_code = code
        self.headers = headers


def too_large(what: str, limit: int) -> Refusal:
    return Refusal(413, "too_large", f"{what} has more than the {limit:,} bytes allowed")


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    errors: Sequence[Mapping[str, Json]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = {
        "type": f"urn:longshift:{code.replace('_', '-')}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": request.url.path,
        "code": code,
        "retryable": retryable,
        "errors": list(errors),
    }
    text = json.dumps(body, ensure_ascii=True)  # ASCII: a message may quote text that UTF-8 cannot carry
    return Response(text, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def misfits(error: ValidationError | RequestValidationError) -> list[dict[str, Json]]:
    """``[{path, message}]`` without the values, which may be large or secret."""
    found = []
    for item in error.errors():
        place = [part for part in item["loc"] if part not in ("body", "query", "path", "header")]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        message = (
            "must be a JSON object" if item["loc"] == ("body",) or item["type"] in _NO_OBJECT else str(item["msg"])
        )
        found.append({"path": path, "message": message})
    return found


def install(app: FastAPI) -> None:
    """Teach ``app`` to answer every error with a problem."""
    app.add_exception_handler(LongshiftError, _of_longshift)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(UniqueConflict, _of_conflict)


async def _of_longshift(request: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        return problem(request, error.status, error.problem_code, str(error), headers=error.headers)
    assert isinstance(error, LongshiftError)
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), None)
    if status is None:
        return internal(request, error)
    if isinstance(error, Unavailable):
        return unavailable(request, error)
    errors: Sequence[Mapping[str, Json]] = error.errors if isinstance(error, InvalidInput) else ()
    if isinstance(error, UnknownAgent):
        errors = [{"path": "agent", "message": str(error)}]
    return problem(request, status, error.code, str(error), retryable=error.retryable, errors=errors)


async def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = misfits(error)
    first = f"{errors[0]['path']}: {errors[0]['message']}" if errors[0]["path"] else str(errors[0]["message"])
    return problem(request, 422, InvalidInput.code, f"the request does not fit: {first}", errors=errors)


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            detail = f"there is nothing at {request.url.path}: see /openapi.json"
        case 405:
            headers["Allow"] = _allowed(request)
            detail = f"{request.method} is not possible here, only {headers['Allow']}"
        case _:
            detail = str(error.detail)
    code = HTTPStatus(error.status_code).name.lower()
    return problem(request, error.status_code, code, detail, headers=headers)


def _allowed(request: Request) -> str:
    """The methods that this path knows; Starlette names those of its first route only."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "PUT", "PATCH", "DELETE")}
    return ", ".join(
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    )


async def _of_conflict(request: Request, error: Exception) -> Response:
    detail = "another request made the same thing in this very moment: try again"
    return problem(request, 503, Unavailable.code, detail, retryable=True, headers={"Retry-After": "1"})


def unavailable(request: Request, error: Unavailable) -> Response:
    """Which server or folder it was is for the log, not for the client."""
    logger.warning("a dependency does not answer", extra={"reason": str(error), "request_id": _id_of(request)})
    detail = "a part of the service does not answer; what was accepted is safe: try again (see /readyz)"
    return problem(request, 503, error.code, detail, retryable=True, headers={"Retry-After": RETRY_AFTER})


def internal(request: Request, error: Exception) -> Response:
    """The answer to what nobody foresaw; logged here, once, under the request's id."""
    request_id = _id_of(request)
    logger.error("a request failed", exc_info=error, extra={"request_id": request_id, "path": request.url.path})
    detail = f"something went wrong inside; the log has more under {request_id}"
    return problem(request, 500, "internal_error", detail, retryable=True)


class Outermost:
    """Gives every response a ``Request-Id`` (a plain ``X-Request-Id`` of the client is kept), catches what is left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["Request-Id"] = request_id
            await send(message)

        try:
            with telemetry.about(request_id=request_id):
                await self._app(scope, receive, tagged)
        except ClientDisconnect:
            return
        except Exception as error:
            if started and isinstance(error.__cause__ or error, Unavailable):
                # too late for an answer: the connection is cut, and the client asks again for what it has not seen
                logger.warning("response cut off", extra={"reason": str(error.__cause__ or error)})
                return
            if started:
                raise  # the server logs it and cuts the connection
            await internal(Request(scope), error)(scope, receive, tagged)


def _id_of(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id"))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return str(value.decode("ascii"))
    return f"req_{new_id().hex}"


_EXAMPLES: Mapping[int, tuple[str, str, str]] = {
    401: ("The key is missing or wrong", "unauthorized", "send the header `Authorization: Bearer lsk_...`"),
    403: ("The key lacks a scope", "forbidden", "this key may read; this request needs the scope 'submit'"),
    404: (
        "There is no such thing for this tenant",
        "not_found",
        "there is no turn turn_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e",
    ),
    413: ("Too large", "too_large", "the body has more than the 1,048,576 bytes allowed"),
    415: ("The content type is not understood", "unsupported_media_type", "send Content-Type: application/json"),
    416: ("The range lies outside", "bad_range", "the artifact has 10 bytes"),
    422: ("Something does not fit", "invalid_input", "the turn does not fit agent 'research': input.question: ..."),
    423: ("The session is busy", "session_busy", "the session has an open turn and on_busy is 'reject'"),
    500: ("A fault inside", "internal_error", "something went wrong inside; the log has more under req_..."),
    503: ("A dependency does not answer; try again", "unavailable", "a part of the service does not answer"),
}


def documented(*statuses: int, conflict: tuple[str, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route: these problems and those that any request may meet. ``conflict``: the code and the detail
    of a 409."""
    answers: dict[int | str, dict[str, Any]] = {
        status: _documented(status, *_EXAMPLES[status]) for status in sorted({*statuses, 401, 403, 422, 500, 503})
    }
    if conflict is not None:
        answers[409] = _documented(409, "It contradicts what is there", *conflict)
    return answers


def _documented(status: int, description: str, code: str, detail: str) -> dict[str, Any]:
    example = {
        "type": f"urn:longshift:{code.replace('_', '-')}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": "/v1/turns",
        "code": code,
        "retryable": status in (500, 503) or code in ("session_busy", "in_use"),
        "errors": [{"path": "input.question", "message": "Field required"}] if status == 422 else [],
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema, "example": example}}}
