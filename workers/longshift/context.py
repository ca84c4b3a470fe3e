"""Restoring what an agent sees of earlier turns: the newest checkpoint, and the fold of the events after it.

The cost of a restore grows with what is new since the checkpoint, never with the whole history (promise P6): a checkpoint
is written when the events since the last one are larger than it is, so that all checkpoints together cost no more than the
log itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from longshift.db import checkpoints, log
from longshift.db.database import Database
from longshift.events import Context, Event, apply
from longshift.model import Claim

PAGE = 1000
SMALLEST = 16 * 1024
"""Bytes of new events below which a checkpoint is not worth its row."""


@dataclass(slots=True)
class Restored:
    """A context, and whether it would pay to keep a checkpoint of it."""

    context: Context
    new_bytes: int
    checkpoint_bytes: int

    @property
    def worth_keeping(self) -> bool:
        return self.new_bytes > max(SMALLEST, self.checkpoint_bytes)


async def restore(db: Database, session_id: UUID, *, through: int) -> Restored:
    """The fold of events 1 to ``through``."""
    if through <= 0:
        return Restored(Context(), 0, 0)
    found = await checkpoints.latest(db, session_id, through=through)
    context, size = found if found is not None else (Context(), 0)
    fresh = 0
    async for event in events(db, session_id, after=context.seq, through=through):
        apply(context, event)
        fresh += sum(map(len, map(str, event.payload.values())))
    return Restored(context, fresh, size)


async def events(
    db: Database, session_id: UUID, *, after: int, through: int | None = None, turn_ids: Sequence[UUID] | None = None
) -> AsyncIterator[Event]:
    """The log from ``after`` (exclusive) to ``through``, page by page."""
    while True:
        page = await log.read(db, session_id, after=after, limit=PAGE, turn_ids=turn_ids)
        for event in page:
            if through is not None and event.seq > through:
                return
            yield event
        if len(page) < PAGE:
            return
        after = page[-1].seq


async def keep(db: Database, claim: Claim, restored: Restored) -> None:
    """Write a checkpoint if it pays."""
    if restored.worth_keeping:
        await checkpoints.save(db, claim, restored.context)
