"""What the parent of a worker process makes of its end: the one that sees it die need not wait for its silence.

    exit code 0                          an orderly end, if it has signed off by itself; else like any other exit code
    SIGKILL, SIGTERM, SIGINT ...         somebody ended it (a person, the kernel's memory killer): released at once
    any other signal or exit code        it crashed by its own doing: released at once, and what ran there is suspect

If the report does not get through, nothing is lost: the sweeper notices the silence.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from datetime import timedelta
from uuid import UUID

from longshift.config import Config
from longshift.db import upkeep
from longshift.db.database import Database
from longshift.errors import Unavailable
from longshift.hot import Hot

logger = logging.getLogger(__name__)

SENT = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
"""Signals that come from outside: a process rarely sends them to itself."""
PATIENCE = timedelta(seconds=5)
"""For a report. After that the silence speaks."""


def crashed(code: int) -> bool:
    """Whether a process that has not signed off, with this exit code (negative: the signal), ended by its own doing."""
    return -code not in SENT


async def report(db: Database, hot: Hot, *, process: UUID, code: int) -> bool:
    """Declare the workers of a process dead that has ended with ``code``; release and ring what it held.

    Returns whether it had served: a process that dies before leaves nothing behind. After code 0: whether it ended without
    signing off.

    Raises:
        Unavailable: Postgres does not answer.
    """
    workers = await upkeep.bury(db, process=process, crashed=crashed(code))
    if not workers:  # it signed off, or was declared dead before, or never served
        return code != 0 and await upkeep.has_served(db, process=process)
    released, rung = await upkeep.rescue(db)
    logger.warning("a worker process has died", extra={"code": code, "crashed": crashed(code), "leases": released})
    await hot.ring(rung, first=True)
    return True


async def report_once(config: Config, *, process: UUID, code: int) -> bool | None:
    """The same for a parent that has no connections of its own; None: the report did not get through."""
    db = Database(
        config.require("database_url"), size=2, connect_timeout=config.connect_timeout, name="longshift-report"
    )
    hot = Hot(config.require("redis_url"))
    try:
        async with asyncio.timeout(PATIENCE.total_seconds()):
            return await report(db, hot, process=process, code=code)
    except (Unavailable, TimeoutError) as error:
        logger.warning("a death could not be reported", extra={"reason": str(error) or "no answer in time"})
        return None
    except Exception as error:  # noqa: BLE001 - no tables, say: what the child has complained of is what counts
        logger.info("a death could not be reported", extra={"reason": type(error).__name__})
        return False
    finally:
        await hot.close()
        await db.close()
