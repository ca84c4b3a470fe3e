"""The HTTP edge for tests: a real uvicorn on a port of its own, in the test's event loop, over real servers.

Turns are moved by the store's own statements (``Hand``), as a worker would move them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from pydantic import SecretStr
from sqlalchemy import text

from longshift.config import Config
from longshift.db import keys, leases, log, tool_calls
from longshift.db.database import Database
from longshift.db.keys import Scope
from longshift.db.tool_calls import Ending, Start
from longshift.events import Kind, NewEvent, encode
from longshift.hot import log_channel, turn_channel
from longshift.model import (
    AgentRecord,
    CallOutcome,
    CallStatus,
    Claim,
    Dedupe,
    Effect,
    NewCall,
    Prefix,
    TurnStatus,
    new_id,
    parse_id,
    show_id,
)
from longshift.tracing import OFF, Traces
from longshift_api.app import create_app
from longshift_api.deps import Edge
from longshift_api.server import bind, make_server

REGISTER = text("INSERT INTO workers (id, host, pid, queues, capacity) VALUES (:id, 'test', 1, '{default}', 1)")
ASK = text("""
INSERT INTO approvals (id, tenant_id, session_id, turn_id, name, show, closed_at) VALUES
(:id, :tenant, :session, :turn, :name, CAST(:show AS json), CASE WHEN :closed THEN clock_timestamp() END)""")
KEY = "lsk_of_the_default_tenant"
ECHO = AgentRecord(
    name="echo",
    version="1",
    queue="default",
    description="says it again",
    input_schema={
        "type": "object",
        "properties": {"text": {"type": "string"}, "times": {"type": "integer", "minimum": 1}},
        "required": ["text"],
        "additionalProperties": False,
    },
    output_schema={"type": "string"},
)


@dataclass(frozen=True)
class Api:
    """A running API. ``client`` sends the key of the default tenant."""

    client: httpx.AsyncClient
    edge: Edge
    url: str

    @property
    def db(self) -> Database:
        return self.edge.db

    async def key(self, *, tenant: str = "other", scopes: frozenset[Scope] = keys.EVERYTHING) -> dict[str, str]:
        """Headers with a new key."""
        tenant_id = await keys.ensure_tenant(self.db, tenant)
        _, secret = await keys.create_key(self.db, tenant_id=tenant_id, name="test", scopes=scopes)
        return {"Authorization": f"Bearer {secret}"}

    async def submit(self, path: str = "/v1/turns", **fields: Any) -> dict[str, Any]:
        """A turn of ``echo``, accepted."""
        answer = await self.client.post(path, json={"agent": "echo", "input": {"text": "hello"}, **fields})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    async def session(self) -> str:
        answer = await self.client.post("/v1/sessions")
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])


def api_config(database_url: str, redis_url: str, folder: Path, **settings: Any) -> Config:
    return Config(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        artifacts_url=f"file://{folder}/artifacts",
        api_key=SecretStr(KEY),
        **settings,
    )


@asynccontextmanager
async def running_api(config: Config, *, traces: Traces = OFF) -> AsyncIterator[Api]:
    app = create_app(config, traces=traces)
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with app.router.lifespan_context(app):
            edge: Edge = app.state.edge
            await leases.serve(edge.db, [ECHO])
            server = make_server(app)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            headers = {"Authorization": f"Bearer {KEY}"}
            try:
                async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
                    yield Api(client, edge, url)
            finally:
                server.should_exit = True
                await serving


class Hand:
    """Moves the turns of one session as the holder of its lease would, and tells Redis so."""

    def __init__(self, api: Api, session_id: str) -> None:
        self._edge = api.edge
        self._session_id = parse_id(Prefix.SESSION, session_id)
        self._claim: Claim
        self._seq = 0

    async def take(self) -> None:
        worker_id = new_id()
        await self._edge.db.execute(REGISTER, {"id": worker_id})
        (won,) = await leases.claim(self._edge.db, [self._session_id], worker_id=worker_id)
        self._claim, self._seq = won.claim, won.claim.last_seq

    async def start(self, turn_id: str) -> None:
        turn = parse_id(Prefix.TURN, turn_id)
        event = self._event(Kind.TURN_STARTED, turn, {"attempt": 1, "agent": "echo", "version": "1", "input": None})
        assert await log.start(self._edge.db, [log.Start(self._claim, self._next(), (event,), turn, "1")])
        await self._tell(turn)

    async def append(
        self, turn_id: str, payload: Mapping[str, Any], *, kind: Kind = Kind.STEP_COMPLETED, key: str = "k"
    ) -> None:
        turn = parse_id(Prefix.TURN, turn_id)
        event = NewEvent(kind, turn, encode(payload), key=key)
        assert await log.append(self._edge.db, [log.Append(self._claim, self._next(), (event,))])
        await self._tell(turn)

    async def succeed(self, turn_id: str, output: object = "done", *, artifact: UUID | None = None) -> None:
        """``artifact``: where the output is instead of the row."""
        turn = parse_id(Prefix.TURN, turn_id)
        event = self._event(Kind.TURN_SUCCEEDED, turn, {"output": output})
        written = json.dumps(output) if artifact is None else None
        status = TurnStatus.SUCCEEDED
        finish = log.Finish(self._claim, self._next(), (event,), turn, status, written, None, True, artifact)
        assert await log.finish(self._edge.db, [finish])
        await self._tell(turn)

    async def fail(self, turn_id: str, error: Mapping[str, Any]) -> None:
        turn = parse_id(Prefix.TURN, turn_id)
        event = self._event(Kind.TURN_FAILED, turn, {"error": error})
        status = TurnStatus.FAILED
        finish = log.Finish(self._claim, self._next(), (event,), turn, status, None, json.dumps(error), keep=True)
        assert await log.finish(self._edge.db, [finish])
        await self._tell(turn)

    async def wait(self, turn_id: str, until: datetime | None = None) -> None:
        """Leave the worker, as a turn does all of whose branches wait."""
        turn = parse_id(Prefix.TURN, turn_id)
        event = self._event(Kind.TURN_WAITING, turn, {"until": until and until.isoformat()})
        status, seen = TurnStatus.WAITING, self._claim.mail_seq
        assert await log.leave(
            self._edge.db, [log.Leave(self._claim, self._next(), (event,), turn, status, until, seen)]
        )
        await self._tell(turn)

    async def call(self, turn_id: str, tool: str = "pay", **arguments: Any) -> Start:
        """Begin a call of an irreversible tool."""
        call = NewCall(
            id=new_id(),
            turn_id=parse_id(Prefix.TURN, turn_id),
            tool=tool,
            effect=Effect.IRREVERSIBLE,
            dedupe=Dedupe.TURN,
            place=f"{tool}#0",
            input=json.dumps(arguments),
            timeout=timedelta(minutes=1),
        )
        start = Start(self._claim, call)
        begun = await tool_calls.begin(self._edge.db, [start])
        assert begun[start.key].standing is None
        return start

    async def doubt(self, turn_id: str, tool: str = "pay", **arguments: Any) -> str:
        """Begin a call and lose sight of it. Returns its id."""
        start = await self.call(turn_id, tool, **arguments)
        error = json.dumps({"type": "TimeoutError", "message": "no result within 60 s"})
        await tool_calls.end(
            self._edge.db, [Ending(start.claim, start.call, CallOutcome(CallStatus.UNKNOWN, error=error))]
        )
        return show_id(Prefix.CALL, start.call.id)

    async def ask(self, turn_id: str, name: str = "publish", *, show: object = None, closed: bool = False) -> str:
        """Open an approval. Returns its id."""
        approval = new_id()
        params = {
            "id": approval,
            "tenant": self._claim.tenant_id,
            "session": self._session_id,
            "turn": parse_id(Prefix.TURN, turn_id),
            "name": name,
            "show": json.dumps(show),
            "closed": closed,
        }
        await self._edge.db.execute(ASK, params)
        return show_id(Prefix.APPROVAL, approval)

    async def run(self, turn_id: str, output: object = "done") -> None:
        """From the claim to the end."""
        await self.take()
        await self.start(turn_id)
        await self.succeed(turn_id, output)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _event(self, kind: Kind, turn: UUID, payload: Mapping[str, Any]) -> NewEvent:
        return NewEvent(kind, turn, encode(payload))

    async def _tell(self, turn: UUID) -> None:
        await self._edge.hot.announce(
            [(log_channel(self._session_id), json.dumps({"seq": self._seq})), (turn_channel(turn), "changed")]
        )
