"""Blocking work off the event loop: a bounded pool, and things that outlive a cancelled caller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Generic, Protocol, TypeVar

from longshift.errors import LongshiftError, Unavailable

T = TypeVar("T")


class Closable(Protocol):
    """A file or a response body."""

    def close(self) -> object: ...


C = TypeVar("C", bound=Closable)


class Lent(Generic[C]):
    """A file that one thread at a time works with and that anybody may close at any moment.

    A cancelled coroutine leaves its thread at work: closing the file under it would fail there, waiting for it would
    delay the cancellation. So ``close`` never waits, and the last user closes on leaving.
    """

    def __init__(self, thing: C) -> None:
        self._thing = thing
        self._guard = threading.Lock()
        self._in_use = threading.Lock()
        self._users = 0
        self._closed = False

    @contextmanager
    def use(self) -> Iterator[C]:
        """Blocks while another thread uses the thing. ``ValueError`` once it is closed."""
        with self._guard:
            if self._closed:
                raise ValueError("used after close()")
            self._users += 1
        try:
            with self._in_use:
                yield self._thing
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._guard:
            self._users -= 1
            last = self._closed and self._users == 0
        if last:
            self._thing.close()

    def close(self) -> None:
        """Close now, or as soon as the last user leaves; a second call does nothing."""
        with self._guard:
            idle = not self._closed and self._users == 0
            self._closed = True
        if idle:
            self._thing.close()


class Threads:
    """The threads of one store. Threads start on first use.

    Work that finds no free thread ``within`` a time is refused: behind transfers to a store that hangs, the queue would
    wait for as many time-outs as it is long. Probes have a thread of their own: a pool that is busy uploading is no reason
    to call the store unreachable.
    """

    def __init__(self, count: int, *, within: timedelta = timedelta(seconds=30)) -> None:
        self._within = within
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="artifacts")
        self._spare = ThreadPoolExecutor(1, thread_name_prefix="artifacts-probe")
        self._probe: Future[str | None] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the pool. If the caller is cancelled, work that has begun goes on unobserved.

        Raises:
            Unavailable: the store is closed, or no thread has become free in time.
        """
        return await self._result(_submit(self.pool, work))

    async def lend(self, opening: Callable[[], C]) -> Lent[C]:
        """Open something in the pool; what a cancelled caller no longer wants is closed again."""
        job = _submit(self.pool, opening)
        try:
            return Lent(await self._result(job))
        except asyncio.CancelledError:
            job.add_done_callback(_close_result)
            raise

    async def _result(self, job: Future[T]) -> T:
        """Gives up work that nobody has begun in time; what has begun has limits of its own."""
        waiter = asyncio.wrap_future(job)
        try:
            done, _ = await asyncio.wait({waiter}, timeout=self._within.total_seconds())
            if not done and job.cancel():
                seconds = self._within.total_seconds()
                raise Unavailable(f"all transfers of the artifact store were busy for {seconds:g} s: try again")
            return await waiter
        except asyncio.CancelledError:
            waiter.cancel()
            raise

    async def probe(self, work: Callable[[], None], *, within: timedelta) -> None:
        """Run ``work``, or join the run under way: probes of a store that hangs must not pile up.

        Raises:
            Unavailable: ``work`` raised it, or has not finished ``within`` this time.
        """
        if self._probe is None or self._probe.done():
            self._probe = _submit(self._spare, lambda: _complaint(work))
        waiter = asyncio.wrap_future(self._probe)
        done, _ = await asyncio.wait({waiter}, timeout=within.total_seconds())
        complaint = (
            waiter.result() if done else f"the artifact store did not answer within {within.total_seconds():g} s"
        )
        if complaint is not None:
            raise Unavailable(complaint)

    async def close(self) -> None:
        """Wait for the work handed over so far; refuse more."""
        self._spare.shutdown(wait=False)
        await asyncio.to_thread(self.pool.shutdown)


def _submit(executor: ThreadPoolExecutor, work: Callable[[], T]) -> Future[T]:
    try:
        return executor.submit(work)
    except RuntimeError:  # the executor's word for "shut down"
        raise Unavailable("the artifact store is closed") from None


def _close_result(job: Future[C]) -> None:
    if not job.cancelled() and job.exception() is None:
        job.result().close()


def _complaint(work: Callable[[], None]) -> str | None:
    """What is wrong, as a value: an exception in a future that nobody awaits any more would be logged as lost."""
    try:
        work()
    except LongshiftError as error:
        return str(error)
    return None
