"""What an agent remembers from turn to turn of its session."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from longshift.events import Kind
from longshift.execution import Execution
from longshift.model import Json


class State(Mapping[str, Json]):
    """Read like a mapping, written with ``await set()``."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    def __getitem__(self, name: str) -> Json:
        return json.loads(self._execution.context.remembered[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._execution.context.remembered)

    def __len__(self) -> int:
        return len(self._execution.context.remembered)

    async def set(self, name: str, value: Json) -> None:
        """Remember ``value`` (JSON) under ``name``; durable when this returns."""
        await self._execution.add("$state", Kind.STATE_CHANGED, {"set": {name: value}})

    async def unset(self, name: str) -> None:
        """Forget ``name``, if it is there."""
        await self._execution.add("$state", Kind.STATE_CHANGED, {"unset": [name]})
