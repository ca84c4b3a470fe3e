"""Sessions with one MCP server: one per event loop, opened when first needed, closed when nobody has used it for a while.

A session is opened and closed by one task of its own, because the SDK's scopes must be left where they were entered.
Calls of all turns share it. One that is broken, or may be, is *retired*: calls that are under way go on, the next one
opens another. Nothing of a session is needed to resume a turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import TypeVar

import httpx2
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.dispatcher import ProgressFnT
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
    CallToolRequest,
    Implementation,
    ListToolsRequest,
    ListToolsResult,
    PaginatedRequestParams,
)
from pydantic import TypeAdapter, ValidationError

from longshift.errors import LongshiftError, NotDone, Unavailable
from longshift.integrations.mcp_wire import Contained, Fault, Faults

R = TypeVar("R")
_TOOLS = TypeAdapter(ListToolsResult)

PAGES = 100
"""Pages of a list of tools that are read; a list that never ends must not hold a turn."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may well be answered."""


class McpError(LongshiftError):
    """An MCP server answered a request with an error of the protocol, not with a result: asking again does not help."""

    code = "mcp_error"


class McpRefused(McpError, NotDone):
    """The same, before anything was done: the credentials, the address, or the size of the request are wrong."""


class McpUnavailable(Unavailable):
    """An MCP server did not answer, and what was asked of it may have been done. ``retry_after``: when to, if it said so."""

    retry_after: str | None = None


class McpNotSent(McpUnavailable, NotDone):
    """An MCP server could not be asked, so that nothing has been done."""


class McpTooLarge(McpError):
    """What an MCP server answered is larger than ``largest``; what was asked of it has been done."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is and how it is reached; ``largest``: bytes of one answer, ``idle``: until a session is closed."""

    name: str
    url: str = field(repr=False)  # path and query may carry a secret
    headers: Mapping[str, str] = field(repr=False)
    auth: httpx2.Auth | None = field(repr=False)
    connect: timedelta
    idle: timedelta
    largest: int

    @property
    def shown(self) -> str:
        """For messages: no path, no query, no user."""
        url = httpx2.URL(self.url)
        return f"MCP server {self.name!r} at {url.scheme}://{url.netloc.decode()}"


class Session:
    """One session, and how many calls use it. ``usable`` is False from the moment on when it is to end."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.faults = Faults()
        self.usable = True
        self._endpoint = endpoint
        self._client: Client | None = None
        self._error: Exception | None = None
        self._opened = asyncio.Event()
        self._closing = asyncio.Event()
        self._users = 0
        self._timer: asyncio.TimerHandle | None = None
        # outside of the turn that happens to open it: it serves others, and must not keep that turn in memory
        self.task = asyncio.create_task(self._keep(), context=Context(), name=f"mcp {endpoint.name}")

    async def client(self) -> Client:
        """
        Raises:
            Exception: why it could not be opened.
        """
        await self._opened.wait()
        if self._client is None:
            raise self._error or MCPError(CONNECTION_CLOSED, "the session was closed")
        return self._client

    @property
    def has_state(self) -> bool:
        """Whether the server keeps something for this session and may have lost it (protocols before 2026)."""
        return self._client is not None and self._client.session.initialize_result is not None

    def enter(self) -> None:
        self._users += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self) -> None:
        self._users -= 1
        if self._users > 0:
            return
        if self.usable:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._endpoint.idle.total_seconds(), self.retire)
        else:
            self._closing.set()

    def retire(self) -> None:
        """Let it end when the last call has left it."""
        self.usable = False
        if self._users == 0:
            self._closing.set()

    async def close(self) -> None:
        """End it now."""
        self.usable = False
        self._closing.set()
        await asyncio.wait([self.task])

    async def _keep(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self._endpoint.connect.total_seconds()):
                    self._client = await self._open(stack)
                self._opened.set()
                await self._closing.wait()
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait for the session
            self._error = error
        finally:
            self.usable = False
            self._opened.set()

    async def _open(self, stack: AsyncExitStack) -> Client:
        endpoint = self._endpoint
        limit = endpoint.connect.total_seconds()
        wire = Contained(httpx2.AsyncHTTPTransport(), self.faults, largest=endpoint.largest)
        http = httpx2.AsyncClient(
            transport=wire,
            headers={**endpoint.headers, "accept-encoding": "identity"},  # so that its size is what was sent
            auth=endpoint.auth,
            timeout=httpx2.Timeout(None, connect=limit),  # a call has its own limit
            trust_env=False,  # a proxy would go around the transport
        )
        await stack.enter_async_context(http)
        streams = streamable_http_client(endpoint.url, http_client=http, max_sse_event_size=endpoint.largest)
        ours = Implementation(name="longshift", version=version("longshift"))
        return await stack.enter_async_context(Client(streams, cache=None, client_info=ours))


class Sessions:
    """The sessions with one server, by event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._sessions: dict[asyncio.AbstractEventLoop, Session] = {}

    async def ask(
        self,
        request: CallToolRequest | ListToolsRequest,
        answer: TypeAdapter[R],
        *,
        on_progress: ProgressFnT | None = None,
    ) -> R:
        """The server's answer to one request.

        It is sent a second time if the server certainly has not acted on the first: it had lost the session, or wants
        headers that the SDK knows after reading the list of tools.

        Raises:
            McpError: the server answered with an error.
            McpUnavailable: it did not answer.
        """
        again = True
        while True:
            async with self._using() as session:
                try:
                    client = await session.client()
                    return await client.session.send_request(request, answer, progress_callback=on_progress)  # type: ignore[type-var]
                except asyncio.CancelledError:  # too slow for its caller, perhaps because something is broken
                    session.retire()
                    raise
                except Exception as raised:
                    error = _first(raised)
                    fault = session.faults.read(error) if isinstance(error, MCPError) else None
                    forgotten = session.has_state and fault is not None and fault.status in (400, 404)
                    mismatch = isinstance(error, MCPError) and error.code == HEADER_MISMATCH
                    problem = self._problem(error, fault)
                    if forgotten or isinstance(problem, McpUnavailable):
                        session.retire()
                    if not again or not (forgotten or mismatch):
                        raise problem from raised
            again = False
            if mismatch:
                await self.tools()

    async def tools(self) -> ListToolsResult:
        """All tools, from every page."""
        page = await self.ask(ListToolsRequest(), _TOOLS)
        tools = list(page.tools)
        for _ in range(PAGES - 1):
            if page.next_cursor is None:
                break
            page = await self.ask(ListToolsRequest(params=PaginatedRequestParams(cursor=page.next_cursor)), _TOOLS)
            tools += page.tools
        return ListToolsResult(tools=tools)

    async def close(self) -> None:
        """End the session of this event loop, if there is one."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[Session]:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or not session.usable:
            session = self._sessions[loop] = Session(self._endpoint)
            session.task.add_done_callback(partial(self._forget, loop, session))
        session.enter()
        try:
            yield session
        finally:
            session.leave()

    def _forget(self, loop: asyncio.AbstractEventLoop, session: Session, _: asyncio.Task[None]) -> None:
        if self._sessions.get(loop) is session:
            del self._sessions[loop]

    def _problem(self, error: Exception, fault: Fault | None) -> LongshiftError:
        """``error`` as callers see it: what happened, at which server, and whether anything can have been done."""
        server = self._endpoint.shown
        if fault is not None:
            return _of_fault(fault, server=server)
        if isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
            if "byte limit" in error.message:  # the SDK has no other sign of it
                return McpTooLarge(f"{server}: its answer is larger than {self._endpoint.largest:,} bytes")
            return McpUnavailable(f"{server} ended the connection before its answer: {error.message}")
        if isinstance(error, MCPError):
            return McpError(f"{server} answered with error {error.code}: {error.message}")
        if isinstance(error, ValidationError):
            return McpError(f"{server} answered with what is not MCP: {error.error_count()} fields do not fit")
        if isinstance(error, TimeoutError):
            limit = self._endpoint.connect.total_seconds()
            return McpNotSent(f"{server} did not open a session within {limit:g} s: check that it runs")
        return McpUnavailable(f"{server} failed: {type(error).__name__}: {error}")


def _first(error: Exception) -> Exception:
    """What a task group of the SDK has wrapped."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _of_fault(fault: Fault, *, server: str) -> LongshiftError:
    if fault.too_large:
        return McpTooLarge(f"{server}: {fault.reason}")
    if fault.status is None or fault.status in PASSING:
        kind = McpUnavailable if fault.sent and fault.status != 429 else McpNotSent
        problem = kind(f"{server} did not answer: {fault.reason}")
        problem.retry_after = fault.retry_after
        return problem
    hint = ": check its headers and credentials" if fault.status in (401, 403) else ""
    if fault.status < 500:
        return McpRefused(f"{server} refused the request: {fault.reason}{hint}")
    return McpError(f"{server} answered with {fault.reason}")
