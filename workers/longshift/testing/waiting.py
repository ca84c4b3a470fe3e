"""Waiting for something to become true: instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

from longshift.clock import SYSTEM

T = TypeVar("T")

POLL = 0.02  # seconds


@overload
async def wait_until(predicate: Callable[[], Awaitable[T]], *, description: str, limit: float = ...) -> T: ...
@overload
async def wait_until(predicate: Callable[[], T], *, description: str, limit: float = ...) -> T: ...
async def wait_until(predicate: Callable[[], Awaitable[T] | T], *, description: str, limit: float = 20.0) -> T:
    """Poll until ``predicate`` (sync or async) returns something true, and return that.

    Raises:
        AssertionError: nothing true within ``limit`` seconds; the message has ``description`` and the last value.
    """
    end = SYSTEM.monotonic() + limit
    while True:
        found = predicate()
        value: T = await found if inspect.isawaitable(found) else found
        if value:
            return value
        if SYSTEM.monotonic() > end:
            raise AssertionError(f"not within {limit:g} s: {description} (last value: {value!r})")
        await asyncio.sleep(POLL)


def wait_until_sync(predicate: Callable[[], T], *, description: str, limit: float = 20.0) -> T:
    """The same for tests without an event loop."""
    end = SYSTEM.monotonic() + limit
    while not (value := predicate()):
        if SYSTEM.monotonic() > end:
            raise AssertionError(f"not within {limit:g} s: {description} (last value: {value!r})")
        time.sleep(POLL)
    return value
