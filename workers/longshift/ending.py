"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN = 0.5
"""Seconds after which a task that still runs is cancelled once more."""


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` and return when they have ended, however they have.

    Once is not enough: in Python 3.11 ``asyncio.wait_for``, which redis-py and psycopg use, forgets a cancellation that
    comes in the very moment in which what it waits for is done.
    """
    ending = list(tasks)
    left = set(ending)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN)
    await asyncio.gather(*ending, return_exceptions=True)
