"""The agents that the benchmarks run: they do next to nothing, so that what is measured is Longshift."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from pydantic import BaseModel

from longshift import Turn, agent, step

RESULT = "x" * 256


class Waiter(BaseModel):
    """``tally``: a file that grows by a byte with each step that begins to wait. ``port``: of a silent server."""

    seconds: float
    tally: str
    port: int = 0


class Lags(BaseModel):
    """How late the event loop ran callbacks, in ms; how long a step took meanwhile, in ms."""

    lags: list[float]
    steps: list[float]


@step
async def nothing(number: int) -> str:
    return RESULT


@agent("noop")
async def noop(turn: Turn, number: int) -> int:
    return number


@agent("steps")
async def steps(turn: Turn, count: int) -> int:
    """``count`` steps, one after another, each with a result of 256 characters."""
    for number in range(count):
        await nothing(number)
    return count


@agent("latency")
async def latency(turn: Turn, count: int) -> list[float]:
    """Milliseconds of each of ``count`` steps, as the agent sees them."""
    took = []
    for number in range(count):
        begun = time.perf_counter()
        await nothing(number)
        took.append((time.perf_counter() - begun) * 1000)
    return took


class Beat(BaseModel):
    count: int
    seconds: float


@step
async def beat(seconds: float) -> None:
    await asyncio.sleep(seconds)


@agent("steady")
async def steady(turn: Turn, rhythm: Beat) -> int:
    """Steps of a known length, for as long as it takes to kill its worker."""
    for _ in range(rhythm.count):
        await beat(rhythm.seconds)
    return rhythm.count


@step(timeout=timedelta(hours=2))
async def wait(waiter: Waiter) -> None:
    with open(waiter.tally, "ab", buffering=0) as tally:  # noqa: ASYNC230, PTH123  # a byte
        tally.write(b".")
    if not waiter.port:
        await asyncio.sleep(waiter.seconds)
        return
    reader, writer = await asyncio.open_connection("127.0.0.1", waiter.port)
    try:
        await reader.read(1)
    finally:
        writer.close()


@agent("waits")
async def waits(turn: Turn, waiter: Waiter) -> None:
    """Wait on I/O inside a step: the turn stays in its worker."""
    await wait(waiter)


@agent("sleeps")
async def sleeps(turn: Turn, seconds: float) -> None:
    """Wait between steps: the turn leaves its worker."""
    await turn.sleep(seconds)


@step
async def lateness(seconds: float) -> list[float]:
    loop, end = asyncio.get_running_loop(), time.perf_counter() + seconds
    late = []
    while time.perf_counter() < end:
        due = loop.time() + 0.005
        await asyncio.sleep(0.005)
        late.append((loop.time() - due) * 1000)
    return late


@agent("lag")
async def lag(turn: Turn, seconds: float) -> Lags:
    """How well this worker's loop turns just now."""
    late = await lateness(seconds)
    took = []
    for number in range(100):
        begun = time.perf_counter()
        await nothing(number)
        took.append((time.perf_counter() - begun) * 1000)
    return Lags(lags=late, steps=took)


__all__ = ["RESULT", "lag", "latency", "noop", "sleeps", "steady", "steps", "waits"]
