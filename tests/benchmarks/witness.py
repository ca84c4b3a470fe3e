"""Loaded into a worker beside its agents, it writes down each write to the log that the worker asks Postgres for, and can
hold up the first heartbeat after the process was stopped.

    asked|committed EPOCH SESSION EVENT PID TIME

``EVENT`` is the id of the write's first event. ``committed``: the statement's answer says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from longshift import Turn, agent
from longshift.db import log
from longshift.db.database import Database
from longshift.db.liveness import Liveness, Pulse
from longshift.db.log import Done, Key, Write
from tests.benchmarks.agents import Work, labour

FILE = "LONGSHIFT_WITNESS"
HOLD_UP = "LONGSHIFT_WITNESS_HOLD_UP"
"""Variables of the environment, of ours: Longshift knows no such settings. The file, and seconds."""
LONG_AGO = 2.0
"""Seconds since the last heartbeat after which the process must have been stopped."""
Statement = Callable[[Database, Sequence[Any]], Awaitable[dict[Key, Done]]]


@agent("witnessed")
async def witnessed(turn: Turn, given: Work) -> int:
    return await labour(turn, given)


@dataclass(frozen=True, slots=True)
class Seen:
    """One line."""

    what: str
    epoch: int
    session: UUID
    event: UUID
    pid: int
    at: float


def read(file: Path) -> list[Seen]:
    return [
        Seen(what, int(epoch), UUID(session), UUID(event), int(pid), float(at))
        for what, epoch, session, event, pid, at in map(str.split, file.read_text().splitlines())
    ]


def _watched(statement: Statement, out: int) -> Statement:
    async def watched(db: Database, writes: Sequence[Write]) -> dict[Key, Done]:
        _note(out, "asked", writes)
        answers = await statement(db, writes)
        _note(out, "committed", [write for write in writes if write.key in answers])
        return answers

    return watched


def _note(out: int, what: str, writes: Sequence[Write]) -> None:
    pid, now = os.getpid(), time.time()
    lines = [f"{what} {w.key[1]} {w.session_id.hex} {w.events[0].id.hex} {pid} {now:.6f}\n" for w in writes]
    os.write(out, "".join(lines).encode())


def hold_up(seconds: float) -> None:
    beat, last = Liveness.beat, time.monotonic()

    def held_up(self: Liveness, worker_id: UUID, pulse: Pulse, *, want_leader: bool) -> datetime | None:
        nonlocal last
        if time.monotonic() - last > LONG_AGO:
            time.sleep(seconds)  # in the heartbeat's own thread
        last = time.monotonic()
        return beat(self, worker_id, pulse, want_leader=want_leader)

    Liveness.beat = held_up  # type: ignore[method-assign]


if FILE in os.environ:
    _out = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for _name in ("append", "start", "finish", "leave"):
        setattr(log, _name, _watched(getattr(log, _name), _out))
    hold_up(float(os.environ.get(HOLD_UP, "0")))
