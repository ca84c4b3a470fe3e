"""pydantic-ai agents inside a turn: what was recorded is not asked for again, wherever the worker dies."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai import DeferredToolRequests, DeferredToolResults, FunctionToolset, ModelRetry, RunContext
from pydantic_ai.capabilities import ModelFallback
from pydantic_ai.exceptions import ApprovalRequired, ModelHTTPError
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelResponse,
    RetryPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturn,
    ToolReturnPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from pydantic_ai.models.test import TestModel

from longshift import Agent, Retry, StepFailed, Tool, ToolCall, Turn, UsageError, agent, emit, step, tool
from longshift.events import Event, Kind
from longshift.integrations.pydantic_ai import LongshiftDurability, as_tool, current_call, keep_messages, past_messages
from longshift.testing import Effects, Result, Scenario, named_crash_points, run, torture

Plan = Callable[[list[ModelMessage]], ModelResponse]


class Weather(BaseModel):
    city: str
    degrees: int


class Provider:
    """A model that says what it is told to, and counts how often it is asked."""

    def __init__(self, *answers: ModelResponse | Exception) -> None:
        self.asked = 0
        self._answers = answers

    def answer(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        self.asked += 1
        answer = self._answers[min(sum(each.kind == "response" for each in messages), len(self._answers) - 1)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def model(self) -> FunctionModel:
        return FunctionModel(self.answer, model_name="fake")


def calls(*parts: tuple[str, dict[str, object]]) -> ModelResponse:
    return ModelResponse([ToolCallPart(name, args, tool_call_id=f"call_{i}") for i, (name, args) in enumerate(parts)])


def says(text: str) -> ModelResponse:
    return ModelResponse([TextPart(text)])


def in_turn(helper: PydanticAgent[None, str]) -> Agent[str, str]:
    @agent("help")
    async def help_with(turn: Turn, question: str) -> str:
        return (await helper.run(question)).output

    return help_with


def keys(result: Result[str]) -> list[str | None]:
    return [event.key for event in result.events if event.key is not None]


def test_each_request_and_each_tool_call_is_a_step_named_after_what_it_is() -> None:
    provider = Provider(calls(("look", {"city": "Oslo"}), ("write", {"text": "x"})), says("done"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability()])

    @helper.tool_plain
    async def look(city: str) -> str:
        return city

    @helper.tool_plain
    def write(text: str) -> None:
        pass

    result = run(in_turn(helper), "?")
    assert result.output == "done"
    assert sorted(filter(None, keys(result))) == ["@call_0/look#0", "@call_1/write#0", "model:fake#0", "model:fake#1"]


class World:
    """A question that takes two tools side by side, and an answer with a structure."""

    def __init__(self) -> None:
        self.effects = Effects()
        self.provider = Provider(
            calls(("slow", {"city": "Oslo"}), ("fast", {"city": "Rome"})),
            calls(("final_result", {"city": "Oslo", "degrees": 3})),
        )
        self.agent = self._agent()

    def _agent(self) -> Agent[str, Weather]:
        helper = PydanticAgent(self.provider.model, output_type=Weather, capabilities=[LongshiftDurability[None]()])

        @helper.tool_plain
        async def slow(city: str) -> Weather:
            await asyncio.sleep(0)
            self.effects.add("slow", key=current_call().key)
            return Weather(city=city, degrees=3)

        @helper.tool_plain
        def fast(city: str) -> ToolReturn:
            self.effects.add("fast", key=current_call().key)
            return ToolReturn(return_value=city, content=[BinaryContent(b"\xff\x00", media_type="image/png")])

        @agent("weather")
        async def weather(turn: Turn, question: str) -> Weather:
            return (await helper.run(question)).output

        return weather


@pytest.mark.parametrize("point", named_crash_points(World().agent, "?"))
def test_a_crash_repeats_no_recorded_request_and_no_recorded_call(point: str) -> None:
    world = World()
    result = run(world.agent, "?", crash_at=point)
    assert result.output == Weather(city="Oslo", degrees=3)
    lost = point.startswith("before step.completed")  # that step ran, and is not recorded
    assert result.calls["model:fake"] == world.provider.asked == 2 + (lost and "model" in point)
    assert world.effects.counts == {"slow": 1, "fast": 1}
    assert result.unused == ()
    assert not any(event.kind == Kind.TURN_DIVERGED for event in result.events)


def test_torture_finds_nothing() -> None:
    def scenario() -> Scenario:
        world = World()
        return Scenario(world.agent, "?", effects=world.effects)

    assert torture(scenario).violations == []


def test_outside_a_turn_the_agent_is_what_it_was() -> None:
    provider = Provider(calls(("look", {})), says("done"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability()])

    @helper.tool_plain
    def look() -> str:
        return "here"

    assert asyncio.run(helper.run("?")).output == "done"
    assert provider.asked == 2


def test_inside_a_step_the_agent_is_part_of_the_step() -> None:
    helper = PydanticAgent(TestModel(custom_output_text="done"), capabilities=[LongshiftDurability()])

    @step
    async def ask() -> str:
        return (await helper.run("?")).output

    @agent("outer")
    async def outer(turn: Turn, question: str) -> str:
        return await ask()

    assert keys(run(outer, "?")) == ["ask#0"]


def test_a_model_given_to_one_run_is_recorded_as_well() -> None:
    helper = PydanticAgent(capabilities=[LongshiftDurability()])

    @agent("any")
    async def any_model(turn: Turn, question: str) -> str:
        with helper.override(model=TestModel(custom_output_text="overridden")):
            first = (await helper.run(question)).output
        return first + (await helper.run(question, model=Provider(says("given")).model)).output

    result = run(any_model, "?", crash_after=3)
    assert result.output == "overriddengiven"
    assert result.calls == Counter({"model:test": 1, "model:fake": 1})


def test_a_request_that_fails_is_tried_again_and_then_fails_the_turn() -> None:
    provider = Provider(ModelHTTPError(503, "fake", body="busy"))
    durability = LongshiftDurability[None](retry=Retry(attempts=3, first=timedelta(milliseconds=1)))
    result = run(in_turn(PydanticAgent(provider.model, capabilities=[durability])), "?")
    assert provider.asked == 3
    assert result.error is not None
    assert (result.error["code"], result.error["step"], result.error["type"]) == (
        "step_failed",
        "model:fake",
        "ModelHTTPError",
    )


def test_the_next_model_is_asked_when_one_has_failed_for_good_and_so_on_a_replay() -> None:
    broken, good = Provider(ModelHTTPError(500, "fake")), Provider(says("from the second"))
    second = FunctionModel(good.answer, model_name="second")
    helper = PydanticAgent(broken.model, capabilities=[ModelFallback(second), LongshiftDurability()])
    result = run(in_turn(helper), "?", crash_at="before turn.succeeded")
    assert result.output == "from the second"
    assert (broken.asked, good.asked) == (1, 1)


def test_a_tool_that_asks_the_model_to_try_again_is_recorded_as_having_answered() -> None:
    provider = Provider(calls(("pick", {"n": 1})), calls(("pick", {"n": 2})), says("done"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability()])
    picked: list[int] = []

    @helper.tool_plain
    def pick(n: int) -> int:
        picked.append(n)
        if n == 1:
            raise ModelRetry("take another")
        return n

    assert run(in_turn(helper), "?", crash_at="before turn.succeeded").output == "done"
    assert picked == [1, 2]


def test_a_tool_that_raises_is_tried_again_as_configured() -> None:
    provider = Provider(calls(("flaky", {})), says("done"))
    durability = LongshiftDurability[None](tool_retry=Retry(attempts=2, first=timedelta(milliseconds=1)))
    helper = PydanticAgent(provider.model, capabilities=[durability])
    tries: list[int] = []

    @helper.tool_plain
    def flaky() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not now")
        return "ok"

    assert run(in_turn(helper), "?").output == "done"
    assert len(tries) == 2


def test_a_plain_tool_may_use_the_turn_and_wait_without_a_worker() -> None:
    provider = Provider(calls(("later", {"what": "a"}), ("later", {"what": "b"})), says("done"))
    helper = PydanticAgent(provider.model, deps_type=Turn, capabilities=[LongshiftDurability(effects={"later": None})])
    sent: list[str] = []

    @step
    async def send(what: str) -> str:
        sent.append(what)
        return what

    @helper.tool
    async def later(ctx: RunContext[Turn], what: str) -> str:
        await ctx.deps.sleep(timedelta(days=1 if what == "b" else 2))
        return await send(what)

    @agent("patient")
    async def patient(turn: Turn, question: str) -> str:
        begun = turn.now()
        output = (await helper.run(question, deps=turn)).output
        assert turn.now() - begun >= timedelta(days=2)
        return output

    result = run(patient, "?")
    assert (result.output, sent, provider.asked) == ("done", ["b", "a"], 2)
    assert result.attempts == 3  # it left its worker for each of the two days
    assert "@call_0/send#0" in keys(result)


def test_functions_that_make_the_output_are_code_of_the_branch_that_called_the_agent() -> None:
    stored: list[str] = []

    @step
    async def store(text: str) -> str:
        stored.append(text)
        return text

    async def publish(ctx: RunContext[Turn], text: str) -> str:
        await ctx.deps.sleep(timedelta(days=1))
        both = await ctx.deps.gather(store(text), store(f"{text} {ctx.deps.random.randint(0, 10**9)}"))
        return both[1]

    provider = Provider(calls(("final_result", {"text": "news"})))
    durability = LongshiftDurability[Turn]()
    helper = PydanticAgent(provider.model, deps_type=Turn, output_type=publish, capabilities=[durability])

    @agent("publisher")
    async def publisher(turn: Turn, question: str) -> list[str]:
        return [(await helper.run(question, deps=turn)).output for _ in range(2)]

    result = run(publisher, "?")
    assert result.output[0] != result.output[1]  # the second run goes on where the numbers of the first ended
    assert (len(stored), provider.asked, result.attempts) == (4, 2, 3)
    steps = [event.key for event in result.events if event.kind == Kind.STEP_COMPLETED]
    assert steps[1:3] == ["0.0/store#0", "0.1/store#0"]
    assert steps[4:] == ["1.0/store#0", "1.1/store#0"]


def test_an_agent_within_a_plain_tool_is_durable_too() -> None:
    inner_provider = Provider(says("inner"))
    inner = PydanticAgent(inner_provider.model, capabilities=[LongshiftDurability[None]()])
    provider = Provider(calls(("delegate", {})), says("outer"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability[None]()])

    @helper.tool(metadata={"longshift": False})
    async def delegate(ctx: RunContext[None]) -> str:
        return (await inner.run("go", usage=ctx.usage)).output

    result = run(in_turn(helper), "?", crash_at="after step.completed @call_0/model:fake")
    assert (result.output, inner_provider.asked, provider.asked) == ("outer", 1, 2)


def test_tools_of_any_toolset_are_recorded_even_one_given_to_the_run() -> None:
    provider = Provider(calls(("late", {})), says("done"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability[None]()])
    toolset: FunctionToolset[None] = FunctionToolset()
    called: list[int] = []

    @toolset.tool_plain
    def late() -> None:
        called.append(1)

    @agent("runtime")
    async def runtime(turn: Turn, question: str) -> str:
        return (await helper.run(question, toolsets=[toolset])).output

    assert run(runtime, "?", crash_at="before turn.succeeded").output == "done"
    assert len(called) == 1


def test_streamed_text_is_shown_while_it_comes_and_recorded_whole() -> None:
    asked: list[int] = []

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
        asked.append(1)
        if len(messages) == 1:
            yield {0: DeltaToolCall(name="look", json_args="{}", tool_call_id="c")}
        else:
            yield "one "
            yield "two"

    helper = PydanticAgent(FunctionModel(stream_function=stream, model_name="s"), capabilities=[LongshiftDurability()])

    @helper.tool_plain
    def look() -> str:
        emit("looking")
        return "x"

    @agent("streamer")
    async def streamer(turn: Turn, question: str) -> str:
        async with helper.run_stream(question) as streamed:
            return "".join([text async for text in streamed.stream_text(delta=True, debounce_by=None)])

    result = run(streamer, "?", crash_at="before turn.succeeded")
    assert (result.output, len(asked)) == ("one two", 2)
    assert [(delta.text, delta.step) for delta in result.deltas] == [
        ("looking", "look"),
        ("one ", "model:s"),
        ("two", "model:s"),
    ]


def test_the_capability_can_ask_for_streams_by_itself() -> None:
    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        yield "one "
        yield "two"

    model = FunctionModel(stream_function=stream, model_name="s")
    result = run(in_turn(PydanticAgent(model, capabilities=[LongshiftDurability(stream=True)])), "?")
    assert result.output == "one two"
    assert "".join(delta.text for delta in result.deltas) == "one two"


def test_a_conversation_goes_on_in_the_next_turn_of_the_session() -> None:
    seen: list[int] = []

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        seen.append(len(messages))
        return says("yes")

    helper = PydanticAgent(FunctionModel(answer), capabilities=[LongshiftDurability()])

    @agent("chat")
    async def chat(turn: Turn, question: str) -> str:
        result = await helper.run(question, message_history=past_messages(turn))
        await keep_messages(turn, result)
        return result.output

    log: list[Event] = []
    for question in ("one", "two", "three"):
        assert run(chat, question, log=log, crash_after=3).output == "yes"
    assert seen == [1, 3, 5]


def test_a_response_recorded_by_another_release_can_be_read() -> None:
    provider = Provider(says("new"))
    helper = in_turn(PydanticAgent(provider.model, capabilities=[LongshiftDurability()]))
    old = {"kind": "response", "parts": [{"part_kind": "text", "content": "old", "gone": 1}], "vanished": {"a": 1}}
    assert run(helper, "?", fake={"model:fake": old}).output == "old"
    unreadable = run(helper, "?", fake={"model:fake": {"kind": "response", "parts": [{"part_kind": "hologram"}]}})
    assert unreadable.error is not None
    assert "cannot be read by this release of pydantic-ai" in str(unreadable.error["message"])


def test_an_effect_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match=r"effect of tool 'x' cannot be 'wirte'"):
        LongshiftDurability(effects={"x": "wirte"})  # type: ignore[dict-item]


Keys = list[tuple[int, str]]


def counting(keys: Keys) -> Tool[[int], Coroutine[Any, Any, str]]:
    @tool(effect="irreversible")
    async def count(call: ToolCall, n: int) -> str:
        """Counts."""
        keys.append((n, call.key))
        return f"counted {n}"

    return count


def test_a_longshift_tool_keeps_its_own_effect_and_key_and_tells_the_model_what_was_not_repeated() -> None:
    keys_seen: Keys = []
    provider = Provider(
        calls(("count", {"n": "x"})), calls(("count", {"n": 3})), calls(("count", {"n": 3})), says("done")
    )
    durability = LongshiftDurability[None]()
    helper = PydanticAgent(provider.model, tools=[as_tool(counting(keys_seen))], capabilities=[durability])
    told: list[object] = []

    @agent("counter")
    async def counter(turn: Turn, question: str) -> str:
        result = await helper.run(question)
        parts = [part for message in result.all_messages() for part in message.parts]
        told[:] = [part.content for part in parts if isinstance(part, ToolReturnPart | RetryPromptPart)]
        return result.output

    result = run(counter, "?", crash_at="before step.completed @call_0/count")
    assert (result.output, [n for n, _ in keys_seen]) == ("done", [3])
    wrong, first, second = told
    assert "arguments do not fit tool 'count'" in str(wrong)
    assert first == "counted 3"
    assert isinstance(second, dict)
    assert second["note"].startswith("not repeated: done at ")


def test_an_irreversible_tool_of_the_framework_is_called_once_and_doubt_is_told() -> None:
    provider = Provider(calls(("send", {"to": "a"})), calls(("send", {"to": "a"})), says("done"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability[None](effects={"send": "irreversible"})])
    sent: list[str] = []

    @helper.tool_plain
    async def send(to: str) -> str:
        sent.append(current_call().key)
        return to

    seen: list[object] = []

    @agent("sender")
    async def sender(turn: Turn, question: str) -> str:
        result = await helper.run(question)
        parts = [part for message in result.all_messages() for part in message.parts]
        seen[:] = [part.content for part in parts if isinstance(part, ToolReturnPart)]
        return result.output

    assert run(sender, "?", crash_at="before step.completed @call_0/send").output == "done"
    assert len(sent) == 1
    first, second = seen
    assert (first, isinstance(second, dict) and second["result"]) == ("a", "a")
    assert "not repeated" in str(second)
    in_doubt = run(in_turn(helper), "?", crash_at="before ledger.end @call_0/send")
    assert in_doubt.error is not None
    assert (in_doubt.error["code"], in_doubt.error["step"], provider.asked) == ("outcome_unknown", "send", 4)
    assert len(sent) == 2  # once in each of the two turns


def test_an_irreversible_tool_that_raises_is_in_doubt() -> None:
    provider = Provider(calls(("send", {})), says("done"))
    durability = LongshiftDurability[None](effects={"send": "irreversible"}, tool_retry=Retry(attempts=3))
    helper = PydanticAgent(provider.model, capabilities=[durability])
    sent: list[int] = []

    @helper.tool_plain
    def send() -> None:
        sent.append(1)
        raise OSError("the line broke")

    result = run(in_turn(helper), "?")
    assert result.error is not None
    assert (result.error["code"], len(sent)) == ("outcome_unknown", 1)


def test_the_key_of_a_call_is_the_same_on_each_try_of_it() -> None:
    provider = Provider(calls(("send", {})), says("done"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability()])
    sent: list[str] = []

    @helper.tool_plain
    def send() -> None:
        sent.append(current_call().headers()["Idempotency-Key"])

    assert run(in_turn(helper), "?", crash_at="before step.completed @call_0/send").output == "done"
    run(in_turn(helper), "?", crash_at="before ledger.end @call_0/send")
    assert len(sent) == 3
    assert len(set(sent)) == 2  # of two turns


def test_two_runs_side_by_side_keep_their_records_apart() -> None:
    provider = Provider(says("x"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability()])

    @agent("both")
    async def both(turn: Turn, question: str) -> list[str]:
        runs = await turn.gather(helper.run("a"), helper.run("b"))
        more = await asyncio.gather(helper.run("c"), helper.run("d"))
        return [each.output for each in (*runs, *more)]

    result = run(both, "?", crash_at="before turn.succeeded")
    assert provider.asked == 4
    assert sorted(filter(None, [event.key for event in result.events])) == [
        "0.0/model:fake#0",
        "0.1/model:fake#0",
        "model:fake#0",
        "model:fake#1",
    ]


def test_the_same_run_has_the_same_id_in_each_attempt() -> None:
    helper = PydanticAgent(Provider(says("x")).model, capabilities=[LongshiftDurability()])
    ids: set[tuple[str, str]] = set()

    @agent("ids")
    async def told(turn: Turn, question: str) -> str:
        result = await helper.run(question)
        ids.add((result.run_id, result.conversation_id))
        return result.output

    run(told, "?", crash_at="before turn.succeeded")
    assert len(ids) == 1


def test_a_failing_step_is_told_apart_by_its_class() -> None:
    provider = Provider(ValueError("no"))
    helper = PydanticAgent(provider.model, capabilities=[LongshiftDurability()])

    @agent("catching")
    async def catching(turn: Turn, question: str) -> str:
        try:
            return (await helper.run(question)).output
        except StepFailed as error:
            return error.error_type

    assert run(catching, "?").output == "ValueError"


def test_what_the_model_sees_of_a_tool_is_the_same_on_a_replay() -> None:
    contents: list[object] = []

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) == 1:
            return calls(("look", {}))
        [part] = [part for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
        contents.append(part.content)
        return says("done")

    helper = PydanticAgent(FunctionModel(answer, model_name="fake"), capabilities=[LongshiftDurability()])

    @helper.tool_plain
    def look() -> tuple[Weather, ...]:
        return (Weather(city="Oslo", degrees=3),)

    run(in_turn(helper), "?", crash_at="before step.completed model:fake#2")
    assert contents == [[{"city": "Oslo", "degrees": 3}]] * 2


@pytest.mark.parametrize("effect", ["read", "write", "irreversible"])
def test_a_tool_that_asks_for_an_approval_itself_is_called_once_it_has_one(effect: Any) -> None:
    paid: list[int] = []
    helper = PydanticAgent(
        Provider(calls(("pay", {"amount": 5})), says("done")).model,
        output_type=[str, DeferredToolRequests],
        capabilities=[LongshiftDurability(effects={"pay": effect})],
    )

    @helper.tool
    async def pay(ctx: RunContext[object], amount: int) -> str:
        if not ctx.tool_call_approved:
            raise ApprovalRequired
        paid.append(amount)
        return "paid"

    @agent("buyer")
    async def buyer(turn: Turn, question: str) -> str:
        asked = await helper.run(question)
        assert isinstance(asked.output, DeferredToolRequests)
        granted = DeferredToolResults(approvals={call.tool_call_id: True for call in asked.output.approvals})
        answered = await helper.run(message_history=asked.all_messages(), deferred_tool_results=granted)
        return str(answered.output)

    for point in (None, "after step.completed @call_0/pay", "after ledger.end @call_0/pay"):
        paid.clear()
        assert (run(buyer, "?", crash_at=point).output, paid) == ("done", [5])
