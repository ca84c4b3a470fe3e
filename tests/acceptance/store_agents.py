"""Agents that keep artifacts and read them again."""

from __future__ import annotations

from longshift import Turn, agent
from tests.acceptance.agents import gate, note, work


@agent("keeper")
async def keeper(turn: Turn, n: int) -> str:
    """A step, an artifact, another step, the artifact's bytes; ``gate`` of its metadata opens after the first step."""
    before = await work(turn, "before", n)
    if "gate" in turn.metadata:
        await gate(turn.metadata["gate"])
    page = await turn.artifact("page.txt", f"page {before}")
    note(turn, "kept")
    await work(turn, "after", before)
    return (await turn.read(page)).decode()


@agent("reader")
async def reader(turn: Turn, artifact: str) -> str:
    return (await turn.read(artifact)).decode()
