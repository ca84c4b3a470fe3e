"""What must hold in every reachable state, by the names that the test of a variant expects to hear."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from tests.model.state import OPEN, Event, State

ENDS = "P1 an accepted turn can never end"
OLDER = "P2 a holder wrote after a later claim had committed"
EPOCHS = "P2 an older epoch stands after a newer one in the log"
OVERLAP = "P3 turns overlap"
ORDER = "P3 turns started out of order"
OUTSIDE = "P3 an event outside its turn"
TWICE = "P4 a step is twice in the log"
ENDED = "P4 two terminal events"
AGAIN = "P4 the current holder started a recorded step"
GAP = "P7 a gap in seq"
FOOLED = "a rightful holder was told that its lease is lost"
UNTRUE = "an acknowledged event is not in the log"
ROWS = "the rows of session and turns differ from the log"

FINAL = {"finished", "cancelled"}


def violated(state: State) -> str | None:
    """The first promise that does not hold; what concerns a transition has been noted by it in ``broken``."""
    return state.broken or log_violates(state.db.log) or _rows_violate(state)


def done(state: State) -> bool:
    """Every accepted turn has ended, and no lease is left held."""
    return state.db.holder is None and not any(turn.status in OPEN for turn in state.db.turns)


@lru_cache(maxsize=100_000)
def log_violates(log: tuple[Event, ...]) -> str | None:
    if any(event.seq != seq for seq, event in enumerate(log, start=1)):
        return GAP
    if any(a.epoch > b.epoch or a.claim > b.claim for a, b in pairwise(log)):
        return EPOCHS
    seen: set[tuple[int, str]] = set()
    current, last = None, -1
    for event in log:
        if event.kind == "started":
            if event.turn < last:
                return ORDER
            if current not in (None, event.turn):
                return OVERLAP
            current = last = event.turn
        elif event.turn != current:
            return OUTSIDE
        if event.kind in {"a", "b", "signal", *FINAL}:
            key = event.turn, "end" if event.kind in FINAL else event.kind
            if key in seen:
                return ENDED if event.kind in FINAL else TWICE
            seen.add(key)
        if event.kind in FINAL:
            current = None
    return None


def _rows_violate(state: State) -> str | None:
    db = state.db
    if db.open_turns != sum(turn.status in OPEN for turn in db.turns):
        return ROWS
    ended = {event.turn: event.kind for event in db.log if event.kind in FINAL}
    for number, turn in enumerate(db.turns):
        if ended.get(number) != (turn.status if turn.status in FINAL and turn.attempted else None):
            return ROWS
    return None
