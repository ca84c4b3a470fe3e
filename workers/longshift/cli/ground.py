"""What a stack stands on before its processes start: a free port, a migrated database, a key, a Redis that answers."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from longshift.cli.local import write_private
from longshift.config import Config
from longshift.db import keys, migrations
from longshift.db.database import Database
from longshift.errors import ConfigError
from longshift.hot import Hot

PORTS = range(20000, 32000)
"""Where a port is chosen if any will do: below those that kernels give to clients."""


def own_pid() -> int:
    return os.getpid()


def free_port(host: str, port: int) -> int:
    """``port``, or a free one if it is 0.

    Raises:
        ConfigError: it is taken, or ``host`` is no address of this machine.
    """
    if port:
        _probe(host, port)
        return port
    for candidate in random.SystemRandom().sample(PORTS, 100):
        with suppress(ConfigError):
            _probe(host, candidate)
            return candidate
    _probe(host, PORTS[0])  # says why none of them will do
    return PORTS[0]


def _probe(host: str, port: int) -> None:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"LONGSHIFT_HOST {host!r} is no address: {error.strerror}") from None
    try:
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address[4])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}: stop what does, or choose another with --port"
        ) from None


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds what listens on ``host``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - to avoid it
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def check_redis(url: str, *, timeout: timedelta) -> None:
    """Raises ``Unavailable`` if Redis does not answer, ``ConfigError`` if the URL is none of Redis."""

    async def checking() -> None:
        hot = Hot(url, timeout=timeout)
        try:
            await hot.check()
        finally:
            await hot.close()

    asyncio.run(checking())


def prepare(config: Config, *, database_url: str, key_file: Path) -> tuple[str, bool]:
    """Migrate, and see to it that the default tenant has a key: the key, and whether it is new.

    ``LONGSHIFT_API_KEY`` if set; else the one in ``key_file``; else (or if that one was revoked) a new one.

    Raises:
        Unavailable: Postgres does not answer.
        ConfigError: ``LONGSHIFT_API_KEY`` is too short.
    """
    # nobody else is on a Postgres that this stack has started
    migrations.upgrade(database_url, contract=config.database_url is None)
    kept = None
    with suppress(OSError):
        kept = key_file.read_text(encoding="utf-8").strip()
    secret, new = asyncio.run(_ensure_key(config, database_url, kept=kept))
    if new:
        write_private(key_file, secret + "\n")
    return secret, new


async def _ensure_key(config: Config, database_url: str, *, kept: str | None) -> tuple[str, bool]:
    db = Database(database_url, size=2, connect_timeout=config.connect_timeout, name="longshift-up")
    try:
        tenant_id = await keys.ensure_tenant(db)
        if config.api_key is not None:
            secret = config.api_key.get_secret_value()
            await keys.ensure_key(db, secret)
            return secret, False
        if kept is not None and await keys.find(db, keys.digest(kept)) is not None:
            return kept, False
        _, secret = await keys.create_key(db, tenant_id=tenant_id, name="longshift up")
        return secret, True
    finally:
        await db.close()
