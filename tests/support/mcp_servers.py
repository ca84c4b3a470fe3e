"""MCP servers for tests, each in a thread of its own, so that an agent's event loop is not theirs; they can be restarted.

``Modern`` is made of the SDK. ``Classic`` speaks the protocol of 2025 by hand: sessions that a restart forgets, and any
answer that a test wants to see.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp_types import ToolAnnotations
from starlette.applications import Starlette

Message = MutableMapping[str, Any]
Asgi = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Running:
    """An ASGI app on a port of its own, which it keeps when it is restarted. ``make_app`` is called at each start."""

    def __init__(self, make_app: Callable[[], Any]) -> None:
        self._make_app = make_app
        self.port = 0
        self._socket = self._listen()
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._socket.fileno() == -1:
            self._socket = self._listen()
        config = uvicorn.Config(
            self._make_app(), interface="asgi3", log_config=None, log_level="critical", timeout_graceful_shutdown=0
        )
        self._server = server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[self._socket])), daemon=True)
        self._thread.start()
        while not server.started and self._thread.is_alive():
            threading.Event().wait(0.005)

    def _listen(self) -> socket.socket:
        # with its protocol named, or asyncio would leave Nagle's algorithm on, which costs 40 ms for each answer
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        return listener

    def stop(self) -> None:
        """As by SIGKILL: connections end where they are."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(10)
        self._socket.close()

    def restart(self) -> None:
        self.stop()
        self.start()


@contextmanager
def running(make_app: Callable[[], Any]) -> Iterator[Running]:
    server = Running(make_app)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Shop:
    """A server made of the SDK, whose tools have effects: ``effects`` has (what, key in ``_meta``, key in the header)."""

    def __init__(self) -> None:
        self.effects: list[tuple[str, str | None, str | None]] = []
        self.lists = 0
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
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
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
