"""What agents did to the world: one append-only file, a line when a step begins and a line when it ends.

    begun|done TURN SESSION PLACE STEP ATTEMPT PID TIME

One write a line: appends of several processes do not mix, so the order of the lines is the order in which it happened,
whichever process did it. TIME is the wall clock of the machine, which the database's ``clock_timestamp()`` reads as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import UUID

from longshift import Turn

BEGUN = "begun"
DONE = "done"


@dataclass(frozen=True, slots=True)
class Effect:
    """One line. ``place``: of the turn in its session, from 0. ``step``: of the turn, from 0."""

    what: str
    turn: UUID
    session: UUID
    place: int
    step: int
    attempt: int
    pid: int
    at: float

    @property
    def step_name(self) -> str:
        """What the step is called in the log."""
        return step_name(self.step)


def note(file: str, what: str, turn: Turn, *, place: int, step: int) -> None:
    ids = f"{turn.id.partition('_')[2]} {turn.session_id.partition('_')[2]}"
    line = f"{what} {ids} {place} {step} {turn.attempt} {os.getpid()} {time.time():.6f}\n"
    os.write(_opened(file), line.encode())


@cache
def _opened(file: str) -> int:
    """One descriptor a process: a worker forked or started later opens the file for itself."""
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def step_name(number: int) -> str:
    return f"part-{number}"


def step_number(name: str) -> int:
    return int(name.partition("-")[2])


def read(file: Path) -> list[Effect]:
    """All lines, in the order of their happening."""
    return list(_parsed(file.read_text().splitlines())) if file.exists() else []


def _parsed(lines: Iterable[str]) -> Iterable[Effect]:
    for line in lines:
        what, turn, session, place, step, attempt, pid, at = line.split()
        yield Effect(what, UUID(turn), UUID(session), int(place), int(step), int(attempt), int(pid), float(at))
