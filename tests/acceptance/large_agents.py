"""Agents whose values are too large for a row."""

from __future__ import annotations

import os
from hashlib import sha256
from typing import Any

from longshift import Turn, agent, tool
from tests.acceptance.agents import gate, note
from tests.support.noise import noise


@agent("measurer", queue="victim-1")
async def measurer(turn: Turn, given: str) -> dict[str, Any]:
    """A tool with a result of 5 MB; its hash and that of the input, and the result itself."""

    @tool(effect="write", name="measure")
    async def measure(seed: int) -> str:
        note(turn, "done", "measure")
        return noise(seed)

    told = await measure(7)
    hashes = [sha256(text.encode()).hexdigest() for text in (given, told)]
    return {"hashes": hashes, "told": told, "history": list(turn.history), "pid": os.getpid()}


@agent("historian")
async def historian(turn: Turn, given: str) -> list[Any]:
    """What it sees of the turns before; waits at a gate if its metadata names one."""
    if "gate" in turn.metadata:
        await gate(turn.metadata["gate"])
    return list(turn.history)


@agent("echoing")
async def echoing(turn: Turn, text: str) -> str:
    return text


@agent("asking")
async def asking(turn: Turn, text: str) -> bool:
    """Whether a child gives back what it was given."""
    child = await turn.spawn(echoing, text)
    return await child == text
