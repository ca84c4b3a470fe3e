"""Rows of artifacts: what is known about bytes that are in the cold tier already.

Write the object first, then the row: a row never points to bytes that are not there. Two rows of one tenant with the
same hash share one object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.artifacts import object_key
from longshift.db.database import Database
from longshift.db.idempotency import Idempotency, remember
from longshift.errors import NotFound
from longshift.model import ArtifactRecord, Prefix, new_id, show_id

_COLUMNS = "id, tenant_id, sha256, size, content_type, name, generation, created_at"
ADD = text("""
INSERT INTO artifacts (id, tenant_id, sha256, size, content_type, name)
VALUES (:id, :tenant, :sha256, :size, :content_type, :name)
ON CONFLICT (id) DO NOTHING""")
FIND = text(f"SELECT {_COLUMNS} FROM artifacts WHERE id = :id AND tenant_id = :tenant AND state = 'live'")


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """Bytes just stored. The same ``id`` again is the same artifact: a repeated step makes no second row."""

    sha256: str
    size: int
    content_type: str
    name: str
    id: UUID = field(default_factory=new_id)


def first_key(tenant_id: UUID, sha256: str) -> str:
    """Where the bytes go before ``add`` is called."""
    return object_key(tenant_id, sha256, 1)


async def add(
    db: Database, artifact: NewArtifact, *, tenant_id: UUID, idempotency: Idempotency | None = None
) -> tuple[ArtifactRecord, bool]:
    """The artifact's row, and whether an equal request had made it before.

    Raises:
        IdempotencyMismatch: the key was used with another body.
        NotFound: the id belongs to somebody else.
    """
    artifact_id, replayed = artifact.id, False
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=artifact.id)
            artifact_id, replayed = known or artifact.id, known is not None
        if not replayed:
            await tx.execute(
                ADD,
                {
                    "id": artifact.id,
                    "tenant": tenant_id,
                    "sha256": artifact.sha256,
                    "size": artifact.size,
                    "content_type": artifact.content_type,
                    "name": artifact.name,
                },
            )
    record = await find(db, artifact_id, tenant_id=tenant_id)
    if record is None:
        raise NotFound(f"{show_id(Prefix.ARTIFACT, artifact_id)} cannot be used: choose another id")
    return record, replayed


async def find(db: Database, artifact_id: UUID, *, tenant_id: UUID) -> ArtifactRecord | None:
    rows = await db.fetch(FIND, {"id": artifact_id, "tenant": tenant_id})
    return _record(rows[0]) if rows else None


def _record(row: Row[Any]) -> ArtifactRecord:
    return ArtifactRecord(
        id=row.id,
        tenant_id=row.tenant_id,
        sha256=row.sha256,
        size=row.size,
        content_type=row.content_type,
        name=row.name,
        key=object_key(row.tenant_id, row.sha256, row.generation),
        created_at=row.created_at,
    )
