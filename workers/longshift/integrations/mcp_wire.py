"""The HTTP below an MCP session: a request that fails, fails alone, and says how far it came.

The SDK runs all requests of a session in one task group, so an unreachable server, or one connection that breaks, would
end the session and with it the calls of every other turn. ``Contained`` answers in the server's place instead: with a
JSON-RPC error for that one request, and a ``Fault`` in it that says what happened.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx2
from mcp import MCPError
from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, UNSUPPORTED_PROTOCOL_VERSION

KEY_META = "idempotencyKey"
"""Where a call carries its key in ``_meta``; the header ``Idempotency-Key`` says the same."""
ASIDE = 2.0
"""Seconds for what nobody waits for: notifications and the end of a session. The SDK sends these one after the other, so
that a server which does not answer them would hold up every later call."""
_UNSENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request has no answer of the server's own."""

    reason: str
    sent: bool = True  # False: certainly not, so that nothing can have been done
    status: int | None = None  # of HTTP, if there was any
    retry_after: str | None = None  # the header, if the server asked for a pause
    too_large: bool = False


class Faults:
    """Writes faults into errors and finds them again; a server cannot pretend to one."""

    def __init__(self) -> None:
        self._sign = secrets.token_hex(16)

    def write(self, fault: Fault, *, data: Any = None) -> dict[str, Any]:
        return {"by": self._sign, "fault": asdict(fault), "data": data}

    def read(self, error: MCPError) -> Fault | None:
        """The fault behind ``error``; None: the server itself has answered so."""
        data = error.data
        return Fault(**data["fault"]) if isinstance(data, dict) and data.get("by") == self._sign else None


class Contained(httpx2.AsyncBaseTransport):
    """Sends requests by ``inner``; those of JSON-RPC never raise. An answer has at most ``largest`` bytes."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, faults: Faults, *, largest: int) -> None:
        self._inner = inner
        self._faults = faults
        self._largest = largest

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        message = _message(request)
        if message is None:  # the stream of the server's own messages, the end of a session, somebody's OAuth
            if request.method == "DELETE":
                _hurry(request)
            return await self._inner.handle_async_request(request)
        if "id" not in message:
            return await self._notify(request)
        key = ((message.get("params") or {}).get("_meta") or {}).get(KEY_META)
        if key is not None:
            request.headers["Idempotency-Key"] = str(key)
        try:
            response = await self._inner.handle_async_request(request)
            return await self._checked(request, message, response)
        except httpx2.TransportError as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            return self._instead(request, message, Fault(reason, sent=not isinstance(error, _UNSENT)))

    async def _notify(self, request: httpx2.Request) -> httpx2.Response:
        _hurry(request)
        try:
            return await self._inner.handle_async_request(request)
        except httpx2.TransportError:  # nobody waits for it, and what comes next shows whether the server is there
            return httpx2.Response(202, request=request)

    async def _checked(
        self, request: httpx2.Request, message: dict[str, Any], response: httpx2.Response
    ) -> httpx2.Response:
        kind = response.headers.get("content-type", "").lower()
        if response.status_code < 400 and not kind.startswith("application/json"):
            return response  # a stream of events, whose size the SDK limits, or what it does not accept
        try:
            body = await self._read(response)
        except _TooLarge:
            fault = Fault(f"its answer has more than {self._largest:,} bytes", too_large=True)
            return self._instead(request, message, fault)
        finally:
            await response.aclose()
        if response.status_code >= 400:
            return self._refused(request, message, response, body)
        return httpx2.Response(response.status_code, headers=response.headers, content=body, request=request)

    async def _read(self, response: httpx2.Response) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise httpx2.RemoteProtocolError("it answered compressed, which was not asked for")
        body = bytearray()
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        async for part in _parts(response.stream):
            body += part
            if len(body) > self._largest:
                raise _TooLarge
        return bytes(body)

    def _refused(
        self, request: httpx2.Request, message: dict[str, Any], response: httpx2.Response, body: bytes
    ) -> httpx2.Response:
        """An HTTP error, with what the server says of it, and with its status, which the SDK would forget."""
        told = _told(body)
        if told.get("code") == UNSUPPORTED_PROTOCOL_VERSION:  # part of agreeing on one, which the SDK does
            return httpx2.Response(response.status_code, json=_error(message, told), request=request)
        reason = f"HTTP {response.status_code}" + (f", {told['message']}" if told.get("message") else "")
        fault = Fault(reason, status=response.status_code, retry_after=response.headers.get("retry-after"))
        return self._instead(request, message, fault, told=told)

    def _instead(
        self, request: httpx2.Request, message: dict[str, Any], fault: Fault, *, told: dict[str, Any] | None = None
    ) -> httpx2.Response:
        told = told or {}
        code = told.get("code", INVALID_REQUEST if fault.status and fault.status < 500 else INTERNAL_ERROR)
        error = {"code": code, "message": fault.reason, "data": self._faults.write(fault, data=told.get("data"))}
        return httpx2.Response(200, json=_error(message, error), request=request)


class _TooLarge(Exception):
    pass


async def _parts(stream: httpx2.AsyncByteStream) -> AsyncIterator[bytes]:
    async for part in stream:
        yield part


def _message(request: httpx2.Request) -> dict[str, Any] | None:
    """The JSON-RPC message that ``request`` carries, if it does."""
    if request.method != "POST" or not request.headers.get("content-type", "").startswith("application/json"):
        return None
    try:
        message = json.loads(request.content)
    except (ValueError, httpx2.RequestNotRead):
        return None
    return message if isinstance(message, dict) and "jsonrpc" in message and "method" in message else None


def _hurry(request: httpx2.Request) -> None:
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), ASIDE)


def _error(message: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": message["id"], "error": error}


def _told(body: bytes) -> dict[str, Any]:
    """The error in a JSON-RPC answer: ``code`` (an int), ``message``, ``data``; empty if it is none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return {}
    return error if isinstance(error, dict) and isinstance(error.get("code"), int) else {}


__all__ = ["ASIDE", "KEY_META", "Contained", "Fault", "Faults"]
