"""Workers: who is alive, and which of the caller's turns each of them runs."""

from __future__ import annotations

from collections import defaultdict
from uuid import UUID

from fastapi import Response

from longshift.db import workers
from longshift.db.workers import RunningRecord
from longshift_api import deps
from longshift_api.deps import Caller, EdgeDep
from longshift_api.pages import reply
from longshift_api.problems import documented
from longshift_api.schemas_workers import WorkerList, WorkerView

router = deps.router("workers")
SHOWN = 20
"""Turns of each worker: a fleet runs thousands, and a list of all turns is another route."""


@router.get(
    "/workers", summary="List the workers", response_model=None, responses={200: {"model": WorkerList}, **documented()}
)
async def list_workers(edge: EdgeDep, caller: Caller) -> Response:
    """Those that are alive, and what each runs of yours: of the turns of other tenants there is no word, nor a count."""
    alive = [worker for worker in await workers.list_workers(edge.db) if worker.alive]
    running: dict[UUID, list[RunningRecord]] = defaultdict(list)
    found = await workers.running(edge.db, [each.id for each in alive], tenant_id=caller.tenant_id, limit=SHOWN)
    for each in found:
        running[each.worker_id].append(each)
    return reply(WorkerList(data=[WorkerView.of(worker, running[worker.id]) for worker in alive]))
