"""The model of a pydantic-ai agent inside a turn: each request is a step, recorded in pydantic-ai's own shapes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from pydantic import ValidationError
from pydantic_ai import RunContext, exceptions
from pydantic_ai.durable_exec import durable_unit_scope, record_durable_unit
from pydantic_ai.exceptions import ModelAPIError
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
)
from pydantic_ai.models import CompletedStreamedResponse, Model, ModelRequestContext, ModelRequestParameters
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.settings import ModelSettings

from longshift.errors import StepFailed, UsageError
from longshift.integrations.calls import Policy, step, turn_here, with_retry_after
from longshift.model import Json
from longshift.tracing import NOTHING, Attributes, names
from longshift.turn import emit

_VOLATILE = frozenset({"timestamp", "run_id", "conversation_id", "metadata", "tool_call_id", "workspace_ref"})
"""Parts of messages that differ from attempt to attempt, though the model sees the same."""


class ModelFailed(ModelAPIError, StepFailed):
    """A model request failed for good. Both: ``ModelFallback`` and its like take the next model, on every replay."""

    def __init__(self, failed: StepFailed, *, model_name: str) -> None:
        super().__init__(model_name, str(failed))
        self.step, self.error_type, self.error_message = failed.step, failed.error_type, failed.error_message


class RecordedModel(WrapperModel):
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

        said = _of_request(model_settings, stream=self._stream)
        return await self._recorded(ask, said, messages, model_settings, model_request_parameters)

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

        said = _of_request(model_settings, stream=True)
        response = await self._recorded(ask, said, messages, model_settings, model_request_parameters)
        yield CompletedStreamedResponse(response, model_request_parameters=model_request_parameters, replay_events=True)

    async def compact_messages(
        self, request_context: ModelRequestContext, *, instructions: str | None = None
    ) -> ModelResponse:
        async def ask() -> ModelResponse:
            return await self.wrapped.compact_messages(request_context, instructions=instructions)

        return await self._recorded(ask, NOTHING, request_context.messages, instructions)

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
                    case (
                        PartStartEvent(part=TextPart(content=text))
                        | PartDeltaEvent(delta=TextPartDelta(content_delta=text))
                    ) if text:
                        emit(text)
        return stream.get()

    async def _recorded(
        self,
        ask: Callable[[], Awaitable[ModelResponse]],
        said: Attributes,
        messages: Sequence[ModelMessage],
        *more: Any,
    ) -> ModelResponse:
        """``said``: what a span may say of the request."""
        execution = turn_here()
        if execution is None:
            return await ask()
        ran = False

        async def send(*digested: Any) -> Json:
            nonlocal ran
            ran = True
            name, provider = self.wrapped.model_name, self.wrapped.system
            try:
                with (
                    execution.port.observer.model(name, provider=provider, attributes=said) as span,
                    durable_unit_scope(),
                ):
                    response = await ask()
                    if span.is_recorded:
                        span.set(_of_response(response))
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
                asks_model=True,
            )
        except StepFailed as failed:
            kind = getattr(exceptions, failed.error_type, None)
            if isinstance(kind, type) and issubclass(kind, ModelAPIError):
                raise ModelFailed(failed, model_name=self.wrapped.model_name) from failed
            raise
        finally:
            record_durable_unit(executed=ran)
        return _response(recorded, self.wrapped.model_name)


def _of_request(settings: ModelSettings | None, *, stream: bool) -> Attributes:
    """What a span may say of a request: how it is made, never what it says."""
    given = settings or {}
    return {
        names.REQUEST_MAX_TOKENS: given.get("max_tokens"),
        names.REQUEST_TEMPERATURE: given.get("temperature"),
        names.REQUEST_TOP_P: given.get("top_p"),
        names.REQUEST_STREAM: stream or None,
    }


def _of_response(response: ModelResponse) -> Attributes:
    usage = response.usage
    return {
        names.RESPONSE_MODEL: response.model_name,
        names.RESPONSE_ID: response.provider_response_id,
        names.FINISH_REASONS: None if response.finish_reason is None else [response.finish_reason],
        names.INPUT_TOKENS: usage.input_tokens,
        names.OUTPUT_TOKENS: usage.output_tokens,
        names.CACHE_READ_TOKENS: usage.cache_read_tokens or None,
        names.CACHE_WRITE_TOKENS: usage.cache_write_tokens or None,
    }


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
        {"tools": sorted(each.tool_defs), "output": each.output_mode}
        if isinstance(each, ModelRequestParameters)
        else each
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
