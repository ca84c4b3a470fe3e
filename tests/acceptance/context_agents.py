"""An agent whose answer tells all that it sees of its session's earlier turns."""

from __future__ import annotations

from typing import Any

from longshift import Turn, agent
from tests.acceptance.agents import gate, note, work
from tests.acceptance.checks import digest


@agent("remembering")
async def remembering(turn: Turn, asked: dict[str, Any]) -> dict[str, Any]:
    """Steps and maybe a gate, after which every third turn leaves its worker and comes again."""
    seen = [message["content"] for message in turn.history]
    total = turn.state.get("total", 0) + asked["n"]
    await work(turn, "before", asked["n"], seconds=0)
    if asked["gate"]:
        await turn.step("gate", _gate, turn, asked["gate"])
        if asked["n"] % 3 == 0:
            await turn.sleep(1.1)
    await turn.say(f"noted {asked['n']}")
    await turn.state.set("total", total)
    return {"saw": digest(seen), "messages": len(seen), "total": turn.state["total"]}


async def _gate(turn: Turn, name: str) -> None:
    note(turn, "begun", "gate")
    await gate(name)
