"""Agents with tools of every effect, in our own words and in those of other frameworks, for workers that die after any event.

Every effect, and every request to a model, is a line in the file of effects.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

from agents import Agent as SdkAgent
from agents import Model, ModelResponse, RunConfig, Runner, Usage
from agents.items import TResponseStreamEvent
from agents.testing import assistant_message, function_call
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.messages import ModelMessage, TextPart, ToolCallPart
from pydantic_ai.messages import ModelResponse as PydanticResponse
from pydantic_ai.models.function import AgentInfo, FunctionModel

from longshift import Absent, Done, ToolCall, Turn, agent, tool
from longshift.integrations import openai_agents, pydantic_ai
from longshift.model import Prefix, show_id
from longshift.place import current
from tests.acceptance.agents import EFFECTS, FOLDER

EVENTS = {"ours": 7, "pydantic": 8, "sdk": 8}
"""Of an undisturbed turn of each agent."""


def note(what: str, key: str = "") -> None:
    execution = current()
    assert execution is not None
    line = {"what": what, "turn": show_id(Prefix.TURN, execution.record.id), "step": what, "attempt": execution.attempt}
    line |= {"pid": os.getpid(), "at": time.monotonic(), "key": key}
    os.write(EFFECTS, json.dumps(line).encode() + b"\n")


def posted(call: ToolCall, text: str) -> Done[str] | Absent:
    """The file says which lines are there."""
    lines = map(json.loads, (FOLDER / "effects.jsonl").read_text().splitlines())
    return Done(text) if any(line["what"] == "post" and line.get("key") == call.key for line in lines) else Absent()


@tool(effect="read")
async def look(call: ToolCall, city: str) -> str:
    note("look", call.key)
    return city.upper()


@tool(effect="write")
async def put(call: ToolCall, text: str) -> str:
    note("put", call.key)
    return f"put {text}"


# nobody sees the victims die: that a call comes to nothing is only certain when its time is over
@tool(effect="irreversible", reconcile=posted, timeout=timedelta(seconds=3))
async def post(call: ToolCall, text: str) -> str:
    """Something that nobody can take back."""
    note("post", call.key)
    return text


async def ours(turn: Turn, question: str) -> list[str]:
    """A model that repeats a call gets the stored result."""
    return [await look(question), await put("a note"), await post("a letter"), await post("a letter")]


# -- pydantic-ai

PLAN = [("look", {"city": "Oslo"}), ("put", {"text": "a note"}), ("post", {"text": "a letter"})]


def answer(messages: list[ModelMessage], info: AgentInfo) -> PydanticResponse:
    note("model")
    if any(each.kind == "response" for each in messages):
        return PydanticResponse([TextPart("done")])
    return PydanticResponse([ToolCallPart(name, args, tool_call_id=f"call_{name}") for name, args in PLAN])


helper = PydanticAgent(
    FunctionModel(answer, model_name="fake"),
    tools=[pydantic_ai.as_tool(each) for each in (look, put, post)],
    capabilities=[pydantic_ai.LongshiftDurability[None]()],
)


async def pydantic(turn: Turn, question: str) -> list[str]:
    return [(await helper.run(question)).output]


# -- OpenAI Agents SDK


class Scripted(Model):
    """Calls all tools, then says that it is done."""

    model = "fake"

    async def get_response(self, *args: Any, **options: Any) -> ModelResponse:
        note("model")
        said = options["input"]
        types = [] if isinstance(said, str) else [item.get("type") for item in said]
        first = not any(here == "function_call_output" != before for before, here in pairwise(types))
        calls: Sequence[Any] = [function_call(name, args, call_id=f"call_{name}") for name, args in PLAN]
        output = list(calls) if first else [assistant_message("done")]
        return ModelResponse(output=output, usage=Usage(requests=1), response_id=None)

    def stream_response(self, *args: Any, **options: Any) -> AsyncIterator[TResponseStreamEvent]:
        raise NotImplementedError


clerk = openai_agents.durable(
    SdkAgent(name="clerk", model=Scripted(), tools=[openai_agents.as_tool(each) for each in (look, put, post)])
)


async def sdk(turn: Turn, question: str) -> list[str]:
    result = await Runner.run(clerk, question, run_config=RunConfig(tracing_disabled=True))
    return [str(result.final_output)]


for _function in (ours, pydantic, sdk):
    _name = _function.__name__
    globals()[f"{_name}_undisturbed"] = agent(_name)(_function)
    for _n in range(1, EVENTS[_name] + 1):
        globals()[f"{_name}_{_n}"] = agent(f"{_name}-{_n}", queue=f"{_name}-{_n}")(_function)
