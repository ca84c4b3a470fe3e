"""An agent in its first version, and what both versions share: see ``test_rolling``."""

from __future__ import annotations

from longshift import Turn, agent
from tests.acceptance.agents import gate, note, work


async def run(turn: Turn, name: str, *, version: str) -> str:
    """A step, a wait that holds no worker, one that holds it if it is called so, a step; its version."""
    await work(turn, "before", 1)
    await turn.wait_for("go")

    async def pass_gate() -> None:
        note(turn, "begun", "at the gate")
        await gate(name)
        note(turn, "done", "at the gate")

    await turn.step("at the gate", pass_gate)
    await work(turn, "after", 1)
    note(turn, "ended", version=version)
    return version


@agent("shared", version="1")
async def shared(turn: Turn, name: str) -> str:
    """Both versions have one queue."""
    return await run(turn, name, version="1")


@agent("moved", version="1")
async def moved(turn: Turn, name: str) -> str:
    """The second version has a queue of its own."""
    return await run(turn, name, version="1")
