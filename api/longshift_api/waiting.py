"""Waiting for a change: on a notification of Redis, with a look at Postgres now and then in case one was missed."""

from __future__ import annotations

import asyncio
import re

from fastapi import Request

from longshift.db import views
from longshift.errors import InvalidInput
from longshift.hot import turn_channel
from longshift.model import TurnRecord
from longshift_api.deps import Edge

LONGEST = 60
"""Seconds that an answer may be held."""

RECHECK = 5.0
RECHECK_WITHOUT_REDIS = 1.0

_PREFERENCE = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?(?:$|[,;\s])", re.IGNORECASE)


def wanted_wait(request: Request) -> int:
    """Seconds to wait, from ``?wait=`` or ``Prefer: wait=``; 0: not at all; at most ``LONGEST``.

    Raises:
        InvalidInput: ``?wait=`` is not a whole number.
    """
    asked = request.query_params.get("wait")
    if asked is not None:
        if not asked.isascii() or not asked.isdigit():
            message = f"must be a whole number of seconds, at most {LONGEST}"
            raise InvalidInput(f"wait {message}", errors=[{"path": "wait", "message": message}])
        return min(int(asked[:9]), LONGEST)
    preferred = _PREFERENCE.search(",".join(request.headers.getlist("prefer")))
    return min(int(preferred[1]), LONGEST) if preferred else 0


async def change_of(edge: Edge, turn: TurnRecord, *, seconds: float) -> TurnRecord | None:
    """The turn as soon as it differs from ``turn``, or as it is after ``seconds``; None if it is gone."""
    end = edge.clock.monotonic() + seconds
    async with edge.hot.listen(turn_channel(turn.id)) as messages:
        while True:
            found = await views.turn(edge.db, turn.id, tenant_id=turn.tenant_id)
            left = end - edge.clock.monotonic()
            if found is None or found.version != turn.version or left <= 0 or edge.stopping.is_set():
                return found
            await next_message(edge, messages, within=min(left, recheck(edge)))


def recheck(edge: Edge) -> float:
    """Seconds between two looks at Postgres while no notification comes."""
    return RECHECK if edge.hot.up else RECHECK_WITHOUT_REDIS


async def next_message(edge: Edge, messages: asyncio.Queue[str], *, within: float) -> str | None:
    """The next message; None after ``within`` seconds or when the process stops. Loses none."""
    if not messages.empty():
        return messages.get_nowait()
    getting = asyncio.ensure_future(messages.get())
    stopping = asyncio.ensure_future(edge.stopping.wait())
    try:
        await asyncio.wait({getting, stopping}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()  # what it had not taken stays in the queue
        stopping.cancel()
