"""``python -m tests.rehearsal [--short] [--autoscale]``; the same as ``make rehearse-scale ARGS="..."``."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import random
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longshift.embedded import Guardian
from tests.rehearsal.manifests import GRACE, SCALED_OBJECT, rule_for
from tests.rehearsal.report import as_json, record, show
from tests.rehearsal.run import Options, Phase, Result, run

SHORT = 10.0
Short = Annotated[bool, typer.Option("--short", help=f"{SHORT:g} s of load: for CI")]
Autoscale = Annotated[
    bool,
    typer.Option("--autoscale", help="the rule of the ScaledObject decides how many workers there are, not a script"),
]
Seconds = Annotated[float, typer.Option(min=10, help="how long the load lasts")]
Peak = Annotated[int, typer.Option(min=2, max=20, help="workers at the height; with --autoscale: at most")]
Slots = Annotated[int, typer.Option(min=1, help="turns that one worker runs at a time")]
Pace = Annotated[float, typer.Option(min=0.5, help="visits of clients per second at the height")]
Faster = Annotated[float, typer.Option(min=1, help="with --autoscale: all times of the rule divided by this")]
Seed = Annotated[int | None, typer.Option(help="decides what clients ask for, and when; default: a new one")]
AsJson = Annotated[Path | None, typer.Option("--json", help="write figures, series and violations to this file too")]
Record = Annotated[Path | None, typer.Option(help="write the demand and the series, for the simulation, to this file")]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="run no fleet, but simulate the rule over made-up demand: minutes")
]
Picture = Annotated[
    Path | None, typer.Option("--svg", help="with --simulate: only draw the picture of docs/how-to/scale.md")
]
Demands = Annotated[str, typer.Option("--only", help="with --simulate: names of demands, comma-separated")]
Manifest = Annotated[Path, typer.Option(help="file with the ScaledObject")]


def main(
    short: Short = False,
    autoscale: Autoscale = False,
    seconds: Seconds = 60,
    peak: Peak = 6,
    slots: Slots = 4,
    pace: Pace = 12,
    faster: Faster = 10,
    seed: Seed = None,
    json_file: AsJson = None,
    record_file: Record = None,
    scaled_object: Manifest = SCALED_OBJECT,
    simulate: Simulate = False,
    only: Demands = "",
    picture: Picture = None,
) -> None:
    """Let a fleet of real workers grow from 1 to 6 and shrink to 1 under load, and check from outside that nothing was lost.

    Ends with 1 if a turn was lost, a finished step ran again, a worker needed SIGKILL, or the like; what was found, and all
    logs, are in the folder that it names then. Ends with 2 if the command line is wrong.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    if simulate:
        _simulate(console, only, json_file, picture)
        return
    options = Options(
        phases=_phases(SHORT if short else seconds, peak, pace, scripted=not autoscale),
        seed=seed if seed is not None else random.SystemRandom().randrange(1_000_000),
        slots=slots,
        grace=GRACE,
        rule=replace(rule_for(slots, scaled_object).faster(faster), most=peak) if autoscale else None,
        faster=faster if autoscale else 1,
    )
    console.print(f"seed {options.seed}", highlight=False)
    result = _run(options, console)
    show(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(result), indent=1) + "\n")
    if record_file is not None:
        record_file.write_text(json.dumps(record(result)) + "\n")
    if result.violations:
        raise typer.Exit(1)
    shutil.rmtree(result.folder)


def _simulate(console: Console, only: str, json_file: Path | None, picture: Path | None) -> None:
    from tests.rehearsal.compare import compare, own_views
    from tests.rehearsal.draw import draw

    if picture is not None:
        with own_views() as ask:
            picture.write_text(draw(ask))
        return
    found = compare(console, names=[name.strip() for name in only.split(",") if name.strip()])
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _phases(seconds: float, peak: int, pace: float, *, scripted: bool) -> list[Phase]:
    """1 to ``peak`` to 1. The load falls when the fleet has shrunk, so that drains interrupt something."""
    if not scripted:
        return [Phase(0.15 * seconds, pace / 10), Phase(0.4 * seconds, pace), Phase(0.45 * seconds, pace / 10)]
    return [
        Phase(0.2 * seconds, pace / peak, replicas=1),
        Phase(0, pace / peak, replicas=peak, settled=True),  # however long a slow machine takes
        Phase(0.6 * seconds, pace, replicas=peak),
        Phase(0, pace / 2, replicas=1, settled=True),
        Phase(0.2 * seconds, pace / 10, replicas=1),
    ]


def _run(options: Options, console: Console) -> Result:
    folder = Path(tempfile.mkdtemp(prefix=f"longshift-rehearsal-{options.seed}-"))
    console.print(f"logs are in {folder}", highlight=False, soft_wrap=True)
    # When even this process is stuck: say where, and end; the guardian then ends everything that was started.
    faulthandler.dump_traceback_later(options.limit, exit=True)
    try:
        with Guardian() as guardian:
            say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
            return asyncio.run(run(options, folder, guardian=guardian, say=say))
    finally:
        faulthandler.cancel_dump_traceback_later()


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
