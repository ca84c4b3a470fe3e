"""An agent that only some workers have."""

from __future__ import annotations

from longshift import Turn, agent
from tests.acceptance.agents import note


@agent("late")
async def late(turn: Turn, n: int) -> int:
    note(turn, "ran", place=n)
    return n


@agent("late sleeper")
async def late_sleeper(turn: Turn, seconds: float) -> None:
    await turn.sleep(seconds)
