"""``make rehearse-scale ARGS="--simulate"``: the rule of the ScaledObject, and what other values would do, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longshift.embedded import Guardian, LocalPostgres
from tests.rehearsal.demand import SYNTHETIC, Demand, step
from tests.rehearsal.judge import Verdict, judge
from tests.rehearsal.manifests import rule_for
from tests.rehearsal.rule import Policy, Rule
from tests.rehearsal.simulate import Model, Outcome, Simulation, Views, views

SLOTS = 100
MODEL = Model(SLOTS)


@dataclass(frozen=True, slots=True)
class Case:
    demand: Demand
    model: Model = MODEL
    most: int | None = None  # instead of maxReplicaCount
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.demand.name}{self.note}"


def cases() -> list[Case]:
    found = [Case(make()) for make in SYNTHETIC]
    slow = Case(step(), Model(SLOTS, start_up=120), note=", 120 s to start")
    wrong = Case(step(), Model(25), most=40, note=", 25 slots instead of 100")
    return [*found, slow, wrong]


def _target(share: float) -> Callable[[Rule], Rule]:
    def change(rule: Rule) -> Rule:
        work, *others = rule.triggers
        return replace(rule, triggers=(replace(work, target=SLOTS * share), *others))

    return change


def _window(seconds: float) -> Callable[[Rule], Rule]:
    return lambda rule: replace(rule, down=replace(rule.down, window=seconds))


def _grows_in(seconds: float) -> Callable[[Rule], Rule]:
    def change(rule: Rule) -> Rule:
        policies = tuple(replace(policy, period=seconds) for policy in rule.up.policies)
        return replace(rule, up=replace(rule.up, policies=policies))

    return change


def _falls_at_once(rule: Rule) -> Rule:
    return replace(rule, down=replace(rule.down, policies=(Policy(percent=True, value=100, period=15),)))


def _without_age(rule: Rule) -> Rule:
    return replace(rule, triggers=tuple(trigger for trigger in rule.triggers if trigger.average))


VARIANTS: Mapping[str, Callable[[Rule], Rule]] = {
    "as it is": lambda rule: rule,
    "utilisation 0.6": _target(0.6),
    "utilisation 1.0": _target(1.0),
    "shrinks after 60 s": _window(60),
    "shrinks after 300 s": _window(300),
    "shrinks after 600 s": _window(600),
    "shrinks at once by any number": _falls_at_once,
    "grows every 30 s": _grows_in(30),
    "grows after 30 s": lambda rule: replace(rule, up=replace(rule.up, window=30)),
    "without the age": _without_age,
}


def simulate(case: Case, ask: Views, variant: str = "as it is") -> tuple[Outcome, Verdict]:
    rule = VARIANTS[variant](rule_for(SLOTS))
    rule = rule if case.most is None else replace(rule, most=case.most)
    outcome = Simulation(case.demand, case.model, ask, rule=rule).run()
    return outcome, judge(outcome, most=rule.most)


@contextmanager
def own_views() -> Iterator[Views]:
    """Answered by a Postgres that lives as long as the block."""
    with tempfile.TemporaryDirectory(prefix="longshift-simulation-") as folder, Guardian() as guardian:
        postgres = LocalPostgres(Path(folder), guardian=guardian)
        url = postgres.start()
        try:
            with views(url) as ask:
                yield ask
        finally:
            postgres.stop()


def compare(console: Console, *, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A table for each case, a row for each variant; all of it as JSON. ``names``: of demands; default: all."""
    found = []
    with own_views() as ask:
        for case in cases():
            if names and case.demand.name not in names:
                continue
            table = Table(*HEADINGS, title=f"{case.name}: {case.demand.about}", title_justify="left")
            for variant in VARIANTS:
                _, verdict = simulate(case, ask, variant)
                table.add_row(variant, *row(verdict))
                found.append({"demand": case.name, "variant": variant, **asdict(verdict), "idle": verdict.idle})
            console.print(table)
    return found


HEADINGS = (
    "rule",
    "first step",
    "big enough",
    "oldest",
    "p99 wait",
    "most",
    "missing",
    "paid",
    "idle",
    "changes",
    "moved",
)


def page_row(verdict: Verdict) -> str:
    """The cells of docs/how-to/scale.md, after the first one."""
    most = str(verdict.highest) + (f" ({verdict.overshoot} too many)" if verdict.overshoot else "")
    cells = (
        f"{verdict.oldest:.0f} s",
        f"{verdict.wait_p99:.0f} s",
        most,
        f"{verdict.short:.1f}",
        f"{verdict.paid:.0f}",
        f"{verdict.idle:.0%}",
        str(verdict.changes),
        str(verdict.interrupted),
    )
    return f"| {' | '.join(cells)} |"


def row(verdict: Verdict) -> tuple[str, ...]:
    """The cells of ``HEADINGS``, after the first one."""
    return (
        _seconds(verdict.reaction),
        _seconds(verdict.caught_up),
        _seconds(verdict.oldest),
        _seconds(verdict.wait_p99),
        str(verdict.highest) + (f" (+{verdict.overshoot})" if verdict.overshoot else ""),
        f"{verdict.short:.1f}",
        f"{verdict.paid:.0f}",
        f"{verdict.idle:.0%}",
        str(verdict.changes),
        str(verdict.interrupted),
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} s"
