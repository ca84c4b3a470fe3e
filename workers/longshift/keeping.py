"""What a turn keeps outside of its log, and finds again: artifacts and passages."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args
from uuid import UUID

from longshift.artifacts import Spooled, in_memory, read_file, spool
from longshift.contract import Artifact, Passage, RecallScope
from longshift.errors import UsageError
from longshift.execution import Execution
from longshift.model import Prefix, parse_id
from longshift.offload import patience, patiently
from longshift.place import running_step
from longshift.replay import derived_id
from longshift.steps import Retry, StepDefinition
from longshift.summaries import HISTORY

T = TypeVar("T")

INNER = Retry(attempts=5)
"""For what the library does between steps and what may fail in any way, except that something is away: that is waited for."""
FOREVER = timedelta(days=365)
"""No time limit of its own: the turn has its deadline."""


class Keeping:
    """The part of ``Turn`` that reaches the cold and the warm tier."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    async def artifact(
        self, name: str, data: bytes | str | Path | AsyncIterable[bytes], *, content_type: str | None = None
    ) -> Artifact:
        """Keep bytes in the cold tier and get a pointer to them; stored before the pointer is recorded.

        While the store is away this waits, between steps until the turn's deadline, inside a step until that step's
        timeout.

        Args:
            name: for people; that of the download.
            data: the bytes; or a file, or chunks as they come, which never are in memory as a whole: they are copied to a
                temporary file first. Those are not looked at on a replay.
            content_type: default: plain text for a ``str``, else bytes without a type.

        Raises:
            StepFailed: the file cannot be read, or its source failed. Inside a step: what the source raised.
        """
        kind = content_type or ("text/plain; charset=utf-8" if isinstance(data, str) else "application/octet-stream")
        place = running_step()
        where = place.key if place is not None else self._execution.scope().path
        if isinstance(data, bytes | str):
            with await in_memory(_encoded(data)) as body:

                async def put(name: str, sha256: str, content_type: str) -> Artifact:
                    return await self._keep(where, body, name, sha256, content_type)

                return cast(Artifact, await self._inner("$artifact", put, name, body.sha256, kind))

        with Source(read_file(data) if isinstance(data, Path) else data) as source:

            async def take_in(name: str, content_type: str) -> Artifact:
                try:
                    body = await source.body()
                except Exception as error:
                    if place is not None:
                        raise
                    # not to be tried again: what was read of the source is gone
                    raise UsageError(
                        f"artifact {name!r}: its source failed, {type(error).__name__}: {error}"
                    ) from error
                return await self._keep(where, body, name, body.sha256, content_type)

            return cast(Artifact, await self._inner("$artifact", take_in, name, kind))

    async def _keep(self, where: str, body: Spooled, name: str, sha256: str, content_type: str) -> Artifact:
        identity = derived_id(self._execution.record.root_turn_id, where, name, sha256)
        port = self._execution.port
        return await self._patiently(
            lambda: port.put_artifact(identity, name=name, data=body, content_type=content_type)
        )

    async def read(self, artifact: Artifact | str) -> bytes:
        """The bytes of an artifact of this tenant, verified against their hash. Waits while the store is away, as
        ``artifact`` does. What a session has read, it keeps: the artifact stays as long as the session.

        Raises:
            NotFound: there is no such artifact.
            ArtifactCorrupt: the store no longer holds those bytes.
        """
        artifact_id = _id_of(artifact)
        return await self._patiently(lambda: self._execution.port.get_artifact(artifact_id))

    async def stream(
        self, artifact: Artifact | str, *, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Bytes ``start`` to ``end`` (excluded) in chunks, like a slice; never in memory as a whole. While the store is away
        it waits, and goes on where it stopped.

        All of an artifact is verified before its last chunk comes; a part cannot be.

        Raises:
            NotFound, ArtifactCorrupt: as ``read``, also after some chunks.
            InvalidInput: no range.
        """
        chunks = self._execution.port.stream_artifact(
            _id_of(artifact), start=start, end=end, pause=patience(self._execution)
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def index(self, source: str, passages: Sequence[str]) -> int:
        """Make passages of ``source`` findable by ``recall``; their number.

        Raises:
            UsageError: ``source`` is ``"history"``, which is for messages.
        """
        if source == HISTORY:
            raise UsageError(f"the source {HISTORY!r} is for messages that have left the context: choose another name")

        async def add(source: str, texts: Sequence[str], /) -> int:
            return await self._execution.port.index(source, texts)

        return cast(int, await self._inner("$index", add, source, list(passages)))

    async def recall(
        self,
        query: str,
        *,
        scope: RecallScope = "session",
        sources: Sequence[str] | None = None,
        limit: int = 8,
    ) -> list[Passage]:
        """The passages that answer ``query`` best, by full text, and by meaning where the workers have an embedder.

        Args:
            query: a question, or words; any of them counts.
            scope: search this session, or all of its tenant.
            sources: only those given to ``index`` under these names; ``history``: messages that have left the context.
            limit: of passages.

        Raises:
            UsageError: there is no such scope.
        """
        if scope not in get_args(RecallScope):
            raise UsageError(f"recall(scope={scope!r}): it is 'session' or 'tenant'")
        port = self._execution.port

        async def find(query: str, sources: Sequence[str] | None, limit: int) -> list[Passage]:
            return await port.recall(query, sources=sources, limit=limit, scope="session")

        async def find_everywhere(query: str, sources: Sequence[str] | None, limit: int, scope: str) -> list[Passage]:
            return await port.recall(query, sources=sources, limit=limit, scope="tenant")

        if scope == "session":  # its arguments are those of earlier versions, whose turns may still be running
            return cast(list[Passage], await self._inner("$recall", find, query, sources, limit))
        return cast(list[Passage], await self._inner("$recall", find_everywhere, query, sources, limit, scope))

    async def _inner(self, name: str, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        """Between steps: a step of its own. Inside a step: part of that step."""
        if running_step() is not None:
            return await function(*args)
        return await self._execution.perform(StepDefinition(name, function, INNER, FOREVER, ours=True), args, {})

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        return await patiently(self._execution, ask)


class Source:
    """Chunks that can be read once, taken in once: whoever tries again gets the same, bytes or error."""

    def __init__(self, chunks: AsyncIterable[bytes]) -> None:
        self._chunks = chunks
        self._taken: Spooled | Exception | None = None

    async def body(self) -> Spooled:
        """Raises what the source raised."""
        if self._taken is None:
            self._taken = UsageError("it was cut off")  # if it is: the rest of the source alone is not the whole
            try:
                self._taken = await spool(self._chunks, limit=sys.maxsize)
            except Exception as error:
                self._taken = error
                raise
        if isinstance(self._taken, Exception):
            raise self._taken
        return self._taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._taken, Spooled):
            self._taken.close()


def _encoded(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _id_of(artifact: Artifact | str) -> UUID:
    return parse_id(Prefix.ARTIFACT, artifact if isinstance(artifact, str) else artifact.id)
