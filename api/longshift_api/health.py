"""Is this process alive, and can it do its work? Both without a key."""

import asyncio
import logging
from collections.abc import Awaitable
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
        _check("postgres", database_health.check(edge.db)),
        _check("redis", edge.hot.check()),
        _check("artifacts", edge.store.check()),
    )
    checks = {"postgres": postgres, "redis": redis, "artifacts": artifacts}
    if "failed" in (postgres.status, artifacts.status):
        return reply(Readiness(status="unavailable", checks=checks), status=503)
    return reply(Readiness(status="ok" if redis.status == "ok" else "degraded", checks=checks))


async def _check(name: str, checking: Awaitable[None]) -> Check:
    try:
        await asyncio.wait_for(checking, PATIENCE.total_seconds())
    except TimeoutError:
        return Check(status="failed", detail=f"no answer within {PATIENCE.total_seconds():g} s")
    except LongshiftError as error:
        logger.warning("a dependency does not answer", extra={"dependency": name, "reason": str(error)})
        return Check(status="failed", detail="does not answer; the log of this process says why")
    return Check(status="ok")
