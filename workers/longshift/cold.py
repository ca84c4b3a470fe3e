"""Artifacts: bytes in the cold tier together with what Postgres knows of them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection
from uuid import UUID

from longshift.artifacts import ArtifactStore, Spooled, object_key, read_verified, stream_verified
from longshift.db import files
from longshift.db.database import Database
from longshift.db.files import NewArtifact
from longshift.db.idempotency import Idempotency
from longshift.errors import NotFound, Unavailable
from longshift.model import ArtifactRecord, Prefix, new_id, show_id

ATTEMPTS = 5
"""A put that meets the collector each time: after so many rounds something else is wrong."""


class Cold:
    """The artifacts of all tenants, for one process."""

    def __init__(self, db: Database, store: ArtifactStore) -> None:
        self._db, self.store = db, store

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

        Args:
            data: at rest, for it may have to be sent again.
            tenant_id: whose it is.
            name, content_type: for people and browsers.
            artifact_id: the same id again is the same artifact; None: a new one.
            session_id: which session refers to it: as long as that lives, it stays.
            idempotency: of the client's request.

        Returns:
            The artifact, and whether an equal request had made it before.

        Raises:
            Unavailable: the store or Postgres is away.
            NotFound: the id belongs to somebody else.
            IdempotencyMismatch: the key was used with another body.
        """
        sha256 = data.sha256 if isinstance(data, Spooled) else hashlib.sha256(data).hexdigest()
        size = data.size if isinstance(data, Spooled) else len(data)
        new = NewArtifact(sha256, size, content_type, name, artifact_id or new_id())
        for _ in range(ATTEMPTS):
            blob = await files.touch(self._db, sha256, tenant_id=tenant_id, size=size)
            if not blob.stored:
                key = object_key(tenant_id, sha256, blob.generation)
                await self.store.put(key, data, size=size, content_type=content_type)
                await files.stored(self._db, sha256, tenant_id=tenant_id, generation=blob.generation)
            added = await files.add(
                self._db,
                new,
                tenant_id=tenant_id,
                generation=blob.generation,
                session_id=session_id,
                idempotency=idempotency,
            )
            if added is not None:
                return await self.find(added[0], tenant_id=tenant_id), added[1]
        raise Unavailable("the artifact is collected as often as it is stored: try again")

    async def find(self, artifact_id: UUID, *, tenant_id: UUID) -> ArtifactRecord:
        """
        Raises:
            NotFound: the tenant has no such artifact.
        """
        record = await files.find(self._db, artifact_id, tenant_id=tenant_id)
        if record is None:
            raise NotFound(f"there is no artifact {show_id(Prefix.ARTIFACT, artifact_id)}")
        return record

    async def find_all(self, ids: Collection[UUID], *, tenant_id: UUID) -> dict[UUID, ArtifactRecord]:
        """Those of ``ids`` that the tenant has."""
        return await files.find_all(self._db, ids, tenant_id=tenant_id)

    async def read(self, artifact_id: UUID, *, tenant_id: UUID) -> bytes:
        """All of it, verified.

        Raises:
            NotFound, ArtifactCorrupt, Unavailable.
        """
        record = await self.find(artifact_id, tenant_id=tenant_id)
        return await read_verified(self.store, record.key, sha256=record.sha256)

    async def stream(self, artifact_id: UUID, *, tenant_id: UUID) -> AsyncIterator[bytes]:
        """The same in chunks; the last one is held back until the whole is known to be right."""
        record = await self.find(artifact_id, tenant_id=tenant_id)
        async for chunk in stream_verified(self.store, record.key, sha256=record.sha256):
            yield chunk
