"""pydantic-ai agents inside a turn: one capability, and every model request and tool call is a step.

    helper = Agent("openai:gpt-5", tools=[search], capabilities=[LongshiftDurability()])


    @agent("help")
    async def help(turn: Turn, question: str) -> str:
        return (await helper.run(question)).output

Outside a turn, and inside a step, the agent is what it is without the capability.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from longshift.errors import ControlFlow, InvalidInput, ToolDenied, UsageError
from longshift.integrations.calls import (
    EFFECTS,
    EffectName,
    Policy,
    beside,
    branch,
    call_tool,
    current_call,
    standing,
    step,
    turn_here,
)
from longshift.model import Json
from longshift.replay import to_json
from longshift.steps import ONCE, Retry
from longshift.tools import Tool as LongshiftTool
from longshift.turn import Turn

try:
    from pydantic_ai import AbstractToolset, RunContext, Tool, ToolsetTool
    from pydantic_ai.agent import AbstractAgent
    from pydantic_ai.capabilities.abstract import WrapModelRequestHandler, WrapRunHandler
    from pydantic_ai.durable_exec import (
        JSON_CODEC,
        BaseDurabilityCapability,
        CallableOperationBackend,
        DurabilityEngineSpec,
        DurableOperationId,
        JournalOperationNamer,
        RoleBasedOperationConfig,
        conversation_id_from_run_id,
        durable_unit_scope,
        record_durable_unit,
        replay_scope,
    )
    from pydantic_ai.exceptions import ApprovalRequired, CallDeferred, ModelRetry, ToolFailed
    from pydantic_ai.messages import (
        ModelMessage,
        ModelMessagesTypeAdapter,
        ModelResponse,
        ToolReturn,
        ToolReturnContent,
    )
    from pydantic_ai.models import Model, ModelRequestContext
    from pydantic_ai.run import AgentRunResult
    from pydantic_ai.tools import AgentDepsT
    from pydantic_ai.toolsets import WrapperToolset

    from longshift.integrations.pydantic_ai_model import ModelFailed, RecordedModel
except ImportError as error:
    raise ImportError("pydantic-ai is missing, or too old: pip install 'longshift[pydantic-ai]'") from error

_JSON = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
_CONTENT: TypeAdapter[Any] = TypeAdapter(ToolReturnContent, config=_JSON)
_RETURN: TypeAdapter[ToolReturn[Any]] = TypeAdapter(ToolReturn)


class LongshiftDurability(BaseDurabilityCapability[AgentDepsT]):
    """Makes an agent's model requests and tool calls steps of the turn that it runs in.

    Tools are recorded as ``write`` unless ``effects``, or ``metadata={"longshift": "read"}`` of the tool, says otherwise.
    ``None`` (as metadata also ``False``) makes a tool plain code of the agent: it runs again on a replay, and may itself
    use the turn: steps, waits, other agents.
    """

    engine_spec = DurabilityEngineSpec(
        engine_name="Longshift",
        durable_unit_noun="step",
        durable_container_noun="turn",
        codec=JSON_CODEC,
        wrapped_toolset_kinds=frozenset(),  # one wrapper around all of them serves any kind, and needs no ids
        toolset_lifecycles={},
        cancellation_error_types=(ControlFlow,),
    )

    def __init__(
        self,
        *,
        retry: Retry = ONCE,
        timeout: timedelta | None = None,
        tool_retry: Retry = ONCE,
        tool_timeout: timedelta | None = None,
        effects: Mapping[str, EffectName | None] | None = None,
        stream: bool = False,
    ) -> None:
        """
        Args:
            retry: of model requests. What the provider's ``Retry-After`` says is believed.
            timeout: of one try of a model request; default ``LONGSHIFT_STEP_TIMEOUT``.
            tool_retry: of tool calls that raise. A ``ModelRetry`` is an answer to the model, not a failure.
            tool_timeout: of one try of a tool call; default ``LONGSHIFT_STEP_TIMEOUT``.
            effects: of tools, by name.
            stream: request the model's answers as streams and show their text to whoever follows the turn. Requests that
                the agent itself makes as streams are always shown.
        """
        super().__init__(name="agent")  # names of steps are made of the model's and the tools', not of the agent's
        self.policy = Policy(retry, timeout, tool_retry, tool_timeout, effects)
        self.stream = stream
        self._backend = _Backend()

    @property
    def in_durable_context(self) -> bool:
        return turn_here() is not None

    def get_durable_operation_backend(self) -> _Backend:
        return self._backend

    # -- the same on every replay

    def get_default_run_id(self) -> str | None:
        execution = turn_here()
        return None if execution is None else str(Turn(execution).uuid())

    def get_default_conversation_id(self, run_id: str) -> str | None:
        return None if turn_here() is None else conversation_id_from_run_id(run_id)

    def get_run_clock(self) -> Callable[[], datetime] | None:
        execution = turn_here()
        return None if execution is None else execution.port.clock.now

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        execution = turn_here()
        return None if execution is None else Turn(execution).now()

    async def wrap_run(self, ctx: RunContext[AgentDepsT], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        execution = turn_here()
        if execution is None:
            return await handler()
        # pydantic-ai carries what is set here over to the task in which the agent's own code runs, so that this code stands
        # in the branch that called the agent, whatever tasks the framework makes.
        with standing(execution, beside(execution)), replay_scope():
            return await super().wrap_run(ctx, handler=handler)

    # -- what becomes a step

    def get_wrapper_model(self, model: Model) -> Model | None:
        return None if turn_here() is None else RecordedModel(model, self.policy, stream=self.stream)

    def get_wrapper_toolset(self, toolset: AbstractToolset[AgentDepsT]) -> AbstractToolset[AgentDepsT] | None:
        return _RecordedToolset(toolset, self)

    def effect(self, name: str, tool: ToolsetTool[AgentDepsT]) -> EffectName | None:
        """What the tool does to the world; None: it is plain code of the agent.

        Raises:
            UsageError: its metadata says something else.
        """
        said = (tool.tool_def.metadata or {}).get("longshift", ...)
        if said is ... or name in (self.policy.effects or {}):
            return self.policy.effect(name)
        effect = None if said is False else said
        if effect not in EFFECTS:
            raise UsageError(
                f"tool {name!r} has metadata={{'longshift': {said!r}}}: write 'read', 'write' or 'irreversible', or False "
                "for plain code of the agent"
            )
        return cast(EffectName | None, effect)

    @contextmanager
    def unit(self, ctx: RunContext[AgentDepsT]) -> Iterator[RunContext[AgentDepsT]]:
        """Inside a step: what would be lost on a replay (``ctx.enqueue``) is refused."""
        with durable_unit_scope(), self._durable_run_context_scope(ctx) as guarded:
            yield guarded

    # The requests are recorded where they are sent, in `get_wrapper_model`, so the base need not replace the model before.

    async def wrap_model_request(
        self, ctx: RunContext[AgentDepsT], *, request_context: ModelRequestContext, handler: WrapModelRequestHandler
    ) -> ModelResponse:
        return await handler(request_context)

    async def before_model_request(
        self, ctx: RunContext[AgentDepsT], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        return request_context

    async def prepare_model_request(
        self, ctx: RunContext[AgentDepsT], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        return request_context

    # Steps run in this process, with the run's own model and tools: nothing has to be registered beforehand.

    def _bind_models(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        if agent.model is not None:
            super()._bind_models(agent)

    def _bind_to_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        pass


@dataclass
class _RecordedToolset(WrapperToolset[AgentDepsT]):
    """Calls each tool in a step, whatever toolset it is of."""

    capability: LongshiftDurability[AgentDepsT]

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[AgentDepsT], tool: ToolsetTool[AgentDepsT]
    ) -> Any:
        execution = turn_here()
        if execution is None:
            return await super().call_tool(name, tool_args, ctx, tool)
        effect = self.capability.effect(name, tool)
        if effect is None:
            async with branch(execution, name, ctx.tool_call_id):
                return await super().call_tool(name, tool_args, ctx, tool)
        ran = False

        async def invoke() -> Json:
            nonlocal ran
            ran = True
            with self.capability.unit(ctx) as guarded:
                return await _outcome(self.wrapped.call_tool(name, tool_args, guarded, tool))

        told = cast(dict[str, Any], to_json(tool_args))
        if ctx.tool_call_approved:  # another call than the one that was answered with ApprovalRequired
            told["tool_call_approved"] = True
        try:
            outcome = await call_tool(
                execution, name, ctx.tool_call_id, invoke, told, effect=effect, policy=self.capability.policy
            )
        finally:
            record_durable_unit(executed=ran)
        result = _result(outcome.value)
        return result if outcome.note is None else {"result": result, "note": outcome.note}


class _Backend(CallableOperationBackend[None]):
    """What other capabilities declare as durable operations: steps, too."""

    def __init__(self) -> None:
        super().__init__(
            namer=JournalOperationNamer("agent"),
            config=RoleBasedOperationConfig(model=None, event=None, capability=None, tool=None),
        )

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: None,
    ) -> object:
        execution = turn_here()
        if execution is None:
            return await body()

        async def run() -> Json:
            return cast(Json, await body())

        return await step(execution, name, run)


def as_tool(tool: LongshiftTool[..., Any]) -> Tool[Any]:
    """A longshift tool for a pydantic-ai agent, with its own name, schema and effect.

    The call is recorded by the tool itself, under the model's id for the call; it needs no capability, but a turn.
    """

    async def call(ctx: RunContext[Any], **arguments: Any) -> Any:
        try:
            return await tool.call(arguments, id=ctx.tool_call_id)
        except InvalidInput as error:
            raise ModelRetry(str(error)) from error
        except ToolDenied as error:
            raise ToolFailed(str(error)) from error

    made: Tool[Any] = Tool.from_schema(call, tool.name, tool.description, dict(tool.schema), takes_ctx=True)
    made.metadata = {"longshift": False}
    return made


MESSAGES = "pydantic-ai"
"""The role under which the session's history keeps messages of agents."""


def past_messages(turn: Turn) -> list[ModelMessage]:
    """The messages that earlier turns of the session kept: the ``message_history`` of the next run."""
    kept = [message["content"] for message in turn.history if message["role"] == MESSAGES]
    return [message for messages in kept for message in ModelMessagesTypeAdapter.validate_python(messages)]


async def keep_messages(turn: Turn, result: AgentRunResult[Any]) -> None:
    """Keep what a run has added to the conversation, for ``past_messages`` of later turns."""
    new = ModelMessagesTypeAdapter.dump_python(result.new_messages(), mode="json")
    await turn.say(new, role=MESSAGES)


async def _outcome(call: Awaitable[Any]) -> Json:
    """How a tool call ended, as JSON: a result, or one of the exceptions by which a tool talks to the agent."""
    try:
        value = await call
    except ModelRetry as error:
        return {"retry": error.message}
    except ValidationError as error:  # of arguments, by the tool's own code: the model is asked to correct them
        return {"retry": str(error)}
    except ToolFailed as error:
        return {"failed": error.message}
    except ApprovalRequired as error:
        return {"approval_required": error.metadata}
    except CallDeferred as error:
        return {"deferred": error.metadata, "kind": error.kind}
    if isinstance(value, ToolReturn):
        return {"tool_return": _RETURN.dump_python(value, mode="json")}
    return {"returned": _CONTENT.dump_python(value, mode="json")}


def _result(recorded: Any) -> Any:
    match recorded:
        case {"returned": value}:
            return _CONTENT.validate_python(value)
        case {"tool_return": value}:
            return _RETURN.validate_python(value)
        case {"retry": message}:
            raise ModelRetry(message)
        case {"failed": message}:
            raise ToolFailed(message)
        case {"approval_required": metadata}:
            raise ApprovalRequired(metadata)
        case {"deferred": metadata, "kind": kind}:
            raise CallDeferred(metadata, kind=kind)
        case _:
            raise UsageError(f"the recorded outcome of a tool call is none that this release knows: {sorted(recorded)}")


__all__ = ["LongshiftDurability", "ModelFailed", "as_tool", "current_call", "keep_messages", "past_messages"]
