"""Is a process alive, and does what it needs answer? For workers, API processes and the exporter alike.

tick      proves that the event loop turns; whoever asks looks at the last tick, from a thread
Probes    questions to dependencies: of each there is one under way, and its answer holds for a second
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from longshift.clock import Clock
from longshift.ending import end
from longshift.errors import LongshiftError
from longshift.metrics import Page

logger = logging.getLogger(__name__)

T = TypeVar("T")
TICK = 0.25
"""Seconds between two ticks of the loop."""
PATIENCE = timedelta(seconds=3)
"""For the answer of a dependency, and of the event loop."""
FRESH = timedelta(seconds=1)
"""An answer younger than this is given again."""

Question = Callable[[], Awaitable[None]]
"""Raises a ``LongshiftError`` that says what does not answer."""


@dataclass(frozen=True, slots=True)
class Check:
    """What came of a question."""

    ok: bool
    reason: str = ""  # why not, for operators

    def shown(self) -> dict[str, str]:
        return {"status": "ok"} if self.ok else {"status": "failed", "detail": self.reason}


class Ticking(Protocol):
    """Where the moment of the last tick (monotonic) is kept."""

    tick: float


class Pulse:
    """The last tick of a loop that has nowhere else to keep it."""

    def __init__(self, clock: Clock) -> None:
        self.tick = clock.monotonic()


async def tick(of: Ticking, *, clock: Clock, lag: Callable[[float], None] = lambda _: None) -> None:
    """Prove, for ever, that the loop turns; ``lag`` is told by how many seconds it was late."""
    while True:
        of.tick = before = clock.monotonic()
        await asyncio.sleep(TICK)
        lag(max(0.0, clock.monotonic() - before - TICK))


def live(of: Ticking, *, clock: Clock, limit: timedelta) -> Page:
    """``/livez``: the loop has turned within ``limit``. From any thread; asks nobody."""
    silent = clock.monotonic() - of.tick
    if silent < limit.total_seconds():
        return Page(200, {"status": "ok"})
    return Page(503, {"status": "stalled", "detail": f"the event loop has not turned for {silent:.0f} s"})


def in_loop(
    loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, T]], *, within: timedelta
) -> T | None:
    """What ``work`` gives in the loop, for a caller in another thread; None: the loop does not come to it in time."""
    if loop.is_closed():
        return None
    coroutine = work()
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # it was closed in this very moment
        coroutine.close()
        return None
    try:
        return future.result(within.total_seconds())
    except (TimeoutError, CancelledError):
        future.cancel()
        return None


class Probes:
    """What a process needs, by name, and how to ask whether it answers.

    Questions to a dependency that hangs must neither pile up nor be cancelled: cancelling takes the answer of the same
    dependency. So one that has not come back is joined by whoever asks next.
    """

    def __init__(self, questions: Mapping[str, Question], *, clock: Clock) -> None:
        self._questions = dict(questions)
        self._clock = clock
        self._asked: dict[str, asyncio.Task[Check]] = {}
        self._known: dict[str, tuple[float, Check]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._questions)

    def known(self, name: str) -> Check | None:
        """What was last found out; from any thread. None: it was never asked."""
        known = self._known.get(name)
        return None if known is None else known[1]

    async def ask(self, *names: str) -> dict[str, Check]:
        """The answers of these dependencies (none named: of all), within ``PATIENCE``."""
        wanted = names or tuple(self._questions)
        return dict(zip(wanted, await asyncio.gather(*map(self._ask, wanted)), strict=True))

    async def close(self) -> None:
        """End the questions under way."""
        await end(self._asked.values())

    async def _ask(self, name: str) -> Check:
        known = self._known.get(name)
        if known is not None and self._clock.monotonic() - known[0] < FRESH.total_seconds():
            return known[1]
        probe = self._asked.get(name)
        if probe is None or probe.done():
            probe = self._asked[name] = asyncio.create_task(_answer(self._questions[name]), name=f"probe-{name}")
        done, _ = await asyncio.wait({probe}, timeout=PATIENCE.total_seconds())
        if not done:
            check = Check(False, f"no answer within {PATIENCE.total_seconds():g} s")
        elif probe.cancelled():
            check = Check(False, "this process is ending")
        else:
            check = probe.result()
        self._remember(name, check)
        return check

    def _remember(self, name: str, check: Check) -> None:
        before = self.known(name)
        self._known[name] = self._clock.monotonic(), check
        if not check.ok and (before is None or before.ok):
            logger.warning("a dependency does not answer", extra={"dependency": name, "reason": check.reason})
        elif check.ok and before is not None and not before.ok:
            logger.info("a dependency answers again", extra={"dependency": name})


async def _answer(question: Question) -> Check:
    """As a value: an exception in a task that nobody awaits any more would be logged as lost."""
    try:
        await question()
    except LongshiftError as error:
        return Check(False, str(error))
    except Exception as error:
        logger.exception("a probe failed")
        return Check(False, f"{type(error).__name__}: {error}")
    return Check(True)
