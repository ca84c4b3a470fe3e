"""Commands that look: status, result, events, steps, agents."""

from __future__ import annotations

from typing import Annotated

import typer

from longshift.cli.exits import ExitCode
from longshift.cli.local import ask
from longshift.cli.output import put, put_json, put_table
from longshift.cli.show import (
    AsJson,
    Id,
    event_line,
    put_batch,
    put_frame,
    put_outcome,
    put_session,
    put_turn,
    step_line,
    with_output,
)
from longshift.cli.work import wait_batch
from longshift.client import BatchInfo, Client, TurnInfo
from longshift.model import Prefix
from longshift.transport import kind_of


def status(id_: Id, json: AsJson = False) -> None:
    """The state of a turn, a batch or a session, by its prefix."""

    kind = kind_of(id_, Prefix.TURN, Prefix.BATCH, Prefix.SESSION)

    async def asking(client: Client) -> None:
        if kind is Prefix.TURN:
            turn = await client.turn(id_)
            put_json(turn) if json else put_turn(turn)
        elif kind is Prefix.BATCH:
            batch = await client.batch(id_)
            put_json(batch) if json else put_batch(batch)
        else:
            session = await client.session(id_)
            put_json(session) if json else put_session(session)

    ask(asking)


def result(
    id_: Id,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended.")] = False,
    json: AsJson = False,
) -> None:
    """The output of a turn as JSON, or the turns of a batch that have ended as JSON lines."""
    if kind_of(id_, Prefix.TURN, Prefix.BATCH) is Prefix.TURN:

        async def turning(client: Client) -> TurnInfo:
            return await with_output(client, await (client.wait(id_) if wait else client.turn(id_)))

        raise typer.Exit(put_outcome(ask(turning), json=json))

    async def asking(client: Client) -> BatchInfo:
        batch = await client.batch(id_)
        if wait:
            batch = await wait_batch(client, batch)
        async for turn in client.results(id_):
            put_json(await with_output(client, turn))
        return batch

    batch = ask(asking)
    if batch["counts"]["succeeded"] < batch["total"]:
        raise typer.Exit(ExitCode.FAILED)


def events(
    id_: Id,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the turn ends (a session: Ctrl-C).")
    ] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events with a greater seq.")] = 0,
    json: AsJson = False,
) -> None:
    """The events of a turn or a session."""

    async def asking(client: Client) -> None:
        if follow:
            async for frame in client.follow(id_, after=after):
                put_frame(frame, json=json)
            return
        async for event in client.events(id_, after=after):
            if json:
                put_json(event)
            else:
                put(event_line(event))

    ask(asking)


def steps(
    id_: Annotated[str, typer.Argument(metavar="TURN", help="turn_...")],
    after: Annotated[int, typer.Option(min=0, help="Only steps with a greater seq.")] = 0,
    json: AsJson = False,
) -> None:
    """What a turn has produced so far: its recorded steps, and those of the turns that it retries."""

    async def asking(client: Client) -> None:
        async for step in client.steps(id_, after=after):
            put_json(step) if json else put(step_line(step))

    ask(asking)


def agents(json: AsJson = False) -> None:
    """The agents that workers have registered."""
    found = ask(Client.agents)
    if json:
        put_json(found)
        return
    rows = [[a["name"], a["version"], a["queue"], a["description"].partition("\n")[0]] for a in found]
    put_table(["name", "version", "queue", "description"], rows)
