"""Agents that wait for others: signals, approvals, children."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

from longshift import ChildFailed, Turn, WaitTimeout, agent
from tests.acceptance.agents import gate, note, work

MINUTE = timedelta(minutes=1)


@agent("waiting child")
async def child(turn: Turn, n: int) -> int:
    """Waits for a signal if ``n`` is below zero."""
    if n < 0:
        note(turn, "waits")
        await turn.wait_for("go")
    return await work(turn, "only", n)


@agent("waits for everything")
async def everything(turn: Turn, n: int) -> dict[str, Any]:
    """One wait of each kind, with a step between them."""
    first = await turn.wait_for("first")
    doubled = await work(turn, "doubled", n)
    kin = [await turn.spawn(child, doubled + i) for i in range(3)]
    both: list[Awaitable[Any]] = [turn.approval("publish", show={"n": n}, timeout=MINUTE), turn.gather(*kin)]
    verdict, outputs = await turn.gather(*both)
    place, second = await turn.race(turn.wait_for("never"), turn.wait_for("second"))
    try:
        await turn.wait_for("never", timeout=1.5)
    except WaitTimeout:
        last = await work(turn, "last", doubled)
    return {"got": [first, second], "race": place, "granted": verdict.granted, "children": outputs, "last": last}


@agent("gathers")
async def gathers(turn: Turn, count: int) -> list[int]:
    """The first one twice."""
    kin = [await turn.spawn(child, n) for n in range(count)]
    return await turn.gather(*kin, kin[0])


@agent("has a family")
async def family(turn: Turn, end: str) -> str:
    """Two children that wait, and one that has such a child itself; ``end``: how it ends."""
    kin = [await turn.spawn(child, -1) for _ in range(2)]
    if end != "grandchild":
        kin.append(await turn.spawn(family, "grandchild"))  # type: ignore[arg-type]
    note(turn, "spawned")
    if end == "fails":
        await turn.wait_for("fail")
        raise ValueError("as asked")
    try:
        await turn.gather(*kin)
    except ChildFailed as error:
        return error.status
    return "all ended"


@agent("works and waits")
async def works_and_waits(turn: Turn, name: str) -> Any:
    """A branch that waits at a gate, inside a step, and one that waits for a signal."""

    async def listens() -> Any:
        heard = await turn.wait_for("go")
        note(turn, "heard")
        return heard

    return (await turn.gather(listens(), turn.step("at the gate", gate, name)))[0]


@agent("asks")
async def asks(turn: Turn, seconds: float) -> bool:
    """Stops its deadline while it waits."""
    verdict = await turn.approval("publish", timeout=seconds, stops_deadline=True)
    return verdict.granted
