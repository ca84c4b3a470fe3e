"""An agent that makes a span of each kind, and waits at a gate in between."""

from __future__ import annotations

import os

from longshift import ToolCall, Turn, agent, step, tool
from tests.acceptance.agents import gate, note


@step
async def look(word: str) -> int:
    return os.getpid()


@tool(effect="write")
async def save(call: ToolCall, word: str) -> str:
    return word


async def ask(word: str) -> None:
    """One request to a model. Imported here: only the process that gets so far pays for it."""
    from pydantic_ai import Agent as PydanticAgent
    from pydantic_ai.models.test import TestModel

    from longshift.integrations.pydantic_ai import LongshiftDurability

    await PydanticAgent(TestModel(), capabilities=[LongshiftDurability[None]()]).run(word)


@agent("traced")
async def traced(turn: Turn, word: str) -> list[int]:
    """The processes that ran its first and its last step."""
    first = await look(word)
    await save(word)
    note(turn, "begun", "at the gate")
    await turn.step("at the gate", gate, word)
    await ask(word)
    return [first, await look(word)]
