"""Loaded into a worker beside its agents, it writes down each write to the log that the worker asks Postgres for.

    asked|committed EPOCH SESSION EVENT PID TIME

``EVENT`` is the id of the write's first event. ``committed``: the statement's answer says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from longshift import Turn, agent
from longshift.db import log
from longshift.db.database import Database
from longshift.db.log import Done, Key, Write
from tests.benchmarks.agents import Work, labour

FILE = "LONGSHIFT_WITNESS"
"""The variable of the environment that names the file: of ours, Longshift knows no such setting."""
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


if FILE in os.environ:
    _out = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for _name in ("append", "start", "finish", "leave"):
        setattr(log, _name, _watched(getattr(log, _name), _out))
