"""The agents that the benchmarks run: they do next to nothing, so that what is measured is Longshift."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Literal

from pydantic import BaseModel

from longshift import Budget, Turn, agent, step
from tests.benchmarks.effects import BEGUN, DONE, note, step_name
from tests.benchmarks.prose import answer

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


@agent("first")
async def first(turn: Turn, nothing: None) -> float:
    """When its first line runs."""
    return time.time()


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


class Work(BaseModel):
    """``steps``: how long each takes, in ms. ``place``: of the turn in its session. ``file``: of the effects.

    ``gate``: a file; while it is not there, the first step does not end.
    """

    steps: list[int]
    file: str
    place: int = 0
    gate: str = ""
    crash: Literal["", "segfault", "exit"] = ""


async def labour(turn: Turn, given: Work) -> int:
    """Steps of known lengths; each writes a line when it begins and when it ends."""

    async def part(number: int) -> int:
        note(given.file, BEGUN, turn, place=given.place, step=number)
        while given.gate and not os.path.exists(given.gate):  # noqa: ASYNC110, ASYNC240, PTH110 - of another process
            await asyncio.sleep(0.1)
        await asyncio.sleep(given.steps[number] / 1000)
        note(given.file, DONE, turn, place=given.place, step=number)
        return number

    for number in range(len(given.steps)):
        await turn.step(step_name(number), part, number)
    return len(given.steps)


@agent("work")
async def work(turn: Turn, given: Work) -> int:
    return await labour(turn, given)


@agent("crowd", queue="crowd")
async def crowd(turn: Turn, given: Work) -> int:
    """On workers of its own; ``crash``: ends its process, every time, when its steps are done."""
    done = await labour(turn, given)
    if given.crash:
        end_process(given.crash)
    return done


@agent("bystander", queue="bystander")
async def bystander(turn: Turn, given: Work) -> int:
    """On workers of its own, too."""
    return await labour(turn, given)


def end_process(how: str) -> None:
    """As a bug in a C extension does, or a library that knows no better."""
    if how == "exit":
        os._exit(3)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants a gigabyte of it
    ctypes.string_at(0)


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


__all__ = ["RESULT", "bystander", "crowd", "lag", "latency", "noop", "sleeps", "steady", "steps", "waits", "work"]


@agent("timer")
async def timer(turn: Turn, seconds: float) -> float:
    """Seconds from the moment at which its sleep was over to its next line."""
    await turn.sleep(seconds)
    return time.time() - turn.now().timestamp()


@agent("listener")
async def listener(turn: Turn, name: str) -> float:
    """Seconds from the moment that the signal says to its next line."""
    sent: float = await turn.wait_for(name)
    return time.time() - sent


@agent("haul")
async def haul(turn: Turn, mebibytes: int) -> int:
    """The bytes of an artifact made of a stream, read back."""

    async def source() -> AsyncIterator[bytes]:
        yield turn.id.encode().ljust(1024 * 1024, b".")
        for _ in range(mebibytes - 1):
            yield bytes(1024 * 1024)

    return sum([len(chunk) async for chunk in turn.stream(await turn.artifact("hauled", source()))])


# -- long sessions

BUDGET = Budget(16_000)


class Said(BaseModel):
    """A user's message: the how-manieth, and its text."""

    number: int
    text: str


@agent("talk")
async def talk(turn: Turn, said: Said) -> str:
    return answer(said.number)


@step
async def think(number: int) -> str:
    return answer(number)


@agent("talk_by_steps")
async def talk_by_steps(turn: Turn, said: Said) -> str:
    return await think(said.number)


@agent("budgeted", budget=BUDGET)
async def budgeted(turn: Turn, said: Said) -> str:
    return answer(said.number)
