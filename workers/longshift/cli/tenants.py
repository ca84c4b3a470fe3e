"""Commands about tenants, straight in Postgres, Redis and the artifact store: who may use these needs no key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from longshift.cli import local
from longshift.cli.exits import EPILOG
from longshift.cli.output import check_complete, confirm, progress, put_facts, put_json, put_table, say
from longshift.cli.show import AsJson
from longshift.model import Prefix, show_id

if TYPE_CHECKING:  # slow to import, and most commands do without them
    from longshift.db.deletions import TenantRecord
    from longshift.removal import Removal, Removed

T = TypeVar("T")
app = typer.Typer(name="tenants", help="List and delete tenants.", no_args_is_help=True)


@app.command("list", epilog=EPILOG)
def list_(json: AsJson = False) -> None:
    """Every tenant, with the number of its sessions."""

    async def asking(removal: Removal) -> list[TenantRecord]:
        return await removal.tenants()

    found = _with_tiers(asking)
    if json:
        for tenant in found:
            facts = {"name": tenant.name, "sessions": tenant.sessions, "created_at": tenant.created_at.isoformat()}
            put_json({"id": show_id(Prefix.TENANT, tenant.id), **facts})
        return
    rows = [[show_id(Prefix.TENANT, t.id), t.name, str(t.sessions), t.created_at.isoformat()[:19]] for t in found]
    put_table(["id", "name", "sessions", "since"], rows)


@app.command(epilog=EPILOG)
def delete(
    name: Annotated[str, typer.Argument(help="As `longshift tenants list` shows it.")],
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel its open turns, and wait for their ends.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: AsJson = False,
) -> None:
    """Delete a tenant: its keys, and all its sessions, batches and artifacts, in all tiers, for good.

    Its keys are refused first. May be repeated if it was interrupted. With open turns it exits with 6, unless they are to be
    cancelled.
    """
    if not yes:
        confirm(f"Delete the tenant {name!r} with all that it has?")

    async def deleting(removal: Removal) -> Removed:
        with progress(f"deleting {name}") as tell:
            return await removal.delete(name, cancel=cancel, told=lambda sessions: tell(f"deleting {name}", sessions))

    removed = asdict(_with_tiers(deleting))
    if json:
        put_json({"tenant": name, **removed})
    else:
        put_facts({key: value for key, value in removed.items() if value and key != "complete"})
    check_complete(removed, what=f"the tenant {name!r}")
    if not json:
        say(f"the tenant {name!r} is deleted")


def _with_tiers(question: Callable[[Removal], Awaitable[T]]) -> T:
    """Raises ``ConfigError``, ``Unavailable``: something is not named, away, or not migrated."""
    from longshift.archive import Archive
    from longshift.artifacts import open_store
    from longshift.cold import Cold
    from longshift.db import health
    from longshift.db.database import Database
    from longshift.hot import Hot
    from longshift.lifecycle import Lifecycle
    from longshift.mailbox import Mailbox
    from longshift.removal import Removal

    config = local.load()

    async def asking() -> T:
        async with AsyncExitStack() as stack:
            url = config.require("database_url")
            db = Database(url, size=2, connect_timeout=config.connect_timeout, name="longshift-cli")
            stack.push_async_callback(db.close)
            await health.check_schema(db)
            hot = Hot(config.require("redis_url"))
            stack.push_async_callback(hot.close)
            store = open_store(config.require("artifacts_url"), connect_timeout=config.connect_timeout)
            stack.push_async_callback(store.close)
            cold = Cold(db, store)
            mailbox = Mailbox(db, hot, cold=cold, config=config)
            stack.push_async_callback(mailbox.close)
            lifecycle = Lifecycle(db, cold, Archive(db, cold), hot.contexts)
            return await question(Removal(db, cold, lifecycle, mailbox))

    return asyncio.run(asking())
