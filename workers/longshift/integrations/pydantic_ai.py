"""pydantic-ai agents inside a turn: one capability, and every model request and tool call is a step.

    helper = Agent("openai:gpt-5", tools=[search], capabilities=[LongshiftDurability()])


    @agent("help")
    async def help(turn: Turn, question: str) -> str:
        return (await helper.run(question)).output

Outside a turn, and inside a step, the agent is what it is without the capability.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from longshift.errors import ControlFlow, StepFailed, UsageError
from longshift.integrations.calls import (
    EFFECTS,
    Effect,
    LongshiftTool,
    Policy,
    beside,
    branch,
    call_tool,
    standing,
    step,
    turn_here,
    with_retry_after,
)
from longshift.model import Json
from longshift.steps import ONCE, Retry
from longshift.turn import Turn, emit

try:
    from pydantic_ai import AbstractToolset, RunContext, Tool, ToolsetTool, exceptions
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
    from pydantic_ai.exceptions import (
        ApprovalRequired,
        CallDeferred,
        ModelAPIError,
        ModelRetry,
        ToolFailed,
    )
    from pydantic_ai.messages import (
        ModelMessage,
        ModelMessagesTypeAdapter,
        ModelResponse,
        PartDeltaEvent,
        PartStartEvent,
        TextPart,
        TextPartDelta,
        ToolReturn,
        ToolReturnContent,
    )
    from pydantic_ai.models import (
        CompletedStreamedResponse,
        Model,
        ModelRequestContext,
        ModelRequestParameters,
    )
    from pydantic_ai.models.wrapper import WrapperModel
    from pydantic_ai.run import AgentRunResult
    from pydantic_ai.settings import ModelSettings
    from pydantic_ai.tools import AgentDepsT
    from pydantic_ai.toolsets import WrapperToolset
except ImportError as error:
    raise ImportError("pydantic-ai is missing, or too old: pip install 'longshift[pydantic-ai]'") from error

_VOLATILE = frozenset({"timestamp", "run_id", "conversation_id", "metadata", "tool_call_id", "workspace_ref"})
"""Parts of messages that differ from attempt to attempt, though the model sees the same."""
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
        effects: Mapping[str, Effect | None] | None = None,
        stream: bool = False,
    ) -> None:
        """
        Args:
            retry: of model requests. What the provider's ``Retry-After`` says is believed.
            timeout: of one try of a model request; default ``LONGSHIFT_STEP_TIMEOUT``.
            tool_retry: of tool calls that raise. A ``ModelRetry`` is an answer to the model, not a failure.
            effects: of tools, by name.
            stream: request the model's answers as streams and show their text to whoever follows the turn. Requests that
                the agent itself makes as streams are always shown.
        """
        super().__init__(name="agent")  # names of steps are made of the model's and the tools', not of the agent's
        self.policy = Policy(retry=retry, timeout=timeout, tool_retry=tool_retry, effects=effects)
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
        return None if turn_here() is None else _RecordedModel(model, self.policy, stream=self.stream)

    def get_wrapper_toolset(self, toolset: AbstractToolset[AgentDepsT]) -> AbstractToolset[AgentDepsT] | None:
        return _RecordedToolset(toolset, self)

    def effect(self, name: str, tool: ToolsetTool[AgentDepsT]) -> Effect | None:
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
        return cast(Effect | None, effect)

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


class ModelFailed(ModelAPIError, StepFailed):
    """A model request failed for good. Both: ``ModelFallback`` and its like take the next model, on every replay."""

    def __init__(self, failed: StepFailed, *, model_name: str) -> None:
        super().__init__(model_name, str(failed))
        self.step, self.error_type, self.error_message = failed.step, failed.error_type, failed.error_message


class _RecordedModel(WrapperModel):
    """Sends each request in a step."""

    def __init__(self, wrapped: Model, policy: Policy, *, stream: bool) -> None:
        super().__init__(wrapped)
        self._policy, self._stream = policy, stream

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        async def ask() -> ModelResponse:
            if self._stream:
                return await self._streamed(messages, model_settings, model_request_parameters, None)
            return await self.wrapped.request(messages, model_settings, model_request_parameters)

        return await self._recorded(ask, messages, model_settings, model_request_parameters)

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[CompletedStreamedResponse]:
        async def ask() -> ModelResponse:
            return await self._streamed(messages, model_settings, model_request_parameters, run_context)

        response = await self._recorded(ask, messages, model_settings, model_request_parameters)
        yield CompletedStreamedResponse(
            response, model_request_parameters=model_request_parameters, replay_events=True
        )

    async def compact_messages(
        self, request_context: ModelRequestContext, *, instructions: str | None = None
    ) -> ModelResponse:
        async def ask() -> ModelResponse:
            return await self.wrapped.compact_messages(request_context, instructions=instructions)

        return await self._recorded(ask, request_context.messages, instructions)

    async def _streamed(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None,
    ) -> ModelResponse:
        async with self.wrapped.request_stream(
            messages, model_settings, model_request_parameters, run_context
        ) as stream:
            async for event in stream:
                match event:
                    case PartStartEvent(part=TextPart(content=text)) | PartDeltaEvent(
                        delta=TextPartDelta(content_delta=text)
                    ) if text:
                        emit(text)
        return stream.get()

    async def _recorded(
        self, ask: Callable[[], Awaitable[ModelResponse]], messages: Sequence[ModelMessage], *more: Any
    ) -> ModelResponse:
        execution = turn_here()
        if execution is None:
            return await ask()
        ran = False

        async def send(*digested: Any) -> Json:
            nonlocal ran
            ran = True
            try:
                with durable_unit_scope():
                    response = await ask()
            except Exception as error:
                with_retry_after(error)
                raise
            return cast(Json, ModelMessagesTypeAdapter.dump_python([response], mode="json")[0])

        try:
            recorded = await step(
                execution,
                f"model:{self.wrapped.model_name}",
                send,
                _lasting(ModelMessagesTypeAdapter.dump_python(list(messages), mode="json")),
                _told(more),
                retry=self._policy.retry,
                timeout=self._policy.timeout,
            )
        except StepFailed as failed:
            kind = getattr(exceptions, failed.error_type, None)
            if isinstance(kind, type) and issubclass(kind, ModelAPIError):
                raise ModelFailed(failed, model_name=self.wrapped.model_name) from failed
            raise
        finally:
            record_durable_unit(executed=ran)
        return _response(recorded, self.wrapped.model_name)


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
            with branch(execution, name, ctx.tool_call_id):
                return await super().call_tool(name, tool_args, ctx, tool)
        ran = False

        async def invoke(arguments: Mapping[str, Any]) -> Json:
            nonlocal ran
            ran = True
            with self.capability.unit(ctx) as guarded:
                return await _outcome(self.wrapped.call_tool(name, tool_args, guarded, tool))

        try:
            recorded = await call_tool(
                execution, name, ctx.tool_call_id, invoke, tool_args, effect=effect, policy=self.capability.policy
            )
        finally:
            record_durable_unit(executed=ran)
        return _result(recorded)


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


def as_tool(tool: LongshiftTool) -> Tool[Any]:
    """A longshift tool for a pydantic-ai agent, with its own name, schema and effect.

    The call is recorded by the tool itself, under the model's id for the call; it needs no capability, but a turn.
    """

    async def call(ctx: RunContext[Any], **arguments: Any) -> Any:
        return await tool.call(arguments, id=ctx.tool_call_id)

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


def _lasting(value: Any) -> Any:
    """``value`` without what differs from attempt to attempt."""
    match value:
        case dict():
            return {key: _lasting(each) for key, each in value.items() if key not in _VOLATILE}
        case list():
            return [_lasting(each) for each in value]
        case _:
            return value


def _told(more: tuple[Any, ...]) -> Any:
    """What else the model is told: which tools it has, its settings."""
    return [
        {"tools": sorted(each.tool_defs), "output": each.output_mode} if isinstance(each, ModelRequestParameters) else each
        for each in more
    ]


def _response(recorded: Json, model: str) -> ModelResponse:
    try:
        [message] = ModelMessagesTypeAdapter.validate_python([recorded])
    except ValidationError as error:
        raise UsageError(
            f"the recorded response of model {model!r} cannot be read by this release of pydantic-ai: "
            f"{error.errors()[0]['msg']}. Let a worker with the release that wrote it finish the turn"
        ) from None
    assert isinstance(message, ModelResponse)
    return message


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


__all__ = ["LongshiftDurability", "ModelFailed", "as_tool", "keep_messages", "past_messages"]
