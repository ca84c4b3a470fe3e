"""Reading logs, wherever they are: archived events come from the cold tier, verified, the others from Postgres.

``Archive`` is the one door to the events of a session for whoever may meet old ones. A page of a log costs one statement;
only if it begins in the archive, segments are fetched, of which a few stay in memory (they never change).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from datetime import datetime
from uuid import UUID

from longshift import segments, snapshot
from longshift.artifacts import read_verified
from longshift.cold import Cold
from longshift.db import archives, steps
from longshift.db.archives import ArchiveRecord, Page
from longshift.db.database import Database
from longshift.db.steps import StepRecord, Wait
from longshift.errors import ArtifactCorrupt, InvalidInput, NotFound, StoreUnavailable, Unavailable
from longshift.events import Context, Event, apply
from longshift.model import TurnRecord
from longshift.segments import Manifest, Segment

logger = logging.getLogger(__name__)
PAGE = 200
"""Events that are decoded at a time, in the event loop: 6 MB of those that keep their results."""
PAGE_BYTES = 8 * 1024 * 1024
"""So much of events is enough at a time, and one event more. Twice that where an archive meets the log behind it."""
KEPT = 16 * 1024 * 1024
"""Characters of segments that stay in memory: two of the largest."""
MANIFESTS = 100
"""Manifests that do."""


class Archive:
    """The logs of all sessions, for one process."""

    def __init__(self, db: Database, cold: Cold) -> None:
        self._db, self._cold = db, cold
        self._manifests: OrderedDict[UUID, Manifest] = OrderedDict()
        self._segments: OrderedDict[UUID, list[str]] = OrderedDict()
        self._size = 0  # of the segments kept

    # -- logs

    async def read(
        self,
        session_id: UUID,
        *,
        after: int,
        limit: int = PAGE,
        turn_ids: Collection[UUID] | None = None,
        kinds: Collection[str] | None = None,
    ) -> Page:
        """At most ``limit`` events with ``seq > after``, in order; with ``turn_ids`` or ``kinds`` only theirs. Fewer, but at
        least one, if they are large.

        Raises:
            ArtifactCorrupt: what is stored of them is not what was archived.
            StoreUnavailable: the object store is away, and they are there.
            Unavailable: Postgres is away.
        """
        while True:
            through, warm = await archives.read(
                self._db,
                session_id,
                after=after,
                limit=limit,
                most_bytes=PAGE_BYTES,
                turn_ids=turn_ids,
                kinds=kinds,
            )
            if after >= through:
                return warm
            record = await archives.find(self._db, session_id)
            if record is None or record.through_seq < through:
                continue  # restored, or deleted, between the two statements: what is behind ``after`` is there again
            found: list[Event] = []
            size = 0
            try:
                archived = self._archived(session_id, record, after=after, through=through, turn_ids=turn_ids)
                async for event, length in archived:
                    if kinds is not None and event.kind not in kinds:
                        continue
                    if size >= PAGE_BYTES:
                        return Page(found, cut=True)
                    found.append(event)
                    size += length
                    if len(found) == limit:
                        return Page(found)
            except ArtifactCorrupt:
                if await self.counts(session_id, record):
                    raise
                continue
            return Page(found + warm.events[: limit - len(found)], cut=warm.cut)

    async def events(
        self,
        session_id: UUID,
        *,
        after: int = 0,
        through: int | None = None,
        turn_ids: Collection[UUID] | None = None,
        kinds: Collection[str] | None = None,
    ) -> AsyncIterator[Event]:
        """The log from ``after`` (exclusive) to ``through``, page by page; raises as ``read``."""
        while True:
            page = await self.read(session_id, after=after, turn_ids=turn_ids, kinds=kinds)
            for event in page.events:
                if through is not None and event.seq > through:
                    return
                yield event
            if len(page.events) < PAGE and not page.cut:
                return
            after = page.events[-1].seq

    # -- what turns have done

    async def steps(self, turn: TurnRecord, *, after: int = 0, limit: int = 100) -> tuple[list[StepRecord], bool]:
        """The recorded steps of a turn and of those that it retries, in the order of the log: those with ``seq > after``;
        and whether there are more than these because these are large.

        Raises as ``read``.
        """
        turn_ids, first_seq = await steps.chain(self._db, turn)
        after = max(after, first_seq - 1)
        page = await self.read(turn.session_id, after=after, limit=limit, turn_ids=turn_ids, kinds=steps.STEPS)
        return [steps.step_of(event) for event in page.events], page.cut

    async def waiting_for(self, turn: TurnRecord, *, now: datetime) -> list[Wait]:
        """What a waiting turn waits for, in the order in which it began to; raises as ``read``."""
        if turn.continues:  # it is open and so not archived; but what it goes on from may be
            turn_ids, first_seq = await steps.chain(self._db, turn)
            if (await archives.head(self._db, turn.session_id)).archived_through >= first_seq:
                log = self.events(turn.session_id, after=first_seq - 1, turn_ids=turn_ids, kinds=steps.WAITED)
                return steps.waits_of([event async for event in log], turn, now=now)
        return await steps.waiting_for(self._db, turn)

    # -- what folds out of them

    async def context(self, session_id: UUID) -> Context | None:
        """The fold of all archived events of a session; None: none are.

        If only the archived context cannot be read, it is folded from the archived events again.

        Raises:
            ArtifactCorrupt: what is stored is not what was archived.
            StoreUnavailable: the object store is away.
            Unavailable: Postgres is away.
        """
        while True:
            record = await archives.find(self._db, session_id)
            if record is None:
                return None
            try:
                return await self._context(session_id, record)
            except ArtifactCorrupt as error:
                if not await self.counts(session_id, record):
                    continue
                logger.error(
                    "archived context is not what was archived, folded anew",
                    extra={"session_id": session_id.hex, "reason": str(error)},
                )
            context = Context()
            async for event, _ in self._archived(session_id, record, after=0, through=record.through_seq):
                apply(context, event)
            return context

    async def _context(self, session_id: UUID, record: ArchiveRecord) -> Context:
        text = (await self._fetch(record.context_id, tenant_id=record.tenant_id)).decode("utf-8", "replace")
        try:
            context = snapshot.read(text)
        except InvalidInput as error:
            raise ArtifactCorrupt(f"the archived context of session {session_id.hex}: {error}") from None
        if (context.seq, context.event_id) != (record.through_seq, record.event_id):
            raise ArtifactCorrupt(f"the archived context of session {session_id.hex} is of another moment of its log")
        return context

    # -- parts of an archive

    async def counts(self, session_id: UUID, record: ArchiveRecord | None) -> bool:
        """Whether it is still this archive (None: none) that counts.

        Else what is missing of it was released by the next one, or by a restore, while it was read.
        """
        return await archives.find(self._db, session_id) == record

    async def manifest(self, session_id: UUID, record: ArchiveRecord | None) -> Manifest:
        """What the archive of a session consists of; raises as ``read``."""
        if record is None:
            return Manifest(session_id.hex)
        manifest = self._manifests.get(record.manifest_id)
        if manifest is None:
            manifest = Manifest.read(await self._fetch(record.manifest_id, tenant_id=record.tenant_id))
            self._manifests[record.manifest_id] = manifest
        self._manifests.move_to_end(record.manifest_id)
        if len(self._manifests) > MANIFESTS:
            self._manifests.popitem(last=False)
        promised = (session_id.hex, record.through_seq, record.event_id.hex)
        if (manifest.session, manifest.through, manifest.event_id) != promised:
            raise ArtifactCorrupt(f"the manifest of session {session_id.hex} is of another archive")
        return manifest

    async def lines(self, segment: Segment, *, tenant_id: UUID) -> list[str]:
        """A segment, verified, in lines; raises as ``read``."""
        lines = self._segments.get(segment.artifact_id)
        if lines is None:
            data = await self._fetch(segment.artifact_id, tenant_id=tenant_id)
            lines = await asyncio.to_thread(segments.unpack, data, segment)
            if segment.artifact_id not in self._segments:  # nobody else has fetched it meanwhile
                self._segments[segment.artifact_id] = lines
                self._size += _size(lines)
            while self._size > KEPT and len(self._segments) > 1:
                self._size -= _size(self._segments.popitem(last=False)[1])
        if segment.artifact_id in self._segments:
            self._segments.move_to_end(segment.artifact_id)
        return lines

    async def _archived(
        self,
        session_id: UUID,
        record: ArchiveRecord,
        *,
        after: int,
        through: int,
        turn_ids: Collection[UUID] | None = None,
    ) -> AsyncIterator[tuple[Event, int]]:
        """Events, and how long they are."""
        wanted = frozenset(turn_ids) if turn_ids is not None else None
        manifest = await self.manifest(session_id, record)
        for segment in manifest.segments:
            if segment.last_seq <= after or segment.first_seq > through or not segment.concerns(wanted):
                continue
            lines = await self.lines(segment, tenant_id=record.tenant_id)
            part = lines[max(0, after + 1 - segment.first_seq) : through + 1 - segment.first_seq]
            for line in part:
                event = segments.event(line, session_id)
                if wanted is None or event.turn_id in wanted:
                    yield event, len(line)

    async def _fetch(self, artifact_id: UUID, *, tenant_id: UUID) -> bytes:
        try:
            record = await self._cold.find(artifact_id, tenant_id=tenant_id)
        except NotFound as error:
            raise ArtifactCorrupt(f"a part of an archive is missing: {error}") from None
        try:
            return await read_verified(self._cold.store, record.key, sha256=record.sha256)
        except NotFound as error:
            raise ArtifactCorrupt(f"a part of an archive is missing: {error}: restore it from a backup") from None
        except Unavailable as error:
            raise StoreUnavailable(str(error)) from error


def _size(lines: list[str]) -> int:
    return sum(map(len, lines))
