"""An agent with a memory, for conversations over several replicas and workers."""

from __future__ import annotations

from longshift import Turn, agent


@agent("chat")
async def chat(turn: Turn, word: str) -> list[str]:
    """Every word of the conversation so far."""
    before = turn.state.get("words", [])
    assert isinstance(before, list)
    words = [*map(str, before), word]
    await turn.state.set("words", words)
    return words
