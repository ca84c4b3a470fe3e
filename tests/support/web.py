"""A web for tests: pages by path, on loopback, and names that point where a test wants them to."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.http_servers import Message, Receive, Send

Page = tuple[int, dict[str, str], bytes]


class Web:
    """``pages`` by path, each (status, headers, body) or a list of them for one request after the other. ``asked`` has the
    requests: (method, path, headers, body). ``/endless`` never ends, ``/mute`` never answers.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Page | list[Page]] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
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
        self.asked.append((scope["method"], scope["path"], headers, json.loads(body) if body else None))
        if scope["path"] == "/mute":
            await receive()  # until the other side has had enough
            return
        page = self.pages.get(scope["path"], (200 if scope["path"] == "/endless" else 404, {}, b""))
        status, shown, content = page.pop(0) if isinstance(page, list) else page
        raw = [(name.encode(), value.encode()) for name, value in shown.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        if scope["path"] == "/endless":
            enough = asyncio.ensure_future(receive())
            while not enough.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": content})


def bomb(size: int) -> bytes:
    """``size`` zero bytes, compressed a thousandfold."""
    return gzip.compress(bytes(size))


def point(monkeypatch: pytest.MonkeyPatch, name: str, *answers: list[str]) -> list[str]:
    """Let ``name`` have these addresses, the n-th answer at the n-th look-up (the last one from then on); what was looked up."""
    real: Callable[..., Any] = socket.getaddrinfo
    asked: list[str] = []

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != name:
            return real(host, port, *args, **kwargs)
        asked.append(name)
        addresses = answers[min(len(asked), len(answers)) - 1]
        return [found for address in addresses for found in real(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked
