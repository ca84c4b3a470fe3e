"""``python -m tests.model [SCOPE...] [--deep] [--variants] [--off NAME] [--json]``: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

from tests.model.explore import Result, Trace
from tests.model.state import State
from tests.model.variants import DEEP, SCOPES, VARIANTS, check

Row = dict[str, object]


def main(argv: list[str] | None = None) -> int:
    """0: the protocol holds, and each variant asked for breaks as it should; 1: not so, or ``--off`` found its violation."""
    every = SCOPES | DEEP
    parser = argparse.ArgumentParser(
        prog="python -m tests.model",
        description="Visit every reachable state of the lease and append protocol.",
        epilog="Scopes: " + "; ".join(f"{scope.name}: {scope.what}" for scope in every.values()) + ".",
    )
    parser.add_argument("scopes", nargs="*", metavar="SCOPE", help="which; default: all but the deep ones")
    parser.add_argument("--deep", action="store_true", help="the deep scopes too: a minute or more, half a GB")
    parser.add_argument("--variants", action="store_true", help="also each variant with one fix taken away")
    parser.add_argument("--off", choices=sorted(VARIANTS), help="only this variant, and a shortest way to break it")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.scopes) - every.keys():
        parser.error(f"no such scope: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if arguments.off:
        return show(arguments.off)
    chosen = arguments.scopes or [*SCOPES, *(DEEP if arguments.deep else ())]
    report = Report(as_json=arguments.json)
    for name in chosen:
        report.add("scope", name, every[name].what, partial(check, every[name]), expected=None)
    for name, variant in VARIANTS.items() if arguments.variants else ():
        report.add("variant", name, variant.what, variant.run, expected=variant.breaks)
    return report.end()


class Report:
    """A line for each run, as soon as it has ended; in JSON all at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.rows: list[Row] = []
        self.bad = False
        if not as_json:
            print(f"{'':25}{'states':>9}{'transitions':>13}{'depth':>7}{'seconds':>9}")

    def add(self, kind: str, name: str, what: str, run: Callable[[], Result[State]], *, expected: str | None) -> None:
        result = run()
        violation = result.trace.violation if result.trace else None
        self.bad |= violation != expected
        self.rows.append(
            {
                kind: name,
                "what": what,
                "states": result.states,
                "transitions": result.transitions,
                "depth": result.depth,
                "seconds": round(result.seconds, 2),
                "violation": violation,
                "expected": expected,
                "steps": len(result.trace.steps) - 1 if result.trace else None,
            }
        )
        if not self.as_json:
            figures = f"{result.states:9,}{result.transitions:13,}{result.depth:7}{result.seconds:9.2f}"
            print(f"{name:25}{figures}  {violation or what}", flush=True)
            if result.trace is not None and expected is None:
                tell(result.trace)

    def end(self) -> int:
        if self.as_json:
            print(json.dumps(self.rows, indent=1))
        else:
            states, transitions = (sum(int(str(row[key])) for row in self.rows) for key in ("states", "transitions"))
            seconds = sum(float(str(row["seconds"])) for row in self.rows)
            print(f"{'in all':25}{states:9,}{transitions:13,}{'':7}{seconds:9.2f}")
        return int(self.bad)


def show(name: str) -> int:
    variant = VARIANTS[name]
    result = variant.run()
    print(f"{name}: {variant.what} (scope {variant.scope!r}: {SCOPES[variant.scope].what})")
    if result.trace is None:
        print(f"nothing breaks, though {variant.breaks!r} was expected: {result.states:,} states")
        return 0
    tell(result.trace)
    return 1


def tell(trace: Trace[State]) -> None:
    """The steps, and below each what it changed in the database."""
    before = trace.steps[0][1]
    for number, (label, state) in enumerate(trace.steps[1:], start=1):
        print(f"{number:4}  {label}")
        if state.db != before.db:
            print(f"{'':12}{row(state)}")
        before = state
    print(f"{'':6}=> {trace.violation}")


def row(state: State) -> str:
    db = state.db
    lease = "nobody holds it" if db.holder is None else f"{db.holder} holds it"
    ready = ", ready" if db.ready and db.holder is None else ""
    turns = ", ".join(turn.status for turn in db.turns)
    log = " ".join(f"{event.seq}:{event.kind}" for event in db.log) or "empty"
    return f"{lease}, epoch {db.epoch}{ready}; turns: {turns}; log: {log}"


if __name__ == "__main__":
    sys.exit(main())
