"""What a benchmark measured: samples with their median and spread, and ratios between contestants of the same run."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ENOUGH = 100
"""Samples below which a p99 is no more than the highest."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured several times. ``samples`` in the order they were taken, ``unit`` as a person reads it."""

    name: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p99(self) -> float:
        return quantile(self.samples, 0.99)

    def as_json(self) -> dict[str, Any]:
        if not self.samples:
            return {"name": self.name, "unit": self.unit, "samples": []}
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "low": min(self.samples),
            "high": max(self.samples),
            "p99": self.p99,
            "samples": list(self.samples),
        }


@dataclass(slots=True)
class Report:
    """The figures of one benchmark."""

    name: str
    about: str  # what was measured, in one sentence
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)  # of what must hold whatever the figures are

    def require(self, holds: bool, what: str) -> None:
        """``what`` is said, and the command fails, unless it ``holds``."""
        if not holds:
            self.violations.append(what)

    def add(self, name: str, unit: str, samples: Sequence[float]) -> Figure:
        figure = Figure(name, unit, tuple(samples))
        self.figures.append(figure)
        return figure

    def ratio(self, name: str, of: Figure, to: Figure) -> None:
        """``of / to`` by repetition: neighbours in time are compared, so that a drift of the machine hits both."""
        pairs = zip(of.samples, to.samples, strict=True)
        self.ratios.append(Figure(name, "x", tuple(a / b for a, b in pairs if b)))

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "about": self.about,
            "figures": [figure.as_json() for figure in self.figures],
            "ratios": [ratio.as_json() for ratio in self.ratios],
            "notes": self.notes,
            "violations": self.violations,
        }

    def show(self, console: Console) -> None:
        table = Table(title=f"{self.name}: {self.about}", title_justify="left", title_style="bold")
        for heading in ("measured", "median", "p99", "low", "high", "unit", "samples"):
            table.add_column(heading, justify="left" if heading in ("measured", "unit") else "right")
        for figure in self.figures:
            table.add_row(figure.name, *_row(figure))
        if self.ratios:
            table.add_section()
        for ratio in self.ratios:
            table.add_row(ratio.name, *_row(ratio))
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim", highlight=False)
        for violation in self.violations:
            console.print(f"  VIOLATED: {violation}", style="bold red", highlight=False)
        console.print()


def quantile(samples: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest sample that at least ``share`` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def machine() -> dict[str, Any]:
    """What the figures depend on, without names and paths."""
    return {
        "cores": os.cpu_count(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
        "command": " ".join(["python", "-m", "tests.benchmarks", *sys.argv[1:]]),
    }


def shown(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _row(figure: Figure) -> tuple[str, ...]:
    if not figure.samples:
        return ("", "", "", "", figure.unit, "0")
    p99 = shown(figure.p99) if len(figure.samples) >= ENOUGH else ""
    rest = (min(figure.samples), max(figure.samples))
    return (shown(figure.median), p99, *map(shown, rest), figure.unit, str(len(figure.samples)))
