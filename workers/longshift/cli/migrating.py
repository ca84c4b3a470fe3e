"""What `longshift migrate` does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from longshift.clock import SYSTEM
from longshift.config import Config
from longshift.db import health, migrations, vectors
from longshift.db.database import Database
from longshift.db.health import Standing
from longshift.errors import ConfigError, Unavailable

T = TypeVar("T")
AGAIN = 0.5
"""Seconds between two attempts."""


class NotYet(ConfigError):
    """The database has not been migrated to what this version needs; somebody else may be about to."""


def bring(config: Config, *, contract: bool, wait: float) -> migrations.Migrated:
    """Migrate, and make what needs an extension.

    Raises:
        Unavailable, ConfigError, InUse: as ``migrations.upgrade``.
    """
    url = config.require("database_url")

    def once() -> migrations.Migrated:
        done = migrations.upgrade(url, contract=contract, connect_timeout=config.connect_timeout)
        if done.sufficient:
            asyncio.run(_make_vectors(url))
        return done

    return _patiently(once, wait=wait)


def may_start(config: Config, *, wait: float) -> str:
    """The revision of the database, if this software may start on it.

    Raises:
        Unavailable: Postgres does not answer.
        ConfigError: it may not; the message says what to do.
    """

    def once() -> str:
        found = asyncio.run(_standing(config))
        if found.complaint is not None:
            raise (NotYet if found.behind else ConfigError)(found.complaint)
        assert found.revision is not None
        return found.revision

    return _patiently(once, wait=wait)


def _patiently(once: Callable[[], T], *, wait: float) -> T:
    until = SYSTEM.monotonic() + wait
    while True:
        try:
            return once()
        except (Unavailable, NotYet):
            if SYSTEM.monotonic() + AGAIN > until:
                raise
        time.sleep(AGAIN)


async def _standing(config: Config) -> Standing:
    url = config.require("database_url")
    db = Database(url, size=2, connect_timeout=config.connect_timeout, name="longshift-migrate")
    try:
        return await health.standing(db)
    finally:
        await db.close()


async def _make_vectors(url: str) -> None:
    """What needs an extension is no migration: everything works without."""
    db = Database(url, size=2, name="longshift-migrate")
    try:
        await vectors.prepare(db)
    finally:
        await db.close()
