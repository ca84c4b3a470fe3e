"""How long Postgres may say nothing: a limit on this side, for the other side may be the one that hangs.

A server that is stopped, swaps or is stuck in its disk accepts connections and never answers. Its kernel goes on to
acknowledge what is sent, so neither keepalives nor ``tcp_user_timeout`` notice, and a Unix socket has neither. Cancelling the
waiting coroutine is no way out either: psycopg then sends a cancel request to the very server that hangs, and waits for that
(up to 10 s, in 3.3.9). So the socket is shut down under the statement: the driver sees the end of the connection at
once and reports it as any other lost one. Whether the statement happened is then in doubt, and the connection is gone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

logger = logging.getLogger(__name__)


def cut(connection: psycopg.AsyncConnection[Any] | psycopg.Connection[Any], *, after: float) -> None:
    """End a connection under whoever waits for it. One that is closed stays closed."""
    with suppress(psycopg.Error, OSError):
        socket_of = socket.socket(fileno=connection.fileno())
        try:
            socket_of.shutdown(socket.SHUT_RDWR)
            logger.warning("postgres said nothing, connection cut", extra={"seconds": after})
        finally:
            socket_of.detach()


class Patience:
    """The limit of one connection of an event loop: begins anew with each round trip.

    There is one timer at a time, which looks when it is due whether it still should: a round trip makes none.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], *, limit: float) -> None:
        self._connection = connection
        self._limit = limit
        self._until: float | None = None
        self._timed = False

    def begin(self) -> None:
        loop = asyncio.get_running_loop()
        self._until = loop.time() + self._limit
        if not self._timed:
            self._timed = True
            loop.call_at(self._until, self._look)

    def end(self) -> None:
        self._until = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timed = False
        if self._until is None:
            return
        if loop.time() < self._until:
            self._timed = True
            loop.call_at(self._until, self._look)
        else:
            cut(self._connection, after=self._limit)


class ThreadPatience:
    """The same for blocking connections of one thread: ``with`` it around everything that asks the server."""

    def __init__(self, *, limit: float) -> None:
        self._limit = limit
        self._connection: psycopg.Connection[Any] | None = None

    def of(self, connection: psycopg.Connection[Any]) -> None:
        """From now on it is this connection that is cut."""
        self._connection = connection

    @contextmanager
    def limited(self) -> Iterator[None]:
        timer = threading.Timer(self._limit, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # or it could cut what is opened next under the same number

    def _cut(self) -> None:
        if self._connection is not None:
            cut(self._connection, after=self._limit)
