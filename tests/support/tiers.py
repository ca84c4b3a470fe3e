"""The cold tier for tests: objects that rot, and come back from a backup."""

from __future__ import annotations

from uuid import UUID

from longshift.cold import Cold

Kept = tuple[str, bytes]
"""The key of an object, and what it should be."""


async def damage(cold: Cold, artifact_id: UUID, *, tenant_id: UUID, remove: bool = False) -> Kept:
    """Let an artifact's bytes rot, or be gone; what they were."""
    key = (await cold.find(artifact_id, tenant_id=tenant_id)).key
    kept = await cold.store.get(key)
    if remove:
        await cold.store.delete(key)
    else:
        await cold.store.put(key, b"rotten", content_type="text/plain")
    return key, kept


async def mend(cold: Cold, *kept: Kept) -> None:
    for key, data in kept:
        await cold.store.put(key, data, content_type="text/plain")
