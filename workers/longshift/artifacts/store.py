"""The interface of the cold tier and its one async face over a blocking backend."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from datetime import timedelta
from functools import partial
from typing import IO, Protocol
from uuid import UUID

from longshift.artifacts.serving import disposition, passive
from longshift.artifacts.spool import CHUNK, Body, Digest, Spooled, spool
from longshift.artifacts.threads import Lent, Threads
from longshift.errors import ArtifactCorrupt, InvalidInput

# No part may start with a dot (so no "..", and room for hidden names); no upper case, which file systems may fold.
_KEY = re.compile(r"[a-z0-9_][a-z0-9._-]{0,199}(?:/[a-z0-9_][a-z0-9._-]{0,199}){0,7}")
_MAX_KEY = 600  # S3 allows 1,024 bytes, prefix included
LONGEST_URL = timedelta(days=7)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtifactStore(Protocol):
    """Immutable bytes under a key. Every method may be called from many coroutines at once.

    Every method raises ``Unavailable`` if the store does not answer or refuses (retryable; it may also be closed) and
    ``InvalidInput`` for a key that ``check_key`` rejects; no other error of the layers below gets out.
    """

    async def put(
        self, key: str, data: AsyncIterable[bytes] | bytes, *, size: int | None = None, content_type: str
    ) -> None:
        """Store ``data``: readers see all of it or nothing, also when the source fails half-way.

        The same key again replaces the object. A put that is cancelled may still become visible, whole.
        ``InvalidInput``: ``size`` was given and ``data`` is shorter or longer. Errors of the source pass unchanged.
        """

    async def get(self, key: str) -> bytes:
        """The whole object, in memory. ``NotFound``: there is none."""

    def stream(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Bytes ``start`` to ``end`` (excluded) in chunks; like a slice, cut at the end of the object.

        ``NotFound`` and ``Unavailable`` come with the first chunk; ``Unavailable`` may also come later, and the reader
        may go on with another stream from where it stopped.
        """

    async def delete(self, key: str) -> None:
        """Remove the object; one that is absent is fine."""

    async def presign(self, key: str, *, expires_in: timedelta, name: str, content_type: str) -> str | None:
        """A URL from which anybody may read the object for so long, as a download called ``name``; None: this store has no
        such thing. Whether the object is there is not looked up.

        ``InvalidInput``: for longer than a week, which is the most that S3 signs for.
        """

    async def check(self) -> None:
        """Whether the store can be reached, within the connect timeout; transfers under way do not delay it."""

    async def close(self) -> None:
        """Wait for the work handed over so far, then release threads and connections."""


class Reader(Protocol):
    """An open object: ``read`` gives up to ``size`` bytes, all that is left for None, and ``b""`` at the end."""

    def read(self, size: int | None, /) -> bytes: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """What an implementation has to do, blocking, from any thread. Keys and ranges have been checked."""

    def put(self, key: str, source: IO[bytes], *, size: int, content_type: str) -> None:
        """Store ``size`` bytes from the start of ``source``, atomically; ``source`` stays open."""

    def open(self, key: str, *, start: int, end: int | None) -> Reader: ...

    def delete(self, key: str) -> None: ...

    def presign(self, key: str, *, expires_in: timedelta, headers: Mapping[str, str]) -> str | None:
        """``headers``: those of the answer, Content-Disposition and Content-Type."""

    def check(self) -> None: ...

    def close(self) -> None: ...


class ThreadedStore:
    """An ``ArtifactStore`` over a ``Backend``, with threads of its own. No thread is held between two chunks."""

    def __init__(self, backend: Backend, *, threads: int, probe_timeout: timedelta) -> None:
        self._backend = backend
        self._threads = Threads(threads)
        self._probe_timeout = probe_timeout

    async def put(
        self, key: str, data: AsyncIterable[bytes] | bytes, *, size: int | None = None, content_type: str
    ) -> None:
        check_key(key)
        if isinstance(data, Spooled):
            await self._put(key, data, size=size, content_type=content_type)
            return
        with await self._take_in(data, size=size) as body:
            await self._put(key, body, size=size, content_type=content_type)

    async def _take_in(self, data: AsyncIterable[bytes] | bytes, *, size: int | None) -> Body:
        """The source is read to its end before the store is touched: one that fails leaves no trace there."""
        if isinstance(data, bytes):
            return Body(Lent(io.BytesIO(data)), size=len(data))
        return await spool(data, limit=sys.maxsize if size is None else size, executor=self._threads.pool)

    async def _put(self, key: str, body: Body, *, size: int | None, content_type: str) -> None:
        if size is not None and body.size != size:
            raise InvalidInput(f"{body.size} bytes came where {size} were announced")

        def upload() -> None:
            with body.rewound() as source:
                self._backend.put(key, source, size=body.size, content_type=content_type)

        await self._threads.run(upload)

    async def get(self, key: str) -> bytes:
        check_key(key)

        def download() -> bytes:
            reader = self._backend.open(key, start=0, end=None)
            try:
                return reader.read(None)
            finally:
                reader.close()

        return await self._threads.run(download)

    async def stream(self, key: str, *, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        check_key(key)
        check_range(start, end)
        reader = await self._threads.lend(partial(self._backend.open, key, start=start, end=end))
        try:
            while chunk := await self._threads.run(partial(_read_chunk, reader)):
                yield chunk
        finally:
            reader.close()

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._threads.run(partial(self._backend.delete, key))

    async def presign(self, key: str, *, expires_in: timedelta, name: str, content_type: str) -> str | None:
        check_key(key)
        if not timedelta(0) < expires_in <= LONGEST_URL:
            raise InvalidInput(f"a URL is signed for up to {LONGEST_URL.days} days, not {expires_in}")
        headers = {"Content-Disposition": disposition(name), "Content-Type": passive(content_type)}
        # in a thread: fresh credentials may have to be fetched
        return await self._threads.run(partial(self._backend.presign, key, expires_in=expires_in, headers=headers))

    async def check(self) -> None:
        await self._threads.probe(self._backend.check, within=self._probe_timeout)

    async def close(self) -> None:
        await self._threads.close()
        self._backend.close()


def _read_chunk(reader: Lent[Reader]) -> bytes:
    with reader.use() as source:
        return source.read(CHUNK)


def object_key(tenant: UUID, sha256: str, generation: int) -> str:
    """``tenant/sha256/generation``. The generation grows when an object is written again after its collection began.

    Raises:
        InvalidInput: ``sha256`` is not 64 lower-case hexadecimal digits, or ``generation`` is negative.
    """
    if _SHA256.fullmatch(sha256) is None or generation < 0:
        raise InvalidInput(f"not the hash and generation of an artifact: {sha256!r}, {generation!r}")
    return f"{tenant.hex}/{sha256}/{generation}"


def check_key(key: str) -> None:
    """A key is 1 to 8 parts of ``a-z 0-9 . _ -`` joined by ``/``; it cannot name anything outside its store.

    Raises:
        InvalidInput: it is anything else.
    """
    if len(key) > _MAX_KEY or _KEY.fullmatch(key) is None:
        raise InvalidInput(f"{key[:100]!r} is not an artifact key: parts of a-z, 0-9, '.', '_', '-' joined by '/'")


def check_range(start: int, end: int | None) -> None:
    """Raises ``InvalidInput`` unless ``0 <= start <= end``."""
    if start < 0 or (end is not None and end < start):
        raise InvalidInput(f"{start}..{end} is not a range of bytes")


async def read_verified(store: ArtifactStore, key: str, *, sha256: str) -> bytes:
    """The object, after its hash has been compared with the one the log promised.

    Raises:
        ArtifactCorrupt: they differ.
        NotFound, Unavailable: as ``ArtifactStore.get``.
    """
    data = await store.get(key)
    digest = Digest()
    if len(data) > CHUNK:
        await asyncio.to_thread(digest.update, data)
    else:
        digest.update(data)
    if digest.sha256 != sha256:
        raise ArtifactCorrupt(
            f"artifact {key!r} has {digest.size} bytes with hash {digest.sha256}, expected {sha256}:"
            " restore it from a backup"
        )
    return data
