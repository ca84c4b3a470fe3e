"""The collector's side of what ``files.py`` describes: artifacts that nobody refers to, blobs without artifacts, garbage.

Each function is one bounded pass that may run twice, late, or in several processes at once without harm. What decides is
always looked up under the locks and in a statement of its own: the one that waits for a lock goes on with the snapshot that
it had before, and would not see what the lock's holder has added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.artifacts import object_key
from longshift.db.database import Database

_IDS = "CAST(:ids AS uuid[])"
_HASHES = "SELECT * FROM unnest(CAST(:tenants AS uuid[]), CAST(:hashes AS text[]))"
LOOSE = text("""
SELECT id FROM artifacts WHERE NOT referenced AND created_at < (SELECT clock_timestamp()) - CAST(:age AS interval)
 ORDER BY created_at LIMIT :limit""")
OF_SESSIONS = text("""
SELECT DISTINCT artifact_id AS id FROM (
    SELECT r.artifact_id FROM artifact_refs r JOIN sessions s ON s.id = r.session_id
     WHERE r.session_id = ANY(CAST(:sessions AS uuid[])) AND s.tenant_id = :tenant LIMIT :limit) x""")
OF_TENANT = text("SELECT id FROM artifacts WHERE tenant_id = :tenant LIMIT :limit")
OWNED = text(f"SELECT id FROM artifacts WHERE id = ANY({_IDS}) AND tenant_id = :tenant")

LOCK_BLOBS = text(f"""
SELECT tenant_id, sha256 FROM blobs
 WHERE (tenant_id, sha256) IN (SELECT tenant_id, sha256 FROM artifacts WHERE id = ANY({_IDS}))
 ORDER BY tenant_id, sha256 FOR UPDATE""")
LOCK_ARTIFACTS = text(f"SELECT id FROM artifacts WHERE id = ANY({_IDS}) ORDER BY id FOR UPDATE")
UNREFER = text(f"""
DELETE FROM artifact_refs WHERE artifact_id = ANY({_IDS})
   AND (CAST(:sessions AS uuid[]) IS NULL OR session_id = ANY(CAST(:sessions AS uuid[])))""")
REMOVE = text(f"""
DELETE FROM artifacts a WHERE a.id = ANY({_IDS}) AND (a.tenant_id, a.sha256) IN ({_HASHES})
   AND NOT EXISTS (SELECT FROM artifact_refs r WHERE r.artifact_id = a.id)""")
KEEP = text(f"UPDATE artifacts SET referenced = true WHERE id = ANY({_IDS}) AND NOT referenced")
RETIRE = text(f"""
WITH d AS (
    DELETE FROM blobs b WHERE (b.tenant_id, b.sha256) IN ({_HASHES})
       AND NOT EXISTS (SELECT FROM artifacts a WHERE a.tenant_id = b.tenant_id AND a.sha256 = b.sha256)
    RETURNING tenant_id, sha256, generation, size)
INSERT INTO garbage (tenant_id, sha256, generation, size) SELECT * FROM d
RETURNING tenant_id, sha256, generation, size""")
LOCK_ORPHANS = text("""
SELECT tenant_id, sha256 FROM blobs
 WHERE orphan_since < (SELECT clock_timestamp()) - CAST(:grace AS interval)
 ORDER BY orphan_since LIMIT :limit FOR UPDATE SKIP LOCKED""")
LOCK_ORPHANS_OF = text("""
SELECT tenant_id, sha256 FROM blobs WHERE tenant_id = :tenant ORDER BY sha256 LIMIT :limit FOR UPDATE SKIP LOCKED""")

FRESH = text("""
SELECT tenant_id, sha256, generation, size FROM garbage WHERE NOT swept ORDER BY since LIMIT :limit""")
STALE = text("""
SELECT tenant_id, sha256, generation, size FROM garbage
 WHERE swept AND since < (SELECT clock_timestamp()) - CAST(:quiet AS interval) ORDER BY since LIMIT :limit""")
_THESE = """
(tenant_id, sha256, generation) IN (
    SELECT * FROM unnest(CAST(:tenants AS uuid[]), CAST(:hashes AS text[]), CAST(:generations AS bigint[])))"""
SWEPT = text(f"UPDATE garbage SET swept = true WHERE {_THESE} AND NOT swept")
# what was thrown away once more meanwhile (``since`` is new) needs another round
FORGET = text(f"""
DELETE FROM garbage WHERE {_THESE} AND swept AND since < clock_timestamp() - CAST(:quiet AS interval)""")
PUT_OFF = text(f"UPDATE garbage SET since = clock_timestamp() WHERE {_THESE}")


@dataclass(frozen=True, slots=True)
class Object:
    """An object of the store that is to be deleted."""

    tenant_id: UUID
    sha256: str
    generation: int
    size: int

    @property
    def key(self) -> str:
        return object_key(self.tenant_id, self.sha256, self.generation)


@dataclass(frozen=True, slots=True)
class Removed:
    """What a pass has removed from Postgres; ``objects`` are garbage now. ``looked``: so many candidates there were."""

    artifacts: int
    objects: Sequence[Object]
    looked: int


async def loose(db: Database, *, older_than: timedelta, limit: int) -> Removed:
    """Remove artifacts that no session has ever referred to, once they are ``older_than``."""
    rows = await db.fetch(LOOSE, {"age": older_than, "limit": limit})
    return await _remove(db, [row.id for row in rows], sessions=())


async def of_sessions(db: Database, sessions: Collection[UUID], *, tenant_id: UUID, limit: int) -> Removed:
    """Remove references of ``sessions``, and the artifacts of which those were the last."""
    rows = await db.fetch(OF_SESSIONS, {"sessions": list(sessions), "tenant": tenant_id, "limit": limit})
    return await _remove(db, [row.id for row in rows], sessions=sessions)


async def of_session(db: Database, ids: Collection[UUID], *, tenant_id: UUID, session_id: UUID) -> Removed:
    """The same for some artifacts of one session."""
    rows = await db.fetch(OWNED, {"ids": list(ids), "tenant": tenant_id})
    return await _remove(db, [row.id for row in rows], sessions=[session_id])


async def of_tenant(db: Database, tenant_id: UUID, *, limit: int) -> Removed:
    """Remove artifacts of a tenant whoever refers to them; when there are none, blobs that wait for theirs."""
    rows = await db.fetch(OF_TENANT, {"tenant": tenant_id, "limit": limit})
    if rows:
        removed = await _remove(db, [row.id for row in rows], sessions=None)
        return replace(removed, looked=removed.artifacts)  # whoever repeats this ends, whatever it finds
    async with db.transaction() as tx:
        blobs = (await tx.execute(LOCK_ORPHANS_OF, {"tenant": tenant_id, "limit": limit})).all()
        objects = await _retire(tx, blobs)
    return Removed(0, objects, looked=len(objects))


async def orphans(db: Database, *, grace: timedelta, limit: int) -> Removed:
    """Throw away blobs that have had no artifact, and no writer's touch, for ``grace``."""
    async with db.transaction() as tx:
        blobs = (await tx.execute(LOCK_ORPHANS, {"grace": grace, "limit": limit})).all()
        return Removed(0, await _retire(tx, blobs), looked=len(blobs))


async def _remove(db: Database, ids: Sequence[UUID], *, sessions: Collection[UUID] | None) -> Removed:
    """``sessions``: whose references go; None: all."""
    if not ids:
        return Removed(0, (), looked=0)
    params = {"ids": list(ids)}
    async with db.transaction() as tx:
        blobs = (await tx.execute(LOCK_BLOBS, params)).all()
        await tx.execute(LOCK_ARTIFACTS, params)
        if sessions is None or sessions:
            await tx.execute(UNREFER, params | {"sessions": None if sessions is None else list(sessions)})
        gone = (await tx.execute(REMOVE, params | _hashes(blobs))).rowcount
        if gone < len(ids):
            await tx.execute(KEEP, params)
        objects = await _retire(tx, blobs) if gone else []
    return Removed(gone, objects, looked=len(ids))


async def _retire(tx: AsyncConnection, blobs: Sequence[Row[Any]]) -> list[Object]:
    """Of ``blobs``, whose rows are locked, throw away those that no artifact points to."""
    if not blobs:
        return []
    return _objects((await tx.execute(RETIRE, _hashes(blobs))).all())


def _hashes(blobs: Sequence[Row[Any]]) -> dict[str, Any]:
    return {"tenants": [row.tenant_id for row in blobs], "hashes": [row.sha256 for row in blobs]}


def _objects(rows: Sequence[Row[Any]]) -> list[Object]:
    return [Object(row.tenant_id, row.sha256, row.generation, row.size) for row in rows]


async def fresh(db: Database, *, limit: int) -> list[Object]:
    """Garbage that lies in the store, oldest first."""
    return _objects(await db.fetch(FRESH, {"limit": limit}))


async def stale(db: Database, *, quiet: timedelta, limit: int) -> list[Object]:
    """Garbage that was deleted, and so long ago that no upload is on its way any more: to be deleted once more."""
    return _objects(await db.fetch(STALE, {"quiet": quiet, "limit": limit}))


async def swept(db: Database, objects: Sequence[Object]) -> None:
    """The objects have been deleted; their rows stay until it is quiet."""
    await db.execute(SWEPT, _these(objects))


async def forget(db: Database, objects: Sequence[Object], *, quiet: timedelta) -> int:
    """The objects have been deleted for good; the number of rows."""
    return await db.execute(FORGET, _these(objects) | {"quiet": quiet})


async def put_off(db: Database, objects: Sequence[Object]) -> None:
    """The objects could not be deleted: others go first."""
    await db.execute(PUT_OFF, _these(objects))


def _these(objects: Sequence[Object]) -> dict[str, Any]:
    return {
        "tenants": [o.tenant_id for o in objects],
        "hashes": [o.sha256 for o in objects],
        "generations": [o.generation for o in objects],
    }
