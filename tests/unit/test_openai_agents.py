"""OpenAI Agents SDK agents inside a turn: what was recorded is not asked for again, wherever the worker dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from agents import Agent as SdkAgent
from agents import (
    GuardrailFunctionOutput,
    InputGuardrail,
    LocalShellTool,
    Model,
    ModelProvider,
    ModelResponse,
    RunConfig,
    RunContextWrapper,
    Runner,
    Usage,
    function_tool,
    handoff,
)
from agents.items import TResponseStreamEvent
from agents.testing import ScriptedModel, assistant_message, function_call
from pydantic import BaseModel

from longshift import Agent, Retry, ToolCall, Turn, UsageError, agent, step, tool
from longshift.events import Event, Kind
from longshift.integrations.openai_agents import TurnSession, as_tool, current_call, durable
from longshift.testing import Effects, Result, Scenario, named_crash_points, run, torture

QUIET = RunConfig(tracing_disabled=True)


class Weather(BaseModel):
    city: str
    degrees: int


class Provider(Model):
    """A model that answers by how often it has answered before in the conversation, and counts how often it is asked."""

    def __init__(self, name: str, *answers: Sequence[Any] | Exception) -> None:
        self.model, self.asked = name, 0
        self._answers = answers

    async def get_response(self, *args: Any, **options: Any) -> ModelResponse:
        self.asked += 1
        answer = self._answer(options["input"])
        if isinstance(answer, Exception):
            raise answer
        usage = Usage(requests=1, input_tokens=2, output_tokens=3, total_tokens=5)
        return ModelResponse(output=list(answer), usage=usage, response_id=None)

    def _answer(self, said: Any) -> Sequence[Any] | Exception:
        """By the rounds of calls that are behind it."""
        types = [] if isinstance(said, str) else [item.get("type") for item in said]
        rounds: int = sum(here == "function_call_output" != before for before, here in pairwise(types))
        return self._answers[min(rounds, len(self._answers) - 1)]

    async def stream_response(self, *args: Any, **options: Any) -> AsyncIterator[TResponseStreamEvent]:
        self.asked += 1
        answer = self._answer(options["input"] if "input" in options else args[1])
        assert not isinstance(answer, Exception)
        async for event in ScriptedModel([list(answer)]).stream_response(*args, **options):
            yield event


def call(name: str, call_id: str, **arguments: object) -> Any:
    return function_call(name, arguments, call_id=call_id)


def says(text: str) -> list[Any]:
    return [assistant_message(text)]


def in_turn(helper: SdkAgent[Any]) -> Agent[str, str]:
    @agent("help")
    async def help_with(turn: Turn, question: str) -> str:
        return str((await Runner.run(helper, question, run_config=QUIET)).final_output)

    return help_with


def keys(result: Result[Any]) -> list[str]:
    return [event.key for event in result.events if event.key is not None]


def test_each_request_and_each_tool_call_is_a_step_named_after_what_it_is() -> None:
    @function_tool
    async def look(city: str) -> str:
        return city

    @function_tool
    def write(text: str) -> None:
        pass

    model = Provider("fake", [call("look", "c1", city="Oslo"), call("write", "c2", text="x")], says("done"))
    result = run(in_turn(durable(SdkAgent(name="helper", model=model, tools=[look, write]))), "?")
    assert result.output == "done"
    assert sorted(keys(result)) == ["@c1/look#0", "@c2/write#0", "model:fake#0", "model:fake#1"]


class World:
    """Two tools side by side, then a handoff to an agent whose answer has a structure."""

    def __init__(self) -> None:
        self.effects = Effects()
        self.triage = Provider(
            "triage",
            [call("slow", "c1", city="Oslo"), call("fast", "c2", city="Rome")],
            [call("transfer_to_forecaster", "c3")],
        )
        self.forecaster = Provider("forecaster", says('{"city": "Oslo", "degrees": 3}'))
        self.agent = self._agent()

    @property
    def asked(self) -> int:
        return self.triage.asked + self.forecaster.asked

    def _agent(self) -> Agent[str, Weather]:
        @function_tool
        async def slow(city: str) -> Weather:
            await asyncio.sleep(0)
            self.effects.add("slow", key=current_call().key)
            return Weather(city=city, degrees=3)

        @function_tool
        def fast(city: str) -> str:
            self.effects.add("fast", key=current_call().key)
            return city

        async def harmless(context: RunContextWrapper[Any], agent: Any, said: Any) -> GuardrailFunctionOutput:
            return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

        forecaster = SdkAgent(name="forecaster", model=self.forecaster, output_type=Weather)
        helper = durable(
            SdkAgent(
                name="triage",
                model=self.triage,
                tools=[slow, fast],
                handoffs=[forecaster],
                input_guardrails=[InputGuardrail(guardrail_function=harmless)],
            )
        )

        @agent("weather")
        async def weather(turn: Turn, question: str) -> Weather:
            result = await Runner.run(helper, question, run_config=QUIET)
            assert result.context_wrapper.usage.total_tokens == 15  # also where nothing was asked again
            return result.final_output_as(Weather)

        return weather


@pytest.mark.parametrize("point", named_crash_points(World().agent, "?"))
def test_a_crash_repeats_no_recorded_request_and_no_recorded_call(point: str) -> None:
    world = World()
    result = run(world.agent, "?", crash_at=point)
    assert result.output == Weather(city="Oslo", degrees=3)
    lost = point.startswith("before step.completed")  # that step ran, and is not recorded
    assert world.asked == 3 + (lost and "model" in point)
    assert world.effects.counts == {"slow": 1, "fast": 1}
    assert result.unused == ()
    assert not any(event.kind == Kind.TURN_DIVERGED for event in result.events)


def test_torture_finds_nothing() -> None:
    def scenario() -> Scenario:
        world = World()
        return Scenario(world.agent, "?", effects=world.effects)

    assert torture(scenario).violations == []


def test_outside_a_turn_the_agent_is_what_it_was() -> None:
    @function_tool
    def look() -> str:
        return "here"

    model = Provider("fake", [call("look", "c1")], says("done"))
    helper = durable(SdkAgent(name="helper", model=model, tools=[look]))
    assert asyncio.run(Runner.run(helper, "?", run_config=QUIET)).final_output == "done"
    assert model.asked == 2
    assert callable(look.__wrapped__)


def test_inside_a_step_the_agent_is_part_of_the_step() -> None:
    helper = durable(SdkAgent(name="helper", model=Provider("fake", says("done"))))

    @step
    async def ask() -> str:
        return str((await Runner.run(helper, "?", run_config=QUIET)).final_output)

    @agent("outer")
    async def outer(turn: Turn, question: str) -> str:
        return await ask()

    assert keys(run(outer, "?")) == ["ask#0"]


def test_making_an_agent_durable_again_changes_nothing_and_its_clones_are_durable() -> None:
    @function_tool
    def look() -> str:
        return "here"

    model = Provider("fake", [call("look", "c1")], says("done"))
    helper = durable(durable(SdkAgent(name="helper", model=model, tools=[look])))
    clone = durable(helper.clone(name="clone"))
    assert keys(run(in_turn(clone), "?")) == ["model:fake#0", "@c1/look#0", "model:fake#1"]


def test_a_model_that_is_given_to_the_agent_later_is_recorded_too() -> None:
    helper = durable(SdkAgent(name="helper", model="gpt-x"))
    helper.model = Provider("fake", says("done"))
    assert keys(run(in_turn(helper), "?")) == ["model:fake#0"]


def test_a_model_given_by_name_comes_from_the_provider() -> None:
    class Given(ModelProvider):
        def get_model(self, model_name: str | None) -> Model:
            assert model_name == "gpt-x"
            return Provider("gpt-x", says("done"))

    helper = durable(SdkAgent(name="helper", model="gpt-x"), model_provider=Given())
    assert keys(run(in_turn(helper), "?")) == ["model:gpt-x#0"]


def test_a_model_that_replaces_the_recorded_one_is_refused_before_any_effect() -> None:
    called: list[int] = []

    @function_tool(failure_error_function=None)
    def look() -> None:
        called.append(1)

    helper = durable(SdkAgent(name="helper", model=Provider("fake"), tools=[look]))
    other = RunConfig(tracing_disabled=True, model=Provider("other", [call("look", "c1")], says("done")))

    @agent("replaced")
    async def replaced(turn: Turn, question: str) -> str:
        return str((await Runner.run(helper, question, run_config=other)).final_output)

    result = run(replaced, "?")
    assert result.error is not None
    assert "RunConfig(model=...) replaces the agent's model" in str(result.error["message"])
    assert called == []


def test_a_request_that_fails_is_tried_again_and_then_fails_the_turn() -> None:
    model = Provider("fake", OSError("busy"))
    helper = durable(SdkAgent(name="helper", model=model), retry=Retry(attempts=3, first=timedelta(milliseconds=1)))
    result = run(in_turn(helper), "?")
    assert model.asked == 3
    assert result.error is not None
    assert (result.error["code"], result.error["step"], result.error["type"]) == (
        "step_failed",
        "model:fake",
        "OSError",
    )


def test_a_tool_that_fails_is_recorded_as_what_the_model_was_told() -> None:
    tries: list[int] = []

    @function_tool
    def broken() -> str:
        tries.append(1)
        raise OSError("no disk")

    model = Provider("fake", [call("broken", "c1")], says("done"))
    result = run(
        in_turn(durable(SdkAgent(name="h", model=model, tools=[broken]))), "?", crash_at="before turn.succeeded"
    )
    assert (result.output, len(tries)) == ("done", 1)
    [recorded] = [event.payload["result"] for event in result.events if event.key == "@c1/broken#0"]
    assert "An error occurred while running the tool" in str(recorded)


def test_a_plain_tool_may_use_the_turn_and_wait_without_a_worker() -> None:
    sent: list[str] = []

    @step
    async def send(what: str) -> str:
        sent.append(what)
        return what

    @function_tool
    async def later(context: RunContextWrapper[Turn], what: str) -> str:
        await context.context.sleep(timedelta(days=1 if what == "b" else 2))
        return await send(what)

    model = Provider("fake", [call("later", "c1", what="a"), call("later", "c2", what="b")], says("done"))
    helper = durable(SdkAgent[Turn](name="helper", model=model, tools=[later]), effects={"later": None})

    @agent("patient")
    async def patient(turn: Turn, question: str) -> str:
        return str((await Runner.run(helper, question, context=turn, run_config=QUIET)).final_output)

    result = run(patient, "?")
    assert (result.output, sent, model.asked) == ("done", ["b", "a"], 2)
    assert result.attempts == 3  # it left its worker for each of the two days
    assert "@c1/send#0" in keys(result)


def test_an_agent_that_is_a_tool_records_its_own_requests() -> None:
    inner_model = Provider("inner", says("inner"))
    inner = SdkAgent(name="inner", model=inner_model)
    model = Provider("outer", [call("delegate", "c1", input="go")], says("outer"))
    delegate = inner.as_tool("delegate", "Delegates.", run_config=QUIET)
    helper = durable(SdkAgent(name="outer", model=model, tools=[delegate]))
    result = run(in_turn(helper), "?", crash_at="after step.completed @c1/model:inner")
    assert (result.output, inner_model.asked, model.asked) == ("outer", 1, 2)


def test_agents_behind_handoff_objects_are_durable_even_in_a_circle() -> None:
    second_model = Provider("second", says("nobody"), [call("transfer_to_first", "c2")])
    second = SdkAgent(name="second", model=second_model)
    first_model = Provider("first", [call("transfer_to_second", "c1")], says("nobody"), says("back"))
    first = durable(SdkAgent(name="first", model=first_model, handoffs=[handoff(second)]))
    second.handoffs.append(first)
    result = run(in_turn(first), "?", crash_at="before turn.succeeded")
    assert result.output == "back"
    assert keys(result) == ["model:first#0", "model:second#0", "model:first#1"]
    assert (first_model.asked, second_model.asked) == (2, 1)


def test_guardrails_that_ask_agents_of_their_own_find_their_records() -> None:
    judge_model, model = Provider("fake", says("fine")), Provider("fake", says("done"))
    judge = durable(SdkAgent(name="judge", instructions="Judge.", model=judge_model))

    async def guard(context: RunContextWrapper[Any], agent: Any, said: Any) -> GuardrailFunctionOutput:
        verdict = await Runner.run(judge, said, run_config=QUIET)
        return GuardrailFunctionOutput(output_info=verdict.final_output, tripwire_triggered=False)

    helper = durable(SdkAgent(name="helper", model=model, input_guardrails=[InputGuardrail(guardrail_function=guard)]))
    result = run(in_turn(helper), "?", crash_at="before turn.succeeded")
    assert (result.output, judge_model.asked, model.asked) == ("done", 1, 1)
    assert not any(event.kind == Kind.TURN_DIVERGED for event in result.events)


def test_streamed_text_is_shown_while_it_comes_and_recorded_whole() -> None:
    @function_tool
    def look() -> str:
        return "here"

    model = Provider("fake", [call("look", "c1")], says("done"))
    helper = durable(SdkAgent(name="helper", model=model, tools=[look]))
    events: list[str] = []

    @agent("streamer")
    async def streamer(turn: Turn, question: str) -> str:
        result = Runner.run_streamed(helper, question, run_config=QUIET)
        events[:] = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
        return str(result.final_output)

    result = run(streamer, "?", crash_at="before turn.succeeded")
    assert (result.output, model.asked) == ("done", 2)
    assert [(delta.text, delta.step) for delta in result.deltas] == [("done", "model:fake")]
    assert events == ["tool_called", "tool_output", "message_output_created"]


def test_durable_can_ask_for_streams_by_itself() -> None:
    helper = durable(SdkAgent(name="helper", model=Provider("fake", says("done"))), stream=True)
    result = run(in_turn(helper), "?")
    assert result.output == "done"
    assert [delta.text for delta in result.deltas] == ["done"]


def test_a_conversation_goes_on_in_the_next_turn_of_the_session() -> None:
    seen: list[int] = []

    class Listening(Provider):
        async def get_response(self, *args: Any, **options: Any) -> ModelResponse:
            seen.append(len(options["input"]))
            return await super().get_response(*args, **options)

    helper = durable(SdkAgent(name="helper", model=Listening("fake", says("yes"))))

    @agent("chat")
    async def chat(turn: Turn, question: str) -> str:
        session = TurnSession(turn)
        result = await Runner.run(helper, question, session=session, run_config=QUIET)
        return str(result.final_output)

    log: list[Event] = []
    for question in ("one", "two", "three"):
        assert run(chat, question, log=log, crash_at="before turn.succeeded").output == "yes"
    assert seen == [1, 3, 5]


def test_items_can_be_taken_back_from_a_session() -> None:
    @agent("taker")
    async def taker(turn: Turn, question: str) -> list[Any]:
        session = TurnSession(turn)
        await session.add_items([{"role": "user", "content": str(n)} for n in range(3)])
        taken = await session.pop_item()
        left = await session.get_items(limit=1)
        await session.clear_session()
        return [taken, left, await session.get_items(), await session.pop_item()]

    taken, left, nothing, none = run(taker, "?", crash_after=3).output
    assert (taken["content"], left[0]["content"], nothing, none) == ("2", "1", [], None)


def test_a_response_recorded_by_another_release_can_be_read() -> None:
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "vanished": 1}
    text = {"type": "output_text", "text": "old", "annotations": []}
    old = {"output": [{**message, "content": [text]}, {"type": "hologram"}], "gone": 1}
    helper = durable(SdkAgent(name="helper", model=Provider("fake", says("new"))))
    assert run(in_turn(helper), "?", fake={"model:fake": {**old, "output": old["output"][:1]}}).output == "old"  # type: ignore[index]


def test_a_tool_that_the_sdk_runs_in_a_way_of_its_own_is_refused() -> None:
    shell = LocalShellTool(executor=lambda request: "")
    with pytest.raises(UsageError, match=r"'local_shell' \(LocalShellTool\) cannot be recorded"):
        durable(SdkAgent(name="helper", tools=[shell]))
    durable(SdkAgent(name="helper", tools=[shell]), effects={"local_shell": None})


def test_tools_that_come_later_are_recorded_too() -> None:
    called: list[int] = []

    @function_tool
    def late() -> None:
        called.append(1)

    helper = durable(SdkAgent(name="helper", model=Provider("fake", [call("late", "c1")], says("done"))))
    helper.tools.append(late)
    assert run(in_turn(helper), "?", crash_at="before turn.succeeded").output == "done"
    assert len(called) == 1


def test_a_longshift_tool_keeps_its_own_effect_and_key() -> None:
    counted: list[int] = []

    @tool(effect="irreversible")
    async def count(call: ToolCall, n: int) -> str:
        """Counts."""
        counted.append(n)
        return f"counted {n}"

    made = as_tool(count)
    assert (made.name, made.description) == ("count", "Counts.")
    asks = [[call_with("c1", n="x")], [call_with("c2", n=3)], [call_with("c3", n=3)]]
    model = Provider("fake", *asks, says("done"))
    helper = durable(SdkAgent(name="helper", model=model, tools=[made]))
    outputs: list[object] = []

    @agent("counter")
    async def counter(turn: Turn, question: str) -> str:
        result = await Runner.run(helper, question, run_config=QUIET)
        outputs[:] = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
        return str(result.final_output)

    result = run(counter, "?", crash_at="before step.completed @c2/count")
    assert (result.output, counted) == ("done", [3])
    assert "arguments do not fit tool 'count'" in str(outputs[0])
    assert outputs[1] == "counted 3"
    assert "not repeated" in str(outputs[2])


def call_with(call_id: str, **arguments: object) -> Any:
    return call("count", call_id, **arguments)


def test_an_irreversible_tool_has_to_be_one_of_longshift() -> None:
    with pytest.raises(UsageError, match=r"tool 'pay' cannot be irreversible.* Make it a longshift @tool"):
        durable(SdkAgent(name="helper"), effects={"pay": "irreversible"})
