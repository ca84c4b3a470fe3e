"""The application: routes, errors, and a lifespan that opens and closes what they use. Nothing connects at import."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from longshift.archive import Archive
from longshift.artifacts import open_store
from longshift.clock import SYSTEM, Clock
from longshift.cold import Cold
from longshift.config import Config
from longshift.db import health as database_health
from longshift.db import keys, revision
from longshift.db.database import Database
from longshift.ending import end
from longshift.errors import Unavailable
from longshift.health import Pulse, tick
from longshift.hot import Hot
from longshift.lifecycle import Lifecycle
from longshift.mailbox import Mailbox
from longshift.metrics import ApiMetrics, Server
from longshift.tracing import OFF, Traces
from longshift.warming import Warmer
from longshift_api import (
    agents,
    approvals,
    artifacts,
    batches,
    events,
    health,
    lives,
    problems,
    sessions,
    tool_calls,
    turns,
    workers,
)
from longshift_api.auth import Keyring
from longshift_api.deps import Edge
from longshift_api.measuring import Measured
from longshift_api.replies import IDEMPOTENCY_KEY
from longshift_api.schemas import Problem
from longshift_api.schemas_tools import ApprovalView, ToolCallView
from longshift_api.schemas_workers import WorkerView
from longshift_api.sent import BatchLine
from longshift_api.spans import Traced

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Submit long agent jobs (*turns*) to *sessions*, watch them, fetch what they made.

A turn answered with 202 is committed and will reach a terminal state. Every POST that makes something takes an
`Idempotency-Key`. Errors are RFC 9457 problems. Every response carries a `Request-Id`."""

# what no route names as its model, and what has examples with nulls in them, which FastAPI leaves out
_FURTHER: Final[list[tuple[type[BaseModel], Literal["validation", "serialization"]]]] = [
    (Problem, "serialization"),
    (BatchLine, "validation"),
    (ToolCallView, "serialization"),
    (ApprovalView, "serialization"),
    (WorkerView, "serialization"),
]


def create_app(config: Config, *, clock: Clock = SYSTEM, traces: Traces = OFF) -> FastAPI:
    """The ASGI application; connections are opened by its lifespan, which closes ``traces`` as well."""

    metrics = ApiMetrics(revision=revision.newest())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_edge(config, clock=clock, metrics=metrics, traces=traces) as edge:
            app.state.edge = edge
            yield

    app = FastAPI(
        title="Longshift",
        version="1",  # of the contract
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        # Requests have spans of ours (longshift_api.spans). FastAPI's own would carry paths and query strings, and go wherever
        # variables of the environment send them.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    for module in (sessions, lives, turns, batches, events, tool_calls, approvals, artifacts, agents, workers, health):
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(problems.Outermost)
    app.add_middleware(Traced)
    app.add_middleware(Measured, metrics=metrics, clock=clock)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # the documented way
    return app


@asynccontextmanager
async def open_edge(
    config: Config, *, metrics: ApiMetrics, clock: Clock = SYSTEM, traces: Traces = OFF
) -> AsyncIterator[Edge]:
    """Postgres, Redis, the artifact store and the mailbox over them; and the port for metrics, if the settings name one.

    Redis may be away: submissions are accepted without it.

    Raises:
        ConfigError: a setting is missing or wrong, or the database has not been migrated.
        Unavailable: Postgres does not answer.
    """
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, traces.close)
        db = Database(
            config.require("database_url"),
            size=config.pool_size,
            connect_timeout=config.connect_timeout,
            timeout=config.database_timeout,
            name="longshift-api",
        )
        stack.push_async_callback(db.close)
        hot = Hot(config.require("redis_url"), context_ttl=config.hot_ttl)
        stack.push_async_callback(hot.close)
        store = open_store(config.require("artifacts_url"), connect_timeout=config.connect_timeout)
        stack.push_async_callback(store.close)
        await _check(db, hot)
        await keys.ensure_tenant(db)
        if config.api_key is not None:
            await keys.ensure_key(db, config.api_key.get_secret_value())
        cold = Cold(db, store)
        archive = Archive(db, cold)
        warmer = Warmer(db, hot.contexts, archive)
        mailbox = Mailbox(db, hot, cold=cold, config=config, clock=clock, warmer=warmer)
        stack.push_async_callback(mailbox.close)
        keyring = Keyring(db, clock=clock)
        edge = Edge(
            config=config,
            clock=clock,
            db=db,
            hot=hot,
            cold=cold,
            archive=archive,
            lifecycle=Lifecycle(db, cold, archive, hot.contexts),
            mailbox=mailbox,
            keyring=keyring,
            metrics=metrics,
            probes=health.make_probes(db, hot, cold, clock=clock),
            traces=traces,
        )
        stack.push_async_callback(edge.probes.close)
        await stack.enter_async_context(_watched(edge))
        yield edge


@asynccontextmanager
async def _watched(edge: Edge) -> AsyncIterator[None]:
    """Let the loop prove that it turns, and answer at the metrics port."""
    pulse = Pulse(edge.clock)
    ticking = asyncio.create_task(tick(pulse, clock=edge.clock, lag=edge.metrics.loop_lag.observe), name="tick")
    server = Server(edge.metrics, health.pages(edge, pulse))
    if edge.config.metrics_port is not None:
        server.try_listen(edge.config.metrics_port, host=edge.config.host)
    try:
        yield
    finally:
        await asyncio.to_thread(server.close)
        await end([ticking])


async def _check(db: Database, hot: Hot) -> None:
    try:
        await database_health.check_schema(db)
    except Unavailable as error:
        raise Unavailable(
            f"{error}: check LONGSHIFT_DATABASE_URL, or run `longshift up`, which starts a local stack"
        ) from None
    try:
        await hot.check()
    except Unavailable as error:
        logger.warning("started without redis: work is accepted and starts later", extra={"reason": str(error)})


def _answers(operation: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    return operation["responses"].values() if operation else ()


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        template = "#/components/schemas/{model}"
        _, further = models_json_schema(_FURTHER, ref_template=template)
        schemas: dict[str, Any] = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas |= further["$defs"]
        for operations in schema["paths"].values():
            if any("Idempotent-Replayed" in answer.get("headers", {}) for answer in _answers(operations.get("post"))):
                operations["post"].setdefault("parameters", []).append(IDEMPOTENCY_KEY)
        app.openapi_schema = schema
    return app.openapi_schema
