"""Tools of MCP servers, over streamable HTTP: ``pip install 'longshift[mcp]'``.

    weather = McpServer("weather", url="https://weather.example/mcp", effects={"forecast": "read"})


    @agent("trip")
    async def trip(turn: Turn, city: str) -> str:
        return (await weather.call("forecast", {"city": city})).text

Each call stands in the ledger, as one of any tool does: its key goes with it, and what is in doubt is only repeated if that is
safe. Nothing is connected before the first
call, and nothing of a connection is needed to resume a turn.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, cast

try:
    import httpx2
    import mcp_types as types
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError("tools from MCP servers need the SDK: pip install 'longshift[mcp]'") from error
from pydantic import BaseModel, TypeAdapter

from longshift.contract import Artifact
from longshift.errors import UsageError
from longshift.integrations.mcp_results import McpResult, McpToolError, Part, read_result, too_large
from longshift.integrations.mcp_session import (
    Endpoint,
    McpError,
    McpNotSent,
    McpRefused,
    McpTooLarge,
    McpUnavailable,
    Sessions,
)
from longshift.integrations.mcp_wire import KEY_META
from longshift.model import Json
from longshift.place import current, running_step
from longshift.replay import digest_of
from longshift.steps import Retry, StepDefinition
from longshift.tools import Absent, Done, Tool, ToolCall, Unknown, tool
from longshift.turn import Turn, emit

Effect = Literal["read", "write", "irreversible"]
Dedupe = Literal["call", "turn", "session"]
Reconcile = Callable[[ToolCall, Mapping[str, Json]], Awaitable[Done[McpResult] | Absent | Unknown]]
PATIENT = Retry(attempts=6, first=timedelta(milliseconds=500), longest=timedelta(seconds=15), on=(McpUnavailable,))
"""Long enough for a server to be started again."""
_ANSWER: TypeAdapter[types.CallToolResult | types.InputRequiredResult] = TypeAdapter(
    types.CallToolResult | types.InputRequiredResult
)
_SERVER = re.compile(r"[A-Za-z][\w-]{0,31}\Z", re.ASCII)
_FIT = re.compile(r"[\w-]{1,64}\Z", re.ASCII)
_UNFIT = re.compile(r"[^\w-]", re.ASCII)


class Definition(BaseModel, frozen=True):
    """A tool as its server describes it; this is what the log keeps of it."""

    name: str
    description: str
    input_schema: dict[str, Any]


class McpTool(Tool[[Mapping[str, Json]], Awaitable[McpResult]]):
    """A tool of a server, in the ledger like any other; ``name`` is for models, ``tool`` what its server calls it."""

    def __init__(self, server: McpServer, definition: Definition) -> None:
        async def call_tool(call: ToolCall, arguments: Mapping[str, Json]) -> McpResult:
            return await server.request(definition.name, arguments, key=call.key)

        made = tool(
            effect=server.effects.get(definition.name, "write"),
            name=_name(server.name, definition.name),
            dedupe=server.dedupe.get(definition.name),
            retry=server.retry,
            timeout=server.timeout,
            reconcile=server.reconcile.get(definition.name),
        )(call_tool)
        step = made.__longshift_step__
        assert step.tool is not None
        super().__init__(step, step.tool, original=call_tool)
        self.tool = definition.name
        self.description = definition.description
        self.schema = definition.input_schema

    def validate(self, arguments: Mapping[str, Json]) -> dict[str, Any]:
        """As the function takes them. Whether they fit the schema is for the server to say: it may have changed since."""
        return {"arguments": {str(name): value for name, value in arguments.items()}}

    async def call(self, arguments: Mapping[str, Json], id: str | None = None) -> Json:  # noqa: A002
        """Call the tool for a model: its text, or its parts if there are others, or ``{"error": text}``; see ``Tool.call``."""
        answer = await super().call(arguments, id)
        assert isinstance(answer, dict)
        if "note" in answer:
            return {**answer, "result": McpResult.model_validate(answer["result"]).for_model()}
        return McpResult.model_validate(answer).for_model()

    async def result(self, arguments: Mapping[str, Json], id: str | None = None) -> McpResult:  # noqa: A002
        """Call the tool for an author: all of its answer."""
        execution = current()
        if execution is None or running_step() is not None:
            return await self(arguments)
        step = replace(self.__longshift_step__, tool=replace(self._spec, call_id=id))
        return cast(McpResult, await execution.perform(step, (), self.validate(arguments)))


@dataclass(frozen=True, slots=True, eq=False)
class McpServer:
    """An MCP server: where it is, and what its tools do.

    Args:
        name: the first part of the names of its steps, and so a wire format.
        url: of its endpoint, ``http://`` or ``https://``. Redirects to other hosts are not followed.
        headers: sent with every request; never logged, recorded or shown.
        auth: the same for credentials that change: an ``httpx2.Auth``, such as the OAuth providers of the SDK.
        effects: by tool, ``"read"``, ``"write"`` or ``"irreversible"``; what is not named is ``"write"``. What a server says
            of its tools (``readOnlyHint`` and the like) is not trusted with this.
        dedupe: by tool, how far its calls with the same arguments are one; see ``tool``.
        reconcile: by irreversible tool, finds out what became of a call: takes a ``ToolCall`` and the arguments.
        timeout: of one try of a call.
        connect: of opening a session, the first connection included.
        retry: of calls that got no answer, irreversible ones only if they were certainly not made; never of an answer, also
            if it is an error.
        idle: how long an unused session is kept.
        largest: bytes of one answer; of a larger one the model learns only that it was too large.
    """

    name: str
    url: str = field(kw_only=True, repr=False)
    headers: Mapping[str, str] = field(kw_only=True, repr=False, default_factory=dict)
    auth: httpx2.Auth | None = field(kw_only=True, repr=False, default=None)
    effects: Mapping[str, Effect] = field(kw_only=True, default_factory=dict)
    dedupe: Mapping[str, Dedupe] = field(kw_only=True, default_factory=dict)
    reconcile: Mapping[str, Reconcile] = field(kw_only=True, repr=False, default_factory=dict)
    timeout: timedelta = field(kw_only=True, default=timedelta(minutes=1))
    connect: timedelta = field(kw_only=True, default=timedelta(seconds=10))
    retry: Retry = field(kw_only=True, default=PATIENT)
    idle: timedelta = field(kw_only=True, default=timedelta(minutes=1))
    largest: int = field(kw_only=True, default=16 * 1024 * 1024)
    _sessions: Sessions = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not _SERVER.match(self.name):
            raise UsageError(
                f"{self.name!r} cannot name an MCP server: use a letter, then up to 31 of letters, digits, _ and -"
            )
        if httpx2.URL(self.url).scheme not in ("http", "https"):
            raise UsageError(f"MCP server {self.name!r}: its url must begin with http:// or https://")
        endpoint = Endpoint(
            name=self.name,
            url=self.url,
            headers=dict(self.headers),
            auth=self.auth,
            connect=self.connect,
            idle=self.idle,
            largest=self.largest,
        )
        object.__setattr__(self, "_sessions", Sessions(endpoint))

    async def tools(self) -> list[McpTool]:
        """The server's tools; in a turn a step, so that a model is offered the same ones on every replay.

        Raises:
            StepFailed: the server could not be asked (outside a turn ``McpError`` or ``McpUnavailable``).
        """
        return [McpTool(self, each) for each in await self._definitions()]

    async def _definitions(self) -> list[Definition]:
        async def list_tools() -> list[Definition]:
            return [
                Definition(name=each.name, description=each.description or "", input_schema=each.input_schema)
                for each in (await self._sessions.tools()).tools
            ]

        execution = current()
        if execution is None or running_step() is not None:
            return await list_tools()
        step = StepDefinition(f"{self.name}.tools", list_tools, self.retry, self.timeout)
        return cast(list[Definition], await execution.perform(step, (), {}))

    async def call(self, tool: str, arguments: Mapping[str, Json] | None = None, *, id: str | None = None) -> McpResult:  # noqa: A002
        """Call a tool. What it answers is a result, also if it answers that it failed; see ``McpResult.raise_for_error``.

        Args:
            tool: its name at the server.
            arguments: as its schema has them.
            id: what the model calls this call; part of its key.

        Raises:
            StepFailed: the server could not be asked, or refused the request (outside a turn ``McpError`` or
                ``McpUnavailable``). For an irreversible tool, ``OutcomeUnknown`` if nobody knows what it did.
        """
        return await McpTool(self, Definition(name=tool, description="", input_schema={})).result(arguments or {}, id)

    async def close(self) -> None:
        """Close the session of this event loop. Optional: an unused one closes by itself, and the next call opens another."""
        await self._sessions.close()

    async def request(self, tool: str, arguments: Mapping[str, Json], *, key: str) -> McpResult:
        """One request to call a tool, under a key of yours: neither a step nor in the ledger."""
        params = types.CallToolRequestParams(name=tool, arguments=dict(arguments), _meta={KEY_META: key})

        async def show(progress: float, total: float | None, message: str | None) -> None:
            emit(f"{message or (f'{progress:g} of {total:g}' if total else f'{progress:g}')}\n")

        try:
            answer = await self._sessions.ask(types.CallToolRequest(params=params), _ANSWER, on_progress=show)
        except McpTooLarge as error:
            return too_large(str(error))
        if isinstance(answer, types.InputRequiredResult):
            raise McpError(f"tool {tool!r} of MCP server {self.name!r} asks its user for input, and there is none")
        return await read_result(answer, keep=_keep if current() is not None else None)


async def _keep(name: str, data: bytes, content_type: str) -> Artifact:
    execution = current()
    assert execution is not None
    return await Turn(execution).artifact(name, data, content_type=content_type)


def _name(server: str, tool: str) -> str:
    """``server_tool``: a step's name, and one that models' providers take; a digest tells apart what would become the same."""
    name = f"{server}_{tool}"
    if _FIT.match(name):
        return name
    return f"{_UNFIT.sub('_', name)[:47]}_{digest_of(tool, {})}"


__all__ = [
    "Effect",
    "McpError",
    "McpNotSent",
    "McpRefused",
    "McpResult",
    "McpServer",
    "McpTooLarge",
    "McpTool",
    "McpToolError",
    "McpUnavailable",
    "Part",
]
