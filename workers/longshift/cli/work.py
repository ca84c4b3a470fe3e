"""Commands that give work: submit, batch, retry, cancel."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from longshift.cli import inputs
from longshift.cli.exits import ExitCode
from longshift.cli.local import ask
from longshift.cli.output import progress, put, put_json, say
from longshift.cli.show import AsJson, Id, put_frame, put_outcome, with_output
from longshift.client import BatchInfo, Client, TurnInfo
from longshift.model import TERMINAL, OnBusy

Key = Annotated[
    str | None, typer.Option("--idempotency-key", help="The same key and request again is the same work, for a day.")
]


def submit(
    agent: Annotated[str, typer.Argument(help="A registered agent: see `longshift agents`.")],
    input_: Annotated[
        str | None, typer.Argument(metavar="INPUT", help="JSON, @FILE with JSON, or - for standard input.")
    ] = None,
    session: Annotated[str | None, typer.Option(help="Session (ses_...) to go on with; default: a new one.")] = None,
    on_busy: Annotated[
        OnBusy, typer.Option(help="If the session has an open turn: queue behind it, refuse, or cancel it.")
    ] = OnBusy.ENQUEUE,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended and print its output.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="The same, showing its events as they come.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most.")] = None,
    idempotency_key: Key = None,
    json: AsJson = False,
) -> None:
    """Submit a turn. Prints its id; with --wait or --follow, its output."""
    value = inputs.read_input(input_)

    async def submitting(client: Client) -> TurnInfo:
        turn = await client.submit(agent, value, session_id=session, on_busy=on_busy, idempotency_key=idempotency_key)
        if wait or follow:
            say(f"accepted as {turn['id']}", style="dim")
        if follow:
            await _follow(client, turn["id"], json=json)
        return await _wait(client, turn["id"], timeout) if wait or follow else turn

    turn = ask(submitting)
    if wait or follow:
        raise typer.Exit(put_outcome(turn, json=json))
    if json:
        put_json(turn)
    else:
        put(turn["id"])


def batch(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help='JSON lines {"agent": ..., "input": ...}; - for standard input.')
    ],
    agent: Annotated[str | None, typer.Option(help="The agent of lines that name none.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all its turns have ended.")] = False,
    idempotency_key: Key = None,
    json: AsJson = False,
) -> None:
    """Submit many turns, all or none. Prints the batch's id; `longshift result` has its results."""

    async def submitting(client: Client) -> BatchInfo:
        whole = agent is None and file != "-"
        lines = Path(file) if whole else inputs.read_lines(file, agent=agent)
        accepted = await client.submit_batch(lines, idempotency_key=idempotency_key)
        if not json:
            put(accepted["id"])
        return await wait_batch(client, accepted) if wait else accepted

    ended = ask(submitting)
    if json:
        put_json(ended)
    say(", ".join(f"{count} {status}" for status, count in ended["counts"].items() if count), style="dim")
    if wait and ended["counts"]["succeeded"] < ended["total"]:
        raise typer.Exit(ExitCode.FAILED)


def retry(
    id_: Annotated[
        str, typer.Argument(metavar="TURN", help="turn_..., one that failed, was cancelled or has expired.")
    ],
    agent_version: Annotated[str | None, typer.Option(help="Version of the agent to run; default: the newest.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended and print its output.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most.")] = None,
    idempotency_key: Key = None,
    json: AsJson = False,
) -> None:
    """Go on with a turn from its last step, as a new turn. Prints its id; with --wait, its output."""

    async def retrying(client: Client) -> TurnInfo:
        turn = await client.retry(id_, agent_version=agent_version, idempotency_key=idempotency_key)
        if wait:
            say(f"accepted as {turn['id']}", style="dim")
        return await _wait(client, turn["id"], timeout) if wait else turn

    turn = ask(retrying)
    if wait:
        raise typer.Exit(put_outcome(turn, json=json))
    if json:
        put_json(turn)
    else:
        put(turn["id"])


def cancel(
    id_: Id,
    reason: Annotated[str | None, typer.Option(help="Why; recorded with the turn.")] = None,
    json: AsJson = False,
) -> None:
    """Cancel a turn, or every open turn of a batch."""
    told = ask(lambda client: client.cancel(id_, reason=reason))
    if json:
        put_json(told)
    elif told["status"] in TERMINAL or told["status"] == "ended":
        say(f"{told['id']} has ended: {told['status']}")
    else:
        say(f"{told['id']} was told to end")


async def wait_batch(client: Client, batch: BatchInfo) -> BatchInfo:
    """The batch when it has ended, with a progress bar on a terminal."""
    with progress(batch["id"], total=batch["total"]) as show:
        return await client.wait_batch(batch["id"], on_change=lambda now: show(now["id"], now["ended"]))


async def _wait(client: Client, turn_id: str, timeout: float | None) -> TurnInfo:
    limit = timedelta(seconds=timeout) if timeout is not None else None
    with progress(turn_id) as show:
        told = await client.wait(turn_id, timeout=limit, on_change=lambda turn: show(f"{turn_id} {turn['status']}", 0))
    return await with_output(client, told)


async def _follow(client: Client, turn_id: str, *, json: bool) -> None:
    async for frame in client.follow(turn_id):
        put_frame(frame, json=json, message=True)
