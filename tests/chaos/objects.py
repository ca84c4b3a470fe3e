"""The object store's bad days: a proxy before an S3 that is slow, answers with errors, or resets connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from contextlib import suppress
from enum import StrEnum
from random import Random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

SLOW = 1.0
"""Seconds by which a slow store delays what it is sent."""
ANSWERS = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b",
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b",
)
BODIES = (
    b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>injected</Message></Error>",
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>injected</Message></Error>",
)


class Mood(StrEnum):
    WELL = "well"
    SLOW = "slow"
    ERRORS = "errors"  # 500 and 503 instead of passing anything on
    RESETS = "resets"  # a reset in the middle, of what was already open too


class FaultyStore:
    """``async with FaultyStore(endpoint) as store``: give ``store.endpoint`` to who shall suffer ``store.mood``."""

    def __init__(self, endpoint: str, *, seed: int = 1) -> None:
        target = urlsplit(endpoint)
        self._host, self._port = target.hostname or "127.0.0.1", target.port or 80
        self._random = Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._mood = Mood.WELL
        self._open: set[asyncio.StreamWriter] = set()
        self.disturbed: Counter[Mood] = Counter()  # requests, by what was done to them
        self.endpoint = ""

    @property
    def mood(self) -> Mood:
        return self._mood

    @mood.setter
    def mood(self, mood: Mood) -> None:
        self._mood = mood
        if mood is Mood.RESETS:
            for writer in list(self._open):
                _reset(writer)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
            answers = asyncio.create_task(_copy(there, writer))
            try:
                await self._requests(reader, back, writer)
            finally:
                answers.cancel()
                back.close()
                await asyncio.wait([answers])
        except OSError:
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _requests(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        """Pass on what the client sends, a piece at a time, until the mood forbids it."""
        while data := await reader.read(65536):
            mood = self._mood
            if mood is not Mood.WELL:
                self.disturbed[mood] += 1
            match mood:
                case Mood.SLOW:
                    await asyncio.sleep(SLOW * self._random.uniform(0.2, 1.0))
                case Mood.ERRORS:
                    which = self._random.randrange(len(ANSWERS))
                    writer.write(ANSWERS[which] % (len(BODIES[which]), BODIES[which]))
                    await writer.drain()
                    return
                case Mood.RESETS:
                    _reset(writer)
                    return
            back.write(data)
            await back.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() != -1:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
