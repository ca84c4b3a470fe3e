"""The shapes on the wire of workers and of what they run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Self

from pydantic import ConfigDict, Field

from longshift.db.workers import RunningRecord, WorkerRecord
from longshift.model import Prefix, show_id
from longshift_api.schemas import MOMENT, SESSION_ID, TURN_ID, Shown
from longshift_api.schemas_tools import WORKER_ID


class ServedAgent(Shown):
    name: str
    version: str


class RunningView(Shown):
    """A turn of yours that a worker holds now."""

    id: str
    session_id: str
    agent: str
    agent_version: str | None = Field(description="null: not pinned yet, its first attempt has just been claimed")
    attempts: int
    since: datetime = Field(description="when this worker claimed it")
    last: str | None = Field(description="replay key of the step, or kind of the event, that was recorded last")
    last_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, running: RunningRecord) -> Self:
        assert running.turn_id is not None
        turn_id, session_id = show_id(Prefix.TURN, running.turn_id), show_id(Prefix.SESSION, running.session_id)
        return cls(
            id=turn_id,
            session_id=session_id,
            agent=running.agent or "",
            agent_version=running.agent_version,
            attempts=running.attempts or 0,
            since=running.since,
            last=running.last,
            last_at=running.last_at,
            links={"self": f"/v1/turns/{turn_id}", "session": f"/v1/sessions/{session_id}"},
        )


class WorkerView(Shown):
    """A worker that is alive. Which machine it runs on is told to operators only, by `longshift fleet`."""

    id: str
    version: str | None = Field(description="of its software")
    queues: Sequence[str]
    agents: Sequence[ServedAgent]
    slots: int = Field(description="turns that it runs at a time, at most")
    state: Literal["ok", "unready", "stuck", "draining", "unknown"] = Field(
        description="`unready`: something that it needs does not answer; `stuck`: it takes no work though there is some, or "
        "a turn makes no progress; `draining`: it takes nothing more and ends; `unknown`: it has not said yet"
    )
    started_at: datetime
    heartbeat_at: datetime
    running: int = Field(description="turns of yours that it holds now")
    turns: Sequence[RunningView] = Field(description="the first 20 of them, those first that it has had for longest")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": WORKER_ID,
                    "version": "1.0.0",
                    "queues": ["default"],
                    "agents": [{"name": "research", "version": "1"}],
                    "slots": 500,
                    "state": "ok",
                    "started_at": MOMENT,
                    "heartbeat_at": MOMENT,
                    "running": 1,
                    "turns": [
                        {
                            "id": TURN_ID,
                            "session_id": SESSION_ID,
                            "agent": "research",
                            "agent_version": "1",
                            "attempts": 1,
                            "since": MOMENT,
                            "last": "/read#0",
                            "last_at": MOMENT,
                            "links": {"self": f"/v1/turns/{TURN_ID}", "session": f"/v1/sessions/{SESSION_ID}"},
                        }
                    ],
                }
            ]
        }
    )

    @classmethod
    def of(cls, worker: WorkerRecord, running: Sequence[RunningRecord]) -> Self:
        return cls(
            id=show_id(Prefix.WORKER, worker.id),
            version=worker.version,
            queues=worker.queues,
            agents=[ServedAgent(name=name, version=version) for name, version in worker.serves],
            slots=worker.capacity,
            state=_state(worker),
            started_at=worker.started_at,
            heartbeat_at=worker.heartbeat_at,
            running=running[0].total if running else 0,
            turns=[RunningView.of(each) for each in running if each.turn_id is not None],
        )


class WorkerList(Shown):
    data: Sequence[WorkerView]


def _state(worker: WorkerRecord) -> Literal["ok", "unready", "stuck", "draining", "unknown"]:
    if worker.draining_since or worker.drain_asked_at:
        return "draining"
    return worker.condition.value if worker.condition is not None else "unknown"
