"""``python -m tests.chaos [--minutes 2] [--seed N]``; the same as ``make chaos ARGS="..."``."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longshift.embedded import Guardian
from tests.chaos.checker import check
from tests.chaos.evidence import Evidence
from tests.chaos.numbers import numbers_of
from tests.chaos.report import as_json, show, show_checks
from tests.chaos.run import Options, Result, run

Minutes = Annotated[float, typer.Option(min=0.1, help="how long faults and load last")]
Seed = Annotated[int | None, typer.Option(help="decides the schedule and what clients ask for; default: a new one")]
Workers = Annotated[int, typer.Option(min=2)]
Clients = Annotated[int, typer.Option(min=1, help="conversations at a time")]
PoisonToo = Annotated[bool, typer.Option("--poison/--no-poison", help="also turns that end their process")]
Defaults = Annotated[bool, typer.Option("--default-settings", help="the defaults of Longshift, not the quick ones")]
AsJson = Annotated[Path | None, typer.Option("--json", help="write the report to this file too")]
Dry = Annotated[bool, typer.Option("--schedule", help="print the schedule of the seed, and run nothing")]
Again = Annotated[Path | None, typer.Option("--check", help="check the evidence of an earlier run, and run nothing")]


def main(
    minutes: Minutes = 2,
    seed: Seed = None,
    workers: Workers = 5,
    clients: Clients = 24,
    poison: PoisonToo = True,
    default_settings: Defaults = False,
    json_file: AsJson = None,
    schedule: Dry = False,
    evidence: Again = None,
) -> None:
    """Let a fleet work while everything around it fails, then prove from outside that no promise was broken."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if evidence is not None:
        raise typer.Exit(_check_again(evidence, console))
    options = Options(
        seconds=minutes * 60,
        seed=seed if seed is not None else random.SystemRandom().randrange(1_000_000),
        workers=workers,
        clients=clients,
        quick=not default_settings,
        poison=poison,
        patience=240 if default_settings else 120,
    )
    console.print(f"seed {options.seed}", highlight=False)
    if schedule:
        for fault in options.schedule(15 if default_settings else 3):
            console.print(str(fault), highlight=False)
        return
    result = _run(options, console)
    show(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(result), indent=1) + "\n")
    if result.violations:
        raise typer.Exit(1)
    shutil.rmtree(result.folder)


def _run(options: Options, console: Console) -> Result:
    folder = Path(tempfile.mkdtemp(prefix=f"longshift-chaos-{options.seed}-"))
    console.print(f"logs are in {folder}", highlight=False, soft_wrap=True)
    # When even this process is stuck: say where, and end; the guardian then ends everything that was started.
    faulthandler.dump_traceback_later(options.limit, exit=True)
    try:
        with Guardian() as guardian:
            say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
            return asyncio.run(run(options, folder, guardian=guardian, say=say))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _check_again(file: Path, console: Console) -> int:
    found = Evidence.load(file)
    for name, value in numbers_of(found).items():
        console.print(f"  {name}: {value}", highlight=False)
    checks = check(found)
    show_checks(checks, console)
    return int(any(checked.violations for checked in checks))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
