"""An agent that makes a span of each kind, and waits at a gate in between."""

from __future__ import annotations

import os

from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from longshift import ToolCall, Turn, agent, step, tool
from longshift.integrations.pydantic_ai import LongshiftDurability
from tests.acceptance.agents import gate, note


def _answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    return ModelResponse([TextPart("fine")])


helper = PydanticAgent(FunctionModel(_answer, model_name="fake"), capabilities=[LongshiftDurability[None]()])


@step
async def look(word: str) -> int:
    return os.getpid()


@tool(effect="write")
async def save(call: ToolCall, word: str) -> str:
    return word


@agent("traced")
async def traced(turn: Turn, word: str) -> list[int]:
    """The processes that ran its first and its last step."""
    first = await look(word)
    await save(word)
    note(turn, "begun", "at the gate")
    await turn.step("at the gate", gate, word)
    await helper.run(word)
    return [first, await look(word)]
