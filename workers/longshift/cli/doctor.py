"""`longshift doctor`: what is wrong, and what to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import typer

from longshift.cli import local
from longshift.cli.exits import ExitCode
from longshift.cli.output import put, put_json, say
from longshift.cli.show import AsJson
from longshift.errors import ConfigError

if TYPE_CHECKING:  # slow to import, and most commands do without it
    from longshift.config import Config

STYLES = {"ok": None, "warning": "yellow", "problem": "red", "skipped": "dim"}


def doctor(json: AsJson = False) -> None:
    """Look at the settings, the servers, the schema and the fleet, and say what to do. Exits with 1 if there is a problem.

    Run it where the processes run, with their settings.
    """
    try:
        config = local.load()
    except ConfigError as error:
        _show("problem", "settings", str(error), json=json)
        raise typer.Exit(ExitCode.FAILED) from None
    counts = asyncio.run(_examine(config, json=json))
    if not json:
        parts = [f"{counts[grade]} {grade}" for grade in STYLES if counts[grade]]
        say(", ".join(parts), style="red" if counts["problem"] else "yellow" if counts["warning"] else "green")
    raise typer.Exit(ExitCode.FAILED if counts["problem"] else ExitCode.OK)


async def _examine(config: Config, *, json: bool) -> Counter[str]:
    from longshift.doctor import examine

    counts: Counter[str] = Counter()
    async for finding in examine(config):
        counts[finding.grade] += 1
        _show(finding.grade, finding.check, finding.found, finding.advice, json=json)
    return counts


def _show(grade: str, check: str, found: str, advice: str | None = None, *, json: bool) -> None:
    if json:
        put_json({"check": check, "grade": grade, "found": found, "advice": advice})
        return
    put(f"{grade:<8} {check:<13} {found}")
    if advice is not None:
        put(f"{'':<23}{advice}")
