"""Tools of MCP servers: what a call gives, what is repeated and what is not, and servers that go away."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from longshift import Retry, StepTimeout, Turn, UsageError, agent
from longshift.errors import OutcomeUnknown
from longshift.integrations.mcp import (
    McpError,
    McpNotSent,
    McpRefused,
    McpResult,
    McpServer,
    McpToolError,
    McpUnavailable,
)
from longshift.integrations.pydantic_ai import LongshiftDurability, as_tool
from longshift.model import Json
from longshift.testing import crash_points, named_crash_points, run
from longshift.testing.waiting import wait_until
from longshift.tools import Absent, Done, ToolCall
from tests.support.http_servers import Running, running
from tests.support.mcp_servers import JSON, Answer, Classic, Shop

SOON = Retry(attempts=6, first=timedelta(milliseconds=5), on=(McpUnavailable,))


LASTING = Retry(attempts=2000, on=(McpUnavailable,))  # its pauses take no time in these tests


class Knocks(httpx2.Auth):
    """Sees every request before it is sent."""

    def __init__(self) -> None:
        self._count = 0
        self._enough = threading.Event()

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        self._count += 1
        if self._count >= 5:  # a session is asked for by two requests: at least one call has failed
            self._enough.set()
        yield request

    @contextmanager
    def opening(self, server: Running) -> Iterator[None]:
        """Start ``server`` when it was asked in vain."""
        self._count = 0
        self._enough.clear()

        def start() -> None:
            self._enough.wait(20)
            server.start()

        thread = threading.Thread(target=start)
        thread.start()
        try:
            yield
        finally:
            self._enough.set()
            thread.join()


def mcp_url(server: Running) -> str:
    return f"{server.url}/mcp"


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def server(shop: Shop) -> Iterator[Running]:
    with running(shop.app) as server:
        yield server


@pytest.fixture
def classic() -> Classic:
    return Classic()


@pytest.fixture
def classic_server(classic: Classic) -> Iterator[Running]:
    with running(classic.app) as server:
        yield server


def test_an_agent_uses_the_tools_of_a_server(shop: Shop, server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server), effects={"price": "read"})

    @agent("buyer")
    async def buyer(turn: Turn, article: str) -> list[Any]:
        tools = {tool.tool: tool for tool in await mcp.tools()}
        price = await tools["price"].call({"article": article})
        bought = await mcp.call("order", {"article": article})
        return [tools["price"].effect, tools["order"].effect, price, bought.text]

    result = run(buyer, "tea")
    assert result.output == ["read", "write", "3", "ordered tea"]
    assert result.calls == {"shop.tools": 1, "shop_price": 1, "shop_order": 1}


def test_a_tool_is_described_as_its_server_does(server: Running) -> None:
    async def look() -> Any:
        return {tool.tool: tool for tool in await McpServer("shop", url=mcp_url(server)).tools()}

    price = asyncio.run(look())["price"]
    assert (price.description, price.schema["required"]) == ("What an article costs.", ["article"])


def test_a_call_carries_its_key_twice_and_the_same_one_on_every_try(shop: Shop, server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server), retry=SOON)

    @agent("buyer")
    async def buyer(turn: Turn, article: str) -> str:
        return (await mcp.call("order", {"article": article})).text

    run(buyer, "tea", crash_at="before ledger.end shop_order")
    (first, second) = shop.effects
    assert first == second
    assert first[0] == "order tea"
    assert first[1] == first[2]
    assert str(first[1]).startswith("call_")


def test_an_agent_that_crashes_anywhere_has_each_effect_once(shop: Shop, server: Running) -> None:
    async def look_up(call: ToolCall, arguments: Mapping[str, Json]) -> Done[McpResult] | Absent:
        receipt = await mcp.call("receipt", {"key": call.key})
        return Done(receipt) if receipt.text else Absent()

    mcp = McpServer(
        "shop",
        url=mcp_url(server),
        effects={"price": "read", "pay": "irreversible"},
        reconcile={"pay": look_up},
    )

    @agent("buyer")
    async def buyer(turn: Turn, article: str) -> list[Json]:
        tools = {tool.tool: tool for tool in await mcp.tools()}
        price = await tools["price"].call({"article": article}, "call-1")
        ordered = await tools["order"].call({"article": article}, "call-2")
        paid = [
            await tools["pay"].call({"amount": 3}, each) for each in ("call-3", "call-4")
        ]  # as models repeat themselves
        assert isinstance(paid[1], dict)
        assert str(paid[1]["note"]).startswith("not repeated: done at ")
        return [price, ordered, paid[0], paid[1]["result"]]

    points = named_crash_points(buyer, "tea")
    assert "before ledger.end shop_pay" in points
    for point in points[::2]:  # before each record; after one is before the next
        shop.effects.clear()
        assert run(buyer, "tea", crash_at=point).output == ["3", "ordered tea", "paid 3", "paid 3"]
        done = [what for what, _, _ in shop.effects]
        assert len(set(shop.effects)) == 3, f"{point}: another key on another try: {shop.effects}"
        assert done.count("pay 3") == 1, f"{point}: {done}"


def test_an_irreversible_call_in_doubt_is_not_repeated(classic: Classic, classic_server: Running) -> None:
    mcp = McpServer("bank", url=mcp_url(classic_server), effects={"broken": "irreversible"}, retry=SOON)

    @agent("payer")
    async def payer(turn: Turn, _: None) -> str:
        with pytest.raises(OutcomeUnknown, match="McpUnavailable") as caught:
            await mcp.call("broken")
        return caught.value.call

    assert run(payer, None).output == classic.effects[0][1]
    assert len(classic.effects) == 1


def test_an_irreversible_call_that_was_not_made_is_repeated(shop: Shop, server: Running) -> None:
    server.stop()
    knocks = Knocks()
    mcp = McpServer("shop", url=mcp_url(server), auth=knocks, effects={"pay": "irreversible"}, retry=LASTING)

    @agent("payer")
    async def payer(turn: Turn, _: None) -> str:
        return (await mcp.call("pay", {"amount": 3})).text

    with knocks.opening(server):
        assert run(payer, None).output == "paid 3"
    assert len(shop.effects) == 1


def test_what_a_tool_says_of_its_failure_is_a_result(server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server))

    async def pay() -> McpResult:
        return await mcp.call("pay", {"amount": -1})

    result = asyncio.run(pay())
    assert (result.is_error, result.text) == (True, "Error executing tool pay")
    with pytest.raises(McpToolError, match="Error executing tool pay"):
        result.raise_for_error()


def test_progress_of_a_tool_is_shown_to_who_follows_the_turn(shop: Shop, server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server))

    @agent("waiter")
    async def waiter(turn: Turn, _: None) -> str:
        return (await mcp.call("slow")).text

    result = run(waiter, None)
    assert result.output == "at last"
    assert [delta.text for delta in result.deltas] == ["half way\n"]


def test_large_pictures_become_artifacts_and_small_ones_stay(server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server))

    @agent("viewer")
    async def viewer(turn: Turn, size: int) -> McpResult:
        return await mcp.call("picture", {"size": size})

    (small,) = run(viewer, 100).output.content
    assert (small["type"], small["size"], "artifact" in small) == ("image", 100, False)
    result = run(viewer, 100_000)
    (large,) = result.output.content
    assert (large["mime_type"], large["size"], "data" in large) == ("image/png", 100_000, False)
    assert len(result.artifacts["image-1"]) == 100_000


def test_an_answer_that_is_too_large_is_told_to_the_model(server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server), largest=50_000)

    @agent("reader")
    async def reader(turn: Turn, size: int) -> McpResult:
        return await mcp.call("prose", {"size": size})

    assert run(reader, 20_000).output.text == "x" * 20_000
    result = run(reader, 60_000)
    assert result.output.is_error
    assert "the tool was called, but" in result.output.text
    assert result.calls == {"shop_prose": 1}


async def test_a_streamed_answer_that_is_too_large_is_told_to_the_model(
    classic: Classic, classic_server: Running
) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server), largest=50_000)
    event = b"event: message\ndata: " + b"x" * 60_000 + b"\n\n"
    classic.answers = [(200, {"content-type": "text/event-stream"}, event)]
    result = await mcp.call("tool0")
    assert (result.is_error, "larger than 50,000 bytes" in result.text) == (True, True)
    await mcp.close()


def test_many_calls_share_one_session(classic: Classic, classic_server: Running) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server))

    @agent("busy")
    async def busy(turn: Turn, _: None) -> int:
        return len(await turn.gather(*(mcp.call("tool0", {"n": n}) for n in range(20))))

    assert run(busy, None).output == 20
    assert (classic.opened, len(set(classic.effects))) == (1, 20)


def test_the_list_of_tools_is_read_to_its_last_page(classic_server: Running) -> None:
    async def names() -> list[str]:
        return [tool.tool for tool in await McpServer("classic", url=mcp_url(classic_server)).tools()]

    assert asyncio.run(names()) == ["tool0", "tool1", "tool2"]


@pytest.mark.parametrize("unknown", [400, 404])
def test_a_server_that_was_restarted_gets_a_new_session(
    unknown: int, classic: Classic, classic_server: Running
) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server), retry=Retry(attempts=1))
    classic.unknown = unknown

    @agent("patient")
    async def patient(turn: Turn, _: None) -> str:
        await mcp.call("tool0")
        await turn.step("restart", classic_server.restart)
        return (await mcp.call("tool0")).text

    assert run(patient, None).output.startswith("done")
    assert (classic.opened, len(classic.effects)) == (2, 2)


def test_a_server_that_is_away_is_asked_until_it_is_back(shop: Shop, server: Running) -> None:
    knocks = Knocks()
    mcp = McpServer("shop", url=mcp_url(server), auth=knocks, retry=LASTING)

    @agent("patient")
    async def patient(turn: Turn, _: None) -> str:
        await mcp.call("order", {"article": "tea"})
        await turn.step("stop", server.stop)
        with knocks.opening(server):
            return (await mcp.call("order", {"article": "milk"})).text

    assert run(patient, None).output == "ordered milk"
    assert [what for what, _, _ in shop.effects] == ["order tea", "order milk"]


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((500, {}, b"oops"), McpUnavailable, "did not answer: HTTP 500"),
        ((429, {"retry-after": "7"}, b""), McpNotSent, "did not answer: HTTP 429"),
        ((501, {}, b""), McpError, "answered with HTTP 501"),
        ((401, {}, b""), McpRefused, "HTTP 401: check its headers and credentials"),
        ((413, {}, b""), McpRefused, "refused the request: HTTP 413"),
        (
            (307, {"location": "http://elsewhere.test/mcp"}, b""),
            McpError,
            "Redirect to http://elsewhere.test/mcp not followed",
        ),
        ((200, {"content-type": "text/html"}, b"<html>"), McpError, "Unexpected content type: text/html"),
        ((200, JSON, b"{"), McpError, "Failed to parse"),
        ((200, JSON | {"content-encoding": "gzip"}, b"\x1f\x8b"), McpUnavailable, "compressed"),
        ((200, {"content-type": "text/event-stream"}, b": nothing\n\n"), McpUnavailable, "before its answer"),
    ],
)
async def test_what_goes_wrong_is_told_apart(
    answer: Answer, kind: type[Exception], text: str, classic: Classic, classic_server: Running
) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server))
    classic.answers = [answer]
    with pytest.raises(McpError if issubclass(kind, McpError) else McpUnavailable, match=re.escape(text)) as caught:
        await mcp.call("tool0")
    assert type(caught.value) is kind
    if isinstance(caught.value, McpNotSent):
        assert caught.value.retry_after == "7"
    assert (await mcp.call("tool0")).text.startswith("done")
    await mcp.close()


async def test_a_broken_connection_does_not_touch_the_other_calls(classic: Classic, classic_server: Running) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server))
    held = asyncio.create_task(mcp.call("held"))
    await wait_until(lambda: classic.opened, description="the session is open")
    with pytest.raises(McpUnavailable, match=r"ReadError|RemoteProtocolError"):
        await mcp.call("broken")
    classic.hold.set()
    assert (await held).text.startswith("done")
    await mcp.close()


def test_a_call_without_an_answer_is_repeated_with_its_key(classic: Classic, classic_server: Running) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server), retry=SOON)

    @agent("unlucky")
    async def unlucky(turn: Turn, _: None) -> str:
        return (await mcp.call("broken")).text

    result = run(unlucky, None)
    assert result.error is not None
    assert "failed: McpUnavailable" in result.error["message"]
    assert (len(classic.effects), len(set(classic.effects))) == (6, 1)


def test_a_tool_that_is_too_slow_fails_and_holds_up_no_other(shop: Shop, server: Running) -> None:
    shop.hold.clear()
    mcp = McpServer("shop", url=mcp_url(server), timeout=timedelta(milliseconds=300))

    @agent("hasty")
    async def hasty(turn: Turn, _: None) -> str:
        with pytest.raises(StepTimeout, match=r"no result within 0\.3 s"):
            await mcp.call("slow")
        return (await mcp.call("order", {"article": "tea"})).text

    assert run(hasty, None).output == "ordered tea"


def test_a_server_that_takes_no_connection_is_named(server: Running) -> None:
    server.stop()

    @agent("lonely")
    async def lonely(turn: Turn, _: None) -> str:
        return (await McpServer("shop", url=f"{mcp_url(server)}?key=hush", retry=Retry(attempts=1)).call("order")).text

    error = run(lonely, None).error
    assert error is not None
    assert f"MCP server 'shop' at http://127.0.0.1:{server.port} did not answer: ConnectError" in error["message"]
    assert "hush" not in str(error)


async def test_an_unused_session_is_closed(classic: Classic, classic_server: Running) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server), idle=timedelta(milliseconds=10))
    before = asyncio.all_tasks()
    await mcp.call("tool0")
    await wait_until(lambda: asyncio.all_tasks() == before, description="nothing of the session runs")
    assert (await mcp.call("tool0")).text.startswith("done")
    assert classic.opened == 2
    await mcp.close()
    assert asyncio.all_tasks() == before


async def test_secrets_are_sent_and_not_shown(
    classic: Classic, classic_server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    mcp = McpServer("classic", url=f"{mcp_url(classic_server)}?key=hush", headers={"authorization": "Bearer hush"})
    classic.answers = [(401, {}, b"")]
    with caplog.at_level(logging.DEBUG, "longshift"), pytest.raises(McpRefused) as caught:
        await mcp.call("tool0")
    assert all(headers["authorization"] == "Bearer hush" for headers in classic.headers)
    assert "hush" not in repr(mcp) + repr(caught.value) + caplog.text
    await mcp.close()


@pytest.mark.parametrize(("name", "url"), [("", "http://a"), ("a.b", "http://a"), ("shop", "ftp://a"), ("shop", "a")])
def test_a_server_that_cannot_be_one_is_refused_at_once(name: str, url: str) -> None:
    with pytest.raises(UsageError):
        McpServer(name, url=url)


def test_any_name_of_a_tool_makes_a_step(classic: Classic, classic_server: Running) -> None:
    mcp = McpServer("classic", url=mcp_url(classic_server))
    names = ["a/b", "a#b", "x" * 200, "x" * 199 + "y"]

    @agent("odd")
    async def odd(turn: Turn, _: None) -> None:
        for name in names:
            await mcp.call(name)

    assert len(run(odd, None).calls) == len(names)
    assert [name for name, _ in classic.effects] == names


def test_a_model_of_a_framework_calls_the_tools_of_a_server(shop: Shop, server: Running) -> None:
    mcp = McpServer("shop", url=mcp_url(server), effects={"price": "read"})
    asked: list[int] = []

    def model(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        asked.append(len(messages))
        if len(messages) == 1:
            calls = {"shop_price": {"article": "tea"}, "shop_order": {"article": "milk"}}
            return ModelResponse([ToolCallPart(name, args, tool_call_id=name) for name, args in calls.items()])
        answers = [part.content for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
        return ModelResponse([TextPart(json.dumps(answers))])

    @agent("helper")
    async def helper(turn: Turn, question: str) -> str:
        tools = [as_tool(tool) for tool in await mcp.tools()]
        helping = PydanticAgent(FunctionModel(model), tools=tools, capabilities=[LongshiftDurability()])
        return (await helping.run(question)).output

    for point in [0, *crash_points(helper, "buy")]:
        shop.effects.clear()
        asked.clear()
        assert run(helper, "buy", crash_after=point or None).output == '["3", "ordered milk"]'
        # side by side, so that the crash may meet one of them under way: then it is called again, with its key
        assert sorted(what for what, _, _ in set(shop.effects)) == ["order milk", "price tea"]
        assert len(asked) == 2


def test_a_server_of_another_maker_is_used_by_an_agent() -> None:
    """``mcp-server-time`` of the Python package index, over streamable HTTP."""
    from mcp_server_time.server import create_server

    with running(lambda: create_server("UTC").streamable_http_app()) as server:
        clock = McpServer("time", url=mcp_url(server), effects={"convert_time": "read", "get_current_time": "read"})

        @agent("traveller")
        async def traveller(turn: Turn, cities: tuple[str, str]) -> list[Json]:
            tools = {tool.tool: tool for tool in await clock.tools()}
            asked: dict[str, Json] = {"source_timezone": cities[0], "time": "12:00", "target_timezone": cities[1]}
            told = await clock.call("convert_time", asked)
            assert isinstance(told.structured, dict)
            lost = await tools["convert_time"].call({**asked, "target_timezone": "Nowhere/Never"}, "call-2")
            return [sorted(tools), told.structured["time_difference"], lost]

        names, difference, lost = run(traveller, ("Asia/Tokyo", "Asia/Kolkata")).output
        assert (names, difference) == (["convert_time", "get_current_time"], "-3.5h")
        assert isinstance(lost, dict)
        assert "Nowhere/Never" in str(lost["error"])
        for point in crash_points(traveller, ("Asia/Tokyo", "Asia/Kolkata")):
            again = run(traveller, ("Asia/Tokyo", "Asia/Kolkata"), crash_after=point)
            assert again.output == [names, difference, lost]
