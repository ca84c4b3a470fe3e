"""Who calls: ``Authorization: Bearer lsk_...``, looked up by its SHA-256 and remembered for a few seconds."""

from __future__ import annotations

from fastapi import Request
from fastapi.security import HTTPBearer

from longshift.clock import Clock
from longshift.db import keys
from longshift.db.database import Database
from longshift.db.keys import Scope
from longshift.model import Principal
from longshift_api.problems import Refusal

REMEMBERED = 3.0
"""Seconds: a revoked key may still be accepted for this long."""

_MOST = 10_000

bearer = HTTPBearer(
    auto_error=False, bearerFormat="lsk_...", description="An API key: `longshift keys create` makes one"
)


class Keyring:
    """Finds the holder of a key without asking Postgres for each request."""

    def __init__(self, db: Database, *, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._known: dict[bytes, tuple[float, Principal]] = {}

    async def holder(self, secret: str) -> Principal | None:
        digest = keys.digest(secret)
        until, principal = self._known.get(digest, (0.0, None))
        if principal is not None and self._clock.monotonic() < until:
            return principal
        found = await keys.find(self._db, digest)
        if found is None:
            self._known.pop(digest, None)
            return None
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[digest] = (self._clock.monotonic() + REMEMBERED, found)
        return found


async def authenticate(request: Request, keyring: Keyring, *, needed: Scope) -> Principal:
    """The holder of the request's key.

    Raises:
        Refusal: 401, no key or a wrong one; 403, the key lacks the scope ``needed``.
    """
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise _unauthorized("send the header `Authorization: Bearer lsk_...`: `longshift keys create` makes a key")
    principal = await keyring.holder(secret.strip())
    if principal is None:
        raise _unauthorized(
            "this key is unknown, expired or revoked: check it, or make another with `longshift keys create`",
            error=', error="invalid_token"',
        )
    require(principal, needed)
    return principal


def require(principal: Principal, needed: Scope) -> None:
    """
    Raises:
        Refusal: 403, the key lacks the scope ``needed``.
    """
    if not principal.scopes & {needed, Scope.ADMIN}:
        has = ", ".join(sorted(principal.scopes))
        raise Refusal(403, "forbidden", f"this key has the scopes {has}; this request needs {needed.value!r}")


def _unauthorized(detail: str, *, error: str = "") -> Refusal:
    return Refusal(401, "unauthorized", detail, headers={"WWW-Authenticate": f'Bearer realm="longshift"{error}'})
