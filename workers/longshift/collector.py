"""The collector as a service: what nobody refers to leaves the cold tier.

Every worker has one, the one that leads the fleet works; apart from the sweeper, for a store that hangs must not delay a
rescue. A pass is bounded (``Cold.collect``), may run twice, late, or in two processes at once without harm, and costs four
statements when there is nothing to collect. What can go wrong: while the store is away its objects stay, and so do those that
it refuses to delete; a warning says so at each pass.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta

from longshift.cold import Cold, Dropped
from longshift.errors import Unavailable
from longshift.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

EVERY = timedelta(minutes=5)
"""Between two passes: much less than the grace of what they look for."""


class Collector:
    """Passes over the cold tier for as long as this worker leads."""

    def __init__(
        self, cold: Cold, *, leads: Callable[[], bool], keep_uploads: timedelta, metrics: WorkerMetrics
    ) -> None:
        self._cold, self._leads, self._keep_uploads, self._metrics = cold, leads, keep_uploads, metrics

    async def run(self) -> None:
        """A pause, a pass, for ever; followers only pause."""
        while True:
            await asyncio.sleep(EVERY.total_seconds())
            if self._leads():
                await self.collect()

    async def collect(self) -> Dropped:
        """One pass; errors are logged, for the next one may do better."""
        try:
            dropped = await self._cold.collect(keep_uploads=self._keep_uploads)
        except Unavailable as error:
            logger.warning("collection put off", extra={"reason": str(error)})
            return Dropped()
        except Exception:
            logger.exception("collection failed")
            return Dropped()
        counts = {"artifacts": dropped.artifacts, "blobs": dropped.blobs, "bytes": dropped.bytes}
        for what, count in counts.items():
            self._metrics.collected.labels(what).inc(count)
        if any(counts.values()):
            logger.info("artifacts collected", extra=counts)
        return dropped
