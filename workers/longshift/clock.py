"""The only module that reads the machine's clock.

Statements use the database's clock; this one serves time-outs, back-off and what a turn records with ``turn.now()``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Clock:
    """``now`` gives aware UTC for people and records; ``monotonic`` gives seconds for measuring."""

    now: Callable[[], datetime] = _utc_now
    monotonic: Callable[[], float] = time.monotonic


SYSTEM = Clock()
