"""Giving turns their context when they start, and handing it on when they have ended.

    start:  the lease's own fold -> Redis -> Postgres -> archive (context.restore)          a checkpoint, if it is due
    end:    what the journal has acknowledged, folded                                       a copy to Redis, soon

A copy is of the moment at which a turn had ended: just what the next one needs when it starts, and, if it waits or loses its
worker, each time it comes again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from longshift.context import events, keep, restore
from longshift.db import retries
from longshift.errors import Unavailable
from longshift.events import FOLDED, Context, Event
from longshift.lease import Fold, Lease
from longshift.model import TurnRecord
from longshift.port import Outside

SHORT = 8
"""Events of a new session's log up to which its context is not copied: most such sessions never come again, and if they do,
Postgres reads so few as fast as Redis."""


@dataclass(frozen=True, slots=True)
class Known:
    """What an attempt at a turn begins with.

    Attributes:
        before: the context as of the turn's start.
        recorded: what the turn has recorded so far, and the turns before it that it retries.
    """

    before: Context
    recorded: list[Event]


class Restorer:
    """What a worker's turns know of the turns before them."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._tiers = outside.tiers

    async def restore(self, lease: Lease, record: TurnRecord) -> Known:
        """What a turn knows when an attempt at it starts; from now on the lease has the fold of its log.

        Args:
            lease: of the turn's session. This attempt has not written anything.
            record: the turn as it was before this attempt.

        Raises:
            LeaseLost: the log is not what the claim saw.
            StoreUnavailable: the context, or what is recorded, is in the object store, which is away.
            Unavailable: Postgres is away; the same call may succeed later.
            ArtifactCorrupt, NotFound: the context is in the cold tier, and cannot be had from there.
        """
        first_seq = record.first_seq or lease.seq + 1
        fold = await self._before(
            lease, through=first_seq - 1, event_id=lease.event_id if lease.seq == first_seq - 1 else None
        )
        recorded: list[Event] = []
        if record.attempts > 0 or record.continues:
            recorded = await self._recorded(record, first_seq=first_seq)
        before = fold.context.copy()  # the turn's own, from now on
        lease.rebase(fold)
        if record.first_seq is not None:
            lease.rebase(_continued(fold, recorded, record=record, lease=lease))
        return Known(before, recorded)

    def hand_on(self, lease: Lease) -> None:
        """A turn has ended, durably: let Redis have the context, for whoever runs the next one."""
        contexts = self._tiers.contexts
        if contexts is None or (lease.claim.last_seq == 0 and lease.seq <= SHORT):
            return
        fold = lease.folded(lease.seq, lease.event_id)
        if fold is not None:
            self._copy(lease, fold)

    async def _before(self, lease: Lease, *, through: int, event_id: UUID | None) -> Fold:
        begun = self._outside.clock.monotonic()
        restored = await restore(
            self._outside.db,
            lease.session_id,
            through=through,
            event_id=event_id,
            claim=lease.claim,
            local=lease.folded(through, event_id),
            tiers=self._tiers,
        )
        if restored.tier is not None and self._tiers.metrics is not None:
            took = self._outside.clock.monotonic() - begun
            self._tiers.metrics.contexts.labels(tier=restored.tier.value).inc()
            self._tiers.metrics.restore_seconds.labels(tier=restored.tier.value).observe(took)
        with suppress(Unavailable):
            await keep(self._outside.db, lease.claim, restored.fold, every=self._tiers.checkpoint_events)
        if restored.dear:
            self._copy(lease, restored.fold)
        return restored.fold

    async def _recorded(self, record: TurnRecord, *, first_seq: int) -> list[Event]:
        """What the turn has recorded, after what the turns have that it retries: these may be archived."""
        db, archive, session, turns = self._outside.db, self._tiers.archive, record.session_id, [record.id]
        if record.continues:
            turns, first_seq = await retries.chain(db, session, record.root_turn_id)
            if archive is not None:
                return [event async for event in archive.events(session, after=first_seq - 1, turn_ids=turns)]
        return [event async for event in events(db, session, after=first_seq - 1, turn_ids=turns)]

    def _copy(self, lease: Lease, fold: Fold) -> None:
        if self._tiers.contexts is not None:
            key = lease.claim.tenant_id, lease.session_id
            self._tiers.contexts.put(key, fold.context.copy(), epoch=lease.claim.epoch, kept=fold.kept)


def _continued(fold: Fold, recorded: Sequence[Event], *, record: TurnRecord, lease: Lease) -> Fold | None:
    """The fold of the whole log of a turn that comes again; None if what is recorded of it is not all that is there."""
    for event in recorded:
        if event.turn_id != record.id or event.seq > lease.seq:
            continue
        if event.seq != fold.context.seq + 1:
            return None
        # as it was written; not checked again: an input stands one level deeper here than where it was accepted
        payload = json.dumps(event.payload, ensure_ascii=False, separators=(",", ":")) if event.kind in FOLDED else None
        fold.add(event.seq, event.id, kind=event.kind, payload=payload, turn_id=event.turn_id)
    return fold if fold.is_at(lease.seq, lease.event_id) else None
