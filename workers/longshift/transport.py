"""What the client stands on: HTTP requests whose failures are the errors of ``longshift.errors``, and event streams.

no answer, 5xx, 429   Unavailable, with the URL and what to do
a problem (RFC 9457)  the error of its ``code``, with its ``detail``
anything else         LongshiftError: it is no Longshift that answers there
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx

from longshift.clock import Clock
from longshift.errors import (
    AlreadyAnswered,
    ConfigError,
    Conflict,
    Denied,
    IdempotencyMismatch,
    InUse,
    InvalidInput,
    LongshiftError,
    NotFound,
    SessionBusy,
    Unavailable,
    UnknownAgent,
)
from longshift.model import Json, Prefix, parse_id

T = TypeVar("T")
PATIENCE = timedelta(seconds=30)
"""How long an API that has answered before may be away while somebody waits or follows."""

PAUSES = (0.2, 0.5, 1.0)
"""Seconds before a request that got no answer is repeated; the last one stays."""

CHUNK = 64 * 1024
"""Bytes of a body that are sent or taken at a time."""

SILENCE = 45.0
"""Seconds without a frame, of which one comes every 15, after which an event stream counts as lost."""

_ERRORS: Mapping[str, type[LongshiftError]] = {
    kind.code: kind
    for kind in (
        NotFound,
        UnknownAgent,
        Conflict,
        AlreadyAnswered,
        IdempotencyMismatch,
        InUse,
        SessionBusy,
        Unavailable,
    )
}


_PLACES: Mapping[Prefix, str] = {
    Prefix.TURN: "turns",
    Prefix.SESSION: "sessions",
    Prefix.BATCH: "batches",
    Prefix.ARTIFACT: "artifacts",
    Prefix.CALL: "tool-calls",
    Prefix.APPROVAL: "approvals",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of an event stream; ``kind`` is an event's kind, or one of open, delta, gap, reset, done."""

    kind: str
    data: dict[str, Any]
    seq: int | None  # where to resume; None for what is not in the log


class Transport:
    """One connection pool to one API."""

    def __init__(self, url: str, api_key: str | None, *, timeout: timedelta, clock: Clock) -> None:
        self.url = url.rstrip("/")
        self.seconds = timeout.total_seconds()
        self._clock = clock
        host = _host(self.url)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"User-Agent": "longshift", **_authorization(api_key)},
            timeout=self.seconds,
            trust_env=not _is_local(host),  # a proxy of the environment is not meant for this machine
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str, *, params: Mapping[str, Any] | None = None) -> Any:
        return (await self._repeated(lambda: self.request("GET", path, params=params))).json()

    async def post(self, path: str, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> Any:
        """A POST that may be repeated: it has a key, or its kind makes nothing new."""
        headers = {"Content-Type": "application/json"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        content = written(body)
        return (await self._repeated(lambda: self.request("POST", path, content=content, headers=headers))).json()

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, once; 304 is an answer.

        Raises:
            LongshiftError: see the module.
        """
        with self._translated():
            response = await self._http.request(method, path, **options)
        return self._checked(response)

    @asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncIterator[httpx.Response]:
        """A response whose body is still to come."""
        with self._translated():
            async with self._http.stream("GET", path, **options) as response:
                if not response.is_success:
                    await response.aread()
                yield self._checked(response)

    async def frames(self, path: str, *, after: int) -> AsyncGenerator[Frame, None]:
        """The frames of one connection to an event stream, until it ends."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self.seconds, read=SILENCE)
        async with self.stream(path, headers=headers, timeout=timeout) as response:
            fields: dict[str, str] = {}
            async for line in lines(response):
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif frame := _frame(fields):
                    yield frame
                if not line:
                    fields = {}

    async def along(self, path: str, *, after: int) -> AsyncIterator[Any]:
        """The items of a list that goes along a log, those with a greater ``seq`` than ``after``."""
        while True:
            page = await self.get(path, params={"after": after, "limit": 500})
            for item in page["data"]:
                yield item
            if not page["has_more"]:
                return
            after = page["next"]

    async def pages(self, path: str, params: Mapping[str, str]) -> AsyncIterator[Any]:
        """The items of a list with a cursor."""
        cursor: dict[str, str] = {}
        while True:
            page = await self.get(path, params={"limit": "100", **params, **cursor})
            for item in page["data"]:
                yield item
            if not page["has_more"]:
                return
            cursor = {"cursor": page["next"]}

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat ``call`` while the API is away, for as long as ``PATIENCE``."""
        end = self._clock.monotonic() + PATIENCE.total_seconds()
        attempt = 0
        while True:
            try:
                return await call()
            except Unavailable:
                if self._clock.monotonic() > end:
                    raise
            await asyncio.sleep(pause(attempt))
            attempt += 1

    async def _repeated(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat ``call`` a little when its answer was lost. Where nobody listens, the caller is told at once."""
        for attempt in range(len(PAUSES)):
            try:
                return await call()
            except Unavailable as error:
                if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                    raise
            await asyncio.sleep(pause(attempt))
        return await call()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise Unavailable(
                f"nothing answers at {self.url}: start a local stack with `longshift up`, or set LONGSHIFT_URL"
            ) from error
        except httpx.TimeoutException as error:
            raise Unavailable(f"no answer from {self.url} in time ({type(error).__name__}): try again") from error
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"the connection to {self.url} was lost: {reason}") from error

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if not response.is_success and response.status_code != httpx.codes.NOT_MODIFIED:
            raise _problem(response, self.url)
        return response


class Check:
    """Reads the lines of an export (docs/reference/export.md) as they come, and says at the end whether they are all of it."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.counts: Counter[str] = Counter()
        self.whole = False

    def add(self, line: bytes) -> str:
        """One line, its end included: of which type it is.

        Raises:
            InvalidInput: it is no line of an export, or not all lines before it are those that were sent.
        """
        try:
            fields = json.loads(line)
            kind = str(fields["type"])
        except (ValueError, TypeError, KeyError):
            raise InvalidInput(f"this is no line of an export: {line[:80]!r}") from None
        if kind != "end":
            self._digest.update(line)
            self.counts[kind] += 1
        elif fields["sha256"] != self._digest.hexdigest() or fields["counts"] != dict(self.counts):
            raise InvalidInput("the export is not what was sent: its lines do not have the hash that its end names")
        self.whole = kind == "end"
        return kind


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a body, ended by LF alone: JSON may hold what ``str.splitlines`` takes for the end of a line."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode()
    if rest:
        yield rest.decode()


def written(value: object) -> bytes:
    """``value`` as JSON, in ASCII: httpx's own way fails on what UTF-8 cannot carry.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"this cannot be sent as JSON: {error}") from None


def line_chunks(items: Iterable[Mapping[str, Json]]) -> Iterator[bytes]:
    """JSON lines in pieces of about ``CHUNK`` bytes."""
    piece = bytearray()
    for item in items:
        piece += written(item) + b"\n"
        if len(piece) >= CHUNK:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def file_chunks(path: Path) -> Iterator[bytes]:
    """A file in such pieces.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error.strerror}") from None


async def streamed(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    """``chunks`` in the form in which httpx streams them."""
    for chunk in chunks:
        yield chunk


def kind_of(id_: str, *allowed: Prefix) -> Prefix:
    """What an id names.

    Raises:
        InvalidInput: none of ``allowed``.
    """
    for prefix in allowed:
        if id_.startswith(f"{prefix}_"):
            parse_id(prefix, id_)
            return prefix
    forms = " or ".join(f"{prefix}_..." for prefix in allowed)
    raise InvalidInput(f"{id_!r} is not an identifier of the form {forms}")


def path_of(id_: str, *allowed: Prefix) -> str:
    """Where the thing of this id is.

    Raises:
        InvalidInput: it is the id of none of ``allowed``.
    """
    return f"/v1/{_PLACES[kind_of(id_, *allowed)]}/{id_}"


def given(**values: T | None) -> dict[str, T]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def pause(attempt: int) -> float:
    """Seconds before the next attempt."""
    return PAUSES[min(attempt, len(PAUSES) - 1)]


def _frame(fields: Mapping[str, str]) -> Frame | None:
    if "data" not in fields:
        return None
    seq = fields.get("id")
    return Frame(fields.get("event", "message"), json.loads(fields["data"]), int(seq) if seq is not None else None)


def _problem(response: httpx.Response, url: str) -> LongshiftError:
    """The error that an answer means."""
    status = response.status_code
    try:
        body = response.json()
        code, detail = str(body["code"]), str(body["detail"])
    except (ValueError, KeyError, TypeError):
        if status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return Unavailable(f"{url} answers {status}: try again")
        return LongshiftError(f"{url} answers {status}, and not as Longshift does: check LONGSHIFT_URL")
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Denied(detail)
    if code in _ERRORS:
        return _ERRORS[code](detail)
    if status == httpx.codes.CONFLICT:
        return Conflict(detail)
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
        return Unavailable(detail)
    return InvalidInput(detail, errors=body.get("errors", ()))


def _host(url: str) -> str:
    """Raises ``ConfigError`` if ``url`` is none that a client can use."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"LONGSHIFT_URL must look like http://127.0.0.1:8420, not {url!r}")
    return parsed.host


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _authorization(api_key: str | None) -> dict[str, str]:
    if api_key is None:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise Denied("the API key has characters that no key has: check LONGSHIFT_API_KEY")
    return {"Authorization": f"Bearer {api_key}"}
