"""Blocking code that nobody can stop, beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def aside(function: Callable[..., T], *args: Any, name: str) -> asyncio.Future[T]:
    """Run ``function`` in a thread of its own. One that hangs keeps neither the loop nor the process from ending, which a
    thread of a pool would; whoever calls this bounds how many there are.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]

    def work() -> None:
        value, failure = None, None
        try:
            value = function(*args)
        except BaseException as error:  # noqa: BLE001 - it goes to whoever awaits it
            # StopIteration cannot be set on a future, and the others would end whoever awaits it
            failure = error if isinstance(error, Exception) and not isinstance(error, StopIteration) else None
            failure = failure or RuntimeError(f"raised {type(error).__name__}: {error}")
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
