"""Ending asyncio tasks, and processes, for certain."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

POOLS = ("step", "agent")
"""What the threads of plain steps and plain agents are called."""
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


def end_process(code: int) -> int:
    """``code``, unless threads are left that would keep the process: then it ends here, with that exit code.

    A plain step cannot be stopped; Python would wait for its thread, for ever if it hangs, before it lets a process end.
    """
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(tuple(f"{p}_" for p in POOLS))]
    for thread in threads:  # an idle one is about to end
        thread.join(0.05)
    left = [thread.name for thread in threads if thread.is_alive()]
    if not left:
        return code
    try:
        logger.warning("threads of plain steps are left behind", extra={"threads": left})
        atexit._run_exitfuncs()  # noqa: SLF001 - what others have registered, which _exit would leave out
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
    finally:
        os._exit(code)
