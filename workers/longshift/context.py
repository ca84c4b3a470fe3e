"""Restoring what an agent sees of earlier turns: the one place that knows where it may come from, and in which order.

    local   the fold that the lease has with it, if it is of this very event
    hot     a copy in Redis, and the fold of what came after it; never without proof that it is of this history
    warm    the newest checkpoint in Postgres, and the fold of the events after it; without a checkpoint, of all events
    cold    the context that was archived with the log, and the fold of what came after it

Whichever serves, the context is the fold of the log (promise P5). The cost grows with what is new since the copy or the
checkpoint, never with the whole history (P6): a checkpoint is written when the events since the last one are larger than it
would be, so that all checkpoints together cost no more than the log itself, and after so many events, however small they are.

A copy that proves wrong is *drift*: counted by reason, logged as an error, dropped, and what it was to serve is rebuilt.

    unreadable, digest    it is no copy, or some of it has changed
    ahead                 it is of an event that the log does not have, or not yet
    history               where it ends, the log has another event
    fold                  it is another context than the fold of its history (found by LONGSHIFT_HOT_VERIFY)
    local                 the same of the fold that a lease has with it
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import random
from uuid import UUID

from longshift.archive import Archive
from longshift.db import checkpoints, log
from longshift.db.database import Database
from longshift.errors import ArtifactCorrupt, LeaseLost, NotFound, StoreUnavailable
from longshift.events import Context, Event
from longshift.hot import Contexts, Copy
from longshift.lease import Fold
from longshift.metrics import WorkerMetrics
from longshift.model import Claim, Kept

logger = logging.getLogger(__name__)

PAGE = 1000
SMALLEST = 16 * 1024
"""Characters of new events below which a checkpoint is not worth its row."""
EVENTS = 1000
"""The same for their number, unless LONGSHIFT_CHECKPOINT_EVENTS says otherwise."""
DEAR = 100
"""Rows read in Postgres: after so many a copy is made at once, since the turn may come again before it ends."""

DRIFT = "a copy of a context is not the fold of its log, it is rebuilt"
"""What the log of a worker says of each drift."""


class Tier(StrEnum):
    LOCAL = "local"
    HOT = "hot"
    WARM = "warm"
    COLD = "cold"


@dataclass(frozen=True, slots=True)
class Tiers:
    """What contexts come from besides Postgres, in one process.

    Attributes:
        contexts: the hot copies; None: there are none.
        archive: the archived contexts; None: no session that is restored here has been archived.
        metrics: where drift is counted.
        verify: share of the contexts from memory and Redis that are compared with the fold before they are used.
        checkpoint_events: events after which a checkpoint is kept, however small they are; a copy further behind than that
            is not used.
    """

    contexts: Contexts | None = None
    archive: Archive | None = None
    metrics: WorkerMetrics | None = None
    verify: float = 0.0
    checkpoint_events: int = EVENTS


@dataclass(frozen=True, slots=True)
class Restored:
    """A context with its newest checkpoint.

    Attributes:
        tier: which one served; None: there is nothing before the first event.
        rows: what was read from the log.
    """

    fold: Fold
    tier: Tier | None
    rows: int = 0

    @property
    def context(self) -> Context:
        return self.fold.context

    @property
    def dear(self) -> bool:
        """Whether it should not be needed a second time."""
        return self.tier is Tier.COLD or self.rows >= DEAR


async def restore(
    db: Database,
    session_id: UUID,
    *,
    through: int,
    event_id: UUID | None = None,
    claim: Claim | None = None,
    local: Fold | None = None,
    tiers: Tiers | None = None,
) -> Restored:
    """The fold of events 1 to ``through``.

    Args:
        event_id: of event ``through``, if the caller knows it: then a copy of just that event needs no proof by Postgres.
        claim: of the caller, if it has the lease: hot copies are for holders.
        local: a fold that the caller has already, maybe of this event; it may come back in the answer.

    Raises:
        LeaseLost: the log has not, or no longer, this event at this place.
        NotFound: events before it are archived, and ``tiers`` have no archive.
        ArtifactCorrupt: what is stored in the cold tier is not what was archived.
        Unavailable: Postgres or the object store is away. Redis never is: without it all takes longer.
    """
    tiers = tiers or Tiers()
    if through <= 0:
        return Restored(Fold(Context(), Kept()), None)
    wanted = Wanted(session_id, through, event_id)
    if local is not None and event_id is not None and local.is_at(through, event_id):
        return await _verified(db, wanted, Restored(local, Tier.LOCAL), tiers)
    if tiers.contexts is not None and claim is not None:
        found = await _hot(db, wanted, claim, tiers, tiers.contexts)
        if found is not None:
            return found
    return await _rebuilt(db, wanted, tiers)


async def keep(db: Database, claim: Claim, fold: Fold, *, every: int = EVENTS) -> bool:
    """Write a checkpoint if it is due; whether it was."""
    if not is_due(fold, every=every):
        return False
    await checkpoints.save(db, claim, fold.context)
    fold.kept = Kept(fold.context.seq)
    return True


def is_due(fold: Fold, *, every: int = EVENTS) -> bool:
    """Whether a checkpoint pays: ``every`` so many events, or when more has come since the last one than it would have itself.

    So a restore reads at most twice the size of the context that it gives. A session that only grows gets none by its size: its
    log is no longer than a checkpoint would be, and checkpoints would double what it costs.
    """
    seq, kept = fold.context.seq, fold.kept
    if kept.seq < 0:  # without one, the next restore would have to fetch the archive
        return True
    return seq > kept.seq and (kept.fresh > max(SMALLEST, fold.context.size) or seq - kept.seq >= every)


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


# -- where it may come from


@dataclass(frozen=True, slots=True)
class Wanted:
    """The fold of which events: 1 to ``through``, whose id is ``event_id`` if that is known."""

    session_id: UUID
    through: int
    event_id: UUID | None

    def check(self, context: Context) -> None:
        """Raises LeaseLost: this is not the fold that was wanted, because the log has another end."""
        if context.seq != self.through or (self.event_id is not None and context.event_id != self.event_id):
            raise LeaseLost(
                f"the log of session {self.session_id.hex} no longer has the event that was its number {self.through}"
            )


async def _rebuilt(db: Database, wanted: Wanted, tiers: Tiers) -> Restored:
    """From Postgres, and the archive if the log begins there."""
    ground = await checkpoints.ground(db, wanted.session_id, through=wanted.through)
    fold, tier = Fold(ground.context, Kept(ground.context.seq)), Tier.WARM
    if ground.archived_through > ground.context.seq:
        archived = await tiers.archive.context(wanted.session_id) if tiers.archive is not None else None
        if archived is None or archived.seq > wanted.through:
            raise NotFound(
                f"the log of session {wanted.session_id.hex} is archived: event {wanted.through} is not here"
            )
        fold, tier = Fold(archived, Kept(-1, archived.size)), Tier.COLD
    rows = await _extend(db, wanted, fold)
    wanted.check(fold.context)
    return Restored(fold, tier, rows)


async def _hot(db: Database, wanted: Wanted, claim: Claim, tiers: Tiers, contexts: Contexts) -> Restored | None:
    """From Redis; None: there is no copy that could be used."""
    key = claim.tenant_id, claim.session_id
    found = await contexts.get(key)
    if found is None:
        return None
    if isinstance(found, Copy):
        if found.context is None or found.epoch > claim.epoch:  # deleted meanwhile; or it is our claim that is old
            return None
        if wanted.through - found.context.seq > tiers.checkpoint_events:  # a checkpoint is nearer
            return None
        restored = await _continued(db, wanted, Fold(found.context, found.kept))
        if isinstance(restored, Restored):
            verified = await _verified(db, wanted, restored, tiers)
            if verified is not restored:
                await contexts.drop(key, found)
            return verified
        if restored is None:
            return None
        reason = restored
    else:
        reason = found.reason
    _report(tiers, wanted, reason)
    await contexts.drop(key, found)
    return None


async def _continued(db: Database, wanted: Wanted, fold: Fold) -> Restored | str | None:
    """A copy and what came after it; or what is wrong with it; None: what came after it is archived."""
    context = fold.context
    if context.seq > wanted.through:
        return "ahead"
    if context.seq == wanted.through and wanted.event_id is not None:
        return Restored(fold, Tier.HOT) if context.event_id == wanted.event_id else "history"
    try:
        rows = await _extend(db, wanted, fold, prove=True)
    except _Gone:
        return None
    except _OtherHistory:
        return "history"
    wanted.check(context)
    return Restored(fold, Tier.HOT, rows)


async def _extend(db: Database, wanted: Wanted, fold: Fold, *, prove: bool = False) -> int:
    """Fold in what came after; the rows read for it.

    ``prove``: read the event at which the fold stands as well.

    Raises:
        _OtherHistory, _Gone: there is no such proof, and nothing was folded in.
    """
    seq, rows = fold.context.seq, 0
    async for page in checkpoints.tail(db, wanted.session_id, first=seq if prove else seq + 1, through=wanted.through):
        rows += len(page)
        if prove and page and page[0].seq == seq:
            if page[0].id != fold.context.event_id:
                raise _OtherHistory
            page = page[1:]
        elif prove:
            await _prove_by_archive(db, wanted, fold)
        prove = False
        for event in page:
            fold.add(event.seq, event.id, kind=event.kind, payload=event.payload, turn_id=event.turn_id)
    return rows


async def _prove_by_archive(db: Database, wanted: Wanted, fold: Fold) -> None:
    through, event_id = await checkpoints.archived(db, wanted.session_id)
    if through > fold.context.seq:
        raise _Gone
    if not fold.is_at(through, event_id):
        raise _OtherHistory


class _OtherHistory(Exception):
    """The log has another event where the copy ends."""


class _Gone(Exception):
    """The event at which the copy ends is archived, and so is what came after it."""


# -- drift


async def _verified(db: Database, wanted: Wanted, candidate: Restored, tiers: Tiers) -> Restored:
    """``candidate``, or what it should have been; looked at with the probability that is set."""
    if not tiers.verify or random() >= tiers.verify:
        return candidate
    try:
        truth = await _rebuilt(db, wanted, tiers)
    except (StoreUnavailable, ArtifactCorrupt, NotFound) as error:  # the cold tier shall not stop who can do without it
        extra = {"session_id": wanted.session_id.hex, "reason": str(error)}
        logger.warning("a copy of a context cannot be compared with its log", extra=extra)
        return candidate
    differs = _difference(candidate.context, truth.context)
    if not differs:
        return candidate
    _report(tiers, wanted, "local" if candidate.tier is Tier.LOCAL else "fold", differs)
    return truth


def _difference(seen: Context, right: Context) -> dict[str, int]:
    """Where two contexts differ, without anything of what they say; empty: they do not."""
    differs: dict[str, int] = {}
    if seen.messages != right.messages:
        pairs = zip(seen.messages, right.messages, strict=False)
        same = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        differs["messages"], differs["right_messages"] = len(seen.messages), len(right.messages)
        differs["first_message"] = min(len(seen.messages), len(right.messages)) if same is None else same
    if list(seen.remembered.items()) != list(right.remembered.items()):
        wrong = set(seen.remembered.items()) ^ set(right.remembered.items())
        differs["state_names"] = len({name for name, _ in wrong})
    if (seen.seq, seen.event_id) != (right.seq, right.event_id):
        differs["seq"], differs["right_seq"] = seen.seq, right.seq
    return differs


def _report(tiers: Tiers, wanted: Wanted, reason: str, differs: dict[str, int] | None = None) -> None:
    if tiers.metrics is not None:
        tiers.metrics.drift.labels(reason=reason).inc()
    logger.error(
        DRIFT,
        extra={"session_id": wanted.session_id.hex, "reason": reason, "through": wanted.through, **(differs or {})},
    )
