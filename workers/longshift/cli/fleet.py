"""`longshift fleet`: the workers, what each runs, and draining them. Straight in Postgres: who may read it needs no key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from longshift.cli import local
from longshift.cli.exits import EPILOG
from longshift.cli.output import progress, put_facts, put_json, put_table, say
from longshift.cli.show import AsJson
from longshift.clock import SYSTEM
from longshift.errors import InvalidInput, NotFound, Unavailable, UsageError
from longshift.model import Json, Prefix, show_id

if TYPE_CHECKING:  # the database's modules are slow to import, and most commands do without them
    from uuid import UUID

    from longshift.db.database import Database
    from longshift.db.workers import RunningRecord, WorkerRecord

T = TypeVar("T")
AGAIN = 0.3
"""Seconds between two looks at workers that drain."""
app = typer.Typer(name="fleet")


@app.callback(invoke_without_command=True, epilog=EPILOG)
def list_(context: typer.Context, json: AsJson = False) -> None:
    """The workers: list them, see what each runs, drain them. Alone it lists them."""
    if context.invoked_subcommand is not None:
        return
    from longshift.db import workers

    found = _with_database(workers.list_workers)
    if json:
        for worker in found:
            put_json(_facts(worker))
        return
    columns = ("id", "host", "pid", "version", "queues", "slots", "running", "state", "since", "")
    put_table(columns, [_row(worker) for worker in found])
    for worker in found:
        if worker.complaint:
            say(f"{show_id(Prefix.WORKER, worker.id)} is {worker.state}: {worker.complaint}", style="yellow")


@app.command(epilog=EPILOG)
def show(
    name: Annotated[str, typer.Argument(metavar="WORKER", help="wrk_..., HOST or HOST:PID.")], json: AsJson = False
) -> None:
    """One worker, and the turns that it runs, those first that it has had for longest (500 at most)."""
    from longshift.db import workers

    async def asking(db: Database) -> tuple[WorkerRecord, list[RunningRecord]]:
        worker = _find(await workers.list_workers(db), name)
        return worker, await workers.running(db, [worker.id])

    worker, turns = _with_database(asking)
    if json:
        put_json(_facts(worker) | {"turns": [_turn(each) for each in turns]})
        return
    put_facts(_facts(worker))
    if turns:
        columns = ("turn_id", "session_id", "agent", "attempt", "since", "last", "last_at", "calling")
        put_table(columns, [[str(_turn(each)[column] or "") for column in columns] for each in turns])


@app.command(epilog=EPILOG)
def drain(
    names: Annotated[list[str] | None, typer.Argument(metavar="WORKER...", help="wrk_..., HOST or HOST:PID.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every worker that runs now.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when they have ended.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most.")] = None,
    json: AsJson = False,
) -> None:
    """Have workers take nothing more, leave every turn at its last step for others, and end, as by SIGTERM.

    Whatever supervises them may start others. A ward ends with its worker.
    """
    if bool(names) == all_:
        raise UsageError("name the workers to drain, or say --all")
    from longshift.db import workers

    async def asking(db: Database) -> list[WorkerRecord]:
        found = await workers.list_workers(db)
        chosen = found if all_ else [_find(found, name) for name in dict.fromkeys(names or ())]
        deaf = [worker for worker in chosen if worker.revision is None]
        if deaf and not all_:
            raise InvalidInput(f"{_places(deaf)}: too old to hear of it; send a SIGTERM instead")
        if deaf:
            say(f"too old to hear of it, send a SIGTERM instead: {_places(deaf)}", style="yellow")
        chosen = [worker for worker in chosen if worker not in deaf]
        await workers.ask_to_drain(db, _processes(chosen))
        if wait:
            await _until_gone(db, chosen, timeout=timeout)
        return chosen

    chosen = _with_database(asking)
    if json:
        put_json({"drained" if wait else "draining": [show_id(Prefix.WORKER, worker.id) for worker in chosen]})
    else:
        say(f"{len(chosen)} workers {'have ended' if wait else 'drain'}")


@app.command(epilog=EPILOG)
def versions(json: AsJson = False) -> None:
    """Each version of each agent: who serves it, and how many open turns need it.

    A turn goes on in the version in which it has begun. Workers whose versions no open turn needs may be drained.
    """
    from longshift.db import workers

    found = _with_database(workers.versions)
    if json:
        for each in found:
            put_json(asdict(each))
        return
    rows = [[each.agent, each.version or "any", str(each.workers), str(each.turns)] for each in found]
    put_table(["agent", "version", "workers", "open turns"], rows)


async def _until_gone(db: Database, chosen: Sequence[WorkerRecord], *, timeout: float | None) -> None:
    """
    Raises:
        Unavailable: they have not ended in time.
    """
    from longshift.db import workers

    processes, begun = _processes(chosen), SYSTEM.monotonic()
    with progress("draining") as tell:
        while True:
            there, turns = await workers.left(db, processes)
            if not there:
                return
            tell(f"{there} workers drain, with {turns} turns", len(chosen) - there)
            if timeout is not None and SYSTEM.monotonic() - begun > timeout:
                raise Unavailable(
                    f"{there} workers still drain, with {turns} turns; they go on: `longshift fleet` shows them"
                )
            await asyncio.sleep(AGAIN)
            await workers.ask_to_drain(db, processes)


def _processes(workers: Sequence[WorkerRecord]) -> list[UUID]:
    return [worker.process for worker in workers if worker.process is not None]


def _places(workers: Sequence[WorkerRecord]) -> str:
    return ", ".join(f"{worker.host}:{worker.pid}" for worker in workers)


def _find(workers: Sequence[WorkerRecord], name: str) -> WorkerRecord:
    """
    Raises:
        NotFound: nobody is called ``name``.
        InvalidInput: several are.
    """
    host, colon, pid = name.rpartition(":")
    found = [worker for worker in workers if show_id(Prefix.WORKER, worker.id) == name]
    found = found or [worker for worker in workers if colon and (worker.host, str(worker.pid)) == (host, pid)]
    found = found or [worker for worker in workers if worker.host == name and not worker.isolated]
    if not found:
        raise NotFound(f"there is no worker {name!r} (any more): `longshift fleet` lists them")
    if len(found) > 1:
        raise InvalidInput(f"several workers are on {name!r}, say which: {_places(found)}")
    return found[0]


def _row(worker: WorkerRecord) -> list[str]:
    flags = [name for name, is_so in (("leader", worker.leads), ("ward", worker.isolated)) if is_so]
    return [
        show_id(Prefix.WORKER, worker.id),
        worker.host,
        str(worker.pid),
        worker.version or "",
        ",".join(worker.queues),
        str(worker.capacity),
        str(worker.running),
        worker.state,
        worker.started_at.isoformat()[:19],
        " ".join(flags),
    ]


def _facts(worker: WorkerRecord) -> dict[str, Json]:
    moments = {
        name: getattr(worker, name) for name in ("started_at", "heartbeat_at", "draining_since", "drain_asked_at")
    }
    return {
        "id": show_id(Prefix.WORKER, worker.id),
        "host": worker.host,
        "pid": worker.pid,
        "version": worker.version,
        "revision": worker.revision,
        "queues": list(worker.queues),
        "agents": [{"name": name, "version": version} for name, version in worker.serves],
        "slots": worker.capacity,
        "running": worker.running,
        "state": worker.state,
        "condition": worker.condition,
        "complaint": worker.complaint,
        "leader": worker.leads,
        "ward": worker.isolated,
        **{name: moment.isoformat() if moment else None for name, moment in moments.items()},
    }


def _turn(running: RunningRecord) -> dict[str, Json]:
    return {
        "turn_id": show_id(Prefix.TURN, running.turn_id) if running.turn_id else None,
        "session_id": show_id(Prefix.SESSION, running.session_id),
        "tenant_id": show_id(Prefix.TENANT, running.tenant_id) if running.tenant_id else None,
        "agent": running.agent,
        "agent_version": running.agent_version,
        "attempt": running.attempts,
        "since": running.since.isoformat(),
        "last": running.last,
        "last_at": running.last_at.isoformat() if running.last_at else None,
        "calling": running.calling,
    }


def _with_database(question: Callable[[Database], Awaitable[T]]) -> T:
    """Raises ``ConfigError``, ``Unavailable``: the database is not named, away, or not migrated."""
    from longshift.db import health
    from longshift.db.database import Database, rights

    config = local.load()

    async def asking() -> T:
        db = Database(
            config.require("database_url"), size=2, connect_timeout=config.connect_timeout, name="longshift-cli"
        )
        try:
            await health.check_schema(db)
            with rights():
                return await question(db)
        finally:
            await db.close()

    return asyncio.run(asking())
