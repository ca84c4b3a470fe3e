"""Uploads of unknown length, taken in with flat memory: hashed, counted and kept in a temporary file."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Self

from longshift.artifacts.threads import Lent
from longshift.errors import InvalidInput, Unavailable

CHUNK = 256 * 1024
"""Bytes moved per visit to a thread: the visit costs about 0.1 ms, hashing these about as much."""

_IN_MEMORY = 1024 * 1024


class Digest:
    """SHA-256 and size of what has been seen so far."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.size = 0

    def update(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """64 lower-case hexadecimal digits."""
        return self._hash.hexdigest()


class Body:
    """``size`` bytes at rest, readable from the start as often as needed. Close it, or use it in a ``with``."""

    def __init__(self, file: Lent[IO[bytes]], *, size: int) -> None:
        self._file = file
        self.size = size

    @contextmanager
    def rewound(self) -> Iterator[IO[bytes]]:
        """The file, at its start, for one thread at a time."""
        with self._file.use() as file:
            file.seek(0)
            yield file

    def close(self) -> None:
        """Never waits: an upload that is still reading finishes with its file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Spooled(Body):
    """An upload that was taken in whole: its ``size``, its ``sha256``, and its bytes by ``async for`` or to ``put``.

    Up to 1 MiB is kept in memory, the rest in an unnamed file under ``TMPDIR``, which should not be a memory disk.
    """

    def __init__(self, file: Lent[IO[bytes]], digest: Digest) -> None:
        super().__init__(file, size=digest.size)
        self.sha256 = digest.sha256

    def whole(self) -> bytes:
        """All of it in memory: for what is known to be small."""
        with self.rewound() as file:
            return file.read()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        position = 0
        while chunk := await asyncio.to_thread(self._read, position):
            yield chunk
            position += len(chunk)

    def _read(self, position: int) -> bytes:
        with self._file.use() as file:
            file.seek(position)
            return file.read(CHUNK)


async def spool(source: AsyncIterable[bytes], *, limit: int, executor: Executor | None = None) -> Spooled:
    """Read ``source`` to its end. Disk and hash work happen in ``executor`` (default: the loop's own).

    Raises:
        InvalidInput: ``source`` has more than ``limit`` bytes; the rest is not read.
        Unavailable: the temporary file cannot be written, for example on a full disk.
    """
    loop = asyncio.get_running_loop()
    digest = Digest()
    file: Lent[IO[bytes]] = Lent(SpooledTemporaryFile(max_size=_IN_MEMORY))  # noqa: SIM115 - it outlives this call
    try:
        async for batch in _batches(source, limit=limit):
            await loop.run_in_executor(executor, _append, file, digest, batch)
    except BaseException:
        file.close()
        raise
    return Spooled(file, digest)


async def in_memory(data: bytes) -> Spooled:
    """Bytes that are in memory already, with their hash; large ones are hashed off the event loop."""
    digest = Digest()
    if len(data) > CHUNK:
        await asyncio.to_thread(digest.update, data)
    else:
        digest.update(data)
    return Spooled(Lent(io.BytesIO(data)), digest)


async def read_file(path: Path) -> AsyncIterator[bytes]:
    """A file in chunks, read off the event loop. Raises ``OSError``."""
    file = Lent(await asyncio.to_thread(path.open, "rb"))

    def read() -> bytes:
        with file.use() as source:
            return source.read(CHUNK)

    try:
        while chunk := await asyncio.to_thread(read):
            yield chunk
    finally:
        file.close()


async def _batches(source: AsyncIterable[bytes], *, limit: int) -> AsyncIterator[list[bytes]]:
    """Chunks in groups of about ``CHUNK`` bytes: a source of tiny pieces must not cost a thread visit for each."""
    batch: list[bytes] = []
    total = held = 0
    async for chunk in source:
        total += len(chunk)
        if total > limit:
            raise InvalidInput(f"the upload has more than the {limit} bytes allowed")
        batch.append(chunk)
        held += len(chunk)
        if held >= CHUNK:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _append(file: Lent[IO[bytes]], digest: Digest, batch: list[bytes]) -> None:
    with file.use() as target:
        for chunk in batch:
            digest.update(chunk)
            try:
                target.write(chunk)
            except OSError as error:
                raise Unavailable(f"cannot write the upload to a temporary file: {error.strerror}") from None
