"""What happened in a run: for people, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checker import Checked
from tests.chaos.evidence import Evidence, end_of
from tests.chaos.run import Result

SHOWN = 10
"""Violations of one check that are shown; all of them are in the JSON."""


def numbers_of(found: Evidence) -> dict[str, Any]:
    """Counts of what went on, from the evidence alone."""
    events = [event for log in found.events.values() for event in log]
    kinds = Counter(event["kind"] for event in events)
    begun = Counter((e.turn, e.step) for e in found.effects if e.what == "begun")
    return {
        "sessions": len(found.events),
        "turns by their end": dict(sorted(Counter(end_of(turn) for turn in found.turns.values()).items())),
        "events": len(events),
        "steps recorded": kinds["step.completed"] + kinds["step.failed"],
        "runs of steps": begun.total(),
        "steps that ran more than once": sum(count > 1 for count in begun.values()),
        "attempts": kinds["turn.started"],
        "waits that left the worker": kinds["turn.waiting"],
        "attempts interrupted by a drain": kinds["turn.rescheduled"],
        "attempts rescued from a worker that was gone": _rescues(found),
        "submissions answered more than once": sum(len(ids) > 1 for ids in found.by_key.values()),
        "events seen by followers": sum(len(stream.seqs) for stream in found.streams),
        "times that followers resumed": sum(stream.resumed for stream in found.streams),
    }


def _rescues(found: Evidence) -> int:
    """Starts of turns whose attempt before had neither waited nor been interrupted in good order."""
    count = 0
    for log in found.events.values():
        last: dict[str, str] = {}
        for event in log:
            left = last.get(event["turn_id"]) in ("turn.waiting", "turn.rescheduled")
            count += event["kind"] == "turn.started" and event["payload"]["attempt"] > 1 and not left
            last[event["turn_id"]] = event["kind"]
    return count


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
