"""Serving the application with uvicorn: a port taken or a missing database is one sentence, not a traceback."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI

from longshift import config as settings
from longshift import telemetry
from longshift.config import Config
from longshift.errors import ConfigError, LongshiftError, Unavailable
from longshift.tracing import open_traces
from longshift_api.app import create_app

logger = logging.getLogger(__name__)

GRACE = 10
"""Seconds for requests under way after SIGTERM; streams and long polls end at once."""


class Server(uvicorn.Server):
    """Tells streams and long polls to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken, or the address is not ours.
    """
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(*address[:3])  # with its protocol: asyncio sets TCP_NODELAY by it, else 40 ms each
    except OSError as error:
        raise ConfigError(f"LONGSHIFT_HOST {host!r} is no address of this machine: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another port with LONGSHIFT_PORT or --port"
        ) from None
    return listener


def make_server(app: FastAPI) -> Server:
    """A server for ``app``, whose lifespan has begun."""
    options = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,  # logging belongs to the process
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE,
    )
    return Server(options, app.state.edge.stopping)


async def serve(config: Config, *, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT, on ``listener`` or else on the configured host and port.

    Raises:
        ConfigError: a setting is wrong, the port is taken, or the database has not been migrated.
        Unavailable: Postgres does not answer.
    """
    traces = open_traces(config, service="longshift-api")
    listener = listener or bind(config.host, config.port)
    with listener:
        app = create_app(config, traces=traces)
        async with app.router.lifespan_context(app):  # here and not in uvicorn, which would print a traceback
            host, port = listener.getsockname()[:2]
            logger.info("the api listens", extra={"host": host, "port": port})
            await make_server(app).serve(sockets=[listener])


def main() -> int:
    """Serve with the settings of the environment; exit code 2: a setting does not fit, 4: Postgres does not answer."""
    telemetry.setup()
    # uvicorn raises the signal again when it has shut down; by default that would end us before the lifespan has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(serve(settings.load()))
    except KeyboardInterrupt:
        return 0
    except LongshiftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 4 if isinstance(error, Unavailable) else 2
    return 0
