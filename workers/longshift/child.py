"""A turn that another one has started, as the other one holds it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from longshift.awaiting import Wait
from longshift.errors import ChildFailed
from longshift.execution import Execution
from longshift.model import Json, TurnStatus

O = TypeVar("O")  # noqa: E741


class Child(Generic[O]):
    """A turn that another one has started. ``await child`` waits for its end and gives its output.

    Raises:
        ChildFailed: it ended without one.
    """

    def __init__(self, execution: Execution, spawned: Mapping[str, Json], output: TypeAdapter[O]) -> None:
        self._execution = execution
        self._output = output
        self.id: str = spawned["turn"]
        self.session_id: str = spawned["session"]

    def __repr__(self) -> str:
        return f"Child({self.id!r})"

    def __await__(self) -> Generator[Any, Any, O]:
        return self._result().__await__()

    async def _result(self) -> O:
        ended = await self._execution.awaiting.wait(Wait("$child", {"child": self.id}))
        if ended["status"] != TurnStatus.SUCCEEDED:
            raise ChildFailed(self.id, status=ended["status"], error=ended["error"])
        return self._output.validate_json(await self._execution.large.text(ended, "output"))
