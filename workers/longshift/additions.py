"""What a turn adds to its session's context, kept in the order of the log.

Branches replay in an order of their own. Applied as they come, two messages or two writes of one name could end up the
other way round than in the log, and the agent would see something else than its fold (promise P5).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from longshift.events import Context, Kind
from longshift.model import Json


class Additions:
    """Messages and state that the turn says and sets, put where the log has them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._before = len(context.history)
        self._messages: list[int] = []  # order of each message of this turn
        self._written: dict[str, int] = {}  # order of the last write of each name

    def apply(self, kind: Kind, payload: Mapping[str, Json], *, order: int, turn: str) -> None:
        """Let the context include one fact; ``order`` grows along the log."""
        if kind is Kind.MESSAGE_SAID:
            place = bisect_right(self._messages, order)
            self._messages.insert(place, order)
            message = {"role": payload["role"], "content": payload["content"], "turn_id": turn}
            self._context.history.insert(self._before + place, message)
            return
        for name, value in payload.get("set", {}).items():
            if self._is_newest(name, order):
                self._context.state[name] = value
        for name in payload.get("unset", ()):
            if self._is_newest(name, order):
                self._context.state.pop(name, None)

    def _is_newest(self, name: str, order: int) -> bool:
        newest = order >= self._written.get(name, 0)
        if newest:
            self._written[name] = order
        return newest
