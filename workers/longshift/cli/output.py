"""What commands print: data to standard output, messages and progress to standard error."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from longshift.errors import Unavailable, UsageError
from longshift.model import Json

STATUS_STYLES: Mapping[str, str] = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "expired": "red",
    "running": "cyan",
    "waiting": "blue",
}


def say(text: str, *, style: str | None = None, end: str = "\n") -> None:
    """A message for people."""
    Console(stderr=True, highlight=False).print(text, style=style, end=end, soft_wrap=True, markup=False)


def put(text: str) -> None:
    """A line of data."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def put_bytes(data: bytes) -> None:
    """Bytes as they are; decoded for a caller in this process that takes text only."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.buffer.write(data)
    else:
        sys.stdout.write(data.decode())


def put_json(value: object, *, pretty: bool = False) -> None:
    """JSON on one line, or for people."""
    put(json.dumps(value, ensure_ascii=not _writes_unicode(), indent=2 if pretty else None))


def confirm(question: str) -> None:
    """Ask before something cannot be undone.

    Raises:
        UsageError: the answer is no, or nobody is there to give one.
    """
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise ended.__context__ from None
        agreed = False  # the end of the input
    if not agreed:
        raise UsageError("nothing was deleted: say --yes, or answer the question")


def check_complete(removed: Mapping[str, Json], *, what: str) -> None:
    """
    Raises:
        Unavailable: a deletion has not removed everything.
    """
    if not removed["complete"]:
        raise Unavailable(f"{what} is deleted, but a part of the service was away: the sweeper removes the rest")


def put_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)


def put_facts(facts: Mapping[str, Json]) -> None:
    """Names and values, those that are there, below each other."""
    shown = {name: value for name, value in facts.items() if value not in (None, {}, [])}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=not _writes_unicode())
        Console(highlight=False).print(f"{name:<{width}}  ", _cell(text), sep="", soft_wrap=True)


@contextmanager
def progress(what: str, *, total: int | None = None) -> Iterator[Callable[[str, int], None]]:
    """A function that shows a state and a count; shows nothing unless standard error is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda state, done: None
        return
    counted = () if total is None else (BarColumn(), MofNCompleteColumn())
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda state, done: bar.update(task, description=state, completed=done)


def _cell(text: str) -> str:
    from rich.markup import escape

    style = STATUS_STYLES.get(text)
    return f"[{style}]{text}[/]" if style else escape(text)


def _writes_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf8mb4")
