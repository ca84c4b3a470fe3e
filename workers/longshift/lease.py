"""A lease as its holder sees it: which session, under which epoch, where the log ends, what folds out of it, and what is
still to be written.

In-memory state of a turn is keyed by (session, epoch). Once ``lost`` is set nothing can be written through it any more.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from longshift.db.log import Done, Write
from longshift.events import FOLDED, Context, NewEvent, include
from longshift.model import Claim, Kept


@dataclass(slots=True, eq=False)
class Entry:
    """One caller's wish: events to append, or (``make``) a write that also changes the turn and stands alone."""

    future: asyncio.Future[Done]
    events: Sequence[NewEvent] = ()
    make: Callable[[int], Write] | None = None

    @property
    def size(self) -> int:
        return sum(len(event.payload) for event in self.events)


@dataclass(slots=True)
class Fold:
    """A context, and the newest checkpoint behind it."""

    context: Context
    kept: Kept

    def is_at(self, seq: int, event_id: UUID | None) -> bool:
        """Whether this is the fold through just that event: the two together name one history."""
        return (self.context.seq, self.context.event_id) == (seq, event_id)

    def add(self, seq: int, event_id: UUID, *, kind: str, payload: str | None, turn_id: UUID | None) -> None:
        """Fold in one event, or only its place. ``payload`` (JSON text) counts if the kind is one of ``FOLDED``."""
        if payload is not None and kind in FOLDED:
            include(self.context, kind, json.loads(payload), turn_id=turn_id)
            kept = self.kept
            self.kept = Kept(kept.seq, kept.fresh + len(payload))
        self.context.seq, self.context.event_id = seq, event_id


@dataclass(slots=True, eq=False)
class Lease:
    """The right to run one session, and the place where its log ends.

    ``fold`` is the context as of some event at or before that place, and ``since`` what was acknowledged after it and shows
    in contexts. Nothing else can be right: only the journal knows which writes are durable.
    """

    claim: Claim
    on_lost: Callable[[], None] | None = None
    seq: int = field(init=False)
    event_id: UUID | None = field(init=False)
    fold: Fold | None = field(default=None, init=False)  # None: nobody has restored it yet
    since: list[tuple[int, NewEvent]] = field(default_factory=list, init=False)
    lost: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)  # given back by our own write
    queue: deque[Entry] = field(default_factory=deque, init=False)
    unacked: tuple[Write, list[Entry]] | None = field(default=None, init=False)  # sent, answer not yet known
    in_lane: bool = field(default=False, init=False)  # waits for a statement of the journal
    in_flight: bool = field(default=False, init=False)  # is part of a statement right now

    def __post_init__(self) -> None:
        self.seq = self.claim.last_seq
        self.event_id = self.claim.last_event_id
        if self.seq == 0:
            self.fold = Fold(Context(), Kept())

    def acknowledge(self, seq: int, events: Sequence[NewEvent]) -> None:
        """These events are durable: the first of them is number ``seq``."""
        self.since.extend((seq + n, event) for n, event in enumerate(events) if event.kind in FOLDED)
        self.seq, self.event_id = seq + len(events) - 1, events[-1].id

    def rebase(self, fold: Fold | None) -> None:
        """From now on ``fold`` is the one to continue; it belongs to the lease, and is of this log up to where it stands."""
        self.fold = fold
        self.since = [(seq, event) for seq, event in self.since if fold is None or seq > fold.context.seq]

    def folded(self, seq: int, event_id: UUID | None) -> Fold | None:
        """The fold through that event, which is the last one that was acknowledged, or one before it that came after the
        fold; None: there is no fold to continue."""
        fold = self.fold
        if fold is None or event_id is None or fold.context.seq > seq:
            return None
        for place, event in self.since:
            if place <= seq:
                fold.add(place, event.id, kind=event.kind, payload=event.payload, turn_id=event.turn_id)
        self.since = [(place, event) for place, event in self.since if place > seq]
        fold.context.seq, fold.context.event_id = seq, event_id
        return fold

    @property
    def session_id(self) -> UUID:
        return self.claim.session_id

    @property
    def busy(self) -> bool:
        return self.in_lane or self.in_flight or self.unacked is not None

    @property
    def key(self) -> tuple[UUID, int]:
        return self.claim.session_id, self.claim.epoch
