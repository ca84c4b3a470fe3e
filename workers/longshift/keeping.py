"""What a turn keeps outside of its log, and finds again: artifacts and passages."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast, get_args

from longshift.contract import Artifact, Passage, RecallScope
from longshift.errors import UsageError
from longshift.execution import Execution
from longshift.model import Prefix, parse_id
from longshift.offload import patiently
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

    async def artifact(self, name: str, data: bytes | str, *, content_type: str | None = None) -> Artifact:
        """Keep bytes in the cold tier and get a pointer to them; stored before the pointer is recorded.

        While the store is away this waits, between steps until the turn's deadline, inside a step until that step's
        timeout.
        """
        raw = data.encode() if isinstance(data, str) else data
        kind = content_type or ("text/plain; charset=utf-8" if isinstance(data, str) else "application/octet-stream")
        digest = hashlib.sha256(raw).hexdigest()
        place = running_step()
        identity = derived_id(
            self._execution.record.root_turn_id, place.key if place else self._execution.scope().path, name, digest
        )

        async def put(name: str, sha256: str, content_type: str) -> Artifact:
            port = self._execution.port
            return await self._patiently(
                lambda: port.put_artifact(identity, name=name, data=raw, content_type=content_type)
            )

        return cast(Artifact, await self._inner("$artifact", put, name, digest, kind))

    async def read(self, artifact: Artifact | str) -> bytes:
        """The bytes of an artifact of this tenant, verified against their hash. Waits while the store is away, as
        ``artifact`` does.

        Raises:
            NotFound: there is no such artifact.
            ArtifactCorrupt: the store no longer holds those bytes.
        """
        identity = artifact if isinstance(artifact, str) else artifact.id
        artifact_id = parse_id(Prefix.ARTIFACT, identity)
        return await self._patiently(lambda: self._execution.port.get_artifact(artifact_id))

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
