"""Reading what sessions have in the cold tier: their archived events, and what folds out of them."""

from __future__ import annotations

from uuid import UUID

from longshift import snapshot
from longshift.cold import Cold
from longshift.db import archives
from longshift.db.database import Database
from longshift.errors import ArtifactCorrupt, InvalidInput
from longshift.events import Context


class Archive:
    """The archived logs of all sessions, for one process."""

    def __init__(self, db: Database, cold: Cold) -> None:
        self._db, self._cold = db, cold

    async def context(self, session_id: UUID) -> Context | None:
        """The fold of all archived events of a session; None: none are.

        Raises:
            ArtifactCorrupt: what is stored is not what was archived.
            Unavailable: the store or Postgres is away.
        """
        found = await archives.find(self._db, session_id)
        if found is None:
            return None
        text = (await self._cold.read(found.context_id, tenant_id=found.tenant_id)).decode()
        try:
            context = snapshot.read(text)
        except InvalidInput as error:
            raise ArtifactCorrupt(f"the archived context of session {session_id.hex}: {error}") from None
        if (context.seq, context.event_id) != (found.through_seq, found.event_id):
            raise ArtifactCorrupt(f"the archived context of session {session_id.hex} is of another moment of its log")
        return context
