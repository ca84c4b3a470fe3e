"""Deleting a tenant: its keys first, so that nothing new comes; then session by session; then what belonged to none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from longshift.cold import Cold
from longshift.db import deletions, keys
from longshift.db.database import Database, chunks
from longshift.db.deletions import TenantRecord
from longshift.errors import InUse, NotFound
from longshift.lifecycle import PIECE, Deleted, Lifecycle
from longshift.mailbox import Mailbox

PAUSE = 0.2
"""Seconds between two looks whether turns that were cancelled have ended."""
LANES = 4
"""Sessions that are deleted at the same time."""


@dataclass(frozen=True, slots=True)
class Removed(Deleted):
    """The same of a tenant, and its keys and batches."""

    keys: int = 0
    batches: int = 0


class Removal:
    """Lists and deletes tenants."""

    def __init__(
        self,
        db: Database,
        cold: Cold,
        lifecycle: Lifecycle,
        mailbox: Mailbox,
        *,
        known_for: timedelta = timedelta(seconds=4),
    ) -> None:
        """``known_for``: so long the API may still take a key that was revoked."""
        self._db, self._cold, self._lifecycle, self._mailbox = db, cold, lifecycle, mailbox
        self._known_for = known_for.total_seconds()

    async def tenants(self) -> list[TenantRecord]:
        return await deletions.tenants(self._db)

    async def delete(self, name: str, *, cancel: bool = False, told: Callable[[int], None] = lambda _: None) -> Removed:
        """Delete the tenant with all that it has; may be repeated if it was interrupted. ``told``: sessions deleted so far.

        Raises:
            NotFound: there is no such tenant.
            InUse: it has open turns, and they are not to be cancelled; nothing was deleted.
            Unavailable: Postgres, or what removes the rest, is away; what was deleted is deleted.
        """
        tenant_id = await keys.find_tenant(self._db, name)
        if not cancel and await deletions.open_turns(self._db, tenant_id, limit=1):
            raise InUse(f"the tenant {name!r} has open turns: wait for their ends, or have them cancelled")
        await deletions.revoke_keys(self._db, tenant_id)
        await asyncio.sleep(self._known_for)
        await self._end_turns(tenant_id)
        removed = await self._sessions(tenant_id, told)
        dropped = await self._cold.drop_tenant(tenant_id)
        rows = await deletions.purge_tenant(self._db, tenant_id, limit=PIECE)
        return Removed(
            sessions=removed.sessions,
            turns=removed.turns + rows["turns"],
            events=removed.events,
            tool_calls=removed.tool_calls,
            approvals=removed.approvals,
            mail=removed.mail,
            checkpoints=removed.checkpoints,
            passages=removed.passages,
            artifacts=removed.artifacts + dropped.artifacts,
            blobs=removed.blobs + dropped.blobs,
            bytes=removed.bytes + dropped.bytes,
            complete=removed.complete,
            keys=rows["api_keys"],
            batches=rows["batches"],
        )

    async def _end_turns(self, tenant_id: UUID) -> None:
        while turns := await deletions.open_turns(self._db, tenant_id):
            await self._mailbox.cancel_turns(turns, tenant_id=tenant_id, reason="its tenant is deleted")
            await asyncio.sleep(PAUSE)

    async def _sessions(self, tenant_id: UUID, told: Callable[[int], None]) -> Deleted:
        removed = Deleted()
        while found := [session async for session in deletions.sessions_of(self._db, tenant_id)]:
            for chunk in chunks(found, size=LANES):
                deleting = (self._delete(session_id, tenant_id=tenant_id) for session_id in chunk)
                for one in await asyncio.gather(*deleting, return_exceptions=True):
                    if isinstance(one, BaseException):
                        raise one
                    removed += one
                told(removed.sessions)
        return removed

    async def _delete(self, session_id: UUID, *, tenant_id: UUID) -> Deleted:
        try:
            return await self._lifecycle.delete(session_id, tenant_id=tenant_id)
        except NotFound:  # somebody else was first
            return Deleted()
