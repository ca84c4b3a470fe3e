"""Commands that make, list and revoke API keys, straight in Postgres: who may read the database needs no key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, TypeVar
from uuid import UUID

import typer

from longshift.cli import local
from longshift.cli.exits import EPILOG
from longshift.cli.output import put, put_json, put_table, say
from longshift.cli.show import AsJson
from longshift.clock import SYSTEM
from longshift.errors import InvalidInput
from longshift.model import Json, Prefix, parse_id, show_id

if TYPE_CHECKING:  # the database's modules are slow to import, and most commands do without them
    from longshift.db.database import Database
    from longshift.db.keys import KeyRecord

T = TypeVar("T")
app = typer.Typer(name="keys", help="Make, list and revoke API keys.", no_args_is_help=True)


@app.command(epilog=EPILOG)
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the list.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="submit, read or admin; may be repeated. Default: all.")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36_500, help="It expires after so many days.")] = None,
    json: AsJson = False,
) -> None:
    """Make a key and print it, once: only its hash is stored."""
    from longshift.db import keys
    from longshift.db.keys import Scope

    unknown = set(scope or ()) - set(Scope)
    if unknown:
        raise InvalidInput(f"there is no scope {min(unknown)!r}; there are {', '.join(Scope)}")
    scopes = {Scope(each) for each in scope or Scope}
    expires_at = SYSTEM.now() + timedelta(days=days) if days is not None else None

    async def creating(db: Database, tenant_id: UUID) -> tuple[KeyRecord, str]:
        return await keys.create_key(db, tenant_id=tenant_id, name=name, scopes=scopes, expires_at=expires_at)

    record, secret = _with_database(creating)
    if json:
        put_json(_shown(record) | {"key": secret})
    else:
        put(secret)
        say(f"this is {show_id(Prefix.KEY, record.id)}; it is not shown again", style="dim")


@app.command("list", epilog=EPILOG)
def list_(json: AsJson = False) -> None:
    """Every key, revoked ones included; of the key itself only its first characters."""
    from longshift.db import keys

    found = _with_database(lambda db, tenant_id: keys.list_keys(db, tenant_id=tenant_id))
    shown = [_shown(record) for record in found]
    if json:
        put_json(shown)
        return
    columns = ("id", "name", "hint", "state", "last_used_at")
    put_table(columns, [[str(item[column] or "") for column in columns] for item in shown])


@app.command(epilog=EPILOG)
def revoke(id_: Annotated[str, typer.Argument(metavar="ID", help="key_..., see `longshift keys list`.")]) -> None:
    """Refuse a key from now on."""
    from longshift.db import keys

    key_id = parse_id(Prefix.KEY, id_)
    _with_database(lambda db, tenant_id: keys.revoke(db, key_id, tenant_id=tenant_id))
    say(f"{id_} is revoked")


def _with_database(question: Callable[[Database, UUID], Awaitable[T]]) -> T:
    """Raises ``ConfigError``, ``Unavailable``: the database is not named, away, or not migrated."""
    from longshift.db import health, keys
    from longshift.db.database import Database

    config = local.load()

    async def asking() -> T:
        url = config.require("database_url")
        db = Database(url, size=2, connect_timeout=config.connect_timeout, name="longshift-cli")
        try:
            await health.check_schema(db)
            return await question(db, await keys.ensure_tenant(db))
        finally:
            await db.close()

    return asyncio.run(asking())


def _shown(record: KeyRecord) -> dict[str, Json]:
    expired = record.expires_at is not None and record.expires_at <= SYSTEM.now()
    state = "revoked" if record.revoked_at else "expired" if expired else "valid"
    times = {name: getattr(record, name) for name in ("created_at", "expires_at", "last_used_at", "revoked_at")}
    return {
        "id": show_id(Prefix.KEY, record.id),
        "name": record.name,
        "hint": record.hint,
        "scopes": sorted(record.scopes),
        "state": state,
        **{name: time.isoformat() if time else None for name, time in times.items()},
    }
