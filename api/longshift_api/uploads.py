"""Bodies that are too large for memory: streamed in, hashed, kept on disk until they have been looked at."""

from __future__ import annotations

from fastapi import Request

from longshift.artifacts import Spooled, spool
from longshift.errors import InvalidInput
from longshift_api.bodies import check_length
from longshift_api.problems import too_large


async def take_in(request: Request, *, limit: int, what: str) -> Spooled:
    """The body of ``request``; close it.

    Raises:
        Refusal: 413, by its announced length before it is read, or by its real length while it is.
    """
    check_length(request, limit, what=what)
    try:
        return await spool(request.stream(), limit=limit)
    except InvalidInput:  # the one thing that spool refuses
        raise too_large(what, limit) from None
