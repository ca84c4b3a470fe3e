"""Tenants and their API keys. A key is shown once, when it is made; what is stored is its SHA-256.

A plain hash is enough because a key has 256 random bits: there is no dictionary to try it against. A key that an
operator chose (``LONGSHIFT_API_KEY``) is only as good as that choice, which is why short ones are refused.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.errors import ConfigError, InvalidInput, NotFound
from longshift.model import Prefix, Principal, new_id, show_id

DEFAULT_TENANT = "default"
SHORTEST = 16

_COLUMNS = "k.id, k.tenant_id, k.name, k.hint, k.scopes, k.created_at, k.expires_at, k.last_used_at, k.revoked_at"
_RETURNED = _COLUMNS.replace("k.", "")
ENSURE_TENANT = text("""
WITH made AS (INSERT INTO tenants (id, name) VALUES (:id, :name) ON CONFLICT (name) DO NOTHING RETURNING id)
SELECT id FROM made UNION ALL SELECT id FROM tenants WHERE name = :name LIMIT 1""")
TENANT = text("SELECT id FROM tenants WHERE name = :name")
CREATE = text(f"""
INSERT INTO api_keys (id, tenant_id, name, hint, hash, scopes, expires_at)
VALUES (:id, :tenant, :name, :hint, :hash, CAST(:scopes AS text[]), :expires) RETURNING {_RETURNED}""")
ENSURE = text("""
INSERT INTO api_keys (id, tenant_id, name, hint, hash, scopes)
VALUES (:id, :tenant, :name, :hint, :hash, CAST(:scopes AS text[]))
ON CONFLICT (hash) DO UPDATE
   SET tenant_id = excluded.tenant_id, scopes = excluded.scopes, expires_at = NULL, revoked_at = NULL""")
LIST = text(f"SELECT {_COLUMNS} FROM api_keys k WHERE k.tenant_id = :tenant ORDER BY k.id")
REVOKE = text("""
UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE id = :id AND tenant_id = :tenant""")
FIND = text("""
SELECT id, tenant_id, scopes, last_used_at IS NULL OR last_used_at < clock_timestamp() - interval '1 minute' AS stale
  FROM api_keys WHERE hash = :hash AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())""")
TOUCH = text("""
UPDATE api_keys SET last_used_at = date_trunc('minute', clock_timestamp())
 WHERE id = :id AND (last_used_at IS NULL OR last_used_at < clock_timestamp() - interval '1 minute')""")


class Scope(StrEnum):
    """What a key may do. ``admin`` includes the others."""

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


EVERYTHING = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One row of ``api_keys``; the key itself is not kept anywhere."""

    id: UUID
    tenant_id: UUID
    name: str
    hint: str  # its first characters
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


def digest(secret: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


async def ensure_tenant(db: Database, name: str = DEFAULT_TENANT) -> UUID:
    """The id of the tenant of this name, made if it is new."""
    while True:
        rows = await db.fetch(ENSURE_TENANT, {"id": new_id(), "name": name})
        if rows:  # none: somebody else made it in this very moment, and the next look sees it
            return UUID(str(rows[0].id))


async def find_tenant(db: Database, name: str) -> UUID:
    """Raises ``NotFound`` if there is no tenant of this name."""
    rows = await db.fetch(TENANT, {"name": name})
    if not rows:
        raise NotFound(f"there is no tenant {name!r}")
    return UUID(str(rows[0].id))


async def create_key(
    db: Database,
    *,
    tenant_id: UUID,
    name: str,
    scopes: Collection[Scope] = EVERYTHING,
    expires_at: datetime | None = None,
) -> tuple[KeyRecord, str]:
    """A new key, and its secret, which is not kept: show it once.

    Raises:
        InvalidInput: no scope.
    """
    if not scopes:
        raise InvalidInput(f"a key needs at least one scope of {', '.join(Scope)}")
    secret = f"lsk_{secrets.token_urlsafe(32)}"
    params = _row(secret, tenant_id=tenant_id, name=name, scopes=scopes) | {"expires": expires_at}
    return _record((await db.fetch(CREATE, params))[0]), secret


async def ensure_key(db: Database, secret: str, *, tenant: str = DEFAULT_TENANT) -> UUID:
    """Make ``secret`` (``LONGSHIFT_API_KEY``) a key of ``tenant`` with every scope; returns the tenant's id.

    May be repeated. A key that was revoked is valid again: the operator has just said so.

    Raises:
        ConfigError: it is too short to be a secret, or cannot be sent in a header.
    """
    if len(secret) < SHORTEST or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(
            f"LONGSHIFT_API_KEY must be at least {SHORTEST} printable ASCII characters without spaces, "
            "for example lsk_ and 32 random letters"
        )
    tenant_id = await ensure_tenant(db, tenant)
    await db.execute(ENSURE, _row(secret, tenant_id=tenant_id, name="LONGSHIFT_API_KEY", scopes=EVERYTHING))
    return tenant_id


async def list_keys(db: Database, *, tenant_id: UUID) -> list[KeyRecord]:
    """Every key of a tenant, revoked ones included, oldest first."""
    return [_record(row) for row in await db.fetch(LIST, {"tenant": tenant_id})]


async def revoke(db: Database, key_id: UUID, *, tenant_id: UUID) -> None:
    """From now on (within the seconds for which the API remembers an answer) the key is refused.

    Raises:
        NotFound: no such key.
    """
    if not await db.execute(REVOKE, {"id": key_id, "tenant": tenant_id}):
        raise NotFound(f"there is no key {show_id(Prefix.KEY, key_id)}")


async def find(db: Database, hash_: bytes) -> Principal | None:
    """Who holds the key with this digest; None if it is unknown, expired or revoked. Notes its use, to the minute."""
    rows = await db.fetch(FIND, {"hash": hash_})
    if not rows:
        return None
    if rows[0].stale:
        await db.execute(TOUCH, {"id": rows[0].id})
    return Principal(rows[0].tenant_id, rows[0].id, frozenset(rows[0].scopes))


def _row(secret: str, *, tenant_id: UUID, name: str, scopes: Collection[Scope]) -> dict[str, Any]:
    hint = secret[: min(8, len(secret) // 4)]
    return {
        "id": new_id(),
        "tenant": tenant_id,
        "name": name,
        "hint": hint,
        "hash": digest(secret),
        "scopes": sorted(scope.value for scope in set(scopes)),
    }


def _record(row: Row[Any]) -> KeyRecord:
    values = {name: getattr(row, name) for name in KeyRecord.__dataclass_fields__}
    return KeyRecord(**values | {"scopes": frozenset(Scope(scope) for scope in row.scopes)})
