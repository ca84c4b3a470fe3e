"""Commands about the life of sessions: list, show, archive, restore, export, delete."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from longshift.cli.exits import EPILOG
from longshift.cli.local import ask
from longshift.cli.output import check_complete, confirm, progress, put_bytes, put_facts, put_json, put_table, say
from longshift.cli.show import AsJson, put_session
from longshift.client import Client, MovedInfo, SessionInfo
from longshift.errors import InvalidInput
from longshift.model import Json

app = typer.Typer(name="sessions", help="Look after sessions: archive, restore, export, delete.", no_args_is_help=True)
SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="ses_...")]


@app.command("list", epilog=EPILOG)
def list_(
    limit: Annotated[int, typer.Option(min=1, help="So many at most.")] = 100,
    json: AsJson = False,
) -> None:
    """Sessions, newest first."""

    async def asking(client: Client) -> list[SessionInfo]:
        found = []
        async for session in client.sessions():
            found.append(session)
            if len(found) == limit:
                break
        return found

    found = ask(asking)
    if json:
        for session in found:
            put_json(session)
        return
    rows = [
        [
            s["id"],
            s["status"],
            str(s["turns"]),
            str(s["last_seq"]),
            str(s["archived_through"] or ""),
            s["active_at"][:19],
        ]
        for s in found
    ]
    put_table(["id", "status", "turns", "events", "archived", "active"], rows)


@app.command(epilog=EPILOG)
def show(id_: SessionId, json: AsJson = False) -> None:
    """One session: how much it has, what of it is archived, how long it is kept."""
    session = ask(lambda client: client.session(id_))
    put_json(session) if json else put_session(session)


@app.command(epilog=EPILOG)
def archive(id_: SessionId, json: AsJson = False) -> None:
    """Move the events of an idle session to the cold tier. It works as before. Needs a key with the scope admin."""
    _put_moved(ask(lambda client: client.archive(id_)), "moved to the cold tier", json=json)


@app.command(epilog=EPILOG)
def restore(id_: SessionId, json: AsJson = False) -> None:
    """Put archived events back into Postgres, verified. Needs a key with the scope admin."""
    _put_moved(ask(lambda client: client.restore(id_)), "put back into Postgres", json=json)


@app.command(epilog=EPILOG)
def export(
    id_: SessionId,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, written whole or not at all. Default: standard output."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Say on standard error what was exported, as JSON.")] = False,
) -> None:
    """All that is known of a session, as JSON lines; the last has counts and a hash, which are checked as they come."""
    counts = _to_file(id_, output) if output else ask(lambda client: _write(client, id_, put_bytes))
    if json:
        sys.stderr.write(_line({"id": id_, "lines": counts}))
    else:
        say(f"{id_}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}", style="dim")


@app.command(epilog=EPILOG)
def delete(
    id_: SessionId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: AsJson = False,
) -> None:
    """Delete a session with all that it has, in all tiers, for good; says how much that was. Needs a key with the scope
    admin."""
    if not yes:
        confirm(f"Delete {id_} with all that it has?")
    removed = ask(lambda client: client.delete_session(id_))
    if json:
        put_json(removed)
    else:
        put_facts({name: value for name, value in removed.items() if name not in ("session_id", "complete") and value})
    check_complete(removed, what=id_)
    if not json:
        say(f"{id_} is deleted")


def _put_moved(moved: MovedInfo, what: str, *, json: bool) -> None:
    if json:
        put_json(moved)
    else:
        say(f"{moved['session_id']}: {moved['events']} events {what}")


def _to_file(id_: str, output: Path) -> dict[str, int]:
    new = output.with_name(f"{output.name}.new")
    try:
        with new.open("wb") as file:
            counts = ask(lambda client: _write(client, id_, file.write))
            file.flush()
            os.fsync(file.fileno())
        new.replace(output)
    except OSError as error:
        raise InvalidInput(f"cannot write {str(output)!r}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
    return counts


async def _write(client: Client, id_: str, write: Callable[[bytes], object]) -> dict[str, int]:
    """Raises ``Unavailable``: it was cut off."""
    counts: dict[str, int] = {}
    with progress(f"exporting {id_}") as tell:
        async for kind, line in client.export(id_):
            write(line)
            if kind != "end":
                counts[kind] = counts.get(kind, 0) + 1
            tell(f"exporting {id_}", sum(counts.values()))
    return counts


def _line(value: Json) -> str:
    return jsonlib.dumps(value) + "\n"
