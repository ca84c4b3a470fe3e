"""Looks after a worker's wards: child processes in which turns run that may have crashed a process.

    suspects wait (the heartbeat says so)  -> start a ward, if fewer than ``LONGSHIFT_WARDS`` run here
    a ward dies                            -> report it: its suspects become a smaller group, the last one is condemned
    no suspects left                       -> a ward ends by itself after a while
    the worker drains, or dies             -> its standard input ends, and the ward drains

Wards run at a lower priority than workers: finding out who crashes must not slow down those who do not.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from random import Random
from uuid import UUID

from longshift import deaths
from longshift.config import Config, worker_environment
from longshift.db.database import Database
from longshift.errors import Unavailable
from longshift.heartbeat import Load
from longshift.hot import Hot
from longshift.model import new_id

logger = logging.getLogger(__name__)

LOOK = timedelta(milliseconds=500)
HESITATION = (2.0, 6.0)
"""Seconds, from and to: all workers learn of the same suspects at the same time, and not all shall start a ward. The leader
does at once; others (whose queues and agents may be others) when suspects still wait after a while."""
PAUSE = timedelta(seconds=2)
"""After the start of a ward, until it is seen whether another one is needed; doubled for each one in a row that died before it
could serve, up to ``2 ** LONGEST`` times."""
LONGEST = 5
LOWER = 5  # see nice(1)
EXTRA = timedelta(seconds=15)
"""What a ward may take to end beyond the grace of its steps."""


class Warden:
    """The wards of one worker."""

    def __init__(self, db: Database, hot: Hot, *, load: Load, leads: Callable[[], bool], config: Config) -> None:
        """``leads``: whether this worker is the sweeper's leader now."""
        self._leads = leads
        self._db = db
        self._hot = hot
        self._load = load
        self._config = config
        self._random = Random()
        self._wards: dict[Process, asyncio.Task[None]] = {}
        self._closing = False
        self._stillborn = 0  # wards in a row that never served

    async def run(self) -> None:
        """Start wards when they are needed, for ever."""
        while True:
            await asyncio.sleep(LOOK.total_seconds())
            if self._needed() and not self._leads():
                await asyncio.sleep(self._random.uniform(*HESITATION))
            if self._needed():
                await self._start()
                await asyncio.sleep(PAUSE.total_seconds() * 2 ** min(self._stillborn, LONGEST))

    def close(self) -> None:
        """Ask all wards to drain."""
        self._closing = True
        for ward in self._wards:
            assert ward.stdin is not None
            ward.stdin.close()

    async def closed(self) -> None:
        """Wait until all wards have ended; kill those that take too long."""
        if self._wards:
            limit = self._config.drain_grace + EXTRA
            await asyncio.wait(list(self._wards.values()), timeout=limit.total_seconds())
        for ward in list(self._wards):
            with suppress(ProcessLookupError):
                ward.kill()

    def _needed(self) -> bool:
        return self._load.suspects and not self._closing and len(self._wards) < self._config.wards

    async def _start(self) -> None:
        process = new_id()
        nice = [found, "-n", str(LOWER)] if (found := shutil.which("nice")) else []
        try:
            ward = await asyncio.create_subprocess_exec(
                *nice,
                *(sys.executable, "-P", "-m", "longshift.ward"),
                stdin=PIPE,
                env=worker_environment(self._config, process=process),
            )
        except OSError as error:
            logger.error("a ward cannot be started", extra={"reason": str(error)})
            return
        logger.warning("ward started", extra={"pid": ward.pid})
        self._wards[ward] = asyncio.create_task(self._watch(ward, process), name=f"ward {ward.pid}")
        if self._closing:  # meanwhile
            self.close()

    async def _watch(self, ward: Process, process: UUID) -> None:
        code = await ward.wait()
        del self._wards[ward]
        try:
            served = await deaths.report(self._db, self._hot, process=process, code=code)
            self._stillborn = 0 if served or code == 0 else self._stillborn + 1
        except Unavailable as error:  # the sweeper will notice the silence
            logger.warning("a death could not be reported", extra={"reason": str(error)})
