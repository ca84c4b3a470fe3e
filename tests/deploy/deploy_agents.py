"""Agents for the tests of deployments. ``DEPLOY_FOLDER`` names the folder of the gate at which one of them waits."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from longshift import Turn, agent

FOLDER = Path(os.environ.get("DEPLOY_FOLDER", "."))


@agent("chat")
async def chat(turn: Turn, word: str) -> list[str]:
    """Every word of the conversation so far."""
    before = turn.state.get("words", [])
    assert isinstance(before, list)
    words = [*map(str, before), word]
    await turn.state.set("words", words)
    return words


@agent("steady")
async def steady(turn: Turn, value: int) -> int:
    """A step that says when it has begun, and ends when the gate is open."""

    async def work(value: int) -> int:
        (FOLDER / "begun").touch()
        while not (FOLDER / "gate").exists():  # noqa: ASYNC110  # made by another process
            await asyncio.sleep(0.02)
        return 2 * value

    return await turn.step("work", work, value)
