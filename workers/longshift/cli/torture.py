"""The command torture: an agent from a file, put through every fault at every point."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longshift.agent import Agent
from longshift.cli import inputs
from longshift.cli.exits import ExitCode
from longshift.cli.output import progress, put, put_json, put_table, say
from longshift.cli.show import AsJson
from longshift.errors import UsageError
from longshift.model import Json

if TYPE_CHECKING:
    from longshift.testing import Report, Scenario


def torture(
    file: Annotated[str, typer.Argument(metavar="FILE[:AGENT]", help="A Python file, and which of its agents.")],
    input_: Annotated[
        str | None,
        typer.Option("--input", metavar="INPUT", help="JSON, @FILE with JSON, or - for standard input; default: null."),
    ] = None,
    once: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="A step whose function may never run again. Repeatable.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Put an agent through a crash, a pause and a doubled wake-up at every point. Exit code 1: it broke a promise."""
    from longshift.testing import torture as put_through

    logging.getLogger("longshift").addHandler(logging.NullHandler())  # what an agent raises is told in its row
    with redirect_stdout(sys.stderr):  # what an agent prints is no data of ours
        scenario = _scenario(file, given=input_)
        with progress("undisturbed") as show:
            report = put_through(
                scenario, once=once or (), progress=lambda what, done, total: show(f"{done} of {total}: {what}", done)
            )
    if json:
        put_json(_as_json(report))
        say(report.summary)
    else:
        _put_matrix(report)
    raise typer.Exit(ExitCode.FAILED if report.violations else ExitCode.OK)


def _put_matrix(report: Report) -> None:
    rows = [
        (
            row.point or str(row.fault),
            str(row.fault) if row.point else "",
            row.happened,
            ", ".join(map(str, row.violations)) or "same",
            ", ".join(f"{name} x{count + 1}" if count > 1 else name for name, count in row.repeated.items()),
        )
        for row in report.rows
    ]
    put_table(("point", "fault", "what happened", "output and effects", "ran again"), rows)
    put("")
    put(report.summary)


def _as_json(report: Report) -> Json:
    return {
        "agent": report.agent,
        **report.counts,
        "violations": [
            {"fault": row.fault, "point": row.point or None, "breach": v.breach, "subject": v.subject, "text": str(v)}
            for row, v in report.violations
        ],
        "rows": [
            {
                "fault": row.fault,
                "point": row.point or None,
                "happened": row.happened,
                "violations": [str(violation) for violation in row.violations],
                "repeated": dict(row.repeated),
                "refused": list(row.refused),
            }
            for row in report.rows
        ],
    }


# -- what the file has


def _scenario(file: str, *, given: str | None) -> Callable[[], Scenario]:
    """The file's ``torture``, or one made of its agent and the input."""
    from longshift.testing import Scenario

    path, wanted = _place(file)
    module = _load(path)
    made = getattr(module, "torture", None)
    value = inputs.read_input(given)
    if callable(made) and _fits(_called(made, path).agent, wanted):
        return made if given is None else lambda: replace(made(), input=value)
    found = _agent(module, path, wanted)
    return lambda: Scenario(found, value)


def _called(made: Callable[[], object], path: Path) -> Scenario:
    from longshift.testing import Scenario

    try:
        scenario = made()
    except Exception as error:
        raise UsageError(f"torture() of {str(path)!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(scenario, Scenario):
        raise UsageError(f"torture() of {str(path)!r} must return a longshift.testing.Scenario, not {scenario!r}")
    return scenario


def _place(file: str) -> tuple[Path, str | None]:
    if Path(file).exists():
        return Path(file), None
    path, colon, wanted = file.rpartition(":")
    return (Path(path), wanted) if colon else (Path(file), None)


def _load(path: Path) -> ModuleType:
    """Import a file; its folder is searched for what it imports."""
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}: give a Python file that defines an agent")
    name = path.stem if path.stem not in sys.modules else f"longshift_tortured_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{str(path)!r} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pydantic looks up what annotations name
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"cannot load {str(path)!r}: {type(error).__name__}: {error}") from error
    return module


def _agent(module: ModuleType, path: Path, wanted: str | None) -> Agent[Any, Any]:
    agents = {name: value for name, value in vars(module).items() if isinstance(value, Agent)}
    fitting = {id(value): value for name, value in agents.items() if wanted == name or _fits(value, wanted)}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    known = ", ".join(sorted({value.name for value in agents.values()}))
    if not agents:
        raise UsageError(f"{str(path)!r} defines no agent: decorate a function with @agent")
    if wanted is None:
        raise UsageError(f"{str(path)!r} defines several agents: choose one with {path}:NAME ({known})")
    raise UsageError(f"{str(path)!r} has no one agent {wanted!r}: it defines {known}")


def _fits(agent: Agent[Any, Any], wanted: str | None) -> bool:
    return wanted is None or agent.name == wanted
