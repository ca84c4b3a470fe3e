"""Children of a turn under test: fakes, or real agents that run, undisturbed, in worlds of their own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from longshift.agent import Agent
from longshift.contract import NewChild
from longshift.errors import UsageError
from longshift.model import Json, TurnStatus
from longshift.testing.outside import submitted
from longshift.testing.world import Post, Time, World

Fakes = Mapping[Any, Any]
Rehearse = Callable[[Agent[Any, Any], World, Fakes], Awaitable[Mapping[str, Json]]]


class Children:
    """What a turn spawns. Each has ended when its start returns, so that its parent finds it when it looks."""

    def __init__(self, world: World, *, fakes: Fakes, rehearse: Rehearse) -> None:
        self._world, self._fakes, self._rehearse = world, fakes, rehearse

    async def run(self, child: NewChild) -> Mapping[str, Json]:
        """How it ends, as wait.ended says it.

        Raises:
            UsageError: nothing is known of it here.
        """
        fake = self._fake_of(child.agent)
        if fake is not None:
            return await _faked(child, fake[0])
        if isinstance(child.definition, Agent):
            return await self._rehearse(child.definition, self._world_of(child, child.definition), self._fakes)
        raise UsageError(
            f"nothing is known of child {child.agent!r} here: give fake={{{child.agent!r}: its output}}, or spawn the agent "
            "itself instead of its name"
        )

    def _fake_of(self, name: str) -> tuple[Any] | None:
        for key, fake in self._fakes.items():
            if (key.name if isinstance(key, Agent) else key) == name:
                return (fake,)
        return None

    def _world_of(self, child: NewChild, agent: Agent[Any, Any]) -> World:
        here = self._world
        record = replace(
            here.record,
            id=child.id,
            root_turn_id=child.id,
            retry_of=None,
            parent_turn_id=here.record.id,
            session_id=child.session_id,
            agent=agent.name,
            agent_version=agent.version,
            input=child.input,
            input_artifact=None,
            attempts=0,
            metadata=child.metadata,
            traceparent=here.workers[max(here.workers)].observer.traceparent,  # of the newest epoch
            deadline=child.deadline,
        )
        post = Post(approve=here.post.approve)
        world = World(submitted(record, here.artifacts), [], here.artifacts, Time(here.time.clock), post=post)
        world.observe = here.observe
        return world


async def _faked(child: NewChild, fake: Any) -> Mapping[str, Json]:
    try:
        output = fake(child.input) if callable(fake) else fake
        output = await output if inspect.isawaitable(output) else output
        if isinstance(output, Exception):
            raise output
    except Exception as error:  # noqa: BLE001 - as a worker records it
        failure: Json = {"code": "agent_error", "message": str(error), "type": type(error).__name__}
        return {"reason": "child", "status": TurnStatus.FAILED.value, "output": None, "error": failure}
    known = child.definition.output if isinstance(child.definition, Agent) else TypeAdapter(Any)
    written = json.loads(known.dump_json(output, by_alias=True))
    return {"reason": "child", "status": TurnStatus.SUCCEEDED.value, "output": written, "error": None}
