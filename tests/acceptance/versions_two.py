"""The agents of ``versions_one`` in their second version."""

from __future__ import annotations

from longshift import Turn, agent
from tests.acceptance.versions_one import run


@agent("shared", version="2")
async def shared(turn: Turn, name: str) -> str:
    return await run(turn, name, version="2")


@agent("moved", version="2", queue="second")
async def moved(turn: Turn, name: str) -> str:
    return await run(turn, name, version="2")
