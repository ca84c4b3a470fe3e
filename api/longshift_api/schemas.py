"""The shapes on the wire: how records are shown to clients. What they send is in ``sent``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from longshift.db.steps import Wait, WaitKind
from longshift.events import Event
from longshift.model import (
    AgentRecord,
    ArtifactRecord,
    BatchRecord,
    Prefix,
    SessionRecord,
    TurnRecord,
    TurnStatus,
    show_id,
)

TURN_ID = "turn_01936f6e4b7a7c0e8f5d2f6a3b1c0d9e"
SESSION_ID = "ses_01936f6e4b7a7c0e8f5d2f6a3b1c0d9f"
BATCH_ID = "bat_01936f6e4b7a7c0e8f5d2f6a3b1c0da0"
ARTIFACT_ID = "art_01936f6e4b7a7c0e8f5d2f6a3b1c0da1"
MOMENT = "2026-01-31T12:00:00Z"
NOTHING: Mapping[UUID, ArtifactRecord] = {}


class Shown(BaseModel):
    """What a client gets. New fields may appear."""

    model_config = ConfigDict(frozen=True)


class Fault(Shown):
    path: str
    message: str
    line: int | None = None


class Problem(Shown):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="for programs: does not change")
    retryable: bool = Field(description="the same request may succeed later")
    errors: list[Fault]


class WaitView(Shown):
    """One thing that a waiting turn waits for."""

    kind: WaitKind
    name: str | None = Field(None, description="of a signal or an approval, or of a step that will be tried again")
    id: str | None = Field(None, description="of an approval, a child turn, or a tool call that is in doubt")
    until: datetime | None = Field(None, description="when it goes on without; null: with its deadline")

    @classmethod
    def of(cls, wait: Wait) -> Self:
        return cls(kind=wait.kind, name=wait.name, id=wait.id, until=wait.until)


class ValueView(Shown):
    """Where a value is that is too large for a row: an artifact with its JSON."""

    id: str = Field(examples=[ARTIFACT_ID])
    size: int | None = Field(description="bytes of JSON; null: it has been deleted")
    sha256: str | None
    preview: str | None = Field(description="how it begins, at most 200 characters, where that is known")
    links: dict[str, str]

    @classmethod
    def of(cls, value: UUID, *, size: int | None = None, sha256: str | None = None, preview: str | None = None) -> Self:
        artifact_id = show_id(Prefix.ARTIFACT, value)
        here = f"/v1/artifacts/{artifact_id}"
        links = {"self": here, "content": f"{here}/content"}
        return cls(id=artifact_id, size=size, sha256=sha256, preview=preview, links=links)


class TurnView(Shown):
    id: str = Field(examples=[TURN_ID])
    session_id: str = Field(examples=[SESSION_ID])
    status: TurnStatus
    agent: str
    agent_version: str | None
    input: Any = Field(
        description="null if `input_artifact` says where it is; `GET /v1/turns/{id}` has it nevertheless, up to 1 MiB and as "
        "long as the artifact store answers"
    )
    input_artifact: ValueView | None = Field(
        None, description="where the input is, if it is larger than 32 KiB of JSON"
    )
    output: Any = Field(
        description="null if there is none, or if `output_artifact` says where it is; `GET /v1/turns/{id}` and the results of "
        "a batch have it nevertheless, up to 1 MiB and as long as the artifact store answers"
    )
    output_artifact: ValueView | None = Field(
        None, description="where the output is, if it is larger than 32 KiB of JSON"
    )
    error: dict[str, Any] | None
    attempts: int = Field(description="starts, those after an interrupt included")
    position: int | None = Field(description="place in the session's order; null while scheduled")
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    deadline: datetime
    run_after: datetime | None
    batch_id: str | None
    custom_id: str | None
    metadata: dict[str, str]
    usage: dict[str, Any]
    retry_of: str | None = Field(description="the turn that this one retries")
    root_turn_id: str = Field(description="the first of a chain of retries; itself, if it retries none")
    parent_turn_id: str | None = Field(description="the turn that started this one as its child")
    blocked_by: str | None = Field(None, description="while queued: the open turn before this one in its session")
    waiting_for: list[WaitView] | None = Field(
        None, description="while waiting, and only where one turn is asked for: what for"
    )
    links: dict[str, str]

    @classmethod
    def of(
        cls,
        turn: TurnRecord,
        *,
        values: Mapping[UUID, ArtifactRecord] = NOTHING,
        blocked_by: UUID | None = None,
        waiting_for: Sequence[Wait] | None = None,
    ) -> Self:
        """``values``: what is known of the large ones."""
        turn_id, session_id = show_id(Prefix.TURN, turn.id), show_id(Prefix.SESSION, turn.session_id)
        here = f"/v1/turns/{turn_id}"
        return cls(
            id=turn_id,
            session_id=session_id,
            status=turn.status,
            agent=turn.agent,
            agent_version=turn.agent_version,
            input=turn.input,
            input_artifact=_value(turn.input_artifact, values),
            output=turn.output,
            output_artifact=_value(turn.output_artifact, values),
            error=dict(turn.error) if turn.error is not None else None,
            attempts=turn.attempts,
            position=turn.position,
            created_at=turn.created_at,
            started_at=turn.started_at,
            ended_at=turn.ended_at,
            deadline=turn.deadline,
            run_after=turn.run_after,
            batch_id=show_id(Prefix.BATCH, turn.batch_id) if turn.batch_id else None,
            custom_id=turn.custom_id,
            metadata=dict(turn.metadata),
            usage=dict(turn.usage),
            retry_of=_turn_id(turn.retry_of),
            root_turn_id=show_id(Prefix.TURN, turn.root_turn_id),
            parent_turn_id=_turn_id(turn.parent_turn_id),
            blocked_by=_turn_id(blocked_by),
            waiting_for=[WaitView.of(wait) for wait in waiting_for] if waiting_for is not None else None,
            links={
                "self": here,
                "events": f"{here}/events",
                "steps": f"{here}/steps",
                "session": f"/v1/sessions/{session_id}",
            },
        )


def _value(value: UUID | None, values: Mapping[UUID, ArtifactRecord]) -> ValueView | None:
    if value is None:
        return None
    known = values.get(value)
    return ValueView.of(value) if known is None else ValueView.of(value, size=known.size, sha256=known.sha256)


def _turn_id(value: UUID | None) -> str | None:
    return show_id(Prefix.TURN, value) if value is not None else None


class SessionView(Shown):
    id: str = Field(examples=[SESSION_ID])
    status: Literal["idle", "busy"] = Field(description="busy: it has open turns")
    open_turns: int
    turns: int = Field(description="turns that have taken their place so far")
    last_seq: int = Field(description="seq of the newest event")
    metadata: dict[str, str]
    created_at: datetime
    active_at: datetime = Field(description="when it was last made use of, about")
    ttl: float | None = Field(description="seconds for which it is kept after that; null: as the fleet is set up")
    expires_at: datetime | None = Field(description="deleted not before this; later, if it is used until then")
    archived_through: int = Field(description="events up to this seq are in the cold tier; 0: none")
    links: dict[str, str]

    @classmethod
    def of(cls, session: SessionRecord) -> Self:
        session_id = show_id(Prefix.SESSION, session.id)
        here = f"/v1/sessions/{session_id}"
        return cls(
            id=session_id,
            status="busy" if session.open_turns else "idle",
            open_turns=session.open_turns,
            turns=session.next_position,
            last_seq=session.last_seq,
            metadata=dict(session.metadata),
            created_at=session.created_at,
            active_at=session.active_at,
            ttl=session.ttl.total_seconds() if session.ttl is not None else None,
            expires_at=session.expires_at,
            archived_through=session.archived_through,
            links={"self": here, "events": f"{here}/events", "turns": f"/v1/turns?session_id={session_id}"},
        )


class MovedView(Shown):
    """What an archiving, or a restore, has moved."""

    session_id: str = Field(examples=[SESSION_ID])
    events: int = Field(description="that were moved by this request")
    archived_through: int = Field(description="events up to this seq are in the cold tier now; 0: none")
    bytes: int = Field(description="that they take there, compressed")


class DeletedView(Shown):
    """What a deletion has removed, of all tiers."""

    session_id: str = Field(examples=[SESSION_ID])
    turns: int
    events: int = Field(description="of the log, archived ones included")
    tool_calls: int
    approvals: int
    mail: int = Field(description="signals and the like")
    checkpoints: int
    passages: int
    artifacts: int = Field(description="that no other session refers to; those of its archive included")
    blobs: int = Field(description="objects of the store that no other artifact shares")
    bytes: int = Field(description="of these objects")
    complete: bool = Field(description="false: a part of the service was away; the rest is removed when it is back")


class BatchView(Shown):
    id: str = Field(examples=[BATCH_ID])
    status: Literal["running", "ended"]
    total: int
    counts: dict[TurnStatus, int] = Field(description="turns by state, every state named")
    ended: int
    progress: float = Field(description="0 to 1: the share of turns that have ended")
    eta: datetime | None = Field(
        description="when it will have ended at the pace so far; null: not known yet, or ended"
    )
    metadata: dict[str, str]
    created_at: datetime
    ended_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, batch: BatchRecord, *, now: datetime) -> Self:
        batch_id = show_id(Prefix.BATCH, batch.id)
        here = f"/v1/batches/{batch_id}"
        done = batch.ended >= batch.total
        return cls(
            id=batch_id,
            status="ended" if done else "running",
            total=batch.total,
            counts={status: batch.counts.get(status, 0) for status in TurnStatus},
            ended=batch.ended,
            progress=round(batch.ended / batch.total, 4) if batch.total else 1.0,
            eta=None if done else _eta(batch, now),
            metadata=dict(batch.metadata),
            created_at=batch.created_at,
            ended_at=batch.last_ended_at if done else None,
            links={"self": here, "results": f"{here}/results", "turns": f"/v1/turns?batch_id={batch_id}"},
        )


def _eta(batch: BatchRecord, now: datetime) -> datetime | None:
    if not batch.ended or now <= batch.created_at:
        return None
    left: timedelta = (now - batch.created_at) * ((batch.total - batch.ended) / batch.ended)
    return now + left


class EventView(Shown):
    seq: int = Field(description="1, 2, 3 ... without gaps in its session")
    id: str
    session_id: str
    turn_id: str | None
    kind: str = Field(examples=["step.completed"])
    key: str | None = Field(description="replay key, where there is one")
    epoch: int = Field(description="the lease under which it was written")
    payload: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(
            seq=event.seq,
            id=str(event.id),
            session_id=show_id(Prefix.SESSION, event.session_id),
            turn_id=show_id(Prefix.TURN, event.turn_id) if event.turn_id else None,
            kind=event.kind,
            key=event.key,
            epoch=event.epoch,
            payload=dict(event.payload),
            created_at=event.created_at,
        )


class ArtifactView(Shown):
    id: str = Field(examples=[ARTIFACT_ID])
    name: str
    content_type: str
    size: int = Field(description="bytes")
    sha256: str
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, artifact: ArtifactRecord) -> Self:
        artifact_id = show_id(Prefix.ARTIFACT, artifact.id)
        here = f"/v1/artifacts/{artifact_id}"
        return cls(
            id=artifact_id,
            name=artifact.name,
            content_type=artifact.content_type,
            size=artifact.size,
            sha256=artifact.sha256,
            created_at=artifact.created_at,
            links={"self": here, "content": f"{here}/content"},
        )


class ArtifactUrlView(Shown):
    url: str = Field(description="to GET it from; a path of this API if not presigned")
    presigned: bool = Field(description="false: the artifact store cannot sign URLs, this one needs the API key")
    expires_at: datetime | None


class AgentView(Shown):
    name: str
    version: str
    queue: str
    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]

    @classmethod
    def of(cls, agent: AgentRecord) -> Self:
        return cls(
            name=agent.name,
            version=agent.version,
            queue=agent.queue,
            description=agent.description,
            input_schema=dict(agent.input_schema),
            output_schema=dict(agent.output_schema),
        )


class SignalView(Shown):
    id: str
    session_id: str
    name: str
    approval_id: str | None = Field(description="the open approval of this name that it has answered")


class Page(Shown):
    has_more: bool
    next: str | None = Field(description="give it as `cursor` for the next page; null: this was the last")


class TurnPage(Page):
    data: Sequence[TurnView]


class SessionPage(Page):
    data: Sequence[SessionView]


class BatchPage(Page):
    data: Sequence[BatchView]


class EventPage(Shown):
    data: Sequence[EventView]
    has_more: bool
    next: int = Field(description="give it as `after` for what comes next, now or later")


class AgentList(Shown):
    data: Sequence[AgentView]


class Check(Shown):
    status: Literal["ok", "failed"]
    detail: str | None = None


Ready = Literal["ok", "degraded", "unavailable"]


class Readiness(Shown):
    status: Ready
    checks: Mapping[str, Check]


class Liveness(Shown):
    status: Literal["ok"] = "ok"
