"""Telling listeners, by Redis: a turn changed, a log grew, an agent emitted. Lossy, coalesced, never awaited by a turn."""

from __future__ import annotations

import asyncio
from collections import deque
from uuid import UUID

from longshift.hot import Hot, delta_message, log_channel, turn_channel
from longshift.model import TurnStatus

PAUSE = 0.02
"""Seconds between two round trips: what happens in between goes together."""
MOST_DELTAS = 2_000
"""Deltas kept while Redis is slow; older ones are dropped."""
LONGEST_DELTA = 16_384
"""Characters of one delta; the rest of it is cut off. What must arrive belongs into a step's result."""


class Notices:
    """What a worker has to tell, sent by one task."""

    def __init__(self, hot: Hot) -> None:
        self._hot = hot
        self._logs: dict[UUID, int] = {}
        self._turns: dict[UUID, TurnStatus] = {}
        self._deltas: deque[tuple[str, str]] = deque(maxlen=MOST_DELTAS)
        self._rings: dict[bool, list[tuple[UUID, str]]] = {True: [], False: []}  # by whether they go first
        self._something = asyncio.Event()

    def log_grew(self, session_id: UUID, seq: int) -> None:
        self._logs[session_id] = seq
        self._something.set()

    def turn_changed(self, turn_id: UUID, status: TurnStatus) -> None:
        self._turns[turn_id] = status
        self._something.set()

    def delta(self, text: str, *, session_id: UUID, turn_id: UUID, step: str, attempt: int) -> None:
        message = delta_message(text[:LONGEST_DELTA], turn_id=turn_id, step=step, attempt=attempt)
        self._deltas.append((log_channel(session_id), message))
        self._something.set()

    def ring(self, session_id: UUID, queue: str, *, first: bool = False) -> None:
        """Send a wake-up, ``first`` before all others; if it is lost, the sweeper sends another."""
        self._rings[first].append((session_id, queue))
        self._something.set()

    async def run(self) -> None:
        while True:
            await self._something.wait()
            await self.flush()
            await asyncio.sleep(PAUSE)

    async def flush(self) -> None:
        """Send all there is."""
        self._something.clear()
        rings, self._rings = self._rings, {True: [], False: []}
        logs, self._logs = self._logs, {}
        turns, self._turns = self._turns, {}
        deltas = list(self._deltas)
        self._deltas.clear()
        for first, sessions in rings.items():
            await self._hot.ring(sessions, first=first)
        await self._hot.announce(
            [
                *deltas,
                *((log_channel(session_id), f'{{"seq":{seq}}}') for session_id, seq in logs.items()),
                *((turn_channel(turn_id), status.value) for turn_id, status in turns.items()),
            ]
        )
