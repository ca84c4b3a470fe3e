"""Batches: many turns at once, taken in whole or not at all; their results as JSON lines, also while they run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Query, Request, Response
from starlette.responses import StreamingResponse

from longshift.artifacts import Spooled
from longshift.catalogue import Drafts
from longshift.db import views
from longshift.errors import NotFound
from longshift.model import BatchRecord, Prefix, show_id
from longshift.tracing import names
from longshift_api import deps, values
from longshift_api.bodies import idempotency, media_type
from longshift_api.deps import Caller, Edge, EdgeDep, in_path
from longshift_api.lines import JsonArray, JsonLines
from longshift_api.pages import METADATA_FILTER, Cursor, Limit, cut, metadata_of, only, read_cursor, reply
from longshift_api.problems import Refusal, documented
from longshift_api.replies import REPLAYED, made
from longshift_api.schemas import BATCH_ID, BatchPage, BatchView, TurnView
from longshift_api.sent import CancelBody
from longshift_api.spans import span_of, traceparent_of
from longshift_api.uploads import take_in

router = deps.router("batches")
JSONL = (
    "application/jsonl",
    "application/x-ndjson",
    "application/x-jsonlines",
    "application/jsonlines",
    "application/ndjson",
)
ARRAY_FACTOR = 16
"""A JSON array is parsed in memory, so it may only be this many times as large as the body of one turn."""

_LINE = {"$ref": "#/components/schemas/BatchLine"}
_EXAMPLE = '{"custom_id": "q1", "agent": "research", "input": {"question": "What is a lease?"}}\n'


@router.post(
    "/batches",
    summary="Submit a batch",
    status_code=202,
    response_model=None,
    responses={
        202: {"model": BatchView, "description": "All turns are committed", "headers": made("/v1/batches/" + BATCH_ID)},
        **documented(404, 413, 415),
    },
    openapi_extra={
        "parameters": [METADATA_FILTER],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"type": "array", "items": _LINE, "minItems": 1, "maxItems": 1000}},
                **{kind: {"schema": {"type": "string"}, "example": _EXAMPLE} for kind in JSONL[:2]},
            },
        },
    },
)
async def submit_batch(request: Request, edge: EdgeDep, caller: Caller) -> Response:
    """A JSON array of up to 1,000 turns, or up to 50,000 JSON lines; all are validated before any is accepted.

    The query may carry ``metadata[key]=value`` for the batch.
    """
    lines = media_type(request) in JSONL
    if not lines and media_type(request) != "application/json":
        raise Refusal(
            415,
            "unsupported_media_type",
            f"send Content-Type: application/json with an array, or {JSONL[0]} with one turn on each line",
        )
    only(request, (), metadata=True)
    metadata = metadata_of(request)
    most = edge.config.max_batch_body
    limit = most if lines else min(most, ARRAY_FACTOR * edge.config.max_body)
    with await take_in(request, limit=limit, what="the batch") as body:
        traceparent = traceparent_of(request)
        if lines:
            drafts: Drafts = JsonLines(body, longest=edge.config.max_body, traceparent=traceparent)
        else:
            drafts = await _array(body, traceparent=traceparent)
        accepted = await edge.mailbox.submit_batch(
            drafts,
            tenant_id=caller.tenant_id,
            metadata=metadata,
            idempotency=idempotency(request, bytes.fromhex(body.sha256)),
        )
    batch_id = show_id(Prefix.BATCH, accepted.resource_id)
    span_of(request).set({names.BATCH_ID: batch_id})
    view = await _view(edge, caller, batch_id)
    edge.metrics.accepted.inc(0 if accepted.replayed else view.total)
    headers = {"Location": view.links["self"], "Retry-After": "1"} | (REPLAYED if accepted.replayed else {})
    return reply(view, status=202, headers=headers)


@router.get(
    "/batches",
    summary="List batches, newest first",
    response_model=None,
    responses={200: {"model": BatchPage}, **documented()},
)
async def list_batches(
    request: Request, edge: EdgeDep, caller: Caller, limit: Limit = 20, cursor: Cursor = None
) -> Response:
    only(request, ("limit", "cursor"))
    rows = await views.batches(edge.db, tenant_id=caller.tenant_id, before=read_cursor(cursor), limit=limit + 1)
    page, following = cut(rows, limit, key=lambda batch: batch.id)
    now = edge.clock.now()
    data = [BatchView.of(batch, now=now) for batch in page]
    return reply(BatchPage(data=data, has_more=following is not None, next=following))


@router.get(
    "/batches/{batch_id}",
    summary="Progress of a batch",
    response_model=None,
    responses={200: {"model": BatchView}, **documented(404)},
)
async def get_batch(batch_id: str, edge: EdgeDep, caller: Caller) -> Response:
    """Its turns counted by state, and when it will have ended at the pace so far."""
    view = await _view(edge, caller, batch_id)
    return reply(view, headers={} if view.status == "ended" else {"Retry-After": "2"})


@router.get(
    "/batches/{batch_id}/results",
    summary="Results of a batch",
    response_model=None,
    responses={
        200: {
            "description": "One turn on each line, in the order of the batch",
            "content": {"application/jsonl": {"schema": {"type": "string"}}},
        },
        **documented(404),
    },
)
async def get_results(
    batch_id: str,
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    everything: Annotated[bool, Query(alias="all", description="also turns that have not ended")] = False,
) -> Response:
    """Works while the batch runs: the turns that have ended so far.

    Large outputs are fetched, up to 1 MiB each; where that is not possible, ``output`` is null and ``output_artifact`` says
    where it is. Of a large input there is only the pointer.
    """
    only(request, ("all",))
    batch = await _find(edge, caller, batch_id)
    return StreamingResponse(
        _result_lines(edge, batch, everything=everything),
        media_type="application/jsonl",
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )


@router.post(
    "/batches/{batch_id}/cancel",
    summary="Cancel a batch",
    status_code=202,
    response_model=None,
    responses={202: {"model": BatchView, "description": "Every open turn was told"}, **documented(404, 413, 415)},
)
async def cancel_batch(batch_id: str, edge: EdgeDep, caller: Caller, body: CancelBody | None = None) -> Response:
    """Cancels every turn that has not ended. May be repeated."""
    batch = await edge.mailbox.cancel_batch(
        in_path(Prefix.BATCH, batch_id), tenant_id=caller.tenant_id, reason=(body or CancelBody()).reason
    )
    return reply(BatchView.of(batch, now=edge.clock.now()), status=202)


async def _array(body: Spooled, *, traceparent: str | None) -> JsonArray:
    def parse() -> JsonArray:
        with body.rewound() as file:
            return JsonArray(file.read(), traceparent=traceparent)

    return await asyncio.to_thread(parse)


async def _result_lines(edge: Edge, batch: BatchRecord, *, everything: bool) -> AsyncIterator[str]:
    turns = views.results(edge.db, batch.id, tenant_id=batch.tenant_id, ended_only=not everything, page=200)
    async for turn, known in values.with_outputs(edge, turns):
        yield TurnView.of(turn, values=known).model_dump_json() + "\n"


async def _find(edge: Edge, caller: Caller, batch_id: str) -> BatchRecord:
    batch = await views.batch(edge.db, in_path(Prefix.BATCH, batch_id), tenant_id=caller.tenant_id)
    if batch is None:
        raise NotFound(f"there is no batch {batch_id}")
    return batch


async def _view(edge: Edge, caller: Caller, batch_id: str) -> BatchView:
    return BatchView.of(await _find(edge, caller, batch_id), now=edge.clock.now())
