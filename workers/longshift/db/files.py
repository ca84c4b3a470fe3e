"""Rows of artifacts, of the blobs that hold their bytes, and of the sessions that refer to them.

Two artifacts of a tenant with the same hash share one blob. Writer and collector meet in the blob's row:

    writer      touch the row (a marked one starts the next generation), upload unless that generation is stored,
                say so, then write the artifact and its reference in a transaction that touches the row again
    collector   mark a row that no artifact refers to, delete the object of that generation, remove the row if it is
                still marked

so that an upload is skipped only if the collector cannot delete what is there, and deleted only if nobody relies on it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.artifacts import object_key
from longshift.db.database import Database
from longshift.db.idempotency import Idempotency, remember
from longshift.model import ArtifactRecord, new_id

_COLUMNS = "a.id, a.tenant_id, a.sha256, b.size, a.content_type, a.name, b.generation, a.created_at"
TOUCH = text("""
INSERT INTO blobs (tenant_id, sha256, size) VALUES (:tenant, :sha256, :size)
ON CONFLICT (tenant_id, sha256) DO UPDATE SET touched_at = clock_timestamp(), state = 'live',
   generation = blobs.generation + CASE WHEN blobs.state = 'deleting' THEN 1 ELSE 0 END,
   stored = blobs.stored AND blobs.state <> 'deleting'
RETURNING generation, stored""")
STORED = text("""
UPDATE blobs SET stored = true
 WHERE tenant_id = :tenant AND sha256 = :sha256 AND generation = :generation AND state = 'live'""")
STANDS = text("""
UPDATE blobs SET touched_at = clock_timestamp()
 WHERE tenant_id = :tenant AND sha256 = :sha256 AND generation = :generation AND state = 'live' AND stored RETURNING 1""")
ADD = text("""
INSERT INTO artifacts (id, tenant_id, sha256, size, content_type, name)
VALUES (:id, :tenant, :sha256, :size, :content_type, :name) ON CONFLICT (id) DO NOTHING""")
REFER = text("""
INSERT INTO artifact_refs (artifact_id, session_id) VALUES (:id, :session) ON CONFLICT DO NOTHING""")
FIND = text(f"""
SELECT {_COLUMNS} FROM artifacts a JOIN blobs b ON b.tenant_id = a.tenant_id AND b.sha256 = a.sha256
 WHERE a.id = :id AND a.tenant_id = :tenant AND b.state = 'live'""")
FIND_ALL = text(f"""
SELECT {_COLUMNS} FROM artifacts a JOIN blobs b ON b.tenant_id = a.tenant_id AND b.sha256 = a.sha256
 WHERE a.id = ANY(CAST(:ids AS uuid[])) AND a.tenant_id = :tenant AND b.state = 'live'""")


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """Bytes to be stored. The same ``id`` again is the same artifact: a repeated step makes no second row."""

    sha256: str
    size: int
    content_type: str
    name: str
    id: UUID = field(default_factory=new_id)


@dataclass(frozen=True, slots=True)
class Touched:
    """The blob as a writer found or made it."""

    generation: int
    stored: bool


async def touch(db: Database, sha256: str, *, tenant_id: UUID, size: int) -> Touched:
    row = (await db.fetch(TOUCH, {"tenant": tenant_id, "sha256": sha256, "size": size}))[0]
    return Touched(row.generation, row.stored)


async def stored(db: Database, sha256: str, *, tenant_id: UUID, generation: int) -> None:
    """The bytes of this generation are there."""
    await db.execute(STORED, {"tenant": tenant_id, "sha256": sha256, "generation": generation})


async def add(
    db: Database,
    artifact: NewArtifact,
    *,
    tenant_id: UUID,
    generation: int,
    session_id: UUID | None = None,
    idempotency: Idempotency | None = None,
) -> tuple[UUID, bool] | None:
    """The artifact's id, and whether an equal request had made it before; None: its blob was collected meanwhile.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    blob = {"tenant": tenant_id, "sha256": artifact.sha256, "generation": generation}
    async with db.transaction() as tx:
        if idempotency is not None:
            known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=artifact.id)
            if known is not None:
                return known, True
        if (await tx.execute(STANDS, blob)).first() is None:
            await tx.rollback()
            return None
        params = {"id": artifact.id, "tenant": tenant_id, "sha256": artifact.sha256, "size": artifact.size}
        await tx.execute(ADD, params | {"content_type": artifact.content_type, "name": artifact.name})
        if session_id is not None:
            await tx.execute(REFER, {"id": artifact.id, "session": session_id})
    return artifact.id, False


async def find(db: Database, artifact_id: UUID, *, tenant_id: UUID) -> ArtifactRecord | None:
    rows = await db.fetch(FIND, {"id": artifact_id, "tenant": tenant_id})
    return _record(rows[0]) if rows else None


async def find_all(db: Database, ids: Collection[UUID], *, tenant_id: UUID) -> dict[UUID, ArtifactRecord]:
    """Those of ``ids`` that the tenant has."""
    rows = await db.fetch(FIND_ALL, {"ids": list(ids), "tenant": tenant_id})
    return {row.id: _record(row) for row in rows}


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
