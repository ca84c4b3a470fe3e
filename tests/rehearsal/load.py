"""What clients ask for during a rehearsal: an open stream of visits, whose pace does not depend on how the fleet does.

Each visit is drawn from the seed; the agents are those of the chaos run, which write down what they do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random

from tests.chaos.clients import PARTS, Client
from tests.chaos.edge import Edge
from tests.chaos.evidence import Evidence
from tests.chaos.plans import Part, Plan

SHORT: Sequence[Part] = ("step", "step", "effect", "say", "step", "thread", "state", "retry", "step")
CAREFUL: Sequence[Part] = ("send", "step", "send")
"""Calls of an irreversible tool, between others."""


class Visitor(Client):
    """All clients of a rehearsal: each visit asks for something and goes; the check reads the end of it."""

    def __init__(self, edge: Edge, found: Evidence, *, seed: int) -> None:
        super().__init__("visitor", edge, found, seed=seed, poison=False)
        self._visits: Mapping[Callable[[], Awaitable[None]], int] = {
            self.ask: 55,
            self.converse: 12,
            self.watch: 3,
            self.think: 10,
            self.pause: 10,
            self.entrust: 10,
        }

    def draw(self) -> Callable[[], Awaitable[None]]:
        return self._random.choices(list(self._visits), list(self._visits.values()))[0]

    async def ask(self) -> None:
        """A turn of some short steps in a new session."""
        await self._work(SHORT, most=14)

    async def converse(self) -> None:
        """Turns of one session, sent without waiting for each other: they must run in this order."""
        session, last = await self._session(), None
        for _ in range(self._random.randint(2, 4)):
            plan = Plan(n=self._random.randrange(1000), parts=self._random.choices(PARTS, k=2))
            last = await self._ask(
                "chaos", plan.model_dump(), ("succeeded",), session=session, after=last, output=plan.answer
            )

    async def watch(self) -> None:
        """The same, and somebody follows the session's events across everything that happens to it."""
        session = await self._session()
        self._follow(session)
        plan = Plan(n=self._random.randrange(1000), parts=["step", "nap", "gather", "step"])
        for _ in range(2):
            await self._ask("chaos", plan.model_dump(), ("succeeded",), session=session, output=plan.answer)

    async def think(self) -> None:
        """One step of seconds, as of a large model."""
        await self._ask("chaos-long", round(self._random.uniform(1, 3), 1), ("succeeded",))

    async def pause(self) -> None:
        """A turn that leaves its worker to wait."""
        await self._ask("chaos-sleeper", round(self._random.uniform(1.1, 4), 1), ("succeeded",), output=1)

    async def entrust(self) -> None:
        """What must not happen twice."""
        await self._work(CAREFUL, most=6)

    async def _work(self, parts: Sequence[Part], *, most: int) -> None:
        count = self._random.randint(1, most)
        plan = Plan(n=self._random.randrange(1000), parts=self._random.choices(parts, k=count))
        await self._ask("chaos", plan.model_dump(), ("succeeded",), output=plan.answer)

    async def leave(self) -> None:
        """Nobody follows any more."""
        for follower in self._followers:
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)


async def visits(visitor: Visitor, *, seed: int, pace: Callable[[], float | None]) -> None:
    """Visits, until ``pace`` says None: it is asked how many shall begin in a second. Returns when all were accepted."""
    random, at = Random(f"arrivals {seed}"), time.monotonic()
    async with asyncio.TaskGroup() as group:
        while (rate := pace()) is not None:
            at += random.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            group.create_task(visitor.draw()())  # type: ignore[arg-type]
