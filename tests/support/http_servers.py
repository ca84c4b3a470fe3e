"""HTTP servers of a test's own: an ASGI app on a port, in a thread, so that an agent's event loop is not theirs."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]


class _Server(uvicorn.Server):
    async def main_loop(self) -> None:
        while not self.should_exit:  # noqa: ASYNC110 - set by the test's thread, and looked at more often than by uvicorn
            await asyncio.sleep(0.005)


class Running:
    """An ASGI app on a port of its own, which it keeps when it is restarted. ``make_app`` is called at each start."""

    def __init__(self, make_app: Callable[[], Any], *, certificate: Path | None = None) -> None:
        self._make_app = make_app
        self._certificate = certificate  # with its key in the same file
        self.port = 0
        self._socket = self._listen()
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._socket.fileno() == -1:
            self._socket = self._listen()
        config = uvicorn.Config(
            self._make_app(),
            interface="asgi3",
            log_config=None,
            log_level="critical",
            timeout_graceful_shutdown=0,
            ssl_certfile=self._certificate,
        )
        self._server = server = _Server(config)
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
def running(make_app: Callable[[], Any], *, certificate: Path | None = None) -> Iterator[Running]:
    server = Running(make_app, certificate=certificate)
    server.start()
    try:
        yield server
    finally:
        server.stop()
