"""Is this process alive, and can it do its work? Both without a key."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import timedelta

from fastapi import APIRouter, Response

from longshift.db import health as database_health
from longshift.errors import LongshiftError
from longshift_api.deps import EdgeDep
from longshift_api.pages import reply
from longshift_api.schemas import Check, Liveness, Readiness

logger = logging.getLogger(__name__)
router = APIRouter(tags=["health"])
PATIENCE = timedelta(seconds=3)


@router.get("/livez", summary="Alive?", response_model=None, responses={200: {"model": Liveness}})
async def livez() -> Response:
    """The event loop turns. Asks nobody else: a dead database is no reason to restart this process."""
    return reply(Liveness())


@router.get(
    "/readyz",
    summary="Ready?",
    response_model=None,
    responses={
        200: {"model": Readiness, "description": "ok, or degraded: Redis is away, work is accepted and starts later"},
        503: {"model": Readiness, "description": "Postgres or the artifact store does not answer"},
    },
)
async def readyz(edge: EdgeDep) -> Response:
    """Each dependency by name."""
    postgres, redis, artifacts = await asyncio.gather(
        _check(edge.probes, "postgres", lambda: database_health.check(edge.db)),
        _check(edge.probes, "redis", edge.hot.check),
        _check(edge.probes, "artifacts", edge.cold.store.check),
    )
    checks = {"postgres": postgres, "redis": redis, "artifacts": artifacts}
    if "failed" in (postgres.status, artifacts.status):
        return reply(Readiness(status="unavailable", checks=checks), status=503)
    return reply(Readiness(status="ok" if redis.status == "ok" else "degraded", checks=checks))


async def _check(
    probes: MutableMapping[str, asyncio.Task[str | None]], name: str, asking: Callable[[], Awaitable[None]]
) -> Check:
    """Ask, or join the question under way: those to a dependency that hangs must neither pile up nor be cancelled, for
    cancelling takes the answer of the same dependency."""
    probe = probes.get(name)
    if probe is None or probe.done():
        probe = probes[name] = asyncio.create_task(_complaint(asking), name=f"probe-{name}")
    done, _ = await asyncio.wait({probe}, timeout=PATIENCE.total_seconds())
    if not done:
        return Check(status="failed", detail=f"no answer within {PATIENCE.total_seconds():g} s")
    complaint = probe.result()
    if complaint is None:
        return Check(status="ok")
    logger.warning("a dependency does not answer", extra={"dependency": name, "reason": complaint})
    return Check(status="failed", detail="does not answer; the log of this process says why")


async def _complaint(asking: Callable[[], Awaitable[None]]) -> str | None:
    """What is wrong, as a value: an exception in a task that nobody awaits any more would be logged as lost."""
    try:
        await asking()
    except LongshiftError as error:
        return str(error)
    return None
