"""`longshift doctor`: looks at everything that a fleet stands on, and says what to do.

Each check is a small object of one shape (``findings.Check``): a name, a look that grades what it finds, and the advice if
that is not ok. Those of ``servers`` look at the settings and at Postgres, Redis and the artifact store, those of ``fleet`` at
what stands in the database. Nothing is written but a probe in Redis and one in the store, which are removed again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from longshift.clock import SYSTEM, Clock
from longshift.config import Config
from longshift.db.database import reason, rights
from longshift.doctor import fleet, servers
from longshift.doctor.findings import Check, Finding, Grade
from longshift.doctor.ground import Ground, opened
from longshift.errors import LongshiftError

__all__ = ["CHECKS", "Check", "Finding", "Grade", "examine"]

CHECKS: Sequence[Check] = (*servers.CHECKS, *fleet.CHECKS)


async def examine(config: Config, *, clock: Clock = SYSTEM, checks: Sequence[Check] = CHECKS) -> AsyncIterator[Finding]:
    """What each check finds, in order."""
    failed: set[str] = set()
    async with opened(config, clock=clock) as ground:
        for check in checks:
            finding = await _finding(check, ground, failed=failed)
            if finding.grade is Grade.PROBLEM:
                failed.add(check.name)
            yield finding


async def _finding(check: Check, ground: Ground, *, failed: set[str]) -> Finding:
    missing = [name for name in check.needs if name in failed]
    if missing:
        return Finding(check.name, Grade.SKIPPED, f"not looked at, because of {missing[0]}")
    try:
        with rights():
            seen = await check.look(ground)
    except LongshiftError as error:
        return Finding(check.name, Grade.PROBLEM, str(error), check.advice)
    except Exception as error:  # noqa: BLE001 - a server that answers as none should must not hide what the other checks find
        return Finding(check.name, Grade.PROBLEM, f"{type(error).__name__}: {reason(error)}", check.advice)
    return Finding(check.name, seen.grade, seen.what, None if seen.grade is Grade.OK else check.advice)
