"""Who works: the workers that have given a sign of life lately."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import text

from longshift.db.database import Database

ALIVE = text("""
SELECT pid FROM workers
 WHERE host = :host AND dead_at IS NULL AND heartbeat_at > clock_timestamp() - CAST(:age AS interval)""")


async def alive(db: Database, *, host: str, age: timedelta = timedelta(seconds=5)) -> set[int]:
    """The process ids of the workers on ``host`` whose last heartbeat is younger than ``age``."""
    return {row.pid for row in await db.fetch(ALIVE, {"host": host, "age": age})}
