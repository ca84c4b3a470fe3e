"""The shapes on the wire: what clients send."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    WithJsonSchema,
)

from longshift.catalogue import Draft
from longshift.errors import InvalidInput
from longshift.model import Json, OnBusy, Prefix, Settlement, parse_id
from longshift_api.schemas import SESSION_ID


def _session_id(value: object) -> object:
    try:
        return parse_id(Prefix.SESSION, value) if isinstance(value, str) else value
    except InvalidInput as error:
        raise ValueError(str(error)) from None


SessionId = Annotated[
    UUID, BeforeValidator(_session_id), WithJsonSchema({"type": "string", "pattern": "^ses_[0-9a-f]{32}$"})
]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="up to 16 pairs of text for the client's own use"),
]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Ttl = Annotated[
    float,
    Field(
        strict=True,  # true is no second
        ge=1,
        le=3_155_760_000,
        description="seconds after its last activity for which the session is kept; null: as the fleet is set up",
    ),
]
Text = Annotated[str, Field(max_length=2000)]


class Sent(BaseModel):
    """What a client sends: a field we do not know is a mistake, and is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TurnDraft(Sent):
    agent: Name = Field(description="a registered agent, see GET /v1/agents")
    agent_version: Name | None = Field(
        None,
        description="default: whichever the worker has that makes the first attempt; pinned from then on. The input is "
        "checked against the newest version that a worker serves",
    )
    input: Any = Field(description="must fit the agent's input schema")
    run_after: AwareDatetime | None = Field(None, description="not before; the turn is `scheduled` until then")
    deadline: AwareDatetime | None = Field(None, description="the turn expires then; default: 7 days")
    metadata: Metadata = {}


class TurnBody(TurnDraft):
    """One turn."""

    on_busy: OnBusy = Field(
        OnBusy.ENQUEUE, description="if the session has an open turn: queue behind it, answer 423, or cancel it"
    )
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"agent": "research", "input": {"question": "What is a lease?"}}]}
    )

    def draft(self, *, session_id: UUID | None = None, traceparent: str | None = None) -> Draft:
        return Draft(
            agent=self.agent,
            input=self.input,
            agent_version=self.agent_version,
            session_id=session_id,
            run_after=self.run_after,
            deadline=self.deadline,
            metadata=self.metadata,
            traceparent=traceparent,
        )


class BatchLine(TurnDraft):
    """One turn of a batch."""

    session_id: SessionId | None = Field(None, description="default: a session of its own; created if it is new")
    custom_id: str | None = Field(None, min_length=1, max_length=256, description="unique in the batch")
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"custom_id": "q1", "agent": "research", "input": {"question": "What is a lease?"}}]
        }
    )

    def draft(self, *, line: int, traceparent: str | None = None) -> Draft:
        return Draft(
            agent=self.agent,
            input=self.input,
            agent_version=self.agent_version,
            session_id=self.session_id,
            run_after=self.run_after,
            deadline=self.deadline,
            metadata=self.metadata,
            custom_id=self.custom_id,
            traceparent=traceparent,
            line=line,
        )


class SessionBody(Sent):
    id: SessionId | None = Field(None, description="chosen by the client: the same request again is the same session")
    metadata: Metadata = {}
    ttl: Ttl | None = None
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": SESSION_ID, "metadata": {"customer": "42"}}]})

    @property
    def lifetime(self) -> timedelta | None:
        return timedelta(seconds=self.ttl) if self.ttl is not None else None


class SessionChange(Sent):
    """What is left out stays as it is."""

    metadata: Metadata | None = None
    ttl: Ttl | None = None
    model_config = ConfigDict(json_schema_extra={"examples": [{"ttl": 86400}]})

    @property
    def lifetime(self) -> timedelta | None:
        return timedelta(seconds=self.ttl) if self.ttl is not None else None


class SignalBody(Sent):
    name: Name
    payload: Any = None
    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "reviewed", "payload": {"ok": True}}]})


class CancelBody(Sent):
    reason: str = Field("cancelled by a client", min_length=1, max_length=500)


class RetryBody(Sent):
    agent_version: Name | None = Field(None, description="default: the newest version that a worker serves")
    deadline: AwareDatetime | None = Field(None, description="the new turn expires then; default: 7 days")
    model_config = ConfigDict(json_schema_extra={"examples": [{"agent_version": "4"}]})


class SettleBody(Sent):
    """What an operator found out about a call whose outcome is in doubt."""

    outcome: Settlement = Field(
        description="it happened (`result` is what the agent gets); it certainly did not, and may be called again; "
        "or nobody can find out"
    )
    result: Any = Field(None, description="only with `done`")
    note: Text | None = Field(None, description="for the audit trail")
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"outcome": "done", "result": {"payment": "p-17"}, "note": "seen in the books"}]
        }
    )

    def checked_result(self) -> Json:
        """What the agent is to get.

        Raises:
            InvalidInput: there is a result of something that was not done.
        """
        if self.outcome is not Settlement.DONE and "result" in self.model_fields_set:
            message = f"is what the tool returned: leave it out with outcome {self.outcome.value!r}"
            raise InvalidInput(f"result {message}", errors=[{"path": "result", "message": message}])
        return self.result


class AnswerBody(Sent):
    """The answer to an approval."""

    granted: StrictBool
    comment: Text | None = Field(None, description="the agent sees it")
    model_config = ConfigDict(json_schema_extra={"examples": [{"granted": True, "comment": "well done"}]})
