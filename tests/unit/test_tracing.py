"""Traces: what hangs below what, what spans say and what they never say; and a collector that is away."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes

import longshift.tracing
from longshift import Approval, Retry, ToolCall, Turn, agent, step, tool
from longshift.config import Config
from longshift.errors import ConfigError
from longshift.model import Prefix, new_id, parse_id
from longshift.testing import Result, run
from longshift.tracing import OFF, Kind, Traces, names, open_traces, traces_to
from tests.support.collector import Spans, collecting, spans_of

SECRET = "the-password-of-the-customer"
Traced = Callable[..., tuple[Result[Any], Spans]]


@pytest.fixture
def traced() -> Traced:
    """Run a turn: how it went, and its spans."""

    def go(agent: Any, value: Any = None, **options: Any) -> tuple[Result[Any], Spans]:
        exporter = InMemorySpanExporter()
        traces = traces_to(exporter)
        result = run(agent, value, traces=traces, **options)
        traces.close()
        return result, spans_of(exporter.get_finished_spans())

    return go


def mark(value: str) -> None:
    """As instrumentation of a library would: on whichever span is current."""
    trace.get_current_span().set_attribute("mark", value)


@step
async def look(url: str) -> str:
    mark("in the step")
    return url


def count(text: str) -> int:
    mark("in its thread")
    return len(text)


@tool(effect="irreversible")
async def pay(call: ToolCall, amount: int) -> str:
    mark("in the tool")
    return call.key


# -- what hangs below what


def test_steps_and_tools_hang_below_their_attempt_and_are_current_in_their_functions(traced: Traced) -> None:
    @agent("shop")
    async def shop(turn: Turn, _: None) -> str:
        mark("in the agent")
        await turn.gather(look("a"), turn.step("count", count, "bcd"))
        return await pay(amount=3)

    result, spans = traced(shop)

    attempt = spans.one("turn shop", mark="in the agent")
    assert sorted(spans.below(attempt)) == ["step count", "step look", "step pay"]
    assert spans.one("step look").attributes == {
        "mark": "in the step",
        "longshift.step.key": result.events[1].key,
        "longshift.step.outcome": "completed",
        "longshift.step.tries": 1,
    }
    assert spans.one("step count").attributes["mark"] == "in its thread"
    assert spans.below(spans.one("step pay")) == ["execute_tool pay"]
    call = spans.one("execute_tool pay").attributes
    assert call["longshift.call.id"] == result.output
    assert (call["gen_ai.operation.name"], call["gen_ai.tool.name"], call["longshift.tool.effect"], call["mark"]) == (
        "execute_tool",
        "pay",
        "irreversible",
        "in the tool",
    )


def test_attempts_at_a_turn_are_one_trace_although_nobody_has_begun_one(traced: Traced) -> None:
    @agent("patient")
    async def patient(turn: Turn, _: None) -> str:
        await look("before")
        await turn.sleep(timedelta(hours=1))
        return await look("after")

    result, spans = traced(patient, crash_at="after step.completed look")

    crashed, waited, ended = spans.named("turn patient")
    turn_id = crashed.attributes["longshift.turn.id"]
    [trace_id] = {each.trace for each in spans.found}
    expected = parse_id(Prefix.TURN, turn_id).hex
    assert (trace_id[:16], trace_id[17:]) == (expected[:16], expected[17:])
    assert [span.attributes["longshift.attempt.outcome"] for span in (crashed, waited, ended)] == [
        "lost",
        "waiting",
        "ended",
    ]
    assert [spans.below(span) for span in (crashed, waited, ended)] == [["step look"], [], ["step look"]]
    assert [span.attributes["longshift.attempt"] for span in (crashed, waited, ended)] == [1, 2, 3]
    assert ended.attributes["longshift.turn.status"] == "succeeded"
    assert result.attempts == 3


def test_of_turns_that_nobody_began_a_trace_for_a_share_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    traces = traces_to(InMemorySpanExporter())

    sampled = [traces.span("turn", trace=new_id()).is_recorded for _ in range(1000)]

    traces.close()
    assert 400 < sum(sampled) < 600


def test_a_child_hangs_below_the_attempt_that_has_started_it(traced: Traced) -> None:
    @agent("child")
    async def child(turn: Turn, word: Any) -> str:
        return await look(word)

    @agent("parent")
    async def parent(turn: Turn, _: None) -> str:
        return str(await (await turn.spawn(child, "hello")))

    _, spans = traced(parent)

    assert spans.below(spans.named("turn parent")[0]) == ["turn child"]
    assert spans.below(spans.one("turn child")) == ["step look"]


def test_a_retry_continues_the_trace_of_the_turn_that_it_retries(traced: Traced) -> None:
    broken = [True]

    @step
    async def ship() -> str:
        if broken:
            raise OSError("no carrier")
        return "sent"

    @agent("order")
    async def order(turn: Turn, _: None) -> str:
        return await ship()

    log: list[Any] = []
    first, before = traced(order, log=log)
    broken.clear()
    _, after = traced(order, log=log, retry=first)

    assert before.one("turn order").trace == after.one("turn order").trace


def test_tries_of_a_step_are_one_span_and_a_long_pause_ends_it(traced: Traced) -> None:
    class Busy(Exception):
        retry_after = timedelta(hours=1)

    failures = [OSError("at once"), OSError("again"), Busy("later")]

    @step(retry=Retry(attempts=9, first=timedelta(0)))
    async def stubborn() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    @agent("asker")
    async def asker(turn: Turn, _: None) -> str:
        return await stubborn()

    _, spans = traced(asker)

    here, later = spans.named("step stubborn")
    assert [
        (span.attributes["longshift.step.outcome"], span.attributes["longshift.step.tries"]) for span in (here, later)
    ] == [("postponed", 3), ("completed", 1)]


def test_what_is_not_sampled_is_followed_and_not_sent(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    seen = []

    @agent("quiet")
    async def quiet(turn: Turn, _: None) -> None:
        seen.append(trace.get_current_span().get_span_context())
        await look("a")

    _, spans = traced(quiet)

    assert spans.found == []
    assert (seen[0].is_valid, seen[0].trace_flags.sampled) == (True, False)


def test_without_traces_there_is_no_span_anywhere() -> None:
    @agent("untraced")
    async def untraced(turn: Turn, _: None) -> list[bool]:
        async def inside() -> bool:
            return trace.get_current_span().get_span_context().is_valid

        return [await inside(), await turn.step("inside", inside)]

    assert run(untraced, None).output == [False, False]
    assert OFF.span("anything").traceparent is None


# -- what spans say


def test_what_agents_are_given_give_and_complain_about_is_in_no_span(traced: Traced) -> None:
    @step
    async def login(password: str) -> str:
        return password

    @step
    async def refuse(password: str) -> None:
        raise ValueError(f"{password} is wrong")

    @tool(effect="write", approval=Approval())
    async def write(call: ToolCall, password: str) -> str:
        raise RuntimeError(password)

    @agent("bank")
    async def bank(turn: Turn, password: str) -> str:
        await login(password)
        try:
            await refuse(password)
        except Exception:
            await turn.say(password)
        return await write(password)

    result, spans = traced(bank, SECRET, approve={"write": True})

    assert SECRET in json.dumps(result.error)
    assert [span.name for span in spans.found if SECRET in span.told] == []
    assert spans.one("step refuse").attributes["error.type"] == "ValueError"
    assert spans.one("execute_tool write").attributes["error.type"] == "RuntimeError"
    ended = spans.named("turn bank")[-1]
    assert (ended.failed, ended.attributes["error.type"]) == (True, "step_failed")


def test_attributes_that_are_not_ours_are_those_of_the_conventions() -> None:
    modules = (gen_ai_attributes, http_attributes, error_attributes)
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    ours = {value for name, value in vars(names).items() if name.isupper() and not value.startswith("longshift.")}

    assert ours - known == set()


# -- where they go


def otlp(monkeypatch: pytest.MonkeyPatch, url: str, **variables: str) -> Traces:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return open_traces(Config(traces="otlp"), service="longshift-worker")


def test_spans_are_sent_to_the_collector_when_a_process_ends_at_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (url, spans):
        traces = otlp(monkeypatch, url, OTEL_RESOURCE_ATTRIBUTES="team=red")
        turn = UUID(int=16)
        with traces.span("above", trace=turn, kind=Kind.SERVER) as above, traces.span("below"):
            pass
        with traces.span("elsewhere", parent=above.traceparent, attributes={"n": 1, "nothing": None}):
            pass
        traces.close()

    assert [each.parent for each in (spans.one("below"), spans.one("elsewhere"))] == [spans.one("above").id] * 2
    assert spans.one("elsewhere").attributes == {"n": 1}
    assert {each.trace for each in spans.found} == {turn.hex}
    assert {each.service for each in spans.found} == {"longshift-worker"}
    assert all("team" in each.told for each in spans.found)


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (url, spans):
        traces = otlp(monkeypatch, url, OTEL_SERVICE_NAME="research-workers")
        with traces.span("one"):
            pass
        traces.close()

    assert spans.one("one").service == "research-workers"


@pytest.mark.timeout(20)
def test_a_collector_that_is_away_costs_its_spans_and_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and listens to nothing
        variables = {
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",  # of a patience that no process should share when it ends
            "OTEL_BSP_SCHEDULE_DELAY": "1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "20",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "5",
        }
        traces = otlp(monkeypatch, f"http://127.0.0.1:{nobody.getsockname()[1]}", **variables)
        monkeypatch.setattr("longshift.tracing.otel.LAST_SPANS", 0.1)
        result = run(busy, 50, traces=traces)
        traces.close()

    assert result.output == 50
    complaints = [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert [record.levelno for record in complaints] == [logging.WARNING]


@agent("busy")
async def busy(turn: Turn, steps: int) -> int:
    return sum([len(await look("x")) for _ in range(steps)])


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.exporter.otlp.proto.http.trace_exporter"])
def test_without_the_extra_one_sentence_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "longshift.tracing.otel", raising=False)
    monkeypatch.delattr(longshift.tracing, "otel", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(ConfigError) as refused:
        open_traces(Config(traces="otlp"), service="longshift-api")

    assert str(refused.value) == (
        f"LONGSHIFT_TRACES is otlp, but the package {missing!r} is missing: pip install 'longshift[otel]'"
    )


def test_spans_of_other_libraries_go_the_same_way_unless_they_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(trace, "set_tracer_provider", chosen.append)
    traces = traces_to(InMemorySpanExporter())

    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    traces.share()
    monkeypatch.setattr(trace, "get_tracer_provider", trace.NoOpTracerProvider)
    traces.share()

    assert len(chosen) == 1
    chosen[0].get_tracer("httpx").start_span("GET").end()
    traces.close()
