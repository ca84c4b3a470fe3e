"""What a turn adds to its session's context, kept in the order of the log.

Branches replay in an order of their own. Applied as they come, two messages or two writes of one name could end up the
other way round than in the log, and the agent would see something else than its fold (promise P5).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from uuid import UUID

from longshift.events import Context, Kind, include
from longshift.model import Json

Fact = tuple[int, Kind, Mapping[str, Json]]
"""What joins a context: its place in the log, grows along it; what it is; what it says."""


class Additions:
    """Messages and state that the turn says and sets, put where the log has them."""

    def __init__(self, context: Context, *, turn_id: UUID) -> None:
        self._context, self._turn_id = context, turn_id
        self._before = context.copy()
        self._facts: list[Fact] = []

    def apply(self, kind: Kind, payload: Mapping[str, Json], *, order: int) -> None:
        """Let the context include one fact; ``order`` grows along the log."""
        place = bisect_right(self._facts, order, key=lambda fact: fact[0])
        self._facts.insert(place, (order, kind, payload))
        if place == len(self._facts) - 1:
            include(self._context, kind, payload, turn_id=self._turn_id)
        else:
            self._fold_again()

    def whole(self, ahead: Iterable[Fact]) -> Context:
        """The context with what is in the log, too, of which the replay has not come to yet (``ahead``)."""
        facts = [*self._facts, *ahead]
        return self._context if len(facts) == len(self._facts) else self._fold(sorted(facts, key=lambda fact: fact[0]))

    def _fold_again(self) -> None:
        again = self._fold(self._facts)
        self._context.messages, self._context.remembered = again.messages, again.remembered

    def _fold(self, facts: Iterable[Fact]) -> Context:
        again = self._before.copy()
        for _, kind, payload in facts:
            include(again, kind, payload, turn_id=self._turn_id)
        return again
