"""What the workers run: agents that write down what they do, and some that no worker would want.

``CHAOS_FOLDER`` names the folder of ``effects.jsonl``, into which every line goes by one write, so that the order of lines
is the order of what happened, whichever process did it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from longshift import Absent, Done, Retry, StepFailed, ToolCall, Turn, agent, step, tool
from tests.chaos.plans import Mischief, Part, Plan, context_of

EFFECTS = os.open(Path(os.environ["CHAOS_FOLDER"]) / "effects.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
PATIENT = 120
"""Tries at an object store that fails for some seconds."""


def note(turn: Turn, what: str, name: str = "", **more: object) -> None:
    line = {"what": what, "turn": turn.id, "step": name, "attempt": turn.attempt, "pid": os.getpid()}
    os.write(EFFECTS, json.dumps({**line, "at": time.monotonic(), **more}).encode() + b"\n")


def see(turn: Turn, what: str) -> None:
    history = [dict(message) for message in turn.history]
    note(turn, what, context=context_of(history, dict(turn.state)), session=turn.session_id)


# ------------------------------------------------------------------------------------------------------ the good ones


@agent("chaos")
async def chaos(turn: Turn, plan: Plan) -> int:
    """The parts of the plan, one after another."""
    see(turn, "entered")
    value = plan.n
    for place, part in enumerate(plan.parts):
        value += await PARTS[part](turn, f"{place}-{part}", value)
    see(turn, "left")
    return value


@agent("chaos-plain")
def chaos_plain(turn: Turn, plan: Plan) -> int:
    """The same in a thread."""
    see(turn, "entered")
    value = plan.n
    for place, part in enumerate(plan.parts):
        value += turn.sync(PARTS[part](turn, f"{place}-{part}", value))
    see(turn, "left")
    return value


async def _step(turn: Turn, name: str, value: int) -> int:
    async def run(value: int) -> int:
        note(turn, "begun", name)
        await asyncio.sleep(0.05 + value * 37 % 10 * 0.05)
        note(turn, "done", name)
        return 1

    return await turn.step(name, run, value)


async def _effect(turn: Turn, name: str, value: int) -> int:
    """Calls a service that does nothing twice for the same key: one made before the step, one within it."""
    before = str(turn.uuid())

    async def run(value: int) -> int:
        note(turn, "begun", name)
        note(turn, "effect", f"{name}, key from before", key=before)
        note(turn, "effect", f"{name}, key from within", key=str(turn.uuid()))
        await asyncio.sleep(0.1)
        note(turn, "done", name)
        return 1

    return await turn.step(name, run, value)


async def _gather(turn: Turn, name: str, value: int) -> int:
    async def after_a_nap() -> int:
        await turn.sleep(0.1)
        return await _step(turn, f"{name}-2", value)

    return sum(await turn.gather(_step(turn, f"{name}-0", value), _step(turn, f"{name}-1", value + 1), after_a_nap()))


async def _nap(turn: Turn, name: str, value: int) -> int:
    await turn.sleep(0.2)
    return 0


async def _sleep(turn: Turn, name: str, value: int) -> int:
    """Long enough to leave the worker."""
    await turn.sleep(1.1)
    return 0


async def _state(turn: Turn, name: str, value: int) -> int:
    await turn.state.set(f"last-{value % 3}", {"value": value, "name": name})
    await turn.state.set("turns", int(str(turn.state.get("turns", 0))) + 1)
    if value % 5 == 0:
        await turn.state.unset(f"last-{(value + 1) % 3}")
    return 0


async def _say(turn: Turn, name: str, value: int) -> int:
    await turn.say({"name": name, "value": value})
    return 0


async def _artifact(turn: Turn, name: str, value: int) -> int:
    """Bytes into the cold tier and out again, with the patience that a store needs which fails for some seconds."""
    text = f"{turn.id} {name} {value}"
    for left in reversed(range(PATIENT)):
        try:
            page = await turn.artifact(f"{name}.txt", text)
            break
        except StepFailed:
            if not left:
                raise
            await turn.sleep(0.5)
    back = await turn.step(f"{name}-read", read_back, turn, page.id)
    assert back == text, f"wrote {text!r}, read {back!r}"
    return 1


@step(retry=Retry(attempts=PATIENT, longest=timedelta(seconds=1)))
async def read_back(turn: Turn, artifact: str) -> str:
    return (await turn.read(artifact)).decode()


async def _thread(turn: Turn, name: str, value: int) -> int:
    def run(value: int) -> int:
        note(turn, "begun", name)
        time.sleep(0.1)
        note(turn, "done", name)
        return 1

    return await turn.step(name, run, value)


async def _retry(turn: Turn, name: str, value: int) -> int:
    """Fails at its first try, whoever tries."""
    tries = 0

    @step(retry=Retry(attempts=3, first=timedelta(milliseconds=50)))
    async def run(value: int) -> int:
        nonlocal tries
        tries += 1
        note(turn, "begun", name, tries=2)
        if tries == 1:
            raise ConnectionError("the first try always fails")
        note(turn, "done", name)
        return 1

    return await turn.step(name, run, value)


async def _values(turn: Turn, name: str, value: int) -> int:
    note(turn, "value", name, value=[str(turn.uuid()), turn.random.random(), turn.now().isoformat()])
    return 0


def sent(call: ToolCall, turn: str, name: str) -> Done[int] | Absent:
    """The file says what was sent."""
    lines = map(json.loads, (Path(os.environ["CHAOS_FOLDER"]) / "effects.jsonl").read_text().splitlines())
    return Done(1) if any(line["what"] == "sent" and line["key"] == call.key for line in lines) else Absent()


# Of a worker that vanishes unseen it is certain only after timeout and time-to-live that its call comes to nothing: together
# that must be longer than a freeze, or a worker could be stopped between the question whether it may call, and the call.
@tool(effect="irreversible", reconcile=sent, timeout=timedelta(seconds=8))
async def send(call: ToolCall, turn: str, name: str) -> int:
    """What nobody can take back, and no receiver recognises."""
    await asyncio.sleep(0.1)
    line = {"what": "sent", "turn": turn, "step": name, "attempt": call.attempt, "pid": os.getpid(), "key": call.key}
    os.write(EFFECTS, json.dumps({**line, "at": time.monotonic()}).encode() + b"\n")
    await asyncio.sleep(0.1)
    return 1


async def _send(turn: Turn, name: str, value: int) -> int:
    return await send(turn.id, name)


async def _large(turn: Turn, name: str, value: int) -> int:
    """A result and a message that are kept in the object store, where LONGSHIFT_INLINE is small."""

    async def run(value: int) -> str:
        note(turn, "begun", name)
        note(turn, "done", name)
        return f"{turn.id} {name} {value}, " * 100

    text = await turn.step(name, run, value)
    assert text == f"{turn.id} {name} {value}, " * 100, f"{name} came back otherwise: {text[:100]}"
    await turn.say(text)
    return 1


PARTS: Mapping[Part, Callable[[Turn, str, int], Awaitable[int]]] = {
    "step": _step,
    "effect": _effect,
    "gather": _gather,
    "nap": _nap,
    "sleep": _sleep,
    "state": _state,
    "say": _say,
    "artifact": _artifact,
    "thread": _thread,
    "retry": _retry,
    "values": _values,
    "send": _send,
    "large": _large,
}


@agent("chaos-sleeper")
async def sleeper(turn: Turn, seconds: float) -> int:
    """Waits without a worker."""
    see(turn, "entered")
    await _step(turn, "before", 1)
    await turn.sleep(seconds)
    return await _step(turn, "after", 1)


@agent("chaos-long")
async def long(turn: Turn, seconds: float) -> None:
    """One long step."""
    see(turn, "entered")

    @step(timeout=timedelta(hours=1))
    async def run() -> None:
        note(turn, "begun", "long")
        await asyncio.sleep(seconds)
        note(turn, "done", "long")

    await turn.step("long", run)


# ----------------------------------------------------------------------------------------------- the ones that misbehave


class Strange(BaseException):
    """Neither an Exception nor anything that asyncio knows."""


@agent("chaos-mischief")
async def mischief(turn: Turn, kind: Mischief) -> Any:
    """Takes one good step, and then does what it should not."""
    see(turn, "entered")
    await _step(turn, "before", 1)
    match kind:
        case "raises":
            raise Strange("no Exception")
        case "spins":
            await turn.step("spin", spin, 5.0)
        case "returns no JSON":
            return object()
        case "exits":
            os._exit(41)
        case "crashes":
            ctypes.string_at(0)
        case "blocks":
            time.sleep(3600)  # noqa: ASYNC251  # that is the mischief
    return None


@step(timeout=timedelta(seconds=1))
def spin(seconds: float) -> None:
    """A thread that nobody can stop, for a while: the process has to live with it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
