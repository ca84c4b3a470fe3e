"""Lists: opaque cursors instead of offsets, filters that are refused if nobody knows them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Query, Request, Response
from pydantic import BaseModel, TypeAdapter, ValidationError

from longshift.errors import InvalidInput
from longshift_api.problems import misfits
from longshift_api.sent import Metadata

T = TypeVar("T")
_METADATA = re.compile(r"metadata\[(.*)\]\Z", re.DOTALL)
_PAIRS: TypeAdapter[dict[str, str]] = TypeAdapter(Metadata)

Limit = Annotated[int, Query(ge=1, le=100, description="items on a page")]
Cursor = Annotated[str | None, Query(max_length=100, description="`next` of the page before")]
METADATA_FILTER = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[key]=value`, as often as needed",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 16},
}


def reply(model: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``model`` as JSON, serialised once."""
    return Response(model.model_dump_json(), status_code=status, media_type="application/json", headers=headers)


def write_cursor(last: UUID) -> str:
    return base64.urlsafe_b64encode(last.bytes).decode("ascii").rstrip("=")


def read_cursor(cursor: str | None) -> UUID | None:
    """Raises ``InvalidInput`` for what ``write_cursor`` never wrote."""
    if cursor is None:
        return None
    try:
        return UUID(bytes=base64.b64decode(cursor.encode() + b"==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        raise InvalidInput("this cursor was not made by this API: give `next` of the page before, unchanged") from None


def cut(rows: Sequence[T], limit: int, *, key: Callable[[T], UUID]) -> tuple[Sequence[T], str | None]:
    """The page out of ``limit + 1`` rows, and the cursor of the next one."""
    page = rows[:limit]
    return page, write_cursor(key(page[-1])) if len(rows) > limit else None


def metadata_of(request: Request) -> dict[str, str]:
    """The ``metadata[key]=value`` pairs of the query.

    Raises:
        InvalidInput: too many, or too long.
    """
    pairs = {found[1]: value for name, value in request.query_params.multi_items() if (found := _METADATA.match(name))}
    try:
        return _PAIRS.validate_python(pairs)
    except ValidationError as error:
        raise InvalidInput("the metadata in the query does not fit", errors=misfits(error)) from None


def only(request: Request, known: Collection[str], *, metadata: bool = False) -> None:
    """Refuse filters that do not exist: a list that ignored one would show too much.

    Raises:
        InvalidInput: a parameter is not among ``known``, nor a ``metadata[key]`` where there is ``metadata``.
    """
    names = [*sorted(known), *(["metadata[key]"] if metadata else [])]
    for name in request.query_params:
        if name not in known and not (metadata and _METADATA.match(name)):
            message = f"there is no such filter; there are {', '.join(names)}"
            raise InvalidInput(f"{name[:80]!r}: {message}", errors=[{"path": name[:80], "message": message}])
