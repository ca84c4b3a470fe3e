"""What the API answers, as the client hands it out: JSON objects whose main fields are named here.

An object may have further fields; what they mean is in the API's own documentation (``/openapi.json``). Times are ISO 8601.
"""

from __future__ import annotations

from typing import Any, TypedDict

from longshift.model import Json


class AgentInfo(TypedDict):
    name: str
    version: str
    queue: str
    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class RunningInfo(TypedDict):
    id: str
    session_id: str
    agent: str
    agent_version: str | None
    attempts: int
    since: str  # when this worker claimed it
    last: str | None  # key of the step, or kind of the event, that was recorded last
    last_at: str | None


class WorkerInfo(TypedDict):
    id: str
    version: str | None
    queues: list[str]
    agents: list[dict[str, str]]  # name, version
    slots: int
    state: str  # ok, unready, stuck, draining, unknown
    started_at: str
    heartbeat_at: str
    running: int  # turns of the caller's that it holds
    turns: list[RunningInfo]  # the first 20 of them


class SessionInfo(TypedDict):
    id: str
    status: str  # idle, busy
    open_turns: int
    turns: int
    last_seq: int
    metadata: dict[str, str]
    created_at: str
    active_at: str  # when it was last made use of, about
    ttl: float | None  # seconds; None: as the fleet is set up
    expires_at: str | None  # not before this
    archived_through: int  # events up to here are in the cold tier


class MovedInfo(TypedDict):
    session_id: str
    events: int
    archived_through: int
    bytes: int


class DeletedInfo(TypedDict):
    session_id: str
    turns: int
    events: int
    tool_calls: int
    approvals: int
    mail: int
    checkpoints: int
    passages: int
    artifacts: int
    blobs: int
    bytes: int
    complete: bool


class WaitInfo(TypedDict):
    kind: str  # timer, signal, approval, child, call, retry
    name: str | None
    id: str | None
    until: str | None


class ValueInfo(TypedDict):
    id: str  # of an artifact
    size: int | None
    sha256: str | None
    preview: str | None
    links: dict[str, str]


class TurnInfo(TypedDict):
    id: str
    session_id: str
    status: str  # see longshift.model.TurnStatus
    agent: str
    agent_version: str | None
    input: Json
    input_artifact: ValueInfo | None
    output: Json  # null, if it is large and cannot be shown: see Client.output
    output_artifact: ValueInfo | None
    error: dict[str, Any] | None
    attempts: int
    created_at: str
    started_at: str | None
    ended_at: str | None
    batch_id: str | None
    custom_id: str | None
    metadata: dict[str, str]
    retry_of: str | None
    root_turn_id: str
    parent_turn_id: str | None
    blocked_by: str | None
    waiting_for: list[WaitInfo] | None


class BatchInfo(TypedDict):
    id: str
    status: str  # running, ended
    total: int
    counts: dict[str, int]
    ended: int
    progress: float
    eta: str | None
    created_at: str
    ended_at: str | None


class EventInfo(TypedDict):
    seq: int
    id: str
    session_id: str
    turn_id: str | None
    kind: str
    key: str | None
    epoch: int
    payload: dict[str, Any]
    created_at: str


class ArtifactUrlInfo(TypedDict):
    url: str
    presigned: bool  # false: a path of the API, which needs the key
    expires_at: str | None


class ArtifactInfo(TypedDict):
    id: str
    name: str
    content_type: str
    size: int
    sha256: str
    created_at: str


class StepInfo(TypedDict):
    seq: int
    turn_id: str
    key: str
    name: str
    status: str  # completed, failed
    result: Json
    artifact: ValueInfo | None
    error: dict[str, Any] | None
    attempts: int | None
    ms: int | None
    at: str
    tool_call_id: str | None


class ToolCallInfo(TypedDict):
    id: str
    session_id: str
    turn_id: str
    tool: str
    effect: str  # read, write, irreversible
    key: str
    input: Json
    status: str  # started, done, failed, unknown, given_up
    attempts: int
    worker_id: str
    created_at: str
    started_at: str
    ended_at: str | None
    result: Json
    artifact_id: str | None
    error: dict[str, Any] | None
    settled_at: str | None
    settled_by: str | None
    note: str | None


class ApprovalInfo(TypedDict):
    id: str
    session_id: str
    turn_id: str
    name: str
    show: Json
    status: str  # open, answered, closed
    granted: bool | None
    comment: str | None
    created_at: str
    expires_at: str | None
    answered_at: str | None
    answered_by: str | None
    closed_at: str | None


class SignalInfo(TypedDict):
    id: str
    session_id: str
    name: str
    approval_id: str | None
