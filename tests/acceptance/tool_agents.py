"""Agents with an irreversible tool: it writes a line into the file of effects, and there is nothing that undoes it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from datetime import timedelta

from longshift import Absent, Done, ToolCall, Turn, agent, tool
from tests.acceptance.agents import EFFECTS, FOLDER, gate

VICTIMS = 2


def write(what: str, turn: str, call: ToolCall) -> None:
    line = {"what": what, "turn": turn, "step": "post", "attempt": call.attempt, "pid": os.getpid(), "key": call.key}
    os.write(EFFECTS, json.dumps({**line, "at": time.monotonic()}).encode() + b"\n")


def posted(call: ToolCall, turn: str, place: str) -> Done[str] | Absent:
    """The file says which lines are there."""
    lines = (FOLDER / "effects.jsonl").read_text().splitlines()
    found = any(line["what"] == "posted" and line.get("key") == call.key for line in map(json.loads, lines))
    if found:
        return Done("posted")
    write("absent", turn, call)
    return Absent()


async def _post(call: ToolCall, turn: str, place: str) -> str:
    """Wait at a gate, then write the line."""
    write("begun", turn, call)
    await gate(place)
    write("posted", turn, call)
    return "posted"


post = tool(effect="irreversible", name="post", reconcile=posted, timeout=timedelta(seconds=30))(_post)
# if nobody sees that its worker dies, it is proven that the call comes to nothing when this is over
post_soon = tool(effect="irreversible", name="post", reconcile=posted, timeout=timedelta(seconds=3))(_post)


@agent("mailer")
async def mailer(turn: Turn, place: str) -> str:
    return await post(turn.id, place)


async def victim(turn: Turn, place: str) -> str:
    return await post_soon(turn.id, place)


for _n in range(1, VICTIMS + 1):
    globals()[f"mailer_{_n}"] = agent(f"mailer-{_n}", queue=f"victim-{_n}")(victim)


@agent("leaving")
async def leaving(turn: Turn, place: str) -> str:
    """A step beside the call, which a drain need not wait for."""

    async def hang() -> None:
        await asyncio.sleep(3600)

    posting, _ = await asyncio.wait({asyncio.ensure_future(post(turn.id, place))})
    await turn.step("hang", hang)
    return posting.pop().result()
