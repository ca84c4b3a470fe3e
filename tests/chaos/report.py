"""What happened in a run: for people, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checker import Checked
from tests.chaos.run import Result

SHOWN = 10
"""Violations of one check that are shown; all of them are in the JSON."""


def as_json(result: Result) -> dict[str, Any]:
    options = result.options
    return {
        "seed": options.seed,
        "seconds": options.seconds,
        "workers": options.workers,
        "replicas": options.replicas,
        "clients": options.clients,
        "settings": "quick" if options.quick else "default",
        "poison": options.poison,
        "faults": result.faults,
        "numbers": result.numbers,
        "checks": {c.name: {"looked_at": c.looked_at, "violations": c.violations} for c in result.checks},
        "violations": result.violations,
    }


def show(result: Result, console: Console) -> None:
    options = result.options
    faults = Table(
        "fault", "times", title=f"seed {options.seed}: {sum(result.faults.values())} faults", title_justify="left"
    )
    for kind, count in result.faults.items():
        faults.add_row(kind, str(count))
    console.print(faults)
    for name, value in result.numbers.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        console.print(f"  {name}: {text or 'none'}", highlight=False)
    show_checks(result.checks, console)
    if result.violations:
        console.print(f"{result.violations} VIOLATIONS; logs and evidence: {result.folder}", style="bold red")
    else:
        console.print(f"no violation (seed {options.seed})", style="bold green")


def show_checks(checks: Sequence[Checked], console: Console) -> None:
    table = Table("check", "looked at", "violations", title_justify="left")
    for checked in checks:
        table.add_row(checked.name, f"{checked.looked_at:,}", str(len(checked.violations)))
    console.print(table)
    for checked in checks:
        if not checked.violations:
            continue
        console.print(f"{checked.name}: {checked.promise}", style="bold red", highlight=False)
        for violation in checked.violations[:SHOWN]:
            console.print(f"  {violation}", highlight=False, markup=False, soft_wrap=True)
        if len(checked.violations) > SHOWN:
            console.print(f"  ... and {len(checked.violations) - SHOWN} more")
