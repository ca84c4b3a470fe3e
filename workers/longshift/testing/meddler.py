"""A proxy before Redis that drops some wake-ups and doubles others, and passes everything else on as it is.

Clients get an answer to every command: a push of which nothing is left becomes a question for the list's length, which
is answered by an integer as well.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

WAKE_UPS = b"longshift.wake."


class Meddler:
    """``with Meddler(redis_url, drop=0.1, double=0.1) as meddler``: give ``meddler.url`` to who shall suffer it.

    ``passed``, ``dropped`` and ``doubled`` count wake-ups. Redis must listen on TCP.
    """

    def __init__(self, url: str, *, drop: float = 0, double: float = 0, seed: int = 1) -> None:
        """``drop`` and ``double`` are probabilities; the same ``seed`` makes the same choices in the same order."""
        self._target = urlsplit(url)
        self._drop, self._double = drop, double
        self._random = Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="meddler")
        self.passed = self.dropped = self.doubled = 0
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        port = self._server.sockets[0].getsockname()[1]
        credentials, _, _ = self._target.netloc.rpartition("@")
        self.url = urlunsplit(self._target._replace(netloc=f"{credentials}@127.0.0.1:{port}"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        except OSError:  # Redis is away: the client is told so, as it would be without us
            writer.close()
            return
        with suppress(asyncio.CancelledError):  # at the end; asyncio would report it as an error of ours
            await asyncio.gather(self._commands(reader, back), _answers(there, writer))
        for each in (writer, back):
            each.close()

    async def _commands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                command = await _read_command(reader)
                writer.write(_encode(self._meddle(command)))
                await writer.drain()
        writer.close()

    def _meddle(self, command: list[bytes]) -> list[bytes]:
        name, *arguments = command
        if name.upper() not in (b"LPUSH", b"RPUSH") or not arguments[0].startswith(WAKE_UPS):
            return command
        key, *messages = arguments
        kept = [message for message in messages for _ in range(self._copies())]
        return [name, key, *kept] if kept else [b"LLEN", key]

    def _copies(self) -> int:
        chance = self._random.random()
        if chance < self._drop:
            self.dropped += 1
            return 0
        if chance < self._drop + self._double:
            self.doubled += 1
            return 2
        self.passed += 1
        return 1


async def _read_command(reader: asyncio.StreamReader) -> list[bytes]:
    count = int((await reader.readuntil(b"\r\n"))[1:])
    parts = []
    for _ in range(count):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        parts.append((await reader.readexactly(size + 2))[:-2])
    return parts


async def _answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def _encode(parts: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
