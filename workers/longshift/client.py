"""A client of the HTTP API: async, written once. The command line, and blocking code, enter it by ``asyncio.run``.

::

    async with Client("http://127.0.0.1:8420", "lsk_...") as client:
        turn = await client.submit("research", {"question": "What is a lease?"})
        turn = await client.wait(turn["id"])

Every POST that makes something carries an ``Idempotency-Key``, made up if the caller gives none, so that a request
whose answer was lost is repeated without harm. What is asked again and again (``wait``, ``follow``) survives a restart
of the API. Problems of the API come out as the errors of ``longshift.errors``, with the API's own sentence; see
``transport``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from longshift.answers import (
    AgentInfo,
    ApprovalInfo,
    ArtifactInfo,
    ArtifactUrlInfo,
    BatchInfo,
    DeletedInfo,
    EventInfo,
    MovedInfo,
    SessionInfo,
    SignalInfo,
    StepInfo,
    ToolCallInfo,
    TurnInfo,
    ValueInfo,
    WorkerInfo,
)
from longshift.clock import SYSTEM, Clock
from longshift.errors import Unavailable
from longshift.model import TERMINAL, Json, OnBusy, Prefix, Settlement, new_id
from longshift.transport import (
    CHUNK,
    PATIENCE,
    Check,
    Frame,
    Transport,
    file_chunks,
    given,
    kind_of,
    line_chunks,
    lines,
    path_of,
    pause,
    streamed,
)

__all__ = [
    "AgentInfo",
    "ApprovalInfo",
    "ArtifactInfo",
    "ArtifactUrlInfo",
    "BatchInfo",
    "Client",
    "DeletedInfo",
    "EventInfo",
    "Frame",
    "MovedInfo",
    "SessionInfo",
    "SignalInfo",
    "StepInfo",
    "ToolCallInfo",
    "TurnInfo",
    "ValueInfo",
    "WorkerInfo",
]

T = TypeVar("T")
TIMEOUT = timedelta(seconds=30)
HOLD = 30.0
"""Seconds for which the API is asked to hold an answer."""


class Client:
    """One connection pool to one API. ``url`` without ``/v1``; ``timeout`` bounds a request, not a wait."""

    def __init__(self, url: str, api_key: str | None, *, timeout: timedelta = TIMEOUT, clock: Clock = SYSTEM) -> None:
        self._wire = Transport(url, api_key, timeout=timeout, clock=clock)
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._wire.close()

    # -- agents, workers and sessions

    async def agents(self) -> list[AgentInfo]:
        found: list[AgentInfo] = (await self._wire.get("/v1/agents"))["data"]
        return found

    async def workers(self) -> list[WorkerInfo]:
        """The workers that are alive, and what each of them runs of the caller's turns."""
        found: list[WorkerInfo] = (await self._wire.get("/v1/workers"))["data"]
        return found

    async def create_session(
        self, session_id: str | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> SessionInfo:
        """A new session; with an id of the caller's choice the same request may be repeated."""
        body = given(id=session_id, metadata=metadata)
        made: SessionInfo = await self._wire.post("/v1/sessions", body, idempotency_key=str(new_id()))
        return made

    async def session(self, session_id: str) -> SessionInfo:
        found: SessionInfo = await self._wire.get(path_of(session_id, Prefix.SESSION))
        return found

    def sessions(self) -> AsyncIterator[SessionInfo]:
        """Newest first."""
        return self._wire.pages("/v1/sessions", {})

    async def archive(self, session_id: str) -> MovedInfo:
        """Move the events of an idle session to the cold tier.

        Raises:
            InUse: it has an open turn.
        """
        moved: MovedInfo = await self._wire.post(f"{path_of(session_id, Prefix.SESSION)}/archive", {})
        return moved

    async def restore(self, session_id: str) -> MovedInfo:
        """Put its archived events back into Postgres.

        Raises:
            InUse: it has an open turn.
        """
        moved: MovedInfo = await self._wire.post(f"{path_of(session_id, Prefix.SESSION)}/restore", {})
        return moved

    async def delete_session(self, session_id: str) -> DeletedInfo:
        """Delete a session with all that it has, in all tiers; what was removed.

        Raises:
            InUse: it has an open turn.
        """
        response = await self._wire.request("DELETE", path_of(session_id, Prefix.SESSION))
        removed: DeletedInfo = response.json()
        return removed

    async def export(self, session_id: str) -> AsyncIterator[tuple[str, bytes]]:
        """All that is known of a session: the type of each line, and the line with its end; checked as it comes.

        Raises:
            Unavailable: it was cut off; what has come is not all.
            InvalidInput: it is not what was sent.
        """
        check = Check()
        async with self._wire.stream(f"{path_of(session_id, Prefix.SESSION)}/export") as response:
            async for line in lines(response):
                text = line.encode() + b"\n"
                yield check.add(text), text
        if not check.whole:
            raise Unavailable(f"the export of {session_id} was cut off: try again")

    # -- turns

    async def submit(
        self,
        agent: str,
        input: Json = None,  # noqa: A002 - the name it has on the wire
        *,
        session_id: str | None = None,
        agent_version: str | None = None,
        on_busy: OnBusy | None = None,
        run_after: datetime | None = None,
        deadline: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> TurnInfo:
        """Submit a turn, on a new session unless one is named. When this returns, it is committed.

        Raises:
            UnknownAgent, InvalidInput, NotFound, SessionBusy, IdempotencyMismatch: it was not accepted.
            Denied: the key is missing, wrong, or may not submit.
            Unavailable: no answer; repeat it with the same ``idempotency_key``.
        """
        body = {"agent": agent, "input": input} | given(
            agent_version=agent_version,
            on_busy=on_busy,
            run_after=run_after.isoformat() if run_after else None,
            deadline=deadline.isoformat() if deadline else None,
            metadata=metadata,
        )
        path = f"{path_of(session_id, Prefix.SESSION)}/turns" if session_id else "/v1/turns"
        turn: TurnInfo = await self._wire.post(path, body, idempotency_key=idempotency_key or str(new_id()))
        return turn

    async def turn(self, turn_id: str) -> TurnInfo:
        found: TurnInfo = await self._wire.get(path_of(turn_id, Prefix.TURN))
        return found

    async def wait(
        self, turn_id: str, *, timeout: timedelta | None = None, on_change: Callable[[TurnInfo], None] | None = None
    ) -> TurnInfo:
        """The turn when it has ended, or as it is after ``timeout``; the API holds each answer until it changes.

        A large output may be missing in it: ``output`` has it in any case.
        """
        path = path_of(turn_id, Prefix.TURN)
        end = None if timeout is None else self._clock.monotonic() + timeout.total_seconds()
        response = await self._wire.request("GET", path)
        while True:
            if response.status_code != httpx.codes.NOT_MODIFIED:
                turn: TurnInfo = response.json()
                tag = response.headers["etag"]
                if on_change is not None:
                    on_change(turn)
            left = HOLD if end is None else min(HOLD, end - self._clock.monotonic())
            if turn["status"] in TERMINAL or left <= 0:
                return turn
            response = await self._wire.patiently(partial(self._changed, path, tag, left))

    async def output(self, turn: TurnInfo) -> Json:
        """The output of a turn, downloaded if it is too large for the API's answer (1 MiB)."""
        large = turn["output_artifact"]
        if turn["output"] is not None or large is None:
            return turn["output"]
        return json.loads(b"".join([chunk async for chunk in self.download(large["id"])]))

    async def cancel(self, id_: str, *, reason: str | None = None) -> TurnInfo | BatchInfo:
        """Ask a turn, or every open turn of a batch, to end."""
        path = path_of(id_, Prefix.TURN, Prefix.BATCH)
        told: TurnInfo | BatchInfo = await self._wire.post(f"{path}/cancel", given(reason=reason))
        return told

    async def retry(
        self,
        turn_id: str,
        *,
        agent_version: str | None = None,
        deadline: datetime | None = None,
        idempotency_key: str | None = None,
    ) -> TurnInfo:
        """A new turn that goes on from the last step of one that failed, was cancelled or has expired.

        Raises:
            Conflict: it has not ended, it has succeeded, or it is being retried already.
            UnknownAgent, InvalidInput, NotFound, Denied, Unavailable: as for ``submit``.
        """
        body = given(agent_version=agent_version, deadline=deadline.isoformat() if deadline else None)
        path = f"{path_of(turn_id, Prefix.TURN)}/retry"
        turn: TurnInfo = await self._wire.post(path, body, idempotency_key=idempotency_key or str(new_id()))
        return turn

    def steps(self, turn_id: str, *, after: int = 0) -> AsyncIterator[StepInfo]:
        """What a turn and those that it retries have recorded so far, however it ended or if it has not."""
        return self._wire.along(f"{path_of(turn_id, Prefix.TURN)}/steps", after=after)

    # -- what people decide

    async def signal(
        self, session_id: str, name: str, payload: Json = None, *, idempotency_key: str | None = None
    ) -> SignalInfo:
        """Tell whichever turn of the session waits for ``name``, now or later; or answer its open approval of this name."""
        path = f"{path_of(session_id, Prefix.SESSION)}/signals"
        body = {"name": name, "payload": payload}
        sent: SignalInfo = await self._wire.post(path, body, idempotency_key=idempotency_key or str(new_id()))
        return sent

    async def approvals(self, id_: str | None = None, *, everything: bool = False) -> AsyncIterator[ApprovalInfo]:
        """The open approvals, or ``everything``: of a session, a turn, or all of them."""
        params = given(status="all" if everything else "open")
        if id_ is not None:
            kind = kind_of(id_, Prefix.TURN, Prefix.SESSION)
            params["turn_id" if kind is Prefix.TURN else "session_id"] = id_
        async for approval in self._wire.pages("/v1/approvals", params):
            yield approval

    async def approval(self, approval_id: str) -> ApprovalInfo:
        found: ApprovalInfo = await self._wire.get(path_of(approval_id, Prefix.APPROVAL))
        return found

    async def answer(self, approval_id: str, granted: bool, *, comment: str | None = None) -> ApprovalInfo:
        """Answer an approval: of two answers the first counts.

        Raises:
            Conflict: it has been answered, or nobody waits for it any more.
        """
        body = {"granted": granted} | given(comment=comment)
        path = path_of(approval_id, Prefix.APPROVAL)
        told: ApprovalInfo = await self._wire.post(path, body, idempotency_key=str(new_id()))
        return told

    async def tool_calls(self, id_: str | None = None) -> AsyncIterator[ToolCallInfo]:
        """The tool calls of a session or a turn, newest first; of none: all those whose outcome is in doubt."""
        path, params = "/v1/tool-calls", {"status": "unknown"}
        if id_ is not None:
            is_turn = kind_of(id_, Prefix.TURN, Prefix.SESSION) is Prefix.TURN
            session_id = (await self.turn(id_))["session_id"] if is_turn else id_
            path, params = f"{path_of(session_id, Prefix.SESSION)}/tool-calls", {"turn_id": id_} if is_turn else {}
        async for call in self._wire.pages(path, params):
            yield call

    async def tool_call(self, call_id: str) -> ToolCallInfo:
        found: ToolCallInfo = await self._wire.get(path_of(call_id, Prefix.CALL))
        return found

    async def settle(
        self, call_id: str, outcome: Settlement, *, result: Json = None, note: str | None = None
    ) -> ToolCallInfo:
        """Say what became of a call whose outcome is in doubt; ``result`` is what the tool returned, if it was done.

        Raises:
            Conflict: its outcome is not in doubt, or somebody else was first.
        """
        body: dict[str, Json] = {"outcome": outcome.value} | given(note=note)
        if outcome is Settlement.DONE:
            body["result"] = result
        path = f"{path_of(call_id, Prefix.CALL)}/settle"
        settled: ToolCallInfo = await self._wire.post(path, body, idempotency_key=str(new_id()))
        return settled

    # -- events

    def events(self, id_: str, *, after: int = 0) -> AsyncIterator[EventInfo]:
        """The events of a turn or session so far, page by page, those with a greater ``seq`` than ``after``."""
        return self._wire.along(f"{path_of(id_, Prefix.TURN, Prefix.SESSION)}/events", after=after)

    async def follow(self, id_: str, *, after: int = 0) -> AsyncGenerator[Frame, None]:
        """Events and deltas as they come; of a turn until it has ended (``done``), of a session for ever.

        Resumes by itself after the last event seen when the connection or the API goes away for less than ``PATIENCE``.
        """
        path = f"{path_of(id_, Prefix.TURN, Prefix.SESSION)}/events"
        opened, attempt = False, 0
        lost_at: float | None = None
        while True:
            try:
                async with aclosing(self._wire.frames(path, after=after)) as frames:
                    async for frame in frames:
                        opened, attempt, lost_at = True, 0, None
                        after = after if frame.seq is None else frame.seq
                        if frame.kind != "open":
                            yield frame
                        if frame.kind == "done":
                            return
            except Unavailable:
                lost_at = lost_at or self._clock.monotonic()
                if not opened or self._clock.monotonic() - lost_at > PATIENCE.total_seconds():
                    raise
            await asyncio.sleep(pause(attempt))
            attempt += 1

    # -- batches

    async def submit_batch(
        self,
        lines: Iterable[Mapping[str, Json]] | Path,
        *,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> BatchInfo:
        """Submit many turns, all or none: an iterable of ``{"agent", "input", ...}``, or a file of such JSON lines.

        Either is streamed, and read once.

        Raises:
            InvalidInput: lines do not fit: ``errors`` has their ``line``. Nothing was accepted.
            Denied, Unavailable: as for ``submit``.
        """
        await self._wire.get("/v1/agents")  # a wrong key is better known before 200 MB are on their way
        chunks = file_chunks(lines) if isinstance(lines, Path) else line_chunks(lines)
        response = await self._wire.request(
            "POST",
            "/v1/batches",
            params={f"metadata[{key}]": value for key, value in (metadata or {}).items()},
            headers={"Content-Type": "application/jsonl", "Idempotency-Key": idempotency_key or str(new_id())},
            content=streamed(chunks),
            timeout=httpx.Timeout(self._wire.seconds, read=10 * self._wire.seconds),  # all of it is stored first
        )
        batch: BatchInfo = response.json()
        return batch

    async def batch(self, batch_id: str) -> BatchInfo:
        found: BatchInfo = await self._wire.get(path_of(batch_id, Prefix.BATCH))
        return found

    async def wait_batch(self, batch_id: str, *, on_change: Callable[[BatchInfo], None] | None = None) -> BatchInfo:
        """The batch when all its turns have ended."""
        path = path_of(batch_id, Prefix.BATCH)
        response = await self._wire.request("GET", path)
        pause = 0.1
        while True:
            batch: BatchInfo = response.json()
            if on_change is not None:
                on_change(batch)
            if batch["status"] == "ended":
                return batch
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 2.0)
            response = await self._wire.patiently(lambda: self._wire.request("GET", path))

    async def results(self, batch_id: str, *, everything: bool = False) -> AsyncIterator[TurnInfo]:
        """The turns of a batch in its order: those that have ended, or ``everything``; streamed."""
        params = {"all": "true"} if everything else None
        async with self._wire.stream(f"{path_of(batch_id, Prefix.BATCH)}/results", params=params) as response:
            async for line in lines(response):
                if line:
                    yield json.loads(line)

    # -- artifacts

    async def upload(
        self, content: bytes | Path, *, name: str | None = None, content_type: str = "application/octet-stream"
    ) -> ArtifactInfo:
        """Store bytes, or a file (streamed); ``application/octet-stream`` lets the API guess the type by the name."""
        name = name or (content.name if isinstance(content, Path) else None)
        response = await self._wire.request(
            "POST",
            "/v1/artifacts",
            params=given(name=name),
            headers={"Content-Type": content_type, "Idempotency-Key": str(new_id())},
            content=streamed(file_chunks(content)) if isinstance(content, Path) else content,
            timeout=httpx.Timeout(self._wire.seconds, read=10 * self._wire.seconds),  # all of it is stored first
        )
        artifact: ArtifactInfo = response.json()
        return artifact

    async def artifact(self, artifact_id: str) -> ArtifactInfo:
        found: ArtifactInfo = await self._wire.get(path_of(artifact_id, Prefix.ARTIFACT))
        return found

    async def artifact_url(self, artifact_id: str, *, expires_in: int = 3600) -> ArtifactUrlInfo:
        """A URL from which anybody may download the artifact for ``expires_in`` seconds, if its store can sign one."""
        path = f"{path_of(artifact_id, Prefix.ARTIFACT)}/url"
        found: ArtifactUrlInfo = await self._wire.get(path, params={"expires_in": expires_in})
        return found

    async def download(self, artifact_id: str) -> AsyncGenerator[bytes, None]:
        """The bytes of an artifact, in pieces."""
        async with self._wire.stream(f"{path_of(artifact_id, Prefix.ARTIFACT)}/content") as response:
            async for chunk in response.aiter_bytes(CHUNK):
                yield chunk

    async def _changed(self, path: str, tag: str, left: float) -> httpx.Response:
        """The turn as soon as it is not ``tag`` any more, or 304 after ``left`` seconds."""
        held = max(1, round(left))
        timeout = httpx.Timeout(self._wire.seconds, read=held + self._wire.seconds)
        return await self._wire.request(
            "GET", path, params={"wait": held}, headers={"If-None-Match": tag}, timeout=timeout
        )
