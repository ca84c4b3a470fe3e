"""Model calls of agents of other frameworks: spans by the names of OpenTelemetry's GenAI conventions, and what they cost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from agents import Agent as SdkAgent
from agents import Model, ModelResponse, ModelSettings, RunConfig, Runner, Usage, function_tool
from agents.items import TResponseStreamEvent
from agents.testing import assistant_message, function_call
from openai.types.responses.response_usage import InputTokensDetails
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelMessage, TextPart, ToolCallPart
from pydantic_ai.messages import ModelResponse as Response
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RequestUsage

from longshift import Agent, Retry, Turn, agent
from longshift.integrations.openai_agents import durable
from longshift.integrations.pydantic_ai import LongshiftDurability
from longshift.testing import run
from longshift.tracing import traces_to
from tests.support.collector import Spans, spans_of

SECRET = "what-the-customer-said"


def traced(agent: Agent[str, Any]) -> Spans:
    """The worker dies after the first request to the model; no request is made twice."""
    exporter = InMemorySpanExporter()
    traces = traces_to(exporter)
    run(agent, SECRET, traces=traces, crash_after=2)
    traces.close()
    return spans_of(exporter.get_finished_spans())


def test_requests_of_pydantic_ai_are_spans_with_their_tokens() -> None:
    failures = [ModelHTTPError(503, "fake", SECRET)]
    answers = [Response([ToolCallPart("look", {"city": SECRET}, tool_call_id="call_7")]), Response([TextPart(SECRET)])]

    def answer(messages: list[ModelMessage], info: AgentInfo) -> Response:
        if failures:
            raise failures.pop()
        response = answers.pop(0)
        response.usage = RequestUsage(input_tokens=11, output_tokens=7, cache_read_tokens=5)
        response.finish_reason, response.provider_response_id = "stop", "resp_1"
        return response

    model = FunctionModel(answer, model_name="fake", settings={"temperature": 0.5, "max_tokens": 100})
    helper = PydanticAgent(
        model, instructions=SECRET, capabilities=[LongshiftDurability[None](retry=Retry(attempts=2))]
    )

    @helper.tool_plain
    async def look(city: str) -> str:
        return city

    @agent("help")
    async def help_with(turn: Turn, question: str) -> str:
        return (await helper.run(question)).output

    spans = traced(help_with)

    refused, first, second = spans.named("chat fake")
    assert (refused.failed, refused.attributes["error.type"]) == (True, "ModelHTTPError")
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "function",
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 100,
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": "resp_1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 5,
    }
    assert (first.attributes, second.attributes) == (expected, expected)
    assert [spans.below(step) for step in spans.named("step model:fake")] == [
        ["chat fake", "chat fake"],
        ["chat fake"],
    ]
    assert spans.one("execute_tool look").attributes["gen_ai.tool.call.id"] == "call_7"
    assert [span.name for span in spans.found if SECRET in span.told] == []


class Scripted(Model):
    """A model of the SDK that calls a tool first."""

    model = "fake"

    async def get_response(self, *args: Any, **options: Any) -> ModelResponse:
        asked = isinstance(options["input"], str) or len(options["input"]) == 1
        usage = Usage(
            requests=1,
            input_tokens=11,
            output_tokens=7,
            total_tokens=18,
            input_tokens_details=InputTokensDetails(cached_tokens=5, cache_write_tokens=0),
        )
        output = function_call("look", {"city": SECRET}, call_id="call_7") if asked else assistant_message(SECRET)
        return ModelResponse(output=[output], usage=usage, response_id="resp_1")

    def stream_response(self, *args: Any, **options: Any) -> AsyncIterator[TResponseStreamEvent]:
        raise NotImplementedError


def test_requests_of_the_openai_agents_sdk_are_spans_with_their_tokens() -> None:
    @function_tool
    async def look(city: str) -> str:
        return city

    settings = ModelSettings(temperature=0.5, max_tokens=100)
    helper = durable(
        SdkAgent(name="helper", instructions=SECRET, model=Scripted(), tools=[look], model_settings=settings)
    )

    @agent("help")
    async def help_with(turn: Turn, question: str) -> str:
        return str((await Runner.run(helper, question, run_config=RunConfig(tracing_disabled=True))).final_output)

    spans = traced(help_with)

    first, second = spans.named("chat fake")
    assert first.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 100,
        "gen_ai.response.id": "resp_1",
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 5,
    }
    assert second.attributes == first.attributes
    assert [spans.below(step) for step in spans.named("step model:fake")] == [["chat fake"], ["chat fake"]]
    assert spans.one("execute_tool look").attributes["gen_ai.tool.call.id"] == "call_7"
    assert [span.name for span in spans.found if SECRET in span.told] == []
