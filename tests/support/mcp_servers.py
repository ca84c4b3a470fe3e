"""MCP servers for tests, to be run by ``http_servers.running``.

``Shop`` is made of the SDK. ``Classic`` speaks the protocol of 2025 by hand: sessions that a restart forgets, and any
answer that a test wants to see.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp_types import ToolAnnotations
from starlette.applications import Starlette

from tests.support.http_servers import Asgi, Message, Receive, Send


class Shop:
    """A server made of the SDK, whose tools have effects: ``effects`` has (what, key in ``_meta``, key in the header)."""

    def __init__(self) -> None:
        self.effects: list[tuple[str, str | None, str | None]] = []
        self.hold = threading.Event()  # what `slow` waits for
        self.hold.set()

    def app(self) -> Starlette:
        server = MCPServer("shop", version="1")

        def done(what: str, context: Context[Any, Any]) -> None:
            meta: Any = context.request_context.meta or {}
            self.effects.append((what, meta.get("idempotencyKey"), (context.headers or {}).get("idempotency-key")))

        @server.tool(annotations=ToolAnnotations(read_only_hint=True))
        async def price(article: str, context: Context[Any, Any]) -> int:
            """What an article costs."""
            done(f"price {article}", context)
            return len(article)

        @server.tool()
        async def order(article: str, context: Context[Any, Any]) -> str:
            """Put an article into the basket."""
            done(f"order {article}", context)
            return f"ordered {article}"

        @server.tool()
        async def pay(amount: int, context: Context[Any, Any]) -> str:
            done(f"pay {amount}", context)
            if amount < 0:
                raise ValueError("no such amount")
            return f"paid {amount}"

        @server.tool()
        async def receipt(key: str) -> str:
            """What was paid under a key; empty if nothing was."""
            return next((what.replace("pay", "paid") for what, known, _ in self.effects if known == key), "")

        @server.tool()
        async def slow(context: Context[Any, Any]) -> str:
            done("slow", context)
            await context.report_progress(1, 2, "half way")
            await _set(self.hold)
            return "at last"

        @server.tool()
        async def picture(size: int) -> Image:
            return Image(data=b"\x89PNG" + bytes(size - 4), format="png")

        @server.tool()
        async def prose(size: int) -> str:
            return "x" * size

        return server.streamable_http_app()


async def _set(event: threading.Event) -> None:
    """Until the test's thread has set it."""
    while not event.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


Answer = tuple[int, dict[str, str], bytes]
JSON = {"content-type": "application/json"}


class Classic:
    """A server of the protocol of 2025, by hand: it has sessions, and forgets them when it is restarted.

    ``answers`` has what it says to the next calls, before what it would say: (status, headers, body). A tool called
    ``broken`` ends its connection in the middle of the answer, and one called ``held`` answers when ``hold`` is set.
    """

    def __init__(self) -> None:
        self.effects: list[tuple[str, str]] = []
        self.opened = 0
        self.unknown = 404  # the status with which servers refuse a session they do not know
        self.answers: list[Answer] = []
        self.headers: list[dict[str, str]] = []
        self.hold = threading.Event()
        self._sessions: set[str] = set()

    def app(self) -> Asgi:
        self._sessions.clear()
        return self._serve

    async def _serve(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
    ) -> None:
        if scope["type"] == "lifespan":
            while (kind := (await receive())["type"]) != "lifespan.shutdown":
                await send({"type": f"{kind}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.headers.append(headers)
        message = json.loads(body) if body else {}
        tool = (message.get("params") or {}).get("name")
        if tool == "held":
            await _set(self.hold)
        status, extra, text = self._answer(scope["method"], headers, message)
        if tool == "broken":
            extra = {**extra, "content-length": str(len(text) + 1)}
        shown = [(name.encode(), value.encode()) for name, value in extra.items()]
        await send({"type": "http.response.start", "status": status, "headers": shown})
        await send({"type": "http.response.body", "body": text, "more_body": tool == "broken"})
        if tool == "broken":
            raise ConnectionError("as the test wants it")

    def _answer(self, method: str, headers: dict[str, str], message: dict[str, Any]) -> Answer:
        if method != "POST":
            return 405, {}, b""
        number = message.get("id")
        match message["method"]:
            case "server/discover":
                return _error(400, number, -32601, "no such method")
            case "initialize":
                self.opened += 1
                session = f"session-{self.opened}"
                self._sessions.add(session)
                result: dict[str, Any] = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}
                result["serverInfo"] = {"name": "classic", "version": "1"}
                return _result(number, result, {"mcp-session-id": session})
            case _ if headers.get("mcp-session-id") not in self._sessions:
                return _error(self.unknown, number, -32600, "there is no such session")
            case "tools/list":
                page = int((message.get("params") or {}).get("cursor", "0"))
                tool = {"name": f"tool{page}", "inputSchema": {"type": "object"}}
                return _result(number, {"tools": [tool]} | ({"nextCursor": str(page + 1)} if page < 2 else {}))
            case "tools/call":
                return self._call(number, message["params"])
            case _:
                return 202, {}, b""

    def _call(self, number: Any, params: dict[str, Any]) -> Answer:
        if self.answers:
            return self.answers.pop(0)
        self.effects.append((params["name"], params["_meta"]["idempotencyKey"]))
        data = base64.b64encode(b"RIFF").decode()
        content = [
            {"type": "text", "text": "done"},
            {"type": "audio", "data": data, "mimeType": "audio/wav"},
            {"type": "resource_link", "uri": "file:///a", "name": "a"},
            {"type": "resource", "resource": {"uri": "file:///b", "text": "b"}},
            {"type": "resource", "resource": {"uri": "file:///c", "blob": data}},
        ]
        return _result(number, {"content": content, "structuredContent": {"n": 1}})


def _result(number: Any, result: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode()
    return 200, JSON | (headers or {}), body


def _error(status: int, number: Any, code: int, message: str) -> Answer:
    body = {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}
    return status, JSON, json.dumps(body).encode()
