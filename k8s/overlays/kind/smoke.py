"""What k8s/kind.sh gives the workers to do: turns of many short steps."""

import asyncio

from longshift import Turn, agent, step


@step
async def tick(number: int) -> int:
    await asyncio.sleep(1)
    return number


@agent("smoke")
async def smoke(turn: Turn, steps: int) -> list[int]:
    return [await tick(number) for number in range(steps)]
