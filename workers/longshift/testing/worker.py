"""A worker that dies by SIGKILL at a point of a turn: ``python -m longshift.testing.worker --crash-at POINT``.

    --crash-at "before step.completed charge"     the step has run, its record was not sent
    --crash-at "after step.completed charge"      the record is durable, and nobody in the process has seen the answer
    --crash-after 5                               as soon as the fifth event of any session is durable

Points are those of ``longshift.testing.points``; the first turn that comes to it ends the process. All else is the
ordinary worker, with the settings of the environment; ``LocalFleet.start_worker(crash_at=...)`` starts one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longshift import fleet, telemetry
from longshift.agent import load_agents
from longshift.config import load
from longshift.db.log import Done, Write
from longshift.errors import LongshiftError
from longshift.events import NewEvent
from longshift.journal import Journal
from longshift.lease import Lease
from longshift.ledger import Ledger
from longshift.model import CallOutcome, NewCall, ToolCallRecord
from longshift.testing.points import Names, call_name, check_point
from longshift.tracing import open_traces
from longshift.worker import Worker


class CrashingJournal(Journal):
    """A journal whose process dies before or after one of its records."""

    def __init__(self, *args: Any, crash_at: str | None = None, crash_after: int | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._crash_at, self._crash_after = crash_at, crash_after
        self._names = Names()

    async def append(self, lease: Lease, events: Sequence[NewEvent]) -> None:
        names = self._before(events)
        await super().append(lease, events)
        self._after(lease, events, names)

    async def write(self, lease: Lease, make: Callable[[int], Write]) -> Done:
        events = make(lease.seq + 1).events
        names = self._before(events)
        done = await super().write(lease, make)
        self._after(lease, events, names)
        return done

    def _before(self, events: Sequence[NewEvent]) -> list[str]:
        names = [self._names.upcoming(event) for event in events]
        if any(f"before {name}" == self._crash_at for name in names):
            _die()
        return names

    def _after(self, lease: Lease, events: Sequence[NewEvent], names: Sequence[str]) -> None:
        for event in events:
            self._names.written(event)
        by_number = self._crash_after is not None and lease.seq >= self._crash_after
        if by_number or any(f"after {name}" == self._crash_at for name in names):
            _die()


class CrashingLedger(Ledger):
    """A ledger of tool calls whose process dies before or after one of its records."""

    def __init__(self, *args: Any, crash_at: str | None = None) -> None:
        super().__init__(*args)
        self._crash_at = crash_at

    async def begin(self, lease: Lease, call: NewCall, *, over: int | None = None) -> int | ToolCallRecord:
        name = call_name("begin", call.place)
        self._reach(f"before {name}")
        begun = await super().begin(lease, call, over=over)
        self._reach(f"after {name}")
        return begun

    async def end(
        self, lease: Lease, call: NewCall, outcome: CallOutcome, *, epoch: int | None = None
    ) -> ToolCallRecord | None:
        name = call_name("end", call.place)
        self._reach(f"before {name}")
        standing = await super().end(lease, call, outcome, epoch=epoch)
        self._reach(f"after {name}")
        return standing

    def _reach(self, point: str) -> None:
        if point == self._crash_at:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the point is reached, or SIGTERM drains it."""
    parser = argparse.ArgumentParser(prog="python -m longshift.testing.worker", description="A worker that dies.")
    points = parser.add_mutually_exclusive_group(required=True)
    points.add_argument("--crash-at", metavar="POINT", help="such as 'before step.completed charge'")
    points.add_argument("--crash-after", metavar="N", type=int, help="events of a session")
    given = parser.parse_args(arguments)
    telemetry.setup()
    try:
        if given.crash_at is not None:
            check_point(given.crash_at)
        config = load()
        sys.path.insert(0, str(Path.cwd()))  # as `longshift worker` does
        journal = partial(CrashingJournal, crash_at=given.crash_at, crash_after=given.crash_after)
        ledger = partial(CrashingLedger, crash_at=given.crash_at)
        traces = open_traces(config, service="longshift-worker")
        app = fleet.create_app(
            redis_url=config.require("redis_url"),
            queues=config.queues,
            runtime=Worker(config, load_agents(config.agents), journal=journal, ledger=ledger, traces=traces),
            connect_timeout=config.connect_timeout.total_seconds(),
        )
        return fleet.run(app)
    except LongshiftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
