"""Is this process alive, and can it do its work? Both without a key; at the metrics port also while its event loop stands.

At the public port no reason is given why a dependency does not answer: it may name machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta

from fastapi import APIRouter, Response

from longshift.clock import Clock
from longshift.cold import Cold
from longshift.db import health as database_health
from longshift.db.database import Database
from longshift.health import PATIENCE, Check, Probes, Pulse, in_loop, live
from longshift.hot import Hot
from longshift.metrics import Page
from longshift_api import schemas
from longshift_api.deps import Edge, EdgeDep
from longshift_api.pages import reply

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Alive?", response_model=None, responses={200: {"model": schemas.Liveness}})
async def livez() -> Response:
    """The event loop turns. Asks nobody else: a dead database is no reason to restart this process."""
    return reply(schemas.Liveness())


@router.get(
    "/readyz",
    summary="Ready?",
    response_model=None,
    responses={
        200: {
            "model": schemas.Readiness,
            "description": "ok, or degraded: Redis is away, work is accepted and starts later",
        },
        503: {"model": schemas.Readiness, "description": "Postgres or the artifact store does not answer"},
    },
)
async def readyz(edge: EdgeDep) -> Response:
    """Each dependency by name."""
    status, checks = _judged(await edge.probes.ask())
    shown = {name: _shown(check) for name, check in checks.items()}
    return reply(schemas.Readiness(status=status, checks=shown), status=503 if status == "unavailable" else 200)


def make_probes(db: Database, hot: Hot, cold: Cold, *, clock: Clock) -> Probes:
    """What an API process needs."""
    questions = {"postgres": lambda: database_health.check(db), "redis": hot.check, "artifacts": cold.store.check}
    return Probes(questions, clock=clock)


def pages(edge: Edge, pulse: Pulse) -> Mapping[str, Callable[[], Page]]:
    """The same for the metrics port, with reasons; called in the loop, asked in threads."""
    loop = asyncio.get_running_loop()

    def ready() -> Page:
        checks = in_loop(loop, edge.probes.ask, within=PATIENCE + timedelta(seconds=1))
        if checks is None:
            detail = "the event loop does not come to it"
            return Page(503, {"status": "unavailable", "checks": {"loop": Check(False, detail).shown()}})
        status, checks = _judged(checks)
        body = {"status": status, "checks": {name: check.shown() for name, check in checks.items()}}
        return Page(503 if status == "unavailable" else 200, body)

    def alive() -> Page:
        return live(pulse, clock=edge.clock, limit=edge.config.loop_limit)

    return {"/livez": alive, "/readyz": ready}


def _judged(checks: dict[str, Check]) -> tuple[schemas.Ready, dict[str, Check]]:
    if not (checks["postgres"].ok and checks["artifacts"].ok):
        return "unavailable", checks
    return "ok" if checks["redis"].ok else "degraded", checks


def _shown(check: Check) -> schemas.Check:
    if check.ok:
        return schemas.Check(status="ok")
    return schemas.Check(status="failed", detail="does not answer; the log of this process says why")
