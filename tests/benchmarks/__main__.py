"""``python -m tests.benchmarks [NAME...] [--short] [--json FILE]``; the same as ``make bench ARGS="..."``."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longshift.embedded import Guardian
from tests.benchmarks import (
    archived,
    artifacts,
    drain,
    faults,
    idle,
    long_session,
    outages,
    poison,
    recovery,
    restore,
    stale,
    steps,
    timers,
    turns,
    waiting,
)
from tests.benchmarks.figures import Report, machine
from tests.benchmarks.stack import Stack

BENCHMARKS: dict[str, Callable[..., Awaitable[Report]]] = {
    "steps": steps.run,
    "turns": turns.run,
    "recovery": recovery.run,
    "faults": faults.run,
    "drain": drain.run,
    "stale": stale.run,
    "poison": poison.run,
    "outages": outages.run,
    "waiting": waiting.run,
    "timers": timers.run,
    "idle": idle.run,
    "restore": restore.run,
    "archived": archived.run,
    "artifacts": artifacts.run,
    "long_session": long_session.run,
}
Names = Annotated[list[str] | None, typer.Argument(help=f"which: {', '.join(BENCHMARKS)}; default: all")]
Short = Annotated[
    bool, typer.Option("--short", help="a smoke test, all in a minute and a half: its figures mean little")
]
AsJson = Annotated[Path | None, typer.Option("--json", help="write the figures to this file too; '-': only them, here")]


def main(names: Names = None, short: Short = False, as_json: AsJson = None) -> None:
    """Measure Longshift on servers of its own: figures of one run beside each other, medians with their spread.

    Ends with 1 if a turn was lost, a finished step ran again, or the like: each such finding is printed.
    """
    chosen = names or list(BENCHMARKS)
    if unknown := set(chosen) - BENCHMARKS.keys():
        raise typer.BadParameter(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    to_stdout = as_json == Path("-")
    console = Console(quiet=to_stdout)
    conditions = machine()
    reports = []
    with tempfile.TemporaryDirectory(prefix="longshift-bench-") as folder, Guardian() as guardian:
        stack = Stack(Path(folder), guardian=guardian)
        stack.start()
        try:
            for name in chosen:
                begun = time.perf_counter()
                reports.append(asyncio.run(_run(name, stack, short=short)))
                reports[-1].notes.append(f"took {time.perf_counter() - begun:.0f} s")
                reports[-1].show(console)
        finally:
            stack.stop()
    text = json.dumps({"conditions": conditions, "short": short, "reports": [r.as_json() for r in reports]}, indent=1)
    if to_stdout:
        print(text)
    elif as_json is not None:
        as_json.write_text(text + "\n")
    if violated := [f"{report.name}: {what}" for report in reports for what in report.violations]:
        sys.stderr.write("\n".join(["VIOLATED", *violated, ""]))
        raise typer.Exit(1)


async def _run(name: str, stack: Stack, *, short: bool) -> Report:
    return await BENCHMARKS[name](stack, short=short)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
