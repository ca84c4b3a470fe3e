"""A lease as its holder sees it: which session, under which epoch, where the log ends, and what is still to be written.

In-memory state of a turn is keyed by (session, epoch). Once ``lost`` is set nothing can be written through it any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from longshift.db.log import Done, Write
from longshift.events import NewEvent
from longshift.model import Claim


@dataclass(slots=True, eq=False)
class Entry:
    """One caller's wish: events to append, or (``make``) a write that also changes the turn and stands alone."""

    future: asyncio.Future[Done]
    events: Sequence[NewEvent] = ()
    make: Callable[[int], Write] | None = None

    @property
    def size(self) -> int:
        return sum(len(event.payload) for event in self.events)


@dataclass(slots=True, eq=False)
class Lease:
    """The right to run one session, and the place where its log ends."""

    claim: Claim
    on_lost: Callable[[], None] | None = None
    seq: int = field(init=False)
    event_id: UUID | None = field(init=False)
    lost: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)  # given back by our own write
    queue: deque[Entry] = field(default_factory=deque, init=False)
    unacked: tuple[Write, list[Entry]] | None = field(default=None, init=False)  # sent, answer not yet known
    in_lane: bool = field(default=False, init=False)  # waits for a statement of the journal
    in_flight: bool = field(default=False, init=False)  # is part of a statement right now

    def __post_init__(self) -> None:
        self.seq = self.claim.last_seq
        self.event_id = self.claim.last_event_id

    @property
    def session_id(self) -> UUID:
        return self.claim.session_id

    @property
    def busy(self) -> bool:
        return self.in_lane or self.in_flight or self.unacked is not None

    @property
    def key(self) -> tuple[UUID, int]:
        return self.claim.session_id, self.claim.epoch
