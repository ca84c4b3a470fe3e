"""A client's promise that equal keys mean the same request, kept in the same transaction as what the request makes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.db.database import Database
from longshift.errors import IdempotencyMismatch, Unavailable

REMEMBER = text("""
INSERT INTO idempotency (tenant_id, route, key, request_hash, resource_id) VALUES (:tenant, :route, :key, :hash, :resource)
ON CONFLICT DO NOTHING RETURNING resource_id""")
# a request without a key of its own: only one that is marked as a repeat, and soon enough, is the one before
REMEMBER_UNKEYED = text("""
INSERT INTO idempotency (tenant_id, route, key, request_hash, resource_id) VALUES (:tenant, :route, :key, :hash, :resource)
ON CONFLICT (tenant_id, route, key) DO UPDATE SET resource_id = excluded.resource_id, created_at = clock_timestamp()
 WHERE NOT :repeat OR idempotency.created_at < clock_timestamp() - CAST(:within AS interval)
RETURNING resource_id""")
REMEMBERED = text("""
SELECT request_hash, resource_id FROM idempotency WHERE tenant_id = :tenant AND route = :route AND key = :key
   AND (CAST(:within AS interval) IS NULL OR created_at >= clock_timestamp() - CAST(:within AS interval))""")


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's promise that equal keys mean the same request.

    ``within``: there is no key; the client's library says by itself whether this is a ``repeat`` of an equal request that
    is at most so old.
    """

    route: str
    key: str
    request_hash: bytes
    within: timedelta | None = None
    repeat: bool = False


async def remember(tx: AsyncConnection, promise: Idempotency, *, tenant_id: UUID, resource_id: UUID) -> UUID | None:
    """The resource an equal request made before, else None. Waits for a first request that is still in flight."""
    row = {**_where(promise, tenant_id), "hash": promise.request_hash, "resource": resource_id}
    if promise.within is None:
        new = (await tx.execute(REMEMBER, row)).first()
    else:
        new = (await tx.execute(REMEMBER_UNKEYED, row | {"repeat": promise.repeat})).first()
    if new is not None:
        return None
    found = (await tx.execute(REMEMBERED, _where(promise, tenant_id))).first()
    if found is None:
        raise Unavailable("the idempotency key was just forgotten: send the request again")
    return _same(found, promise)


async def recall(db: Database, promise: Idempotency, *, tenant_id: UUID) -> UUID | None:
    """The resource that an equal request made before: asked first, so that a repeat is not validated again.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    if promise.within is not None and not promise.repeat:
        return None
    rows = await db.fetch(REMEMBERED, _where(promise, tenant_id))
    return _same(rows[0], promise) if rows else None


def _where(promise: Idempotency, tenant_id: UUID) -> dict[str, Any]:
    return {"tenant": tenant_id, "route": promise.route, "key": promise.key, "within": promise.within}


def _same(found: Row[Any], promise: Idempotency) -> UUID:
    if bytes(found.request_hash) != promise.request_hash:
        raise IdempotencyMismatch(f"Idempotency-Key {promise.key!r} was used before with another body: use a new key")
    return UUID(str(found.resource_id))
