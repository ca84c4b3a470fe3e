"""How calls of tools end: the records in the ledger, and what stands there as the result of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from longshift.errors import NotDone, OutcomeUnknown
from longshift.events import encode, storable
from longshift.model import CallOutcome, CallStatus, Json, NewCall, Prefix, ToolCallRecord, show_id
from longshift.offload import CONTENT_TYPE, Laid, Pointer, hash_of, point_to, preview_of, size_of, stored_soon
from longshift.place import StepRun
from longshift.steps import StepDefinition
from longshift.tooling import ToolCall, ToolSpec

if TYPE_CHECKING:
    from longshift.execution import Execution

ERROR_TEXT = 2000
"""Characters of an error's text that are recorded."""


@dataclass(slots=True)
class Try:
    """One try of a tool's step.

    Attributes:
        row: the call as the ledger has it.
        begun: how often it was started.
        made: the tool's own code has begun to run.
        over: nobody waits for its thread any more; one that begins only now calls nothing.
        wanted: somebody waits for it; what has not been called by then will not be.
    """

    step: StepDefinition
    spec: ToolSpec
    run: StepRun
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    row: NewCall
    begun: int = 0
    made: bool = False
    over: bool = False
    wanted: bool = True
    announced: bool = False  # by tool.started

    @property
    def call(self) -> ToolCall:
        return ToolCall(self.name, self.begun, self.spec.name)

    @property
    def name(self) -> str:
        return show_id(Prefix.CALL, self.row.id)

    @property
    def limit(self) -> timedelta:
        return self.row.timeout


class Records:
    """The ends of the calls of one execution."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._facts: dict[str, dict[str, Json]] = {}
        self._laid_out: dict[str, Laid] = {}

    def open(self, trial: Try) -> None:
        self._facts[trial.run.key] = {"call": trial.name}

    def facts(self, key: str) -> dict[str, Json]:
        """What the record of the step at ``key`` says of its call."""
        return self._facts.pop(key, {})

    def laid_out(self, key: str) -> Laid | None:
        """The result of the call at ``key``, if the ledger has it as an artifact: the record of the step shares that."""
        return self._laid_out.pop(key, None)

    async def done(self, trial: Try, text: str) -> Any:
        """Record the result (JSON text), and return what stands."""
        pointer = await self._lay_out(trial, text) if size_of(text) > self._execution.port.inline else None
        outcome = CallOutcome(CallStatus.DONE, None if pointer else text, artifact_id=pointer.id if pointer else None)
        standing = await self._record(trial, outcome)
        if standing is not None:
            return await self.stands(trial, standing)
        return self._read(trial, Laid(text, pointer))

    async def _lay_out(self, trial: Try, text: str) -> Pointer | None:
        """Where a large result is; None while the store is away: that the call is done must not wait for that."""
        port, data = self._execution.port, text.encode()
        pointer = await point_to(data, text, root=trial.row.id, place=("result",))
        name = f"{trial.spec.name}.json"
        stored = await stored_soon(
            lambda: port.put_artifact(pointer.id, name=name, data=data, content_type=CONTENT_TYPE)
        )
        return pointer if stored else None

    def _read(self, trial: Try, laid: Laid) -> Any:
        if laid.pointer is not None:
            self._laid_out[trial.run.key] = laid
        return trial.step.decode(laid.text)

    async def end(
        self,
        trial: Try,
        status: CallStatus,
        *,
        error: BaseException,
        reason: str = "",
        epoch: int | None = None,
        left_behind: bool = False,
    ) -> ToolCallRecord | None:
        described: dict[str, Json] = {"type": type(error).__name__, "message": text_of(error)}
        if reason:
            described["reason"] = reason
        if left_behind:
            described["left_behind"] = True
        return await self._record(trial, CallOutcome(status, error=encode(described)), epoch=epoch)

    async def _record(self, trial: Try, outcome: CallOutcome, *, epoch: int | None = None) -> ToolCallRecord | None:
        port = self._execution.port
        standing = await port.end_call(trial.row, outcome, epoch=epoch)
        port.underway.open_ends.discard(trial.row.id)
        port.observer.call_ended(trial.spec.effect, outcome.status if standing is None else standing.status)
        return standing

    async def stands(self, trial: Try, record: ToolCallRecord) -> Any:
        """The outcome in the ledger as that of this try."""
        if record.status is CallStatus.DONE:
            at = record.ended_at
            if at is not None and (record.turn_id, record.place) != (trial.row.turn_id, trial.row.place):
                self._facts.setdefault(trial.run.key, {})["done_at"] = at.isoformat()
                if trial.spec.told is not None:
                    trial.spec.told.done_at = at
            return self._read(trial, await self._result_of(record))
        error = record.error or {}
        kind, message = str(error.get("type", "Unknown")), str(error.get("message", "it is in doubt"))
        if record.status is CallStatus.FAILED:
            raise NotDone(record.note or message)
        if record.status is CallStatus.GIVEN_UP:
            message = f"given up by an operator: {record.note or 'no note'}"
        raise self._unknown(trial, kind, message)

    async def _result_of(self, record: ToolCallRecord) -> Laid:
        if record.artifact_id is None:
            return Laid(json.dumps(record.result))
        text = await self._execution.large.fetch(Pointer(record.artifact_id, 0, ""))
        data = text.encode()
        return Laid(text, Pointer(record.artifact_id, len(data), await hash_of(data), preview_of(text)))

    async def failed(self, trial: Try, error: Exception) -> Any:
        """It has certainly not happened, so that it may be tried again."""
        standing = await self.end(trial, CallStatus.FAILED, error=error)
        if standing is not None and standing.status is CallStatus.DONE:
            return await self.stands(trial, standing)
        raise error

    async def doubtful(
        self,
        trial: Try,
        error: BaseException,
        *,
        reason: str = "",
        epoch: int | None = None,
        left_behind: bool = False,
    ) -> Any:
        """Nobody knows: an operator may find out.

        Args:
            epoch: of the start that is in doubt, if it was another's.
            left_behind: its thread still runs.
        """
        standing = await self.end(
            trial, CallStatus.UNKNOWN, error=error, reason=reason, epoch=epoch, left_behind=left_behind
        )
        if standing is not None and standing.status is not CallStatus.UNKNOWN:
            return await self.stands(trial, standing)
        message = f"{text_of(error)} ({reason})" if reason else text_of(error)
        raise self._unknown(trial, type(error).__name__, message) from error

    def _unknown(self, trial: Try, kind: str, message: str) -> OutcomeUnknown:
        return OutcomeUnknown(trial.step.name, error_type=kind, error_message=message, call=trial.name)


def text_of(said: object) -> str:
    return storable(str(said))[:ERROR_TEXT]
