"""What an agent's author holds: one turn of a session."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from longshift.awaiting import TIMEOUT, Wait
from longshift.child import Child
from longshift.contract import Artifact, Passage, Verdict
from longshift.errors import InvalidInput, NotDone, OutcomeUnknown, UsageError, WaitTimeout
from longshift.events import Kind
from longshift.execution import Execution
from longshift.keeping import Keeping
from longshift.model import CallStatus, Json, Prefix, show_id
from longshift.place import current, running_step
from longshift.remembered import State
from longshift.replay import derived_id
from longshift.steps import StepDefinition
from longshift.summaries import Summaries

if TYPE_CHECKING:
    from longshift.agent import Agent

logger = logging.getLogger(__name__)

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Turn(Keeping):
    """One turn of a session, inside its agent.

    Code between steps runs again after a resume: whatever must not, belongs into a step. ``now()``, ``uuid()`` and
    ``random`` give the same values on every replay.
    """

    def __init__(self, execution: Execution, *, summaries: Summaries | None = None) -> None:
        super().__init__(execution)
        self._summaries = summaries if summaries is not None else Summaries(execution, None)
        self.state = State(execution)

    @property
    def id(self) -> str:
        """``turn_...``, as clients know it."""
        return show_id(Prefix.TURN, self._execution.record.id)

    @property
    def session_id(self) -> str:
        return show_id(Prefix.SESSION, self._execution.record.session_id)

    @property
    def attempt(self) -> int:
        """1 on the first run, more after an interrupt; do not let results depend on it."""
        return self._execution.attempt

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._execution.record.metadata

    @property
    def history(self) -> Sequence[Mapping[str, Json]]:
        """The session's messages up to here: ``{"role", "content", "turn_id"}``, this turn's input included.

        A summary stands in the place of the oldest ones; it has ``summary_of``, too: the number of messages.
        """
        return tuple(self._execution.context.history)

    # -- the same on every replay

    def now(self) -> datetime:
        """Aware UTC: when the last step or wait of this branch ended (at first: when the turn started)."""
        return self._execution.scope().now

    def uuid(self) -> UUID:
        """A new UUID, the same on every replay; inside a step the same on each of its tries: a key for its effects."""
        scope = self._execution.scope()
        scope.counters["$uuid"] += 1
        return derived_id(self._execution.record.root_turn_id, scope.path, "$uuid", str(scope.counters["$uuid"]))

    @property
    def random(self) -> Random:
        """This branch's random numbers, the same on every replay."""
        return self._execution.scope().random

    # -- steps and branches

    @overload
    async def step(
        self, name: str, function: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs
    ) -> R: ...

    @overload
    async def step(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def step(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run somebody else's function as a step called ``name``; one that is not async runs in a thread.

        Raises:
            StepFailed: it raised.
        """
        definition = getattr(function, "__longshift_step__", None)
        definition = StepDefinition(name, function) if definition is None else replace(definition, name=name)
        return await self._execution.perform(definition, args, kwargs)

    async def gather(self, *branches: Awaitable[T]) -> list[T]:
        """Run branches side by side; each counts its steps for itself. Results in the order given."""
        return await self._execution.branches.gather(branches)

    @overload
    async def race(self, *branches: Awaitable[T]) -> tuple[int, T]: ...

    @overload
    async def race(self, *branches: Awaitable[Any]) -> tuple[int, Any]: ...

    async def race(self, *branches: Awaitable[Any]) -> tuple[int, Any]:
        """Run branches side by side until the first one ends, and cancel the others: its place and its result.

        If the first one to end raises, so does this. Which one it was is recorded; a replay runs no other. What a loser
        waited for is not consumed; steps that a loser has recorded stay in the log.
        """
        return await self._execution.branches.race(branches)

    # -- waits: from a second on, and when every branch waits, they hold no worker

    async def sleep(self, duration: timedelta | float) -> None:
        """Let ``duration`` (seconds, or a timedelta) pass."""
        await self._execution.branches.wait_until("$sleep", self._execution.port.clock.now() + _length(duration))

    @overload
    async def wait_for(self, name: str, *, timeout: timedelta | float | None = None) -> Any: ...

    @overload
    async def wait_for(self, name: str, *, timeout: timedelta | float | None = None, type: type[T]) -> T: ...

    async def wait_for(
        self,
        name: str,
        *,
        timeout: timedelta | float | None = None,  # durable: it survives this coroutine
        type: Any = Any,  # noqa: A002
    ) -> Any:
        """The payload of the session's next signal of this name; one that came before is kept until somebody waits for it.

        Each signal goes to one wait only, the oldest first.

        Args:
            name: of the signal.
            timeout: how long to wait; None: until the turn's deadline.
            type: what the payload is read as.

        Raises:
            WaitTimeout: none came in time.
            InvalidInput: the payload is no ``type``. The signal is consumed; if the turn fails by it, a retry waits for
                another one.
        """
        length = _length(timeout) if timeout is not None else None
        adapter = TypeAdapter(type)
        ended = await self._execution.awaiting.wait(Wait("$wait_for", {"signal": name}, length, reads=adapter))
        if ended["reason"] == TIMEOUT:
            raise WaitTimeout(f"no signal {name!r} came within {length}")
        try:
            return adapter.validate_json(json.dumps(ended["payload"]))
        except ValidationError as error:
            places = [{"path": "/".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()]
            where = f"{places[0]['path']}: " if places[0]["path"] else ""
            text = f"the payload of signal {name!r} does not fit: {where}{places[0]['message']}"
            raise InvalidInput(text, errors=places) from None

    async def approval(
        self,
        name: str,
        *,
        show: Any = None,
        timeout: timedelta | float | None = None,
        stops_deadline: bool = False,
    ) -> Verdict:
        """Ask somebody whether to go on, and wait for the answer.

        Args:
            name: what is to be approved.
            show: what whoever decides should see; anything that can be written as JSON.
            timeout: after this nobody needs to answer any more; None: with the turn's deadline.
            stops_deadline: while the turn waits for this without a worker, its deadline comes no nearer; needs ``timeout``.

        Raises:
            UsageError: ``stops_deadline`` without ``timeout``: the turn might never end.
        """
        if stops_deadline and timeout is None:
            raise UsageError(
                f"approval {name!r} stops the deadline, so it needs a timeout: or the turn might never end"
            )
        try:
            shown = to_jsonable_python(show)
        except PydanticSerializationError as error:
            raise UsageError(f"approval {name!r} cannot show this: {error}; give it plain data or a model") from None
        length = _length(timeout) if timeout is not None else None
        awaiting = self._execution.awaiting
        return await awaiting.approve(name, shown, timeout=length, stops_deadline=stops_deadline)

    async def settled(self, error: OutcomeUnknown, *, timeout: timedelta | float | None = None) -> Any:
        """Wait until somebody has found out what became of a tool call that is in doubt: an operator (``longshift
        settle``), or the worker that made it, if it was only cut off. Holds no worker.

        Args:
            error: what the call raised.
            timeout: after this nobody waits for it any more; None: with the turn's deadline.

        Returns:
            What the tool has returned, or the operator says it has, as plain JSON.

        Raises:
            NotDone: it has not happened; call the tool again if it still should.
            OutcomeUnknown: nobody can find out.
            WaitTimeout: nobody has, in time.
        """
        length = _length(timeout) if timeout is not None else None
        ended = await self._execution.awaiting.wait(Wait("$settled", {"call": error.call}, length))
        if ended["reason"] == TIMEOUT:
            raise WaitTimeout(f"nobody has settled {error.call} within {length}")
        why = ended.get("note") or (ended["error"] or {}).get("message", "")
        match ended["status"]:
            case CallStatus.DONE:
                return json.loads(await self._execution.large.text(ended, "result"))
            case CallStatus.FAILED:
                raise NotDone(why)
            case _:
                text = f"given up: {why}"
                raise OutcomeUnknown(error.step, error_type=error.error_type, error_message=text, call=error.call)

    @overload
    async def spawn(
        self,
        agent: Agent[I, O],
        input: I,
        *,
        queue: str | None = None,
        deadline: timedelta | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Child[O]: ...

    @overload
    async def spawn(
        self,
        agent: str,
        input: Json,
        *,
        queue: str | None = None,
        deadline: timedelta | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Child[Any]: ...

    async def spawn(
        self,
        agent: Agent[Any, Any] | str,
        input: Any,  # noqa: A002
        *,
        queue: str | None = None,
        deadline: timedelta | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Child[Any]:
        """Start a turn of another agent, in a new session. Await what this returns, now or later, for its output.

        It has started, durably, when this returns. If this turn fails, is cancelled or expires, so are its open children;
        if it succeeds, they go on.

        Args:
            agent: which, or its name.
            input: as the agent takes it; for a name, the JSON that a client would send.
            queue: the class of workers that runs it; default: the agent's.
            deadline: how long it may take; never longer than this turn.
            metadata: of the new turn.

        Raises:
            UnknownAgent: no worker has registered it.
            InvalidInput: the input does not fit it.
        """
        known = None if isinstance(agent, str) else agent
        spawned = await self._execution.awaiting.spawn(
            agent if isinstance(agent, str) else agent.name,
            input if known is None else known.input.dump_python(input, mode="json", by_alias=True),
            definition=known,
            queue=queue,
            deadline=deadline,
            metadata=metadata or {},
        )
        return Child(self._execution, spawned, known.output if known is not None else TypeAdapter(Any))

    def sync(self, awaitable: Awaitable[T]) -> T:
        """For agents that are not async: wait for ``awaitable``, for example ``turn.sync(turn.sleep(60))``.

        Raises:
            UsageError: called in an async agent, where ``await`` does it.
        """
        return self._execution.from_thread(awaitable)

    # -- what the session keeps

    async def say(self, content: Json, *, role: str = "assistant") -> None:
        """Add a message to the session's history. Of a large one (32 KiB) the history shows where it is, and its beginning."""
        await self._execution.add("$say", Kind.MESSAGE_SAID, {"role": role, "content": content}, large="content")

    async def summarize(self) -> bool:
        """Let a summary stand for the history's older messages now, whether the agent's budget is used up or not.

        The newest ones stay as they are, as the budget says; of an agent without one, 4,000 tokens. What leaves is found by
        ``recall``.

        Returns:
            Whether there was anything to summarize.
        """
        return await self._summaries.now()


def _length(duration: timedelta | float) -> timedelta:
    return duration if isinstance(duration, timedelta) else timedelta(seconds=duration)


def emit(text: str) -> None:
    """Show ``text`` to whoever follows the turn, now: a delta, lossy and never recorded. Outside a turn: nothing.

    Inside a step it is a sign of progress (``@step(progress=...)``).
    """
    execution, step = current(), running_step()
    if step is not None:
        step.watch.move()
    if execution is not None and execution.is_live:
        execution.port.emit(text, step=step.definition.name if step else "", attempt=step.attempt if step else 0)


def cancelled() -> bool:
    """Whether nobody waits any more for the step that this code is part of: it timed out, or its turn has left.

    For plain steps and tools, whose threads nothing can stop: one that looks from time to time frees its thread.
    """
    step = running_step()
    return step is not None and step.watch.over


__all__ = ["Artifact", "Child", "Passage", "State", "Turn", "Verdict", "cancelled", "emit"]
