"""What every route stands on: the open connections, the caller, strict bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response, Security
from fastapi.routing import APIRoute

from longshift.archive import Archive
from longshift.clock import Clock
from longshift.cold import Cold
from longshift.config import Config
from longshift.db.database import Database
from longshift.db.idempotency import Idempotency
from longshift.db.keys import Scope
from longshift.errors import InvalidInput, NotFound
from longshift.health import Probes
from longshift.hot import Hot
from longshift.lifecycle import Lifecycle
from longshift.mailbox import Mailbox
from longshift.metrics import ApiMetrics
from longshift.model import Prefix, Principal, parse_id
from longshift.tracing import OFF, Traces
from longshift_api.auth import Keyring, authenticate, bearer
from longshift_api.bodies import StrictRequest, json_idempotency


@dataclass(frozen=True, slots=True)
class Edge:
    """One process's open connections, made by the application's lifespan."""

    config: Config
    clock: Clock
    db: Database
    hot: Hot
    cold: Cold
    archive: Archive
    lifecycle: Lifecycle
    mailbox: Mailbox
    keyring: Keyring
    metrics: ApiMetrics
    probes: Probes  # questions of /readyz
    traces: Traces = OFF
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # set: streams and long polls end now


class EdgeRoute(APIRoute):
    """Authenticates before it reads, and reads strictly: GET needs the scope ``read``, everything else ``writing``."""

    writing: ClassVar[Scope] = Scope.SUBMIT

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        needed = Scope.READ if (self.methods or set()) <= {"GET", "HEAD"} else self.writing
        has_body = self.body_field is not None

        async def handler(request: Request) -> Response:
            edge: Edge = request.app.state.edge
            request.state.principal = await authenticate(request, edge.keyring, needed=needed)
            strict = StrictRequest(request.scope, request.receive)
            strict.limit = edge.config.max_body
            if has_body and await strict.body():
                await strict.json()  # here, where our errors pass: FastAPI would turn them into a bare 400
            return await handle(strict)

        return handler


class OperatorRoute(EdgeRoute):
    """Everything but GET needs the scope ``admin``."""

    writing = Scope.ADMIN


def router(tag: str, *, route_class: type[EdgeRoute] = EdgeRoute) -> APIRouter:
    """A router for authenticated resources under ``/v1``."""
    return APIRouter(prefix="/v1", tags=[tag], route_class=route_class, dependencies=[Security(bearer)])


def _edge(request: Request) -> Edge:
    edge: Edge = request.app.state.edge
    return edge


def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


def in_path(prefix: Prefix, text: str) -> UUID:
    """The identifier in a path. One that is malformed names nothing, which is 404 as well.

    Raises:
        NotFound: it is not an identifier of this kind.
    """
    try:
        return parse_id(prefix, text)
    except InvalidInput:
        raise NotFound(f"there is no {text[:80]!r}: an id has the form {prefix}_<32 hex digits>") from None


EdgeDep = Annotated[Edge, Depends(_edge)]
Caller = Annotated[Principal, Depends(_principal)]
Promise = Annotated[Idempotency | None, Depends(json_idempotency)]
