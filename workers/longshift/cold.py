"""Artifacts: bytes in the cold tier together with what Postgres knows of them, and the collector of what nobody wants.

How a writer and the collector keep out of each other's way is written at the head of ``db/files.py``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from uuid import UUID

from longshift.artifacts import ArtifactStore, Digest, Spooled, check_range, in_memory, object_key, read_verified
from longshift.db import collection, files
from longshift.db import idempotency as idempotency_keys
from longshift.db.collection import Object, Removed
from longshift.db.database import Database
from longshift.db.files import NewArtifact
from longshift.db.idempotency import Idempotency
from longshift.errors import ArtifactCorrupt, NotFound, Unavailable
from longshift.model import ArtifactRecord, Prefix, new_id, show_id

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""A put that meets the collector each time: after so many rounds something else is wrong."""
GRACE = timedelta(hours=1)
"""A blob without artifacts that no writer has touched for so long was left by one that died."""
RENEW = timedelta(minutes=10)
"""So often an upload under way says that it is."""
QUIET = timedelta(hours=1)
"""So long after an object was deleted an upload may still turn up that its writer has given up: it is deleted once more."""
AT_ONCE = 500
"""Rows of one transaction, and objects between two records of what was deleted."""
ROUNDS = 20
"""Transactions of one kind in one collection: what is left comes with the next."""
DELETES = 8
"""Objects that are deleted at a time."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a deletion has removed: rows of artifacts, blobs that no other artifact shares, and their bytes."""

    artifacts: int = 0
    blobs: int = 0
    bytes: int = 0

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(self.artifacts + other.artifacts, self.blobs + other.blobs, self.bytes + other.bytes)


class Cold:
    """The artifacts of all tenants, for one process."""

    def __init__(
        self,
        db: Database,
        store: ArtifactStore,
        *,
        grace: timedelta = GRACE,
        quiet: timedelta = QUIET,
        renew: timedelta = RENEW,
    ) -> None:
        self._db, self.store = db, store
        self._grace, self._quiet, self._renew = grace, quiet, renew

    # -- writing

    async def put(
        self,
        data: bytes | Spooled,
        *,
        tenant_id: UUID,
        name: str,
        content_type: str,
        artifact_id: UUID | None = None,
        session_id: UUID | None = None,
        idempotency: Idempotency | None = None,
    ) -> tuple[ArtifactRecord, bool]:
        """Store bytes, unless the tenant has them already, and then the row that points to them.

        Two round trips to Postgres, and one to the store if the bytes are new.

        Args:
            data: at rest, for it may have to be sent again.
            tenant_id: whose it is.
            name, content_type: for people and browsers.
            artifact_id: the same id again is the same artifact, so let it depend on the content; None: a new one.
            session_id: which session refers to it: as long as that lives, it stays.
            idempotency: of a client's request, for a new artifact without a session.

        Returns:
            The artifact, and whether an equal request had made it before.

        Raises:
            Unavailable: the store or Postgres is away.
            NotFound: the id belongs to somebody else, or the session was deleted.
            Conflict: an artifact of this id has other bytes.
            IdempotencyMismatch: the key was used with another body.
        """
        if isinstance(data, bytes):
            with await in_memory(data) as body:
                return await self.put(
                    body,
                    tenant_id=tenant_id,
                    name=name,
                    content_type=content_type,
                    artifact_id=artifact_id,
                    session_id=session_id,
                    idempotency=idempotency,
                )
        if idempotency is not None:
            known = await idempotency_keys.recall(self._db, idempotency, tenant_id=tenant_id)
            if known is not None:  # asked first, so that a repeat is not uploaded again
                return await self.find(known, tenant_id=tenant_id), True
        new = NewArtifact(data.sha256, data.size, content_type, name, artifact_id or new_id())
        for _ in range(ATTEMPTS):
            blob = await files.touch(self._db, new.sha256, tenant_id=tenant_id, size=new.size)
            if not blob.stored:
                await self._upload(data, new, tenant_id=tenant_id, generation=blob.generation)
            added = await self._add(
                new, tenant_id=tenant_id, generation=blob.generation, session_id=session_id, idempotency=idempotency
            )
            if isinstance(added, ArtifactRecord):
                return added, False
            if added is not None:
                return await self.find(added, tenant_id=tenant_id), True
            if not blob.stored:
                await files.discard(
                    self._db, new.sha256, tenant_id=tenant_id, generation=blob.generation, size=new.size
                )
        raise Unavailable("the artifact is collected as often as it is stored: try again")

    async def _add(
        self,
        new: NewArtifact,
        *,
        tenant_id: UUID,
        generation: int,
        session_id: UUID | None,
        idempotency: Idempotency | None,
    ) -> ArtifactRecord | UUID | None:
        if idempotency is None:
            return await files.add(self._db, new, tenant_id=tenant_id, generation=generation, session_id=session_id)
        return await files.add_once(self._db, new, idempotency, tenant_id=tenant_id, generation=generation)

    async def _upload(self, data: Spooled, new: NewArtifact, *, tenant_id: UUID, generation: int) -> None:
        """However long it takes, the collector does not take it for abandoned."""
        key = object_key(tenant_id, new.sha256, generation)
        upload = asyncio.ensure_future(self.store.put(key, data, size=new.size, content_type=new.content_type))
        try:
            while not (await asyncio.wait({upload}, timeout=self._renew.total_seconds()))[0]:
                try:
                    await files.touch(self._db, new.sha256, tenant_id=tenant_id, size=new.size)
                except Unavailable:
                    pass  # ``add`` will find out what has become of it
            await upload
        finally:
            upload.cancel()

    # -- reading

    async def find(self, artifact_id: UUID, *, tenant_id: UUID, session_id: UUID | None = None) -> ArtifactRecord:
        """The artifact; a session that reads it keeps it from now on.

        Raises:
            NotFound: the tenant has no such artifact.
        """
        record = await files.find(self._db, artifact_id, tenant_id=tenant_id, session_id=session_id)
        if record is None:
            raise NotFound(f"there is no artifact {show_id(Prefix.ARTIFACT, artifact_id)}")
        return record

    async def find_all(self, ids: Collection[UUID], *, tenant_id: UUID) -> dict[UUID, ArtifactRecord]:
        """Those of ``ids`` that the tenant has."""
        return await files.find_all(self._db, ids, tenant_id=tenant_id)

    async def read(self, artifact_id: UUID, *, tenant_id: UUID, session_id: UUID | None = None) -> bytes:
        """All of it, verified; ``session_id``: who reads it, and keeps it from now on.

        Raises:
            NotFound, ArtifactCorrupt, Unavailable.
        """
        record = await self.find(artifact_id, tenant_id=tenant_id, session_id=session_id)
        try:
            return await read_verified(self.store, record.key, sha256=record.sha256)
        except NotFound:
            record = await self._moved(record, key=record.key)
            return await read_verified(self.store, record.key, sha256=record.sha256)

    async def stream(
        self,
        record: ArtifactRecord,
        *,
        start: int = 0,
        end: int | None = None,
        pause: Callable[[Unavailable], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Bytes ``start`` to ``end`` (excluded) in chunks; like a slice, cut at the end. Of the whole, the last chunk is held
        back until the hash of all is known to be right; a part cannot be verified.

        Args:
            pause: what to do while the store is away, before it goes on where it stopped; None: to raise.

        Raises:
            InvalidInput: no range.
            NotFound, ArtifactCorrupt, Unavailable: also after some chunks, which are of no use then.
        """
        check_range(start, end)
        stop = record.size if end is None else min(end, record.size)
        whole = start == 0 and stop == record.size
        digest, held, position, key = Digest(), b"", start, record.key
        while position < stop:
            try:
                async with aclosing(self.store.stream(key, start=position, end=stop)) as chunks:
                    async for chunk in chunks:
                        position += len(chunk)
                        if whole:
                            digest.update(chunk)
                        if held:
                            yield held
                        held = chunk
                if position < stop:
                    raise ArtifactCorrupt(f"artifact {key!r} has {position:,} bytes, expected {record.size:,}")
            except NotFound:
                key = (await self._moved(record, key=key)).key
            except Unavailable as error:
                if pause is None:
                    raise
                await pause(error)
        if whole and digest.sha256 != record.sha256:
            raise ArtifactCorrupt(f"artifact {key!r} has hash {digest.sha256}, expected {record.sha256}")
        if held:
            yield held

    async def _moved(self, record: ArtifactRecord, *, key: str) -> ArtifactRecord:
        """Where the artifact is now, for nothing is at ``key``: it may have been dropped and put again.

        Raises:
            NotFound: the object is gone, or the artifact.
        """
        now = await self.find(record.id, tenant_id=record.tenant_id)
        if now.key == key:
            raise NotFound(f"the bytes of artifact {show_id(Prefix.ARTIFACT, record.id)} are gone from the store")
        return now

    # -- removing

    async def drop(self, *, tenant_id: UUID, session_ids: Collection[UUID]) -> Dropped:
        """Of deleted sessions: their references, the artifacts that no other session refers to, and their bytes.

        The sessions' deletion must be committed, and have locked their rows FOR UPDATE: nothing is added to them any more.
        If the store does not answer, the collector deletes the objects when it does. May be repeated; bounded transactions.
        """
        if not session_ids:
            return Dropped()
        return await self._all(
            partial(collection.of_sessions, self._db, session_ids, tenant_id=tenant_id, limit=AT_ONCE)
        )

    async def release(self, artifact_ids: Sequence[UUID], *, tenant_id: UUID, session_id: UUID) -> Dropped:
        """The same for some artifacts of a session that lives on and refers to them no more."""
        dropped, objects = Dropped(), list[Object]()
        for first in range(0, len(artifact_ids), AT_ONCE):
            chunk = artifact_ids[first : first + AT_ONCE]
            removed = await collection.of_session(self._db, chunk, tenant_id=tenant_id, session_id=session_id)
            dropped += _count(removed)
            objects += removed.objects
        await self._sweep_now(objects)
        return dropped

    async def drop_tenant(self, tenant_id: UUID) -> Dropped:
        """All artifacts of a tenant that is deleted, whoever refers to them, and their bytes."""
        return await self._all(partial(collection.of_tenant, self._db, tenant_id, limit=AT_ONCE))

    async def _all(self, remove: Callable[[], Awaitable[Removed]]) -> Dropped:
        dropped, objects = Dropped(), list[Object]()
        while (removed := await remove()).looked:
            dropped += _count(removed)
            objects += removed.objects
        await self._sweep_now(objects)
        return dropped

    async def _sweep_now(self, objects: Sequence[Object]) -> None:
        try:
            for first in range(0, len(objects), AT_ONCE):
                await self._sweep(objects[first : first + AT_ONCE])
        except Unavailable as error:
            logger.warning("objects of deleted artifacts are deleted later", extra={"reason": str(error)})

    async def collect(self, *, keep_uploads: timedelta) -> Dropped:
        """One bounded pass of the collector: artifacts that nobody refers to and that are older than ``keep_uploads``, blobs
        that a writer has left, and objects that are to be deleted. Any process may do it at any time; the sweeper's leader does.

        Returns:
            What was removed from Postgres.

        Raises:
            Unavailable: Postgres is away, or the store: what is left comes with the next pass.
        """
        dropped = await self._rounds(partial(collection.loose, self._db, older_than=keep_uploads, limit=AT_ONCE))
        dropped += await self._rounds(partial(collection.orphans, self._db, grace=self._grace, limit=AT_ONCE))
        for _ in range(ROUNDS):
            objects = await collection.fresh(self._db, limit=AT_ONCE)
            await self._sweep(objects)
            if len(objects) < AT_ONCE:
                break
        for _ in range(ROUNDS):
            objects = await collection.stale(self._db, quiet=self._quiet, limit=AT_ONCE)
            await self._sweep(objects, last=True)
            if len(objects) < AT_ONCE:
                break
        return dropped

    async def _rounds(self, remove: Callable[[], Awaitable[Removed]]) -> Dropped:
        dropped = Dropped()
        for _ in range(ROUNDS):
            removed = await remove()
            dropped += _count(removed)
            if removed.looked < AT_ONCE:
                break
        return dropped

    async def _sweep(self, objects: Sequence[Object], *, last: bool = False) -> None:
        """Delete objects and say so. One that cannot be deleted must not keep the others from it.

        Raises:
            Unavailable: the store, or Postgres.
        """
        free, done, left, errors = asyncio.Semaphore(DELETES), list[Object](), list[Object](), list[Unavailable]()

        async def delete(what: Object) -> None:
            async with free:
                if len(errors) > DELETES:  # it is the store, not an object: the next pass goes on
                    return
                try:
                    await self.store.delete(what.key)
                    done.append(what)
                except Unavailable as error:
                    errors.append(error)
                    left.append(what)

        await asyncio.gather(*map(delete, objects))
        if done and last:
            await collection.forget(self._db, done, quiet=self._quiet)
        elif done:
            await collection.swept(self._db, done)
        if left:
            await collection.put_off(self._db, left)
            raise errors[0]


def _count(removed: Removed) -> Dropped:
    return Dropped(removed.artifacts, len(removed.objects), sum(what.size for what in removed.objects))
