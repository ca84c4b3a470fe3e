"""The model of an OpenAI Agents SDK agent inside a turn: each request is a step, recorded in the SDK's own shapes."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

from agents import Model, ModelBehaviorError, ModelProvider, ModelResponse, ModelSettings, MultiProvider, Usage
from agents.items import TResponseOutputItem, TResponseStreamEvent
from agents.retry import ModelRetryAdvice, ModelRetryAdviceRequest
from agents.usage import deserialize_usage, serialize_usage
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseOutputItemDoneEvent,
    ResponseTextDeltaEvent,
    ResponseUsage,
)
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from longshift.integrations.calls import Policy, step, turn_here, with_retry_after
from longshift.model import Json
from longshift.replay import to_json
from longshift.tracing import NOTHING, Attributes, names
from longshift.turn import emit

_ARGUMENTS = inspect.signature(Model.get_response)
_ITEM: TypeAdapter[TResponseOutputItem] = TypeAdapter(TResponseOutputItem)


class RecordedModel(Model):
    """Sends each request in a step."""

    def __init__(
        self, model: Model | str | None, policy: Policy, *, stream: bool, provider: ModelProvider | None
    ) -> None:
        self._model, self._policy, self._stream, self._provider = model, policy, stream, provider

    @property
    def wrapped(self) -> Model:
        if isinstance(self._model, Model):
            return self._model
        if self._provider is None:
            self._provider = MultiProvider()  # not before it is needed: it may read the environment
        return self._provider.get_model(self._model)

    @property
    def name(self) -> str:
        if isinstance(self._model, Model):
            return str(getattr(self._model, "model", type(self._model).__name__))
        return self._model or "default"

    async def close(self) -> None:
        await self.wrapped.close()

    async def _cleanup_on_run_end(self, owner: object) -> None:
        await self.wrapped._cleanup_on_run_end(owner)  # noqa: SLF001 - models have it for wrappers, too

    def get_retry_advice(self, request: ModelRetryAdviceRequest) -> ModelRetryAdvice | None:
        return self.wrapped.get_retry_advice(request)

    async def get_response(self, *args: Any, **options: Any) -> ModelResponse:
        if turn_here() is None:
            return await self.wrapped.get_response(*args, **options)

        async def send() -> Json:
            if self._stream:
                return _write(_as_model_response(await _consumed(self.wrapped.stream_response(*args, **options))))
            return _write(await self.wrapped.get_response(*args, **options))

        return _read(await self._recorded(send, args, options))

    async def stream_response(self, *args: Any, **options: Any) -> AsyncIterator[TResponseStreamEvent]:
        if turn_here() is None:
            async for event in self.wrapped.stream_response(*args, **options):
                yield event
            return

        async def send() -> Json:
            return _write(_as_model_response(await _consumed(self.wrapped.stream_response(*args, **options))))

        response = _as_response(_read(await self._recorded(send, args, options)), model=self.name)
        for index, item in enumerate(response.output):
            yield ResponseOutputItemDoneEvent(
                type="response.output_item.done", item=item, output_index=index, sequence_number=index
            )
        number = len(response.output)
        yield ResponseCompletedEvent(type="response.completed", response=response, sequence_number=number)

    async def _recorded(self, send: Callable[[], Awaitable[Json]], args: Any, options: Any) -> Json:
        execution = turn_here()
        assert execution is not None

        given = _ARGUMENTS.bind(self, *args, **options).arguments

        async def sent(told: Json) -> Json:
            observer, said = execution.port.observer, _of_request(given.get("model_settings"))
            try:
                with observer.model(self.name, provider=_provider(self.wrapped), attributes=said) as span:
                    answer = await send()
                    if span.is_recorded:
                        span.set(_of_response(answer))
                    return answer
            except Exception as error:
                with_retry_after(error)
                raise

        return await step(
            execution,
            f"model:{self.name}",
            sent,
            _told(given),
            retry=self._policy.retry,
            timeout=self._policy.timeout,
            asks_model=True,
        )


def _provider(model: Model) -> str | None:
    """OpenAI, if it is the SDK's own client; what other models of the SDK talk to, they do not say."""
    return "openai" if type(model).__module__.startswith("agents.models.openai") else None


def _of_request(settings: ModelSettings | None) -> Attributes:
    """What a span may say of a request: how it is made, never what it says."""
    if settings is None:
        return NOTHING
    return {
        names.REQUEST_MAX_TOKENS: settings.max_tokens,
        names.REQUEST_TEMPERATURE: settings.temperature,
        names.REQUEST_TOP_P: settings.top_p,
    }


def _of_response(written: Json) -> Attributes:
    usage = _read(written).usage
    return {
        names.RESPONSE_ID: written["response_id"],
        names.INPUT_TOKENS: usage.input_tokens,
        names.OUTPUT_TOKENS: usage.output_tokens,
        names.CACHE_READ_TOKENS: usage.input_tokens_details.cached_tokens or None,
    }


def _told(arguments: Mapping[str, Any]) -> Json:
    """What the model is told, by which a request is recognised on a replay."""
    told = {name: arguments.get(name) for name in ("system_instructions", "input", "previous_response_id")}
    told |= {name: arguments.get(name) for name in ("conversation_id", "prompt")}
    told["tools"] = [tool.name for tool in arguments.get("tools", ())]
    told["handoffs"] = [handoff.tool_name for handoff in arguments.get("handoffs", ())]
    return to_json(told)


async def _consumed(stream: AsyncIterator[TResponseStreamEvent]) -> Response:
    """The response at the end of a stream; its text is shown while it comes.

    Raises:
        ModelBehaviorError: the stream ended without one.
    """
    items: list[Any] = []
    ending = "its end"
    async for event in stream:
        match event:
            case ResponseTextDeltaEvent():
                emit(event.delta)
            case ResponseOutputItemDoneEvent():
                items.append(event.item)
            case ResponseCompletedEvent():
                if not event.response.output:  # some providers have their items in the events before only
                    event.response.output = items
                return event.response
            case _ if event.type in ("response.failed", "response.incomplete", "error"):
                ending = repr(event.type)
    raise ModelBehaviorError(f"the stream of the model's answer came to {ending} without a response")


def _as_model_response(response: Response) -> ModelResponse:
    usage = Usage()
    if response.usage is not None:
        usage = Usage(
            requests=1,
            input_tokens=response.usage.input_tokens,
            input_tokens_details=response.usage.input_tokens_details,
            output_tokens=response.usage.output_tokens,
            output_tokens_details=response.usage.output_tokens_details,
            total_tokens=response.usage.total_tokens,
        )
    return ModelResponse(output=response.output, usage=usage, response_id=response.id)


def _as_response(response: ModelResponse, *, model: str) -> Response:
    usage = response.usage
    return Response(
        id=response.response_id or "recorded",
        created_at=0,
        model=model,
        object="response",
        output=response.output,
        parallel_tool_calls=True,
        tool_choice="auto",
        tools=[],
        usage=ResponseUsage(
            input_tokens=usage.input_tokens,
            input_tokens_details=usage.input_tokens_details,
            output_tokens=usage.output_tokens,
            output_tokens_details=usage.output_tokens_details,
            total_tokens=usage.total_tokens,
        ),
    )


def _write(response: ModelResponse) -> Json:
    return {
        # what a provider did not say is not said when the item is sent back to it
        "output": [
            item.model_dump(mode="json", exclude_unset=True, warnings=False) if isinstance(item, BaseModel) else item
            for item in cast(list[Any], response.output)
        ],
        "usage": to_jsonable_python(serialize_usage(response.usage)),
        "response_id": response.response_id,
        "request_id": response.request_id,
    }


def _read(recorded: Json) -> ModelResponse:
    said = cast(dict[str, Any], recorded)
    return ModelResponse(
        output=[_item(item) for item in said["output"]],
        usage=deserialize_usage(said.get("usage") or {}),
        response_id=said.get("response_id"),
        request_id=said.get("request_id"),
    )


def _item(recorded: Json) -> TResponseOutputItem:
    try:
        return _ITEM.validate_python(recorded)
    except ValidationError:  # of a kind that this release does not know, or no longer
        return cast(TResponseOutputItem, recorded)
