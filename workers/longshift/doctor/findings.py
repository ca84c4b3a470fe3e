"""The one shape of all checks: a look at the ground, and what to do if it is not as it should be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshift.doctor.ground import Ground


class Grade(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it works; somebody should know, or it will not for long
    PROBLEM = "problem"  # work stands still, is refused, or may be lost
    SKIPPED = "skipped"  # it could not be looked at


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has found."""

    grade: Grade
    what: str


def fine(what: str) -> Seen:
    return Seen(Grade.OK, what)


def warning(what: str) -> Seen:
    return Seen(Grade.WARNING, what)


def problem(what: str) -> Seen:
    return Seen(Grade.PROBLEM, what)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is looked at.

    Attributes:
        name: stable, for programs.
        look: what is there, and how it is graded.
        advice: what to do if that is not ok.
        needs: checks without which this one has nothing to look at; those that are problems are enough of a finding.
    """

    name: str
    look: Callable[[Ground], Awaitable[Seen]]
    advice: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a check; ``advice`` is None if there is nothing to do."""

    check: str
    grade: Grade
    found: str
    advice: str | None = None
