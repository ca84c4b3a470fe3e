"""The agents of the acceptance tests: loaded by real workers, they write what they do into one append-only file.

``ACCEPTANCE_FOLDER`` names the folder of that file and of the gates at which an agent waits for its test.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from longshift import Turn, agent

FOLDER = Path(os.environ["ACCEPTANCE_FOLDER"])
EFFECTS = os.open(FOLDER / "effects.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
VICTIMS = 20


def note(turn: Turn, what: str, step: str = "", **more: object) -> None:
    """One line, by one write: appends of several processes do not mix."""
    line = {"what": what, "turn": turn.id, "step": step, "attempt": turn.attempt, "pid": os.getpid()}
    os.write(EFFECTS, json.dumps({**line, "at": time.monotonic(), **more}).encode() + b"\n")


async def work(turn: Turn, name: str, value: int, *, seconds: float = 0.02) -> int:
    """A step that takes its time and has an effect: lines when it begins and when it ends."""

    async def run(value: int) -> int:
        note(turn, "begun", name)
        await asyncio.sleep(seconds)
        note(turn, "done", name)
        return 2 * value

    return await turn.step(name, run, value)


async def gate(name: str) -> None:
    """Wait until the test opens the gate."""
    while not (FOLDER / f"gate-{name}").exists():  # noqa: ASYNC110  # made by another process
        await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------- crash after every event


async def five(turn: Turn, n: int) -> dict[str, Any]:
    """Five steps, three of them side by side, a wait that stays, a wait that leaves, state, an artifact."""
    first = await work(turn, "first", n)
    sides = await turn.gather(*(work(turn, f"side-{i}", first + i, seconds=0.05 * (i + 1)) for i in range(3)))
    note(turn, "values", uuid=str(turn.uuid()), random=turn.random.random(), now=turn.now().isoformat())
    await turn.sleep(0.05)
    await turn.state.set("sides", sum(sides))
    page = await turn.artifact("page.md", f"# {sum(sides)}")
    await turn.sleep(2)  # far from the second below which a wait stays: the record of its begin may take its time
    last = await work(turn, "last", int(str(turn.state["sides"])))
    text = (await turn.read(page)).decode()
    return {"value": last, "sides": sides, "artifact": page.sha256, "text": text, "history": len(turn.history)}


undisturbed = agent("five")(five)
for _n in range(1, VICTIMS + 1):
    globals()[f"five_{_n}"] = agent(f"five-{_n}", queue=f"victim-{_n}")(five)


# ------------------------------------------------------------------------------------------------ pauses, order, load


@agent("gated")
async def gated(turn: Turn, name: str) -> int:
    """A step before the gate, one that waits at it, one after it."""
    before = await work(turn, "before", 1)

    async def pass_gate(value: int) -> int:
        note(turn, "begun", "at the gate")
        await gate(name)
        note(turn, "done", "at the gate")
        return value + os.getpid()

    passed = await turn.step("at the gate", pass_gate, before)
    await work(turn, "after", passed)
    return passed


@agent("ordered")
async def ordered(turn: Turn, place: int) -> int:
    note(turn, "entered", session=turn.session_id, place=place)
    await work(turn, "only", place, seconds=0.005)
    note(turn, "left", session=turn.session_id, place=place)
    return place


@agent("loaded")
async def loaded(turn: Turn, n: int) -> int:
    """Steps of 50 to 500 ms, two of them side by side; before them one that waits at the gate of the turn's metadata."""
    if "gate" in turn.metadata:
        await turn.step("start", _start, turn, turn.metadata["gate"])
    value = n
    for i in range(4):
        value = await work(turn, f"step-{i}", value, seconds=0.05 + (n * 7 + i * 13) % 10 * 0.05)
    pair = await turn.gather(*(work(turn, f"pair-{i}", value, seconds=0.05 + (n + i) % 10 * 0.05) for i in range(2)))
    return sum(pair) + await work(turn, "end", value, seconds=0.05)


async def _start(turn: Turn, name: str) -> None:
    note(turn, "begun", "start")
    await gate(name)
    note(turn, "done", "start")


@agent("sleeper")
async def sleeper(turn: Turn, seconds: float) -> int:
    before = await work(turn, "before", 1)
    await turn.sleep(seconds)
    return await work(turn, "after", before)


@agent("breakable")
async def breakable(turn: Turn, name: str) -> int:
    """Fails between two of its steps, until somebody opens the gate."""
    before = await work(turn, "before", 1)
    await turn.say("half way")

    async def needs_gate() -> int:
        note(turn, "begun", "middle")
        if not (FOLDER / f"gate-{name}").exists():
            raise OSError("the gate is shut")
        return 1

    return await work(turn, "after", before + await turn.step("middle", needs_gate))


@agent("noop")
async def noop(turn: Turn, n: int) -> int:
    note(turn, "ran", place=n)
    return n


# --------------------------------------------------------------------------------------------- agents that misbehave


@agent("deaf")
async def deaf(turn: Turn, n: int) -> int:
    """A plain step that never ends, and that nothing can stop."""

    def hang(value: int) -> int:
        note(turn, "begun", "hang")
        threading.Event().wait()
        return value

    return await turn.step("hang", hang, n)


class Strange(BaseException):
    """Neither an Exception nor anything that asyncio knows."""


@agent("poison")
async def poison(turn: Turn, kind: str) -> Any:
    """Fails in ways that frameworks do not expect, each from another place."""
    match kind:
        case "raises BaseException":
            raise Strange("no Exception")
        case "exits":
            sys.exit(3)
        case "exits in a step":
            await turn.step("exits", sys.exit, 3)
        case "exits in an async step":
            await turn.gather(turn.step("exits", _exit, 3))
        case "is cancelled by itself":
            raise asyncio.CancelledError
        case "cancels its own task":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(3600)
        case "returns what is no JSON":
            return object()
        case "recurses":
            return _recurse(0)
        case "raises BaseException in a step":
            await turn.step("strange", _strange)
    return None


@agent("deadly")
async def deadly(turn: Turn, kind: str) -> int:
    """Ends its whole process, after a step: by a signal of its own, by an exit, or by standing in everybody's way."""
    before = await work(turn, "before", 1)
    await gate(turn.metadata["gate"])

    async def end(value: int) -> None:
        note(turn, "begun", "end")
        match kind:
            case "segmentation fault":
                ctypes.string_at(0)
            case "exit":
                os._exit(3)
            case "blocks the loop":
                time.sleep(3600)  # noqa: ASYNC251  # what must not be, is what this is about

    await turn.step("end", end, before)
    return before


async def _exit(code: int) -> None:
    sys.exit(code)


async def _strange() -> None:
    raise Strange("in a step")


def _recurse(depth: int) -> int:
    return _recurse(depth + 1) + 1
