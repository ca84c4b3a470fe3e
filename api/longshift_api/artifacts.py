"""Artifacts: named, immutable bytes. Uploaded raw, downloaded raw, in ranges if wanted."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from email.message import Message
from typing import Annotated

from fastapi import Query, Request, Response
from starlette.responses import StreamingResponse

from longshift.artifacts import ANY_TYPE, disposition
from longshift.errors import InvalidInput
from longshift.events import storable
from longshift.model import ArtifactRecord, Prefix
from longshift_api import deps
from longshift_api.bodies import idempotency, media_type
from longshift_api.deps import Caller, Edge, EdgeDep, in_path
from longshift_api.pages import reply
from longshift_api.problems import Refusal, documented
from longshift_api.replies import REPLAYED, made, matches
from longshift_api.schemas import ARTIFACT_ID, ArtifactUrlView, ArtifactView
from longshift_api.uploads import take_in

router = deps.router("artifacts")
_UNSAID = ("", ANY_TYPE, "application/x-www-form-urlencoded")  # the last is what curl says if it is not told otherwise
_TYPE = re.compile(r"[\w!#$&^.+-]{1,60}/[\w!#$&^.+-]{1,100}(?:\s*;[\x20-\x7e]{1,200})?\Z", re.ASCII)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z")
_ANYTHING = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "/artifacts",
    summary="Upload an artifact",
    status_code=201,
    response_model=None,
    responses={
        201: {"model": ArtifactView, "description": "Stored", "headers": made("/v1/artifacts/" + ARTIFACT_ID)},
        **documented(413, 415),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"*/*": _ANYTHING}}},
)
async def upload(
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    name: Annotated[str | None, Query(min_length=1, max_length=255)] = None,
) -> Response:
    """The body is the bytes themselves, named by ``?name=`` or ``Content-Disposition``, typed by ``Content-Type``.

    Without a type, the name decides.
    """
    if media_type(request).startswith("multipart/"):
        raise Refusal(415, "unsupported_media_type", "send the bytes themselves, not a form: curl --data-binary @FILE")
    name = storable(name or _disposed(request) or "artifact")
    content_type = _content_type(request, name)
    with await take_in(request, limit=edge.config.max_artifact, what="the artifact") as body:
        if not body.size:
            raise InvalidInput("the artifact is empty: send its bytes as the body")
        promise = idempotency(request, bytes.fromhex(body.sha256))
        artifact, replayed = await edge.cold.put(
            body, tenant_id=caller.tenant_id, name=name, content_type=content_type, idempotency=promise
        )
    view = ArtifactView.of(artifact)
    return reply(view, status=201, headers={"Location": view.links["self"]} | (REPLAYED if replayed else {}))


@router.get(
    "/artifacts/{artifact_id}",
    summary="An artifact's name, type, size and hash",
    response_model=None,
    responses={200: {"model": ArtifactView}, **documented(404)},
)
async def get_artifact(artifact_id: str, edge: EdgeDep, caller: Caller) -> Response:
    return reply(ArtifactView.of(await _find(edge, caller, artifact_id)))


@router.get(
    "/artifacts/{artifact_id}/content",
    summary="An artifact's bytes",
    response_model=None,
    responses={
        200: {"description": "All of it", "content": {"*/*": _ANYTHING}},
        206: {"description": "The range asked for", "content": {"*/*": _ANYTHING}},
        304: {"description": "It is what If-None-Match says"},
        **documented(404, 416),
    },
    openapi_extra={
        "parameters": [{"name": "Range", "in": "header", "schema": {"type": "string"}, "example": "bytes=0-1023"}]
    },
)
async def get_content(artifact_id: str, request: Request, edge: EdgeDep, caller: Caller) -> Response:
    """Streamed; one range at a time. The ETag is the hash, for an artifact never changes.

    The whole is verified on its way: bytes that are not what was uploaded are never sent to the end.
    """
    artifact = await _find(edge, caller, artifact_id)
    headers = _headers(artifact)
    if matches(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    span = _span(request, artifact)
    start, end = span or (0, artifact.size)
    chunks = edge.cold.stream(artifact, start=start, end=end)
    headers["Content-Length"] = str(end - start)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{artifact.size}"
    return StreamingResponse(
        await _begun(chunks), status_code=200 if span is None else 206, media_type=None, headers=headers
    )


@router.get(
    "/artifacts/{artifact_id}/url",
    summary="A URL to download an artifact without an API key",
    response_model=None,
    responses={200: {"model": ArtifactUrlView}, **documented(404)},
)
async def get_url(
    artifact_id: str,
    request: Request,
    edge: EdgeDep,
    caller: Caller,
    expires_in: Annotated[int, Query(ge=1, le=604_800, description="seconds, at most a week")] = 3600,
) -> Response:
    """Signed by the object store, so that the bytes need not pass through the API: whoever has it may read them until it
    expires. The store cannot sign for longer than its own credentials last.

    Where the artifacts are in a folder there is no such thing: ``presigned`` is false, and ``url`` is the ordinary link to
    the content, which needs the key.
    """
    artifact = await _find(edge, caller, artifact_id)
    lifetime = timedelta(seconds=expires_in)
    url = await edge.cold.store.presign(
        artifact.key, expires_in=lifetime, name=artifact.name, content_type=artifact.content_type
    )
    if url is None:
        content = ArtifactView.of(artifact).links["content"]
        return reply(ArtifactUrlView(url=content, presigned=False, expires_at=None))
    secret = {"Cache-Control": "no-store"}
    return reply(ArtifactUrlView(url=url, presigned=True, expires_at=edge.clock.now() + lifetime), headers=secret)


async def _begun(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same chunks, the first already fetched: a missing object must be an error, not half an answer."""
    first = await anext(chunks, b"")

    async def all_of_them() -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    return all_of_them()


async def _find(edge: Edge, caller: Caller, artifact_id: str) -> ArtifactRecord:
    return await edge.cold.find(in_path(Prefix.ARTIFACT, artifact_id), tenant_id=caller.tenant_id)


def _headers(artifact: ArtifactRecord) -> dict[str, str]:
    """What came from one client must not run in the browser of another: never inline, never sniffed."""
    return {
        "Content-Type": artifact.content_type,
        "ETag": f'"{artifact.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": disposition(artifact.name),
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }


def _span(request: Request, artifact: ArtifactRecord) -> tuple[int, int] | None:
    """First byte and the one after the last; None: all of it, also for what we do not serve (several ranges).

    Raises:
        Refusal: 416, the range lies outside.
    """
    found = _RANGE.match(request.headers.get("range", "").replace(" ", ""))
    condition = request.headers.get("if-range")
    if found is None or found[0] == "bytes=-" or (condition is not None and condition != f'"{artifact.sha256}"'):
        return None
    size = artifact.size
    first, last = found[1], found[2]
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < int(first):
        return None
    if start >= size:
        detail = f"the artifact has {size:,} bytes"
        raise Refusal(416, "bad_range", detail, headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _disposed(request: Request) -> str | None:
    """The file name in ``Content-Disposition``, without folders."""
    header = Message()
    header["Content-Disposition"] = request.headers.get("content-disposition", "")
    name = header.get_filename()
    return re.split(r"[/\\]", name)[-1][:255] if name else None


def _content_type(request: Request, name: str) -> str:
    if media_type(request) in _UNSAID:
        return mimetypes.guess_type(name)[0] or ANY_TYPE
    given = request.headers["content-type"].strip()
    if not _TYPE.match(given):
        raise InvalidInput("Content-Type must have the form type/subtype, for example application/pdf")
    return given
