"""How turns, batches, sessions, events, tool calls and approvals look."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from typing import Annotated

import typer

from longshift.cli.exits import ExitCode
from longshift.cli.output import put, put_facts, put_json, say
from longshift.client import (
    ApprovalInfo,
    BatchInfo,
    Client,
    Frame,
    SessionInfo,
    StepInfo,
    ToolCallInfo,
    TurnInfo,
    ValueInfo,
)
from longshift.model import TERMINAL, Json, TurnStatus

LONGEST = 100
"""Characters of a payload shown on one line."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="turn_..., bat_... or ses_..., as far as it makes sense.")]


def put_turn(turn: TurnInfo) -> None:
    names = (
        "id",
        "status",
        "agent",
        "agent_version",
        "session_id",
        "batch_id",
        "custom_id",
        "retry_of",
        "parent_turn_id",
    )
    state = ("blocked_by", "waiting_for", "attempts", "created_at", "started_at", "ended_at", "error")
    large = {"input_artifact": _large(turn["input_artifact"]), "output_artifact": _large(turn["output_artifact"])}
    put_facts({key: turn.get(key) for key in (*names, *state)} | large)


def put_batch(batch: BatchInfo) -> None:
    counts = {status: count for status, count in batch["counts"].items() if count}
    facts: dict[str, Json] = {key: batch.get(key) for key in ("id", "status", "created_at", "ended_at", "eta")}
    put_facts(facts | {"ended": f"{batch['ended']} of {batch['total']}"} | counts)


def put_call(call: ToolCallInfo) -> None:
    keys = ("id", "tool", "effect", "status", "session_id", "turn_id", "key", "attempts", "worker_id")
    times = ("created_at", "started_at", "ended_at", "settled_at", "settled_by", "note")
    put_facts({key: call.get(key) for key in (*keys, *times, "input", "result", "artifact_id", "error")})


def put_approval(approval: ApprovalInfo) -> None:
    keys = ("id", "name", "status", "granted", "comment", "session_id", "turn_id")
    times = ("created_at", "expires_at", "answered_at", "answered_by", "closed_at")
    put_facts({key: approval.get(key) for key in (*keys, *times, "show")})


def put_session(session: SessionInfo) -> None:
    keys = (
        "id",
        "status",
        "open_turns",
        "turns",
        "last_seq",
        "created_at",
        "active_at",
        "ttl",
        "expires_at",
        "metadata",
    )
    archived: dict[str, Json] = {"archived_through": session["archived_through"] or None}
    put_facts({key: session.get(key) for key in keys} | archived)


async def with_output(client: Client, turn: TurnInfo) -> TurnInfo:
    """The turn with its output, however large that is."""
    return {**turn, "output": await client.output(turn)}


def put_outcome(turn: TurnInfo, *, json: bool) -> ExitCode:
    """The output of a turn, or why there is none; the exit code that says which."""
    if json:
        put_json(turn)
    succeeded = turn["status"] == TurnStatus.SUCCEEDED
    if succeeded and not json:
        put_json(turn["output"], pretty=True)
    elif not succeeded:
        say(f"error: {why_none(turn)}", style="red")
    return ExitCode.OK if succeeded else ExitCode.FAILED


def why_none(turn: TurnInfo) -> str:
    if turn["status"] not in TERMINAL:
        return f"{turn['id']} has not ended: it is {turn['status']}"
    error = turn["error"] or {}
    reason = ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))
    return f"{turn['id']} {turn['status']}" + (f": {reason}" if reason else "")


def put_frame(frame: Frame, *, json: bool, message: bool = False) -> None:
    """One message of a stream; with ``message`` it is no data but goes to standard error."""
    if json:
        put_json({"event": frame.kind, "seq": frame.seq, "data": frame.data})
    elif frame.kind == "delta":
        say(str(frame.data.get("text", "")), end="", style="dim")
    else:
        line = event_line(frame.data) if "kind" in frame.data else f"{frame.kind}  {short(frame.data)}"
        if message or frame.kind == "done":
            say(line, style="dim")
        else:
            put(line)


def event_line(event: Mapping[str, Json]) -> str:
    """``seq  time  kind  key  payload`` of an event."""
    time = str(event["created_at"])[11:19]
    parts = [f"{event['seq']:>5}", time, f"{event['kind']:<20}", event.get("key") or "", short(event["payload"])]
    return "  ".join(str(part) for part in parts if part).rstrip()


def step_line(step: StepInfo) -> str:
    """``seq  time  status  name  ms  result or error`` of a step."""
    large = _large(step["artifact"])
    came = step["error"] if step["error"] is not None else step["result"] if large is None else large
    tries = f"{step['attempts']} tries" if (step["attempts"] or 1) > 1 else ""
    took = f"{step['ms']} ms" if step["ms"] is not None else ""
    parts = [
        f"{step['seq']:>5}",
        step["at"][11:19],
        f"{step['status']:<9}",
        f"{step['name']:<20}",
        took,
        tries,
        short(came),
    ]
    return "  ".join(part for part in parts if part).rstrip()


def _large(value: ValueInfo | None) -> Json:
    """What is shown of a value that is elsewhere."""
    return (
        {key: value[key] for key in ("id", "size", "preview") if value[key] is not None} if value is not None else None
    )


def short(value: Json) -> str:
    """``value`` as JSON on one line, cut where it becomes long; nothing is nothing."""
    text = jsonlib.dumps(value) if value else ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
