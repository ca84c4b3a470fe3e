"""A Celery worker pool that awaits wake-ups on one asyncio loop, without monkey-patching.

Two threads:

    hub thread    the main thread: kombu's hub (BRPOP, acks, timers). Touches all of Celery's state, calls on_apply().
    loop thread   one asyncio loop: the runtime with its turns, and the coroutine of each wake-up in hand.

                  hub thread                              loop thread
    on_start      wait until the runtime has started  <-  runtime.start()
    on_apply      accept, call_soon_threadsafe         -> create_task(wake-up)
    _finished     Request.on_success: ack             <-  hub.call_soon
    drain         (also from a signal handler)         -> runtime.drain(), leftover wake-ups cancelled, runtime.stop()
    on_stop       wait until the loop thread has ended

The pool bounds wake-ups, not turns: turns live in the runtime's own tasks, and ``wake()`` that waits for a free slot is
the back-pressure. Celery keeps count (``worker_disable_prefetch``), so that no more than ``limit`` messages leave
Redis; the pool needs no queue of its own. ``Hub.call_soon`` is safe from other threads since kombu 5.7 (a lock, and a
socket pair that wakes the poller), but not from a signal handler, which may interrupt the holder of that lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Protocol
from uuid import UUID

from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown
from kombu.asynchronous import Hub, get_event_loop

from longshift.clock import SYSTEM
from longshift.errors import ConfigError, LongshiftError
from longshift.tasks import WakeTask

logger = getLogger(__name__)

STOP_TIMEOUT = 10.0
"""Seconds for ``runtime.stop()``, and as many for closing the loop: a hung clean-up must not hold the process."""


class Runtime(Protocol):
    """What a worker process runs on the loop. Every method is awaited on that one loop.

    ``stop`` is called once whenever ``start`` was called, also when that failed or was cancelled.
    """

    async def start(self) -> None:
        """Connect and get ready for wake-ups. An error here ends the process; a signal cancels it."""

    async def wake(self, session_ids: Sequence[UUID]) -> None:
        """Claim the sessions; return when each is claimed or found not claimable. Turns run on elsewhere.

        Waits while the worker has no free slot. May be called with the same session twice, and after ``drain`` began;
        may be cancelled once ``drain`` has returned.
        """

    async def drain(self) -> None:
        """Take nothing new and return when all turns have left the process, within a grace of its own."""

    async def stop(self) -> None:
        """Disconnect. After a second signal ``drain`` was cancelled: end at once what still runs."""


class App(Protocol):
    """What the pool needs of the Celery app."""

    longshift_runtime: Runtime
    longshift_pool: AsyncioPool | None
    tasks: dict[str, Any]

    def request_stop(self, exit_code: int = 0) -> None:
        """Begin an orderly stop of the worker."""


@dataclass(eq=False)
class _Job:
    """A wake-up in hand. Celery keeps a weak reference to it and the job keeps Celery's request alive."""

    id: str
    task: WakeTask
    kwargs: dict[str, Any]
    succeeded: Callable[[tuple[int, None, float]], None]

    def terminate(self, _signal: int | None = None) -> None:
        """Celery's revoke: a wake-up is over in no time, so there is nothing to end."""


class AsyncioPool(BasePool):  # type: ignore[misc]  # Celery ships no types
    """See the module's docstring. Celery makes one per worker; it finds the runtime on the app."""

    signal_safe = False
    body_can_be_buffer = True
    task_join_will_block = False

    app: App
    limit: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hub: Hub | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run_loop, name="longshift-loop", daemon=True)
        self._opened: Future[bool] = Future()
        self._ended = threading.Event()
        self._drain_asked = asyncio.Event()
        self._draining = False
        self._aborting = False
        self._wakes: set[asyncio.Task[None]] = set()
        self.app.longshift_pool = self

    # -- hub thread

    def on_start(self) -> None:
        """Start the loop and the runtime; ends the worker when the runtime cannot start."""
        self._hub = get_event_loop()
        if self._hub is None:
            raise ConfigError("the pool needs kombu's event loop: use the Redis broker and no green threads")
        self._thread.start()
        try:
            opened = self._opened.result()
        except Exception as error:
            known = isinstance(error, LongshiftError)
            logger.error("the worker cannot start: %s", str(error) or type(error).__name__, exc_info=not known)
            raise WorkerShutdown(1) from None
        if not opened:
            raise WorkerShutdown(0)

    def on_apply(
        self,
        _target: object,
        args: Sequence[Any] = (),
        _kwargs: object = None,
        callback: Callable[[tuple[int, None, float]], None] | None = None,
        accept_callback: Callable[[int, float], None] | None = None,
        **_options: object,
    ) -> _Job:
        """Take a wake-up in hand. One that comes while draining is left alone: unacked, it goes back to the broker."""
        name, task_id, request, *_ = args
        assert callback is not None, "Celery always passes it"
        assert accept_callback is not None, "Celery always passes it"
        job = _Job(task_id, self.app.tasks[name], request["kwargs"], callback)
        if not self._draining:
            accept_callback(0, SYSTEM.monotonic())
            self._call(self._launch, job)
        return job

    def on_stop(self) -> None:
        """Wait until the turns have left and the runtime has stopped."""
        self.drain()
        if self._thread.ident is None:
            return
        self._ended.wait()
        self._thread.join(STOP_TIMEOUT)
        if self._thread.is_alive():
            logger.error("the event loop did not close in time", extra={"seconds": STOP_TIMEOUT})

    def on_terminate(self) -> None:
        """A cold shutdown: like on_stop, but nothing gets a grace."""
        self.abort()
        self.on_stop()

    def terminate_job(self, _pid: int, _signal: int | None = None) -> None:
        """Part of Celery's interface: a wake-up is over in no time, so there is nothing to end."""

    def _finished(self, job: _Job) -> None:
        job.succeeded((0, None, 0.0))

    # -- any thread, and signal handlers: no locks, no logging

    def drain(self) -> None:
        """Begin the orderly stop; cancels ``runtime.start()`` if that still runs. Returns at once."""
        self._draining = True
        self._call(self._begin_drain)

    def abort(self) -> None:
        """Cut the drain short. Returns at once."""
        self._draining = True
        self._call(self._begin_abort)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        loop = self._loop
        if loop is None:  # not running yet: _serve() looks at _draining once it has set _loop
            return
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has closed: what was asked for has happened
            return

    # -- loop thread

    def _run_loop(self) -> None:
        failure: BaseException | None = None
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except asyncio.CancelledError:
            pass  # a signal: during start, or the second one
        except BaseException as error:  # noqa: BLE001  # SystemExit in a turn comes out here as well
            failure = error
        self._ended.set()
        self._report(failure)

    def _report(self, failure: BaseException | None) -> None:
        if self._opened.done():
            if failure is not None:
                logger.critical("the event loop of the worker failed", exc_info=failure)
                self.app.request_stop(1)
                self._wake_hub()
        elif failure is None:
            self._opened.set_result(False)
        else:
            self._opened.set_exception(failure)

    async def _serve(self) -> None:
        self._main = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        if self._draining:
            return
        runtime = self.app.longshift_runtime
        try:
            await runtime.start()
            self._opened.set_result(True)
            await self._drain_asked.wait()
            logger.info("draining", extra={"wake_ups": len(self._wakes)})
            await runtime.drain()
        finally:
            await self._leave(runtime)

    async def _leave(self, runtime: Runtime) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._cancel_wakes()
                await runtime.stop()
        except TimeoutError:
            logger.error("the runtime did not stop in time", extra={"seconds": STOP_TIMEOUT})
        finally:
            self._ended.set()

    async def _cancel_wakes(self) -> None:
        for task in self._wakes:
            task.cancel()
        if self._wakes:
            await asyncio.wait(self._wakes)

    def _begin_drain(self) -> None:
        if self._opened.done():
            self._drain_asked.set()
        elif self._main is not None:
            self._main.cancel()
        self._wake_hub()

    def _begin_abort(self) -> None:
        if self._main is not None and not self._aborting:
            self._aborting = True
            self._main.cancel()
        self._wake_hub()

    def _wake_hub(self) -> None:
        """Make the hub look at Celery's stop flag now: a signal alone does not interrupt its poll (PEP 475)."""
        if self._hub is not None:
            self._hub.call_soon(_nothing)

    def _launch(self, job: _Job) -> None:
        task = asyncio.get_running_loop().create_task(self._wake(job), name=f"wake-up {job.id}")
        self._wakes.add(task)
        task.add_done_callback(self._wakes.discard)

    async def _wake(self, job: _Job) -> None:
        try:
            await job.task.body(self.app.longshift_runtime, job.kwargs)
        except Exception:
            logger.exception("a wake-up failed", extra={"task_id": job.id})
        finally:
            if self.active and self._hub is not None:  # else the consumer has closed and taken the message back
                self._hub.call_soon(self._finished, job)


def _nothing() -> None:
    """Called for the wake-up of the poller that comes with it."""
