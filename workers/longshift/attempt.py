"""What every attempt at a turn does, on a worker as in ``longshift.testing``: how it begins, how the agent is called,
and how its end is recorded. The runner adds leases and Postgres, ``longshift.testing`` a list.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID

from pydantic_core import PydanticSerializationError

from longshift.agent import Agent
from longshift.chain import carried
from longshift.contract import Port
from longshift.errors import (
    ArtifactCorrupt,
    ControlFlow,
    GivenUp,
    InvalidInput,
    LongshiftError,
    NotFound,
    StepFailed,
    UsageError,
)
from longshift.events import Context, Event, Kind, NewEvent, encode, include, storable_json
from longshift.execution import Execution
from longshift.model import Json, TurnRecord, TurnStatus
from longshift.offload import Laid, Pointer, hash_of, lost, preview_of
from longshift.replay import Replay
from longshift.stepping import ERROR_TEXT
from longshift.summaries import Summaries
from longshift.turn import Turn

logger = logging.getLogger(__name__)

UNWIND = timedelta(seconds=10)
"""Time that an agent's ``finally`` blocks get when its turn leaves."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a turn ended, as its terminal event and row will say; the first three are JSON text.

    ``artifact`` is where a large output is, which the row then does not have.
    """

    status: TurnStatus
    payload: str
    output: str | None = None
    error: str | None = None
    artifact: UUID | None = None

    def event(self, record: TurnRecord) -> NewEvent:
        return NewEvent(_KINDS[self.status], record.id, self.payload)


_KINDS = {
    TurnStatus.SUCCEEDED: Kind.TURN_SUCCEEDED,
    TurnStatus.FAILED: Kind.TURN_FAILED,
    TurnStatus.CANCELLED: Kind.TURN_CANCELLED,
    TurnStatus.EXPIRED: Kind.TURN_EXPIRED,
}


@dataclass(frozen=True, slots=True)
class Given:
    """A turn with its whole input.

    Attributes:
        pointer: to the input, if it is large.
        lost: the end of the turn, if its input is gone from the store.
    """

    record: TurnRecord
    pointer: Pointer | None = None
    lost: Outcome | None = None


async def given(record: TurnRecord, get: Callable[[UUID], Awaitable[bytes]]) -> Given:
    """The turn with its input, fetched with ``get`` if that is large.

    Raises:
        Unavailable: the store is away.
    """
    if record.input_artifact is None:
        return Given(record)
    try:
        data = await get(record.input_artifact)
    except (NotFound, ArtifactCorrupt) as error:
        return Given(record, Pointer(record.input_artifact, 0, ""), _gave_up(lost(record.input_artifact, error)))
    text = data.decode()
    pointer = Pointer(record.input_artifact, len(data), await hash_of(data), preview_of(text))
    return Given(replace(record, input=json.loads(text)), pointer)


def begun(record: TurnRecord, agent: Agent[Any, Any], *, now: datetime, pointer: Pointer | None = None) -> NewEvent:
    """``turn.started`` of the next attempt; the first one carries the input (or the ``pointer`` to it), or, on a retry,
    which turn it goes on from."""
    attempt = record.attempts + 1
    payload: dict[str, Json] = {
        "attempt": attempt,
        "agent": agent.name,
        "version": agent.version,
        "at": now.isoformat(),
    }
    if record.continues:
        payload["retry_of"] = record.retry_of.hex if record.retry_of else None
    if attempt > 1 or record.continues:
        return NewEvent(Kind.TURN_STARTED, record.id, encode(payload))
    laid = Laid(encode(record.input) if pointer is None else "", pointer)
    return NewEvent(Kind.TURN_STARTED, record.id, laid.within(payload, "input"))


def resumed(
    record: TurnRecord,
    recorded: Sequence[Event],
    *,
    before: Context,
    port: Port,
    now: datetime,
    pointer: Pointer | None = None,
    make: type[Execution] = Execution,
) -> Execution:
    """The execution of the next attempt.

    Args:
        record: the turn as it was before this attempt, with its whole input.
        recorded: the turn's own events so far; on a retry, those of the turns before it, too.
        before: the session's context as of the turn's start; taken over, not copied.
        port: the outside.
        now: when this attempt began; the turn's clock starts with its first attempt.
        pointer: to the input, if it is large: what the log has of it, and so the history.
        make: what to make of it.
    """
    first = next((event for event in recorded if event.kind == Kind.TURN_STARTED), None)
    if not record.continues:  # else it is in the history already
        said = {"input": record.input} if pointer is None else {"artifact": pointer.facts}
        include(
            before, Kind.TURN_STARTED, first.payload if first is not None else {"attempt": 1, **said}, turn_id=record.id
        )
    return make(
        record,
        attempt=record.attempts + 1,
        replay=Replay(carried(recorded, turn_id=record.id), turn_id=record.id),
        context=before,
        port=port,
        started=now if first is None else datetime.fromisoformat(first.payload["at"]),
    )


def left(record: TurnRecord, *, waits: bool, until: datetime | None = None) -> NewEvent:
    """The turn leaves its worker: it waits, until then or (None) for what others bring; or it was interrupted by a drain."""
    if not waits:
        return NewEvent(Kind.TURN_RESCHEDULED, record.id, encode({"reason": "drain"}))
    return NewEvent(Kind.TURN_WAITING, record.id, encode({"until": until.isoformat() if until is not None else None}))


async def call(agent: Agent[Any, Any], execution: Execution, *, threads: Executor) -> Outcome:
    """The agent's result, or how it failed; control flow passes through."""
    try:
        value = agent.read_input(execution.record.input)
        summaries = Summaries(execution, agent.budget)
        turn = Turn(execution, summaries=summaries)
        with execution.entered(threaded=not agent.is_async):
            await summaries.begin()
            if agent.is_async:
                result = await cast(Awaitable[Any], agent.function(turn, value))
            else:
                function = partial(copy_context().run, partial(agent.function, turn, value))
                with execution.port.pace.queueing() as begun:
                    result = await asyncio.get_running_loop().run_in_executor(threads, _after, begun, function)
        if execution.given_up is not None:
            return _gave_up(execution.given_up)
        return await _succeeded(agent, result, execution)
    except GivenUp as error:
        return _gave_up(error)
    except StepFailed as error:
        return failed(error.code, str(error), step=error.step, type=error.error_type)
    except InvalidInput as error:
        return failed(error.code, str(error), errors=error.errors)
    except LongshiftError as error:
        return failed(error.code, str(error))
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # the last two would end the worker
        logger.exception("agent failed", extra={"agent": agent.name, "turn_id": execution.record.id.hex})
        text = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else str(error)
        return failed("agent_error", text or f"raised {type(error).__name__}", type=type(error).__name__)
    except asyncio.CancelledError:
        if execution.cancelled_from_outside():
            raise
        return failed("agent_error", "the agent was cancelled by its own code", type="CancelledError")


def _gave_up(error: GivenUp) -> Outcome:
    return failed(error.code, str(error), **error.details)


def _after(begun: Callable[[], None], function: Callable[[], Any]) -> Any:
    """In the thread."""
    begun()
    return function()


async def _succeeded(agent: Agent[Any, Any], result: Any, execution: Execution) -> Outcome:
    try:
        output = storable_json(agent.output.dump_json(result, warnings="error", by_alias=True).decode())
        json.loads(output)  # what Python cannot read again, such as 5,000 digits, would stop the session's later turns
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise UsageError(
            f"agent {agent.name!r} returned a {type(result).__name__} that does not fit its return annotation: "
            f"{' '.join(str(error).split())}"
        ) from None
    laid = await execution.large.lay_out(output, place=("output",), name="output", what=f"the output of {agent.name!r}")
    return Outcome(
        TurnStatus.SUCCEEDED,
        laid.within({}, "output"),
        output=output if laid.pointer is None else None,
        artifact=laid.pointer.id if laid.pointer is not None else None,
    )


def failed(code: str, message: str, **more: Json) -> Outcome:
    error = encode({"code": code, "message": message[:ERROR_TEXT], **more})
    return Outcome(TurnStatus.FAILED, f'{{"error":{error}}}', error=error)


def stopped(status: TurnStatus, reason: str) -> Outcome:
    """The end of a turn that was cancelled or has expired."""
    text = reason or ("the deadline has passed" if status is TurnStatus.EXPIRED else "cancelled")
    error = encode({"code": status.value, "message": text})
    return Outcome(status, encode({"reason": text}), error=error)


async def unwind(task: asyncio.Task[Outcome], execution: Execution) -> None:
    """End the agent's coroutine: durable calls raise, everything else is cancelled."""
    execution.unwind("leaving")
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=UNWIND.total_seconds())
    if not task.done():
        logger.error("agent does not end, turn left behind", extra={"turn_id": execution.record.id.hex})
        task.add_done_callback(_retrieve)
    else:
        _retrieve(task)


def _retrieve(task: asyncio.Task[Outcome]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ControlFlow):
        logger.error("agent raised while leaving", exc_info=error)
