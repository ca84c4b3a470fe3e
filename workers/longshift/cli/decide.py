"""Commands by which a person decides: approvals, approve, tools, settle, signal."""

from __future__ import annotations

from typing import Annotated

import typer

from longshift.cli import inputs
from longshift.cli.local import ask
from longshift.cli.output import put, put_json, put_table, say
from longshift.cli.show import AsJson, put_approval, put_call, short
from longshift.client import ApprovalInfo, Client, ToolCallInfo
from longshift.errors import UsageError
from longshift.model import Prefix, Settlement
from longshift.transport import kind_of

CallId = Annotated[str, typer.Argument(metavar="CALL", help="call_..., see `longshift tools --open`.")]
ApprovalId = Annotated[str, typer.Argument(metavar="APPROVAL", help="apr_..., see `longshift approvals`.")]


def approvals(
    id_: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of a session or a turn; or one (apr_...), in full.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that were answered or closed, too.")] = False,
    json: AsJson = False,
) -> None:
    """What turns ask people, newest first: the open approvals."""
    if id_ is not None and id_.startswith(f"{Prefix.APPROVAL}_"):
        approval = ask(lambda client: client.approval(id_))
        put_json(approval) if json else put_approval(approval)
        return

    async def asking(client: Client) -> list[ApprovalInfo]:
        return [approval async for approval in client.approvals(id_, everything=everything)]

    found = ask(asking)
    if json:
        for approval in found:
            put_json(approval)
        return
    rows = [
        [a["id"], a["name"], _verdict(a), a["turn_id"], a["created_at"], a["expires_at"] or "", short(a["show"])]
        for a in found
    ]
    put_table(["id", "name", "status", "turn", "since", "until", "show"], rows)


def approve(
    id_: ApprovalId,
    deny: Annotated[bool, typer.Option("--deny", help="Say no.")] = False,
    comment: Annotated[str | None, typer.Option(help="What the agent is told with it.")] = None,
    json: AsJson = False,
) -> None:
    """Answer an approval: yes, or with --deny no. Of two answers the first counts; the second exits with 6."""
    approval = ask(lambda client: client.answer(id_, not deny, comment=comment))
    if json:
        put_json(approval)
    else:
        say(f"{approval['id']} is {_verdict(approval)}: {approval['turn_id']} goes on")


def tools(
    id_: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Of a session or a turn; or one call (call_...), in full.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Of all sessions, those whose outcome is in doubt.")] = False,
    json: AsJson = False,
) -> None:
    """The tool calls of a session or a turn, newest first: when, how often, and what came of them."""
    if (id_ is None) != open_:
        raise UsageError("name a session, a turn or a call, or say --open: `longshift tools ses_...`")
    if id_ is not None and kind_of(id_, Prefix.SESSION, Prefix.TURN, Prefix.CALL) is Prefix.CALL:
        call = ask(lambda client: client.tool_call(id_))
        put_json(call) if json else put_call(call)
        return

    async def asking(client: Client) -> list[ToolCallInfo]:
        return [call async for call in client.tool_calls(id_)]

    found = ask(asking)
    if json:
        for call in found:
            put_json(call)
        return
    rows = [
        [
            c["id"],
            c["tool"],
            c["effect"],
            c["status"],
            str(c["attempts"]),
            c["turn_id"],
            c["started_at"],
            short(c["input"]),
        ]
        for c in found
    ]
    put_table(["id", "tool", "effect", "status", "attempts", "turn", "started", "input"], rows)


def settle(
    id_: CallId,
    done: Annotated[bool, typer.Option("--done", help="It happened: its step has a result.")] = False,
    not_done: Annotated[bool, typer.Option("--not-done", help="It certainly did not: it may be called again.")] = False,
    give_up: Annotated[bool, typer.Option("--give-up", help="Nobody will ever know.")] = False,
    result: Annotated[
        str | None,
        typer.Option(
            help="With --done: what the tool returned, as JSON, @FILE, or - for standard input. Default: null."
        ),
    ] = None,
    note: Annotated[str | None, typer.Option(help="How you know; kept with the call.")] = None,
    json: AsJson = False,
) -> None:
    """Say what became of a tool call whose outcome is in doubt. Needs a key with the scope admin.

    Of two who settle, the first counts; the second exits with 6.
    """
    chosen = [
        outcome
        for outcome, given in ((Settlement.DONE, done), (Settlement.NOT_DONE, not_done), (Settlement.GIVE_UP, give_up))
        if given
    ]
    if len(chosen) != 1:
        raise UsageError("say one of --done, --not-done and --give-up")
    if result is not None and not done:
        raise UsageError("--result is what the tool returned: say it with --done only")
    value = inputs.read_input(result, name="--result")
    call = ask(lambda client: client.settle(id_, chosen[0], result=value, note=note))
    if json:
        put_json(call)
    else:
        say(f"{call['id']} is settled: {call['status']}")


def signal(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="ses_...")],
    name: Annotated[str, typer.Argument(help="What a turn waits for, or the name of an approval.")],
    payload: Annotated[
        str | None, typer.Argument(metavar="[PAYLOAD]", help="JSON, @FILE with JSON, or - for standard input.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option("--idempotency-key", help="The same key and request again is the same signal, for a day."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Send a signal to a session: to the turn that waits for it, now or later. Prints its id."""
    value = inputs.read_input(payload, name="PAYLOAD")
    sent = ask(lambda client: client.signal(session, name, value, idempotency_key=idempotency_key))
    if json:
        put_json(sent)
        return
    put(sent["id"])
    if sent["approval_id"] is not None:
        say(f"it has answered {sent['approval_id']}", style="dim")


def _verdict(approval: ApprovalInfo) -> str:
    if approval["status"] != "answered":
        return approval["status"]
    return "granted" if approval["granted"] else "denied"
