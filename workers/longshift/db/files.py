"""Rows of artifacts, of the blobs that hold their bytes, and of the sessions that refer to them: how they come to be.

Two artifacts of a tenant with the same hash share one blob. Writer and collector (``collection.py``) meet in the blob's row:

    writer      touch: make the row, or find it; upload unless the bytes are there; then ``add``, one statement that locks the
                row, if it is still the same, and writes the artifact and its reference
    collector   locks the row; if no artifact points to it (in a snapshot of its own, after the lock), moves it to
                ``garbage``; only then the object is deleted

so an upload is skipped only for bytes that nobody may delete before ``add`` has looked, and deleted is only what nobody can
rely on: after the move, ``add`` finds no row of its generation, and the writer begins anew. A row made anew has a generation
from a sequence, and with it the object another key: neither a late upload nor a late delete can meet a newer object.

    dies after        what is left                        who takes it away
    touch, upload     a blob without artifacts            the collector, after a grace (a writer at work renews it)
    add               an artifact with its reference      nobody: it is the artifact; a repetition finds it by its id
    the move          a row of garbage                    the next pass of any collector
    the delete        the same                            the same: deleting twice does no harm

An artifact stays as long as a session refers to it; whoever adds a reference locks the artifact's row first (KEY SHARE), the
collector locks it (UPDATE) before it looks for references. Lock order: session, blob by hash, artifacts by id, references.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.artifacts import object_key
from longshift.db.database import Database
from longshift.db.idempotency import Idempotency, remember
from longshift.errors import Conflict, NotFound
from longshift.model import ArtifactRecord, NewTurn, Prefix, new_id, show_id

_NAMED = re.compile(rf"\b{Prefix.ARTIFACT}_([0-9a-f]{{32}})\b")
_COLUMNS = "a.id, a.tenant_id, a.sha256, a.size, a.content_type, a.name, a.created_at"
TOUCH = text("""
INSERT INTO blobs (tenant_id, sha256, size) VALUES (:tenant, :sha256, :size)
ON CONFLICT (tenant_id, sha256) DO UPDATE
   SET orphan_since = CASE WHEN blobs.orphan_since IS NOT NULL THEN clock_timestamp() END
RETURNING generation, stored""")
_ADD = """
b AS MATERIALIZED (
    SELECT b.size, b.generation FROM {holder} blobs b
     WHERE b.tenant_id = :tenant AND b.sha256 = :sha256 AND b.generation = :generation FOR NO KEY UPDATE OF b),
a AS (
    INSERT INTO artifacts (id, tenant_id, sha256, size, content_type, name, referenced)
    SELECT :id, :tenant, :sha256, b.size, :content_type, :name, {referenced} FROM b
    ON CONFLICT (id) DO UPDATE SET referenced = artifacts.referenced OR excluded.referenced
     WHERE artifacts.tenant_id = excluded.tenant_id AND artifacts.sha256 = excluded.sha256
    RETURNING *),
u AS (
    UPDATE blobs SET stored = true, orphan_since = NULL FROM a
     WHERE blobs.tenant_id = a.tenant_id AND blobs.sha256 = a.sha256)"""
ADD = text(f"""
WITH {_ADD.format(holder="", referenced="false")}
SELECT true AS held, EXISTS (SELECT FROM b) AS stands, {_COLUMNS}, (SELECT generation FROM b) AS generation
  FROM (VALUES (1)) one LEFT JOIN a ON true""")
# deleting a session locks its row FOR UPDATE, which waits for this: nothing is added to what is being deleted
_SESSION = "s AS MATERIALIZED (SELECT id FROM sessions WHERE id = :session AND deleted_at IS NULL FOR KEY SHARE)"
ADD_FOR = text(f"""
WITH {_SESSION}, {_ADD.format(holder="s,", referenced="true")},
r AS (INSERT INTO artifact_refs (artifact_id, session_id) SELECT a.id, :session FROM a ON CONFLICT DO NOTHING)
SELECT EXISTS (SELECT FROM s) AS held, EXISTS (SELECT FROM b) AS stands, {_COLUMNS}, (SELECT generation FROM b) AS generation
  FROM (VALUES (1)) one LEFT JOIN a ON true""")
OWNER = text("SELECT tenant_id FROM artifacts WHERE id = :id")
DISCARD = text("""
INSERT INTO garbage (tenant_id, sha256, generation, size)
SELECT :tenant, :sha256, :generation, :size
 WHERE NOT EXISTS (SELECT FROM blobs WHERE tenant_id = :tenant AND sha256 = :sha256 AND generation = :generation)
ON CONFLICT (tenant_id, sha256, generation) DO UPDATE SET since = clock_timestamp(), swept = false""")
FIND = text(f"""
SELECT {_COLUMNS}, b.generation,
       EXISTS (SELECT FROM artifact_refs r WHERE r.artifact_id = a.id AND r.session_id = CAST(:session AS uuid)) AS referred
  FROM artifacts a JOIN blobs b ON b.tenant_id = a.tenant_id AND b.sha256 = a.sha256
 WHERE a.id = :id AND a.tenant_id = :tenant""")
FIND_ALL = text(f"""
SELECT {_COLUMNS}, b.generation FROM artifacts a JOIN blobs b ON b.tenant_id = a.tenant_id AND b.sha256 = a.sha256
 WHERE a.id = ANY(CAST(:ids AS uuid[])) AND a.tenant_id = :tenant""")
REFER = text(f"""
WITH {_SESSION},
a AS MATERIALIZED (
    SELECT a.id FROM s, artifacts a WHERE a.id = :id AND a.tenant_id = :tenant FOR KEY SHARE OF a)
INSERT INTO artifact_refs (artifact_id, session_id) SELECT a.id, :session FROM a ON CONFLICT DO NOTHING""")
REFER_ALL = text("""
WITH a AS MATERIALIZED (
    SELECT id FROM artifacts WHERE id = ANY(CAST(:artifact AS uuid[])) AND tenant_id = :tenant ORDER BY id FOR KEY SHARE)
INSERT INTO artifact_refs (artifact_id, session_id)
SELECT DISTINCT r.artifact_id, r.session_id
  FROM unnest(CAST(:artifact AS uuid[]), CAST(:session AS uuid[])) AS r(artifact_id, session_id)
  JOIN a ON a.id = r.artifact_id ORDER BY 1, 2
ON CONFLICT DO NOTHING""")


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
    """From now on, and for a grace, the blob is not collected for want of artifacts."""
    row = (await db.fetch(TOUCH, {"tenant": tenant_id, "sha256": sha256, "size": size}))[0]
    return Touched(row.generation, row.stored)


async def add(
    db: Database, artifact: NewArtifact, *, tenant_id: UUID, generation: int, session_id: UUID | None = None
) -> ArtifactRecord | None:
    """The bytes of this generation are there: write the artifact. None: the blob was collected meanwhile.

    Raises:
        NotFound: the session was deleted, or the artifact's id belongs to another tenant.
        Conflict: an artifact of this id has other bytes.
    """
    statement, params = _addition(artifact, tenant_id=tenant_id, generation=generation, session_id=session_id)
    (row,) = await db.fetch(statement, params)
    if row.held and row.stands and row.id is None:
        await _refuse(db, artifact.id, tenant_id=tenant_id)
    return _added(row, session_id)


async def add_once(
    db: Database, artifact: NewArtifact, idempotency: Idempotency, *, tenant_id: UUID, generation: int
) -> ArtifactRecord | UUID | None:
    """The same for a client's request, for which the id of what an equal request made is another answer.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    statement, params = _addition(artifact, tenant_id=tenant_id, generation=generation, session_id=None)
    async with db.transaction() as tx:
        known = await remember(tx, idempotency, tenant_id=tenant_id, resource_id=artifact.id)
        if known is not None:
            return known
        record = _added((await tx.execute(statement, params)).one(), None)
        if record is None:
            await tx.rollback()
        return record


def _addition(
    artifact: NewArtifact, *, tenant_id: UUID, generation: int, session_id: UUID | None
) -> tuple[Any, dict[str, Any]]:
    params = {
        "id": artifact.id,
        "tenant": tenant_id,
        "sha256": artifact.sha256,
        "generation": generation,
        "content_type": artifact.content_type,
        "name": artifact.name,
    }
    return (ADD, params) if session_id is None else (ADD_FOR, params | {"session": session_id})


def _added(row: Row[Any], session_id: UUID | None) -> ArtifactRecord | None:
    if not row.held and session_id is not None:
        raise NotFound(
            f"there is no session {show_id(Prefix.SESSION, session_id)} any more that could keep an artifact"
        )
    return _record(row) if row.stands and row.id is not None else None


async def _refuse(db: Database, artifact_id: UUID, *, tenant_id: UUID) -> None:
    """Nothing was written, for the id is taken; if it is free by now, the caller may try again."""
    name = show_id(Prefix.ARTIFACT, artifact_id)
    found = await db.fetch(OWNER, {"id": artifact_id})
    if found and found[0].tenant_id != tenant_id:
        raise NotFound(f"{name} cannot be used: it belongs to somebody else")
    if found:
        raise Conflict(f"artifact {name} has other bytes, and never changes: give new ones an id of their own")


async def discard(db: Database, sha256: str, *, tenant_id: UUID, generation: int, size: int) -> None:
    """The object of a generation that is gone may have been written again meanwhile: let the collector delete it. Of one that
    stands (its artifact's id was taken, and is free again) nothing is thrown away."""
    params = {"tenant": tenant_id, "sha256": sha256, "generation": generation, "size": size}
    await db.execute(DISCARD, params)


async def find(
    db: Database, artifact_id: UUID, *, tenant_id: UUID, session_id: UUID | None = None
) -> ArtifactRecord | None:
    """The artifact. ``session_id``: a session that reads it, and so refers to it from now on."""
    params = {"id": artifact_id, "tenant": tenant_id, "session": session_id}
    rows = await db.fetch(FIND, params)
    if not rows:
        return None
    if session_id is not None and not rows[0].referred:
        await db.execute(REFER, params)
    return _record(rows[0])


async def find_all(db: Database, ids: Collection[UUID], *, tenant_id: UUID) -> dict[UUID, ArtifactRecord]:
    """Those of ``ids`` that the tenant has."""
    rows = await db.fetch(FIND_ALL, {"ids": list(ids), "tenant": tenant_id})
    return {row.id: _record(row) for row in rows}


def named_in(written: str) -> set[UUID]:
    """The artifacts that are named in a JSON text, wherever in it."""
    return {UUID(digits) for digits in _NAMED.findall(written)}


def kept_by(turn: NewTurn, written: str) -> set[UUID]:
    """The artifacts that a new turn lets its session keep: what its input names, and the input itself if it is large.
    ``written``: the input as it stands in its row."""
    if turn.input_artifact is not None:
        return {turn.input_artifact, *turn.named}
    return named_in(written)


async def refer(tx: AsyncConnection, named: Iterable[tuple[UUID, Collection[UUID]]], *, tenant_id: UUID) -> None:
    """Let sessions, whose rows this transaction has locked, keep artifacts; those that the tenant has not are passed over.

    Args:
        named: (session, its artifacts).
    """
    pairs = [(artifact, session) for session, artifacts in named for artifact in artifacts]
    if pairs:
        artifacts, sessions = zip(*pairs, strict=True)
        params = {"tenant": tenant_id, "artifact": list(artifacts), "session": list(sessions)}
        await tx.execute(REFER_ALL, params)


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
