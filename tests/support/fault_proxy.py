"""A proxy before a server that speaks HTTP, or anything else over TCP: it refuses, is silent, slow, or cuts answers off.

with FaultProxy(port) as proxy:
    proxy.url                  instead of the server's
    proxy.suffer(Fault.SILENT) from now on, connections of before included; Fault.NONE: all is well again
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Self


class Fault(StrEnum):
    NONE = "none"
    REFUSED = "refused"  # nothing listens
    SILENT = "silent"  # accepts, and never answers
    UNAVAILABLE = "unavailable"  # 503 to every request
    ERROR = "error"  # 500 to every request
    CUT = "cut"  # ends each answer after some of its bytes, with a reset
    SLOW = "slow"  # each piece of an answer takes its time


CUT_AFTER = 400
"""Bytes of an answer that ``Fault.CUT`` lets through: its headers, or a part of its body."""
SLOWNESS = 0.2
_STATUS = {Fault.UNAVAILABLE: b"503 Slow Down", Fault.ERROR: b"500 Internal Server Error"}


class FaultProxy:
    """In a thread of its own; listens on the same port after a ``REFUSED`` as before."""

    def __init__(self, port: int, *, cut_after: int = CUT_AFTER, latency: float = 0) -> None:
        """``latency``: seconds that each piece of a request takes; a small request is one piece."""
        self._target = port
        self._latency = latency
        self._cut_after = cut_after
        self._fault = Fault.NONE
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def suffer(self, fault: Fault) -> None:
        """Returns when it is so."""
        asyncio.run_coroutine_threadsafe(self._change(fault), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- in its loop

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _change(self, fault: Fault) -> None:
        self._fault = fault
        if fault is Fault.REFUSED and self._server is not None:
            self._server.close()
            self._server = None
        elif self._server is None:
            await self._listen()
        self._cut_all()

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        self._cut_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                if self._fault is Fault.SILENT:
                    await reader.read(-1)
                elif self._fault in _STATUS:
                    await self._refuse(reader, writer)
                else:
                    await self._pass(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % _STATUS[self._fault])
        await writer.drain()
        await reader.read(-1)  # a reset could overtake the answer while the body is still coming

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.add(back)
        sending = asyncio.create_task(_copy(reader, back, latency=self._latency))
        try:
            await self._answer(there, writer)
        finally:
            sending.cancel()
            self._writers.discard(back)
            back.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._cut_after
        while data := await reader.read(65536):
            if self._fault is Fault.SLOW:
                await asyncio.sleep(SLOWNESS)
            if self._fault is Fault.CUT:
                writer.write(data[:left])
                left -= len(data)
                await writer.drain()
                if left <= 0:
                    return
            else:
                writer.write(data)
                await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, latency: float) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            await asyncio.sleep(latency)
            writer.write(data)
            await writer.drain()
