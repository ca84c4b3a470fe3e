"""Agents made up by hypothesis: trees of steps, branches, tasks, waits and messages, in JSON."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from typing import Any

from hypothesis import strategies as st

from longshift import Retry, StepFailed, Turn, agent, step

LEAVES = ["work", "plain", "flaky", "fails", "nap", "sleep", "say", "set", "artifact", "now", "uuid", "random"]
LEAVES += ["listen", "ask", "child"]
FORKS = ["gather", "tasks", "group"]

OTHERS: dict[str, Any] = {"signals": {"news": ["n"] * 99}, "approve": {"go": True}, "fake": {"kid": "grown"}}
"""What the waits of any program wait for; the same for all of them, because branches may overtake each other."""

leaves = st.sampled_from(LEAVES).map(lambda name: {"do": name})
programs = st.recursive(
    st.lists(leaves, min_size=1, max_size=4),
    lambda inner: st.lists(
        leaves
        | st.builds(lambda do, parts: {"do": do, "parts": parts}, st.sampled_from(FORKS), st.lists(inner, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    max_leaves=8,
)

ran: Counter[str] = Counter()  # calls of each step's function, by its place in the program
seen: defaultdict[str, set[str]] = defaultdict(set)  # what the agent saw at each place, over all attempts


def forget() -> None:
    ran.clear()
    seen.clear()


@step
async def work(place: str) -> str:
    ran[place] += 1
    for _ in range(len(place) % 3):
        await asyncio.sleep(0)
    return f"worked at {place}"


def plain(place: str) -> str:
    ran[place] += 1
    return f"computed at {place}"


@step(retry=Retry(attempts=3))
async def flaky(place: str) -> str:
    ran[place] += 1
    if ran[place] < 2:
        raise OSError("not yet")
    return f"managed at {place}"


@step
async def fails(place: str) -> str:
    ran[place] += 1
    raise ValueError(f"no way at {place}")


async def failed(place: str) -> str:
    try:
        return await fails(place)
    except StepFailed as error:
        return f"{error} / {error.step} / {error.error_type} / {error.error_message}"


async def leaf(turn: Turn, do: str, place: str) -> Any:
    match do:
        case "work":
            return await work(place)
        case "plain":
            return await turn.step("plain", plain, place)
        case "flaky":
            return await flaky(place)
        case "fails":
            return await failed(place)
        case "nap":
            return await turn.sleep(0.25)
        case "sleep":
            return await turn.sleep(3600)
        case "listen":
            return await turn.wait_for("news", timeout=3600)
        case "ask":
            return (await turn.approval("go", show=place)).granted
        case "child":
            return await (await turn.spawn("kid", place))
        case "say":
            return await turn.say({"at": place})
        case "set":
            return await turn.state.set(place[:1], place)
        case "artifact":
            return (await turn.artifact(f"{place}.txt", place)).name
    return None


def sight(turn: Turn, do: str) -> str | None:
    match do:
        case "now":
            return turn.now().isoformat()
        case "uuid":
            return str(turn.uuid())
        case "random":
            return str(turn.random.random())
    return None


async def fork(turn: Turn, do: str, parts: list[Any]) -> list[Any]:
    branches = [interpret(turn, part, place) for part, place in parts]
    match do:
        case "gather":
            return await turn.gather(*branches)
        case "tasks":
            return list(await asyncio.gather(*branches))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(branch) for branch in branches]
    return [task.result() for task in tasks]


async def interpret(turn: Turn, program: list[Any], path: str) -> list[Any]:
    results: list[Any] = []
    for number, node in enumerate(program):
        place, do = f"{path}{number}", node["do"]
        if do in FORKS:
            parts = [(part, f"{place}.{index}:") for index, part in enumerate(node["parts"])]
            results.append(await fork(turn, do, parts))
            continue
        result = await leaf(turn, do, place)
        seen[place].add(f"{sight(turn, do)} {result}")
        results.append(result)
    return results


@agent("interpreter")
async def interpreter(turn: Turn, program: list[Any]) -> list[Any]:
    return await interpret(turn, program, "")
