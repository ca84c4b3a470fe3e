"""The exporter: serves what holds for the whole fleet, read from Postgres. A fleet needs one; a second does no harm.

A scrape looks at the database, unless the last look is young enough: then it is given again. Looks that take long are rarer,
so that they never take more than a tenth of one connection's time. While Postgres does not answer, that is what it says.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from datetime import timedelta

from longshift.clock import SYSTEM, Clock
from longshift.config import Config
from longshift.db import backlog, health, revision
from longshift.db.database import Database
from longshift.ending import end
from longshift.errors import Unavailable
from longshift.health import FRESH, PATIENCE, Check, Probes, Pulse, in_loop, live, tick
from longshift.metrics import Figures, FleetMetrics, Page, Server

logger = logging.getLogger(__name__)

PORT = 9464
"""Unless the settings name another one."""
CACHED = timedelta(seconds=5)
SHARE = 10
"""A look is given again for so many times the time that it took."""


class Exporter:
    """One process's look at the fleet."""

    def __init__(self, config: Config, *, clock: Clock = SYSTEM) -> None:
        self._config, self._clock = config, clock
        self._db = Database(
            config.require("database_url"),
            size=2,
            connect_timeout=config.connect_timeout,
            timeout=config.database_timeout,
            name="longshift-exporter",
        )
        self._probes = Probes({"postgres": lambda: health.check(self._db)}, clock=clock)
        self._pulse = Pulse(clock)
        self._metrics = FleetMetrics(self._asked, revision=revision.newest())
        self._server = Server(self._metrics, {"/livez": self._livez, "/readyz": self._readyz})
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking: asyncio.Task[Figures | None] | None = None
        self._stale_at = -1.0  # monotonic: when the last look is too old to be given again
        self._up = True

    async def serve(self, until: asyncio.Event, *, port: int, host: str) -> None:
        """Answer scrapes, for as long as it is wanted.

        Raises:
            OSError: the port is taken, or the address is not one of this machine.
        """
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._db.close)
            stack.push_async_callback(self._probes.close)
            stack.push_async_callback(self._end_look)
            ticking = asyncio.create_task(tick(self._pulse, clock=self._clock, lag=self._metrics.loop_lag.observe))
            stack.push_async_callback(end, [ticking])
            self._server.listen(port, host=host)
            stack.push_async_callback(asyncio.to_thread, self._server.close)
            await until.wait()

    async def look(self) -> Figures | None:
        """What the database says, or said a moment ago; None: it does not answer."""
        if self._looking is None or (self._looking.done() and self._clock.monotonic() > self._stale_at):
            self._looking = asyncio.create_task(self._look(), name="look")
        return await asyncio.shield(self._looking)

    async def _look(self) -> Figures | None:
        begun = self._clock.monotonic()
        try:
            found = await backlog.figures(self._db, lease_ttl=self._config.lease_ttl)
        except Exception as error:
            if not isinstance(error, Unavailable):  # no such view, say: it is not migrated yet
                logger.exception("the database cannot be read")
            self._say(str(error))
            self._stale_at = self._clock.monotonic() + FRESH.total_seconds()
            return None
        self._say(None)
        took = self._clock.monotonic() - begun
        self._stale_at = begun + max(CACHED.total_seconds(), SHARE * took)
        return found

    def _say(self, complaint: str | None) -> None:
        if complaint is not None and self._up:
            logger.warning("postgres does not answer, there are no figures", extra={"reason": complaint})
        elif complaint is None and not self._up:
            logger.info("postgres answers again")
        self._up = complaint is None

    async def _end_look(self) -> None:
        if self._looking is not None:
            await end([self._looking])

    # -- in the threads of scrapes

    def _asked(self) -> Figures | None:
        if self._loop is None:
            return None
        return in_loop(self._loop, self.look, within=self._config.database_timeout)

    def _livez(self) -> Page:
        return live(self._pulse, clock=self._clock, limit=self._config.loop_limit)

    def _readyz(self) -> Page:
        asked = in_loop(self._loop, self._probes.ask, within=PATIENCE + timedelta(seconds=1)) if self._loop else None
        check = asked["postgres"] if asked else Check(False, "the event loop does not come to it")
        status = "ok" if check.ok else "unavailable"
        return Page(200 if check.ok else 503, {"status": status, "checks": {"postgres": check.shown()}})
