"""OpenAI Agents SDK agents inside a turn: ``durable(agent)``, and every model request and tool call is a step.

    helper = durable(Agent(name="helper", tools=[search], handoffs=[billing]))


    @agent("help")
    async def help(turn: Turn, question: str) -> str:
        return (await Runner.run(helper, question)).final_output

Outside a turn, and inside a step, the agent is what it was before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

from pydantic_core import to_jsonable_python

from longshift.errors import InvalidInput, ToolDenied, UsageError
from longshift.integrations.calls import (
    EffectName,
    Policy,
    beside,
    branch,
    call_tool,
    current_call,
    standing,
    turn_here,
)
from longshift.model import Json
from longshift.steps import ONCE, Retry
from longshift.tools import Tool as LongshiftTool
from longshift.turn import Turn

try:
    from agents import (
        Agent,
        ApplyPatchTool,
        ComputerTool,
        CustomTool,
        FunctionTool,
        Handoff,
        LocalShellTool,
        ModelProvider,
        RunContextWrapper,
        ShellTool,
        Tool,
        ToolOutputFileContent,
        ToolOutputImage,
        ToolOutputText,
        TResponseInputItem,
    )
    from agents.memory import SessionSettings
    from agents.tool import with_function_tool_failure_error_handler
    from agents.tool_context import ToolContext

    from longshift.integrations.openai_agents_model import RecordedModel
except ImportError as error:
    raise ImportError("the OpenAI Agents SDK is missing, or too old: pip install 'longshift[openai-agents]'") from error

A = TypeVar("A", bound=Agent[Any])
_MARK = "__longshift__"
_OUTPUTS = (ToolOutputText, ToolOutputImage, ToolOutputFileContent)
_LOCAL = (ApplyPatchTool, ComputerTool, CustomTool, LocalShellTool, ShellTool)
"""Tools that the SDK runs itself, on this machine, in ways of their own."""
ITEMS = "openai-agents"
"""The role under which the session's history keeps items of conversations."""


def durable(
    agent: A,
    *,
    retry: Retry = ONCE,
    timeout: timedelta | None = None,
    tool_retry: Retry = ONCE,
    tool_timeout: timedelta | None = None,
    effects: Mapping[str, EffectName | None] | None = None,
    stream: bool = False,
    model_provider: ModelProvider | None = None,
) -> A:
    """Make the agent's model requests and tool calls steps of the turn that it runs in; with it, the agents it hands off
    to and the agents that are its tools.

    The agent is changed in place, and returned: it stays the one that handoffs, hooks and results know. Tools are recorded
    as ``write`` unless ``effects`` says otherwise; None makes a tool plain code of the agent: it runs again on a replay, and
    may itself use the turn: steps, waits, other agents. Agents as tools are plain, since their own calls are recorded.

    Args:
        agent: of any kind; calling this again for it changes nothing.
        retry: of model requests. What the provider's ``Retry-After`` says is believed.
        timeout: of one try of a model request; default ``LONGSHIFT_STEP_TIMEOUT``.
        tool_retry: of tools that raise. Most do not: what ``function_tool`` makes turns errors into answers to the model.
        tool_timeout: of one try of a tool call; default ``LONGSHIFT_STEP_TIMEOUT``.
        effects: of tools, by name: "read", "write" or None.
        stream: request the model's answers as streams and show their text to whoever follows the turn. What
            ``Runner.run_streamed`` requests is always shown.
        model_provider: of models given by name. Default: the SDK's own; that of a ``RunConfig`` is not asked.

    Raises:
        UsageError: it has a tool that the SDK runs on this machine in a way of its own, such as a shell; or an effect says
            ``irreversible``, which only a longshift tool can be here.
    """
    policy = Policy(retry, timeout, tool_retry, tool_timeout, effects)
    for name, effect in (effects or {}).items():
        if effect == "irreversible":
            raise UsageError(
                f"tool {name!r} cannot be irreversible: what function_tool and MCP servers give turns errors into answers, so "
                'that nobody would see that a call is in doubt. Make it a longshift @tool(effect="irreversible") and give '
                "as_tool(...) of it to the agent"
            )
    _Durable(policy, stream=stream, provider=model_provider).make(agent)
    return agent


class _Durable:
    """Makes an agent durable, and those it leads to."""

    def __init__(self, policy: Policy, *, stream: bool, provider: ModelProvider | None) -> None:
        self.policy, self.stream, self.provider = policy, stream, provider

    def make(self, agent: Agent[Any]) -> None:
        self._record_model(agent)  # first: a clone of a durable agent has its model already
        if _MARK in vars(agent):
            return
        vars(agent)[_MARK] = True
        for tool in agent.tools:
            self.record(tool)
        list_tools = agent.get_all_tools

        async def get_all_tools(run_context: RunContextWrapper[Any]) -> list[Tool]:
            self._record_model(agent)  # it may have been given another one
            tools = await list_tools(run_context)
            for tool in tools:  # those of MCP servers are made anew for each request, and some are added later
                self.record(tool)
            return tools

        vars(agent)["get_all_tools"] = get_all_tools
        for each in agent.handoffs:
            if isinstance(each, Handoff):
                self._follow(each)
            else:
                self.make(each)

    def _record_model(self, agent: Agent[Any]) -> None:
        if not isinstance(agent.model, RecordedModel):
            agent.model = RecordedModel(agent.model, self.policy, stream=self.stream, provider=self.provider)

    def _follow(self, handoff: Handoff[Any, Any]) -> None:
        if _MARK in vars(handoff):
            return
        vars(handoff)[_MARK] = True
        invoke = handoff.on_invoke_handoff

        async def followed(context: RunContextWrapper[Any], arguments: str) -> Agent[Any]:
            target: Agent[Any] = await invoke(context, arguments)
            self.make(target)
            return target

        handoff.on_invoke_handoff = followed

    def record(self, tool: Tool) -> None:
        """Let the tool's calls be recorded from now on."""
        hosted = isinstance(tool, ShellTool) and tool.executor is None
        if isinstance(tool, _LOCAL) and not hosted and self.policy.effect(tool.name) is not None:
            raise UsageError(
                f"the calls of tool {tool.name!r} ({type(tool).__name__}) cannot be recorded, because the SDK runs it in a "
                "way of its own: make it a function_tool, or accept that it runs again after a crash: "
                f"durable(agent, effects={{{tool.name!r}: None}})"
            )
        if not isinstance(tool, FunctionTool) or _MARK in vars(tool):
            return
        effect = self.policy.effect(tool.name)
        inner = getattr(tool, "_agent_instance", None)  # of `agent.as_tool()`
        if isinstance(inner, Agent) and tool.name not in (self.policy.effects or {}):
            self.make(inner)
            effect = None
        _record(tool, effect, self.policy)


def _record(tool: FunctionTool, effect: EffectName | None, policy: Policy) -> None:
    vars(tool)[_MARK] = True
    invoke = tool.on_invoke_tool

    async def recorded(context: ToolContext[Any], arguments: str) -> Any:
        execution = turn_here()
        if execution is None:
            return await invoke(context, arguments)
        _check_config(context)
        if effect is None:
            async with branch(execution, tool.name, context.tool_call_id):
                return await invoke(context, arguments)

        async def run() -> Json:
            return _as_json(await invoke(context, arguments), typed=tool.output_json_schema is not None)

        outcome = await call_tool(
            execution, tool.name, context.tool_call_id, run, _parsed(arguments), effect=effect, policy=policy
        )
        if outcome.note is None:
            return outcome.value
        return json.dumps({"result": outcome.value, "note": outcome.note})

    prepare = getattr(invoke, "prepare_arguments", None)
    if prepare is None:
        tool.on_invoke_tool = recorded
        return
    # What `function_tool` makes has an invoker of the SDK's own, which its rules for approvals look for.
    vars(recorded)["__agents_prepare_arguments__"] = prepare
    vars(recorded)["__agents_function_tool_wrapped_callable__"] = getattr(tool, "__wrapped__", None)
    tool.on_invoke_tool = with_function_tool_failure_error_handler(recorded, lambda *_: None)
    tool.__post_init__()  # type: ignore[no-untyped-call] # binds the invoker to the tool


def _check_config(context: ToolContext[Any]) -> None:
    """Raises UsageError: the run's configuration replaces the model whose requests are recorded."""
    model = None if context.run_config is None else context.run_config.model
    if model is not None and not isinstance(model, RecordedModel):
        raise UsageError(
            "RunConfig(model=...) replaces the agent's model, so that its requests are not recorded: give the model to the "
            "agent, Agent(model=...)"
        )


def as_tool(tool: LongshiftTool[..., Any]) -> FunctionTool:
    """A longshift tool for an agent of the SDK, with its own name, schema and effect.

    The call is recorded by the tool itself, under the model's id for the call; it needs no ``durable``, but a turn.
    """

    async def invoke(context: ToolContext[Any], arguments: str) -> Any:
        try:
            return await tool.call(_parsed(arguments), id=context.tool_call_id)
        except (InvalidInput, ToolDenied) as error:
            return str(error)

    made = FunctionTool(
        name=tool.name,
        description=tool.description,
        params_json_schema=dict(tool.schema),
        on_invoke_tool=invoke,
        strict_json_schema=False,
    )
    _record(made, None, Policy())
    return made


class TurnSession:
    """A session of the SDK that is the turn's session: ``Runner.run(agent, question, session=TurnSession(turn))``.

    Each turn adds what is new; nothing that is there is written again.
    """

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.session_id = turn.session_id
        self.session_settings: SessionSettings | None = None

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        items: list[TResponseInputItem] = []
        for message in self._turn.history:
            if message["role"] != ITEMS:
                continue
            match cast(Any, message["content"]):
                case {"add": added}:
                    items.extend(added)
                case {"pop": _}:
                    items = items[:-1]
                case {"clear": _}:
                    items = []
        return items if limit is None else items[max(0, len(items) - limit) :]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        if items:
            await self._say({"add": to_jsonable_python(items)})

    async def pop_item(self) -> TResponseInputItem | None:
        items = await self.get_items()
        if not items:
            return None
        await self._say({"pop": 1})
        return items[-1]

    async def clear_session(self) -> None:
        await self._say({"clear": True})

    async def _say(self, content: Json) -> None:
        execution = turn_here()
        if execution is None:
            raise UsageError("a TurnSession can only be used in its turn, and not inside a step")
        with standing(execution, beside(execution)):  # the SDK calls this from tasks of its own
            await self._turn.say(content, role=ITEMS)


def _parsed(arguments: str) -> dict[str, Any]:
    """The arguments as the model has written them; those that are no JSON object are one text."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def _as_json(value: Any, *, typed: bool) -> Json:
    """What a tool gave, as the model will be given it: the SDK sends the text of what it does not know."""
    if typed or isinstance(value, _OUTPUTS):
        return cast(Json, to_jsonable_python(value, exclude_none=not typed))
    if isinstance(value, list) and any(isinstance(each, _OUTPUTS) for each in value):
        return [_as_json(each, typed=False) for each in value]
    try:
        return cast(Json, json.loads(json.dumps(value)))
    except (TypeError, ValueError):
        return str(value)


__all__ = ["TurnSession", "as_tool", "current_call", "durable"]
