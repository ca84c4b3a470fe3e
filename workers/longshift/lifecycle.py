"""What becomes of a session that nobody uses: its log moves to the cold tier, comes back, or goes for good.

None of it needs a lease: see ``db.archives`` and ``db.deletions`` for what decides. Everything here may be done by several
processes at once, and may stop at any place: the old state stands or the new one, and what is left over is found by the
sweeper (rows) or by the collector (artifacts).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from uuid import UUID

from longshift import segments, snapshot
from longshift.archive import Archive
from longshift.cold import Cold
from longshift.db import archives, deletions
from longshift.db.archives import ArchiveRecord, Head
from longshift.db.database import Database, chunks
from longshift.errors import ArtifactCorrupt, InUse, LongshiftError
from longshift.events import Context, apply
from longshift.hot import Contexts
from longshift.model import Prefix, new_id, show_id
from longshift.segments import CONTEXT_TYPE, MANIFEST_TYPE, SEGMENT_TYPE, Draft, Manifest, Segment, StoredEvent

logger = logging.getLogger(__name__)
AGAIN = timedelta(minutes=1)
"""After a deletion the sweeper looks so much later for what somebody wrote meanwhile; and again, as long as it is in vain."""
PIECE = 1000
"""Rows of events that are removed or put back in one transaction: about 10 ms."""
READ_BYTES = 4 * 1024 * 1024
"""Of events that are read at a time, about."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What an archiving or a restore has moved: ``events`` of ``through`` in all; ``bytes`` in the cold tier, compressed."""

    events: int
    through: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion has removed, of all tiers.

    Attributes:
        sessions, turns, events, tool_calls, approvals, mail, checkpoints, passages: how many. Events are those of the log,
            archived or not.
        artifacts, blobs: those that no other session needs; ``bytes`` of the blobs.
        complete: False: something was away; the sweeper removes the rest.
    """

    sessions: int = 0
    turns: int = 0
    events: int = 0
    tool_calls: int = 0
    approvals: int = 0
    mail: int = 0
    checkpoints: int = 0
    passages: int = 0
    artifacts: int = 0
    blobs: int = 0
    bytes: int = 0
    complete: bool = True

    def __add__(self, other: Deleted) -> Deleted:
        names = [each.name for each in fields(self) if each.name != "complete"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Deleted(**sums, complete=self.complete and other.complete)


@dataclass(slots=True)
class Sealing:
    """An archive while it is made: the segments before, the new ones, and the fold of all of them."""

    context: Context
    segments: list[Segment]
    added: list[UUID] = field(default_factory=list)


class Lifecycle:
    """Archives, restores and deletes sessions, for one process."""

    def __init__(self, db: Database, cold: Cold, archive: Archive, contexts: Contexts | None = None) -> None:
        """``contexts``: the hot copies, of which a deleted session keeps none; None: there are none."""
        self._db, self._cold, self._archive, self._contexts = db, cold, archive, contexts

    # -- to the cold tier

    async def archive(self, session_id: UUID, *, tenant_id: UUID | None = None) -> Moved:
        """Move the log of an idle session to the cold tier; what is there already stays there.

        Raises:
            NotFound: no such session (of that tenant).
            InUse: it has an open turn, or was used meanwhile.
            ArtifactCorrupt: its log has a gap, or what was archived before cannot be read.
            Unavailable: Postgres or the store is away.
        """
        seen = await archives.head(self._db, session_id, tenant_id=tenant_id)
        if seen.in_use:
            raise InUse(f"{show_id(Prefix.SESSION, session_id)} has an open turn: wait for its end, or cancel it")
        found = await archives.find(self._db, session_id)
        if found is not None and found.through_seq != seen.archived_through:
            raise _changed(session_id)
        moved = Moved(0, seen.last_seq, found.bytes if found is not None else 0)
        if seen.last_seq > seen.archived_through:
            async with self._unchanged(session_id, found):
                moved = await self._seal(session_id, seen, found)
        await self._trim(session_id)
        return moved

    async def _seal(self, session_id: UUID, seen: Head, before: ArchiveRecord | None) -> Moved:
        manifest = await self._archive.manifest(session_id, before)
        context = await self._archive.context(session_id) if before is not None else None
        sealing = Sealing(context or Context(), list(manifest.segments))
        draft = Draft()
        async for event in self._stored(session_id, seen):
            if event.seq != sealing.context.seq + 1:
                raise ArtifactCorrupt(f"the log of session {session_id.hex} has a gap after {sealing.context.seq}")
            draft.add(event)
            apply(sealing.context, event.folded(session_id))
            if draft.full:
                await self._put_segment(sealing, draft, tenant_id=seen.tenant_id)
                draft = Draft()
        if draft.events:
            await self._put_segment(sealing, draft, tenant_id=seen.tenant_id)
        if (sealing.context.seq, sealing.context.event_id) != (seen.last_seq, seen.last_event_id):
            raise _changed(session_id)
        record = await self._put_ends(session_id, sealing, tenant_id=seen.tenant_id)
        if not await archives.seal(self._db, session_id, record, seen=seen, added=sealing.added):
            raise _changed(session_id)
        if before is not None:
            await self._release(session_id, [before.manifest_id, before.context_id], tenant_id=seen.tenant_id)
        return Moved(seen.last_seq - seen.archived_through, record.through_seq, record.bytes)

    async def _stored(self, session_id: UUID, seen: Head) -> AsyncIterator[StoredEvent]:
        """The events that are not archived yet; so many at a time that they take little memory."""
        after, limit = seen.archived_through, 100
        while after < seen.last_seq:
            page = await archives.stored(self._db, session_id, after=after, through=seen.last_seq, limit=limit)
            for event in page:
                yield event
            if not page:
                return
            after = page[-1].seq
            mean = sum(len(event.payload) for event in page) // len(page) + 200
            limit = max(1, min(PIECE, READ_BYTES // mean))

    async def _put_segment(self, sealing: Sealing, draft: Draft, *, tenant_id: UUID) -> None:
        data = await asyncio.to_thread(draft.compressed)
        name = f"events-{draft.events[0].seq}-{draft.events[-1].seq}.jsonl.gz"
        artifact_id = await self._put(sealing, data, tenant_id=tenant_id, name=name, content_type=SEGMENT_TYPE)
        sealing.segments.append(draft.entry(artifact_id, data))

    async def _put_ends(self, session_id: UUID, sealing: Sealing, *, tenant_id: UUID) -> ArchiveRecord:
        """The manifest and the context."""
        through, event_id = sealing.context.seq, sealing.context.event_id
        assert event_id is not None
        manifest = Manifest(session_id.hex, through, event_id.hex, tuple(sealing.segments))
        text = snapshot.write(sealing.context).encode()
        context_id, manifest_id = await asyncio.gather(
            self._put(sealing, text, tenant_id=tenant_id, name="context.txt", content_type=CONTEXT_TYPE),
            self._put(sealing, manifest.write(), tenant_id=tenant_id, name="manifest.json", content_type=MANIFEST_TYPE),
        )
        size = sum(segment.size for segment in sealing.segments)
        return ArchiveRecord(tenant_id, through, event_id, manifest_id, context_id, through, size)

    async def _put(self, sealing: Sealing, data: bytes, *, tenant_id: UUID, name: str, content_type: str) -> UUID:
        """Without a reference: ``seal`` makes it. Until then it is the collector's, if nobody comes to that."""
        artifact_id = new_id()
        await self._cold.put(data, tenant_id=tenant_id, name=name, content_type=content_type, artifact_id=artifact_id)
        sealing.added.append(artifact_id)
        return artifact_id

    async def _release(self, session_id: UUID, artifacts: Sequence[UUID], *, tenant_id: UUID) -> None:
        """Nobody reads these any more. Those that are not released because this process dies go with their session."""
        await self._cold.release(artifacts, tenant_id=tenant_id, session_id=session_id)

    async def _trim(self, session_id: UUID) -> None:
        """Remove the rows of archived events, as long as nobody uses the session; the sweeper comes back to what is left."""
        while await archives.trim(self._db, session_id, limit=PIECE) == PIECE:
            pass

    # -- back

    async def restore(self, session_id: UUID, *, tenant_id: UUID | None = None) -> Moved:
        """Put the archived events of an idle session back into Postgres. A session works without this: it is for one whose
        old events are read again and again, or for who wants to leave the cold tier.

        Raises:
            NotFound: no such session (of that tenant).
            InUse: it has an open turn, or was used meanwhile.
            ArtifactCorrupt: what is stored is not what was archived; nothing has changed.
            Unavailable: Postgres or the store is away.
        """
        seen = await archives.head(self._db, session_id, tenant_id=tenant_id)
        found = await archives.find(self._db, session_id)
        if found is None:
            return Moved(0, seen.last_seq, 0)
        if found.through_seq != seen.archived_through:
            raise _changed(session_id)
        async with self._unchanged(session_id, found):
            manifest = await self._archive.manifest(session_id, found)
            await archives.begin_restore(self._db, session_id)
            # the newest first: what is there if this stops has no gap behind it
            for segment in reversed(manifest.segments):
                lines = await self._archive.lines(segment, tenant_id=seen.tenant_id)
                for piece in reversed(list(chunks(lines, size=PIECE))):
                    events = [segments.stored(line) for line in piece]
                    if not await archives.put_back(self._db, session_id, events, seen=seen):
                        raise _changed(session_id)
        gone = [found.manifest_id, found.context_id, *(segment.artifact_id for segment in manifest.segments)]
        if not await archives.unseal(self._db, session_id, seen=seen):
            raise _changed(session_id)
        await self._release(session_id, gone, tenant_id=seen.tenant_id)
        return Moved(found.events, seen.last_seq, 0)

    @asynccontextmanager
    async def _unchanged(self, session_id: UUID, found: ArchiveRecord | None) -> AsyncIterator[None]:
        """What is missing of an archive, or of a log, because somebody else has archived or restored it is not corrupt."""
        try:
            yield
        except ArtifactCorrupt:
            if not await self._archive.counts(session_id, found):
                raise _changed(session_id) from None
            raise

    # -- for good

    async def delete(
        self, session_id: UUID, *, tenant_id: UUID | None = None, unused_since: datetime | None = None
    ) -> Deleted:
        """Delete a session with all that it has in all tiers. What remains is a tombstone: its id is not given out again.

        Raises:
            NotFound: no such session (of that tenant).
            InUse: it has an open turn, or its turn is the child of one; or it was used after ``unused_since``.
            Unavailable: Postgres is away: nothing was deleted, or all of it will be.
        """
        buried = await deletions.bury(self._db, session_id, again=AGAIN, tenant_id=tenant_id, unused_since=unused_since)
        removed = Deleted(sessions=1, events=buried.events)
        try:
            return removed + await self._purge(session_id, tenant_id=buried.tenant_id, epoch=buried.epoch)
        except LongshiftError as error:
            logger.warning(
                "session deleted, the rest of it is removed later",
                extra={"session_id": session_id.hex, "reason": str(error)},
            )
            return removed + Deleted(complete=False)

    async def finish_deletion(self, session_id: UUID, *, tenant_id: UUID, epoch: int) -> None:
        """For the sweeper: remove what is left of a deleted session.

        Raises:
            LongshiftError: it cannot be done now.
        """
        await deletions.postpone(self._db, session_id, again=AGAIN)
        if not (await self._purge(session_id, tenant_id=tenant_id, epoch=epoch)).complete:
            raise LongshiftError("the copy of its context cannot be removed while Redis is away")
        await deletions.purged(self._db, session_id)

    async def _purge(self, session_id: UUID, *, tenant_id: UUID, epoch: int) -> Deleted:
        forgotten = self._contexts is None or await self._contexts.bury((tenant_id, session_id), epoch=epoch)
        rows = await deletions.purge(self._db, session_id, limit=PIECE)
        dropped = await self._cold.drop(tenant_id=tenant_id, session_ids=[session_id])
        return Deleted(
            turns=rows["turns"],
            tool_calls=rows["tool_calls"],
            approvals=rows["approvals"],
            mail=rows["mail"],
            checkpoints=rows["checkpoints"],
            passages=rows["passages"],
            artifacts=dropped.artifacts,
            blobs=dropped.blobs,
            bytes=dropped.bytes,
            complete=forgotten,
        )


def _changed(session_id: UUID) -> InUse:
    return InUse(f"{show_id(Prefix.SESSION, session_id)} was used, or moved, meanwhile: try again")
