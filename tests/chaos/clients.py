"""What clients do: conversations of several kinds, one after another, drawn from the seed.

A client asks for something, knows how it must end (``Asked``), writes down every state it is shown (``Seen``), and begins
its next conversation when all turns of this one have ended.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from random import Random

import httpx
from uuid_utils.compat import uuid7

from longshift.model import Json
from tests.chaos.edge import Edge, GaveUpError, RefusedError, TooLateError
from tests.chaos.evidence import TERMINAL, Asked, Evidence, Seen, Stream
from tests.chaos.plans import FAULTY, PLAIN, POISON, WORTH, Mischief, Part, Plan

PARTS: tuple[Part, ...] = tuple(WORTH)
FOR_EVER = 3600.0
"""Seconds that nobody waits: such a turn is cancelled, or runs into its deadline."""
POLL = 3
"""Seconds for which a poll is held."""


class Client:
    """One client; ``name`` and ``seed`` decide what it asks for, and in which order."""

    def __init__(self, name: str, edge: Edge, found: Evidence, *, seed: int, poison: bool) -> None:
        self._name = name
        self._edge = edge
        self._found = found
        self._random = Random(f"client {name} {seed}")
        self._number = 0
        self._followers: set[asyncio.Task[None]] = set()
        self._kinds: Mapping[Callable[[], Awaitable[None]], int] = {
            self.talk: 30,
            self.talk_patiently: 14,
            self.batch: 8,
            self.cancel_queued: 8,
            self.cancel_waiting: 7,
            self.cancel_running: 7,
            self.overrun: 8,
            self.later: 8,
            self.misbehave: 5,
            self.poison: 8 if poison else 0,
        }

    async def run(self, stopping: asyncio.Event) -> None:
        """Conversations until ``stopping``; the one under way is finished."""
        try:
            while not stopping.is_set():
                (conversation,) = self._random.choices(list(self._kinds), list(self._kinds.values()))
                try:
                    with suppress(TooLateError):
                        await conversation()
                except RefusedError as error:
                    self._found.unanswered.append(str(error))
                    await asyncio.sleep(1)
        except GaveUpError as error:
            if str(error).startswith("POST"):  # what was accepted is looked at once more, after the run
                self._found.unanswered.append(str(error))
        finally:
            for follower in self._followers:
                follower.cancel()
            await asyncio.gather(*self._followers, return_exceptions=True)

    # -- conversations

    async def talk(self) -> None:
        """Several turns of one session, sent without waiting for each other."""
        session, last = await self._session(), None
        followed = self._random.random() < 0.25
        turns: list[Json] = []
        for _ in range(self._random.randint(1, 5)):
            last = await self._ask_for_work(session, after=last)
            turns.append(last)
            if followed:
                followed = False
                self._follow(session)
        await self._wait(turns)

    async def talk_patiently(self) -> None:
        """Each turn is sent when the one before has ended."""
        session, last = await self._session(), None
        for _ in range(self._random.randint(2, 4)):
            last = await self._ask_for_work(session, after=last)
            await self._wait([last])

    async def batch(self) -> None:
        """Turns for new sessions and, several, for one session of the batch."""
        shared = _new_session()
        plans = [self._plan() for _ in range(self._random.randint(3, 12))]
        lines = [
            {
                "agent": "chaos",
                "input": plan.model_dump(),
                "custom_id": str(place),
                "session_id": shared if place % 3 == 0 else _new_session(),
            }
            for place, plan in enumerate(plans)
        ]
        body = "\n".join(map(json.dumps, lines)).encode()
        batch = await self._edge.submit("/v1/batches", body, key=self._key(), twice=self._twice())
        text = (await self._edge.ask("GET", f"/v1/batches/{batch['id']}/results", params={"all": "true"})).text
        turns = [json.loads(line) for line in text.splitlines()]
        if [turn["custom_id"] for turn in turns] != [str(place) for place in range(len(plans))]:
            self._found.bad_answers.append(f"{batch['id']} has other turns than were sent: {text[:300]}")
        before: dict[str, str] = {}
        for turn, plan in zip(turns, plans, strict=False):
            asked = Asked(turn["id"], turn["session_id"], ("succeeded",), plan.answer, before.get(turn["session_id"]))
            self._found.asked.append(asked)
            before[turn["session_id"]] = turn["id"]
        await self._wait(turns)

    async def cancel_queued(self) -> None:
        """A turn that stands behind another one."""
        session = await self._session()
        first = await self._ask_for_work(session)
        second = await self._ask("chaos-sleeper", FOR_EVER, ("cancelled",), session=session, after=first)
        third = await self._ask_for_work(session, after=second)
        await self._cancel(second)
        await self._wait([first, second, third])

    async def cancel_waiting(self) -> None:
        turn = await self._ask("chaos-sleeper", FOR_EVER, ("cancelled",))
        following = await self._ask_for_work(turn["session_id"], after=turn)
        await self._wait([turn], status="waiting", within=self._random.uniform(0.5, 8))
        await self._cancel(turn)
        await self._wait([turn, following])

    async def cancel_running(self) -> None:
        turn = await self._ask("chaos-long", FOR_EVER, ("cancelled",))
        following = await self._ask_for_work(turn["session_id"], after=turn)
        await self._wait([turn], status="running", within=self._random.uniform(0.5, 8))
        await self._cancel(turn)
        await self._wait([turn, following])

    async def overrun(self) -> None:
        """A deadline that passes while the turn runs, or waits; those behind it go on."""
        agent = self._random.choice(["chaos-sleeper", "chaos-long"])
        turn = await self._ask(agent, FOR_EVER, ("expired",), deadline=_in(self._random.uniform(1, 5)))
        behind = await self._ask(
            "chaos-long", FOR_EVER, ("expired",), session=turn["session_id"], after=turn, deadline=_in(1)
        )
        last = await self._ask_for_work(turn["session_id"], after=behind)
        await self._wait([turn, behind, last])

    async def later(self) -> None:
        """``run_after``: others may overtake it."""
        session = await self._session()
        late = await self._ask_for_work(session, run_after=_in(self._random.uniform(0.5, 4)))
        soon = await self._ask_for_work(session)
        told = await self._ask("chaos-sleeper", FOR_EVER, ("cancelled",), session=session, run_after=_in(FOR_EVER))
        await self._cancel(told)
        await self._wait([late, soon, told])

    async def misbehave(self) -> None:
        """A turn that fails in ways that frameworks do not expect, and an innocent one behind it."""
        kind = self._random.choice(list(FAULTY))
        turn = await self._ask("chaos-mischief", kind, (f"failed:{FAULTY[kind]}",))
        following = await self._ask_for_work(turn["session_id"], after=turn)
        await self._wait([turn, following])

    async def poison(self) -> None:
        """A turn that ends its process whenever it runs, and an innocent one behind it."""
        kind: Mischief = self._random.choice(POISON)
        turn = await self._ask("chaos-mischief", kind, ("failed:crash_loop",))
        following = await self._ask_for_work(turn["session_id"], after=turn)
        await self._wait([turn, following])

    # -- what they are made of

    async def _session(self) -> str:
        """A new one, under an id that the client has chosen: the same request again is the same session."""
        session = _new_session()
        await self._edge.ask("POST", "/v1/sessions", json={"id": session})
        return session

    def _plan(self, parts: Sequence[Part] = PARTS) -> Plan:
        return Plan(n=self._random.randrange(1000), parts=self._random.choices(parts, k=self._random.randint(1, 6)))

    async def _ask_for_work(self, session: str, *, after: Json = None, **more: Json) -> Json:
        """A turn that succeeds."""
        plain = self._random.random() < 0.2
        plan = self._plan(PLAIN if plain else PARTS)
        agent = "chaos-plain" if plain else "chaos"
        ends = ("succeeded",)
        return await self._ask(agent, plan.model_dump(), ends, session=session, after=after, output=plan.answer, **more)

    async def _ask(
        self,
        agent: str,
        value: Json,
        expected: tuple[str, ...],
        *,
        session: str | None = None,
        after: Json = None,
        output: Json = None,
        **more: Json,
    ) -> Json:
        path = f"/v1/sessions/{session}/turns" if session else "/v1/turns"
        body = {"agent": agent, "input": value, **more}
        turn = await self._edge.submit(path, body, key=self._key(), twice=self._twice())
        before = after["id"] if after and "run_after" not in more else None
        poison = "failed:crash_loop" in expected
        self._found.asked.append(Asked(turn["id"], turn["session_id"], expected, output, before, poison))
        self._see(turn)
        return turn

    async def _cancel(self, turn: Json) -> None:
        self._see((await self._edge.ask("POST", f"/v1/turns/{turn['id']}/cancel")).json())

    async def _wait(self, turns: Sequence[Json], *, status: str | None = None, within: float | None = None) -> None:
        """Until all have ended, or have the ``status``; or until ``within`` seconds have passed."""

        async def one(turn: Json) -> None:
            while True:
                seen = await self._edge.get(f"/v1/turns/{turn['id']}", wait=POLL)
                self._see(seen)
                if seen["status"] in TERMINAL or seen["status"] == status:
                    return
                await asyncio.sleep(0.1)

        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                for turn in turns:
                    await one(turn)

    def _see(self, turn: Json) -> None:
        if "status" in turn:  # else it was refused, and that is written down
            self._found.seen.append(Seen(turn["id"], turn["status"], turn["output"]))

    def _follow(self, session: str) -> None:
        """One session at a time: connections are not without number."""
        for earlier in self._followers:
            earlier.cancel()
        task = asyncio.create_task(follow(self._edge, self._found, session))
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    def _twice(self) -> bool:
        return self._random.random() < 0.4

    def _key(self) -> str:
        self._number += 1
        return f"{self._name}-{self._number}"


async def follow(edge: Edge, found: Evidence, session: str) -> None:
    """Every event of the session, across every interruption, until cancelled; what came is written down then."""
    seqs: list[int] = []
    resets = resumed = 0
    try:
        while True:
            try:
                async with edge.stream(f"/v1/sessions/{session}/events", after=seqs[-1] if seqs else 0) as response:
                    kind = ""
                    async for line in response.aiter_lines():
                        name, _, value = line.partition(": ")
                        if name == "event":
                            kind = value
                        resets += line == "event: reset"
                        if name == "data" and kind not in ("open", "delta", "reset", "gap"):
                            seqs.append(json.loads(value)["seq"])
            except httpx.HTTPError:
                pass
            resumed += 1
            await asyncio.sleep(0.5)
    finally:
        found.streams.append(Stream(session, seqs, resets, resumed))


def _new_session() -> str:
    return f"ses_{uuid7().hex}"


def _in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
