"""HTTP to addresses that strangers name, such as a source in a turn's input: only to the public network, only so much, only
for so long.

A name is looked up once, every address it has is checked, and the connection goes to an address that was checked: a name
that answers differently the second time gains nothing. The same holds for each redirect. Environment proxies are not used,
for behind one nobody here would know where a connection ends.
"""

from __future__ import annotations

import asyncio
import json
import socket
import zlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

import httpx

from longshift.errors import ConfigError, InvalidInput, Unavailable
from longshift.model import Json

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may well succeed."""
TEXT = ("text/", "application/xhtml+xml", "application/xml", "application/json")
"""Content types that are text, by their beginning."""
USER_AGENT = "longshift"
_PUBLIC_V6 = IPv6Network("2000::/3")
_CARRYING = {IPv6Network("64:ff9b::/96"): 0, IPv6Network("::ffff:0:0/96"): 0, IPv6Network("2002::/16"): 80}
"""Networks whose addresses stand for one of IPv4 (NAT64, mapped, 6to4), and how far to the right it is not."""


class Forbidden(InvalidInput):
    """The address is not on the public network, and nobody has allowed it."""


class Failed(Unavailable):
    """The other side did not answer, or asked to come again: ``retry_after`` is the header that says when, if there was one."""

    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """``time`` is for all of a request, redirects included; ``size`` is in bytes, after decompression."""

    size: int = 8 * 1024 * 1024
    time: timedelta = timedelta(seconds=60)
    connect: timedelta = timedelta(seconds=10)
    redirects: int = 5


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was at ``url``, after redirects. ``content_type``: without parameters, in lower case; ``charset``: as it says."""

    url: str
    content_type: str
    charset: str | None
    body: bytes


class Guard:
    """Which hosts may be asked: those on the public network, and those in ``allow`` (names, addresses, or networks as
    ``10.1.0.0/16``).

    Raises:
        ConfigError: an entry is none of these.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self._names: set[str] = set()
        self._networks: list[Network] = []
        for entry in allow:
            try:
                self._networks.append(ip_network(entry))
            except ValueError:
                if not _is_name(entry):
                    raise ConfigError(
                        f"LONGSHIFT_FETCH_ALLOW: {entry!r} is no host and no network: write wiki.internal or 10.1.0.0/16"
                    ) from None
                self._names.add(entry.lower().rstrip("."))

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of ``host``, all of them checked.

        Raises:
            Forbidden: it has one that may not be asked.
            Failed: it has none, now.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Failed(f"there is no host {host!r} ({error}): check its name") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if host.lower().rstrip(".") not in self._names:
            for address in addresses:
                self.check(host, ip_address(address))
        return addresses

    def check(self, host: str, address: Address) -> None:
        """
        Raises:
            Forbidden: ``address`` is not public and not allowed.
        """
        if any(address in network for network in self._networks) or is_public(address):
            return
        raise Forbidden(
            f"{host} is {address}, which is not on the public network: give a public address, or have the operator "
            "allow it by LONGSHIFT_FETCH_ALLOW"
        )


def is_public(address: Address) -> bool:
    """Whether ``address`` is of one machine on the public network. What stands for an address of IPv4 is judged by that."""
    if isinstance(address, IPv6Address):
        for network, shift in _CARRYING.items():
            if address in network:
                return is_public(IPv4Address((int(address) >> shift) & 0xFFFFFFFF))
        if address not in _PUBLIC_V6 or address.scope_id is not None:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects to addresses that ``guard`` has checked, under the name that was asked for: ``Host``, SNI, certificate."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        # no connection is used twice: a pool knows them by their address, and two names may share one
        self._inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        host = url.raw_host.decode("ascii")
        failure: httpx.TransportError | None = None
        for address in await self._guard.addresses(host, url.port or (443 if url.scheme == "https" else 80)):
            extensions = {**request.extensions, "sni_hostname": host}
            sent = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,  # its Host is that of the name
                stream=request.stream,
                extensions=extensions,
            )
            try:
                return await self._inner.handle_async_request(sent)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def aclose(self) -> None:
        await self._inner.aclose()


async def fetch(url: str, *, guard: Guard, limits: Limits = Limits()) -> Fetched:
    """What is at ``url``, if it is text.

    Raises:
        InvalidInput: it cannot be fetched, and will not be: the message says why and what to do. ``Forbidden`` is such.
        Failed: it may be, later.
    """
    async with _client(guard, limits) as client:
        target = checked(url)
        for _ in range(limits.redirects + 1):
            async with client.stream("GET", target) as response:
                if response.next_request is None:
                    return await _read(response, limits)
            target = checked(str(response.next_request.url))
        raise InvalidInput(f"it redirects more than {limits.redirects} times: give the address where it ends")


async def post(
    url: str, content: Json, *, key: str, guard: Guard, limits: Limits = Limits(time=timedelta(seconds=30))
) -> None:
    """Send JSON to a webhook, under an ``Idempotency-Key``. Redirects are not followed.

    Raises:
        InvalidInput: it was refused, or may not be sent there.
        Failed: nobody knows whether it arrived; send it again with the same key.
    """
    headers = {"content-type": "application/json", "idempotency-key": key}
    async with (
        _client(guard, limits) as client,
        client.stream("POST", checked(url), content=json.dumps(content).encode(), headers=headers) as response,
    ):
        if response.is_success:
            return
        if response.next_request is not None:
            raise InvalidInput(
                f"it answered with a redirect (HTTP {response.status_code}): give the address where it ends"
            )
        _check_status(response)


@asynccontextmanager
async def _client(guard: Guard, limits: Limits) -> AsyncIterator[httpx.AsyncClient]:
    """For one request; what can go wrong on its way is ``Failed``."""
    seconds = limits.time.total_seconds()
    headers = {"user-agent": USER_AGENT, "accept-encoding": "gzip"}  # of which we can bound what comes out
    try:
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(
                transport=GuardedTransport(guard),
                headers=headers,
                timeout=httpx.Timeout(None, connect=limits.connect.total_seconds()),
                trust_env=False,
            ) as client,
        ):
            yield client
    except TimeoutError:
        raise Failed(f"it took more than {seconds:g} s") from None
    except (httpx.TransportError, httpx.StreamError) as error:
        raise Failed(f"{type(error).__name__}: {error}".removesuffix(": ")) from None


def checked(url: str) -> str:
    """``url``, if it is one of HTTP and carries no credentials.

    Raises:
        InvalidInput: it is not; the message says what is wrong, without what may be a secret.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InvalidInput(f"it is no address of the web: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidInput(f"its address begins with {parsed.scheme or 'nothing'!r}: give one with http:// or https://")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise InvalidInput(f"its address has port {parsed.port}, which there is not")
    if parsed.userinfo:
        raise InvalidInput("its address has a user or a password in it: those are not sent, leave them out")
    return url


async def _read(response: httpx.Response, limits: Limits) -> Fetched:
    _check_status(response)
    kind, _, _ = response.headers.get("content-type", "text/plain").partition(";")
    kind = kind.strip().lower()
    if not kind.startswith(TEXT):
        raise InvalidInput(f"it is of type {kind!r}, not text: convert it to plain text and upload it")
    body = bytearray()
    async for part in _decoded(response, limits.size):
        body += part
        if len(body) > limits.size:
            raise InvalidInput(f"it has more than {limits.size:,} bytes: upload the part that matters")
    return Fetched(str(response.url), kind, response.charset_encoding, bytes(body))


def _check_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    if response.status_code in PASSING:
        failure = Failed(f"it answered with HTTP {response.status_code}")
        failure.retry_after = response.headers.get("retry-after")
        raise failure
    raise InvalidInput(f"it answered with HTTP {response.status_code}: check the address and whether it is public")


async def _decoded(response: httpx.Response, most: int) -> AsyncIterator[bytes]:
    """The body, decompressed in pieces of at most ``most`` + 1 bytes, whatever the ratio."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding == "identity":
        async for part in response.aiter_raw():
            yield part
        return
    if coding not in ("gzip", "x-gzip"):
        raise InvalidInput(f"it is compressed with {coding!r}, which was not asked for: upload it instead")
    unzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        async for part in response.aiter_raw():
            yield unzip.decompress(part, most + 1)  # what is left of it does not matter: this is too much already
            if unzip.eof:  # what comes after it has no end perhaps, and would all be kept
                return
    except zlib.error as error:
        raise InvalidInput(f"it is not compressed as it says: {error}") from None


def _is_name(text: str) -> bool:
    labels = text.rstrip(".").split(".")
    return all(label and len(label) <= 63 and label.replace("-", "").replace("_", "").isalnum() for label in labels)


__all__ = [
    "Failed",
    "Fetched",
    "Forbidden",
    "Guard",
    "GuardedTransport",
    "Limits",
    "checked",
    "fetch",
    "is_public",
    "post",
]
