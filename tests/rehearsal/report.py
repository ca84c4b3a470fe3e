"""What a rehearsal found: for people, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.figures import machine, quantile
from tests.chaos.numbers import numbers_of
from tests.chaos.report import show_checks
from tests.rehearsal.run import Result

SHOWN = (
    ("from the new replica count to a new worker's first turn", "s", "first_turn"),
    ("from the start of a worker to its being ready", "s", "ready"),
    ("from SIGTERM to the end of a worker", "s", "drained"),
    ("turns that a drain interrupted", "", "interrupted"),
    ("how long each of those stood still", "s", "paused"),
    ("from acceptance to start, the first of a session", "s", "waited"),
)


def as_json(result: Result) -> dict[str, Any]:
    options, figures = result.options, result.figures
    return {
        "conditions": machine(),
        "seed": options.seed,
        "slots": options.slots,
        "mode": "scripted" if options.rule is None else "autoscaled",
        "phases": [asdict(phase) for phase in options.phases],
        "figures": figures.as_json(),
        "changes": result.progress.changes,
        "series": [asdict(sample) for sample in result.progress.series],
        "numbers": numbers_of(result.found),
        "checks": {c.name: {"looked_at": c.looked_at, "violations": c.violations} for c in result.checks},
        "violations": result.violations,
    }


def record(result: Result) -> dict[str, Any]:
    """What the simulation reads: the demand, and what really happened, to compare."""
    return {
        "about": f"{'scripted' if result.options.rule is None else 'autoscaled'}, seed {result.options.seed}",
        "slots": result.options.slots,
        "faster": result.options.faster,
        "most": result.options.rule.most if result.options.rule is not None else None,
        "segments": [[round(each, 2) for each in astuple(segment)] for segment in result.figures.segments],
        "ready_after": round(median(result.figures.ready), 2),
        "changes": result.progress.changes,
        "series": [
            [s.at, s.runnable, s.running, round(s.oldest, 2), s.wanted, s.ready] for s in result.progress.series
        ],
    }


def show(result: Result, console: Console) -> None:
    figures = result.figures
    table = Table("measured", "median", "highest", "unit", "of", title="the rehearsal", title_justify="left")
    for name, unit, attribute in SHOWN:
        table.add_row(name, *_row(getattr(figures, attribute)), unit, str(len(getattr(figures, attribute))))
    console.print(table)
    changes = ", ".join(f"{n} at {at:.0f} s" for at, n in result.progress.changes)
    console.print(f"  replicas: {changes}", highlight=False)
    console.print(
        f"  {figures.turns} turns, {figures.pods} pods, {figures.drains} drains, {figures.killed} that needed SIGKILL, "
        f"{figures.crashed} that ended by themselves",
        highlight=False,
    )
    show_checks(result.checks, console)
    if result.violations:
        console.print(f"{result.violations} VIOLATIONS; logs and evidence: {result.folder}", style="bold red")
    else:
        console.print(f"no violation (seed {result.options.seed})", style="bold green")


def _row(samples: Sequence[float]) -> tuple[str, str]:
    if not samples:
        return "", ""
    return f"{quantile(samples, 0.5):.3g}", f"{max(samples):.3g}"
