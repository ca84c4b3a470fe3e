"""Connections to Postgres: one async engine per process, errors translated once.

Every worker write is one autocommit statement, or one short transaction. Whatever says that the server is not there comes
out as ``Unavailable``; data that Postgres refuses comes out as ``InvalidInput``.

Nothing here waits for ever: a checkout, a connect, a statement and a commit each have their limit (``limits.py``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

import psycopg
from psycopg.types.array import ListBinaryDumper
from sqlalchemy import Connection, Engine, Row, TextClause, event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InvalidRequestError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from longshift.db.limits import Patience
from longshift.db.revision import signed
from longshift.errors import ConfigError, InvalidInput, Unavailable

Params = Mapping[str, Any]
CHUNK = 1000
T = TypeVar("T")
_REFUSED = (  # this value will never be accepted: sending it again is no use
    psycopg.errors.DataError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,  # nested too deep for the server's stack; an OperationalError to the driver
)
_RETRY = (  # the server refused this statement, not this data: the same may succeed a moment later
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DiskFull,
    psycopg.errors.TooManyConnections,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.QueryCanceled,
)
_STORAGE = frozenset({"md.c", "fd.c", "slru.c", "xlog.c", "buffile.c"})
"""Where Postgres writes files. Of what the operating system says there, it names only ENOSPC and EIO; a quota (EDQUOT), a
limit (EFBIG) or a disk gone read-only (EROFS) come as XX000 or 42501, like errors that mean something else."""
_PATIENCE = "longshift.patience"
_since: ContextVar[int | None] = ContextVar("longshift_since", default=None)


def driver_url(url: str) -> str:
    """``url`` with the driver that the project uses.

    Raises:
        ConfigError: it is not a ``postgresql://`` URL.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "LONGSHIFT_DATABASE_URL is not a URL of the form postgresql://user:password@host/name"
        ) from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ConfigError(f"LONGSHIFT_DATABASE_URL must begin with postgresql://, not {parsed.drivername}://")
    return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def reason(error: BaseException) -> str:
    """The first line of what the driver said, without the statement and its parameters."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


@contextmanager
def rights() -> Iterator[None]:
    """For commands of operators, whose role may be another one than the fleet's.

    Raises:
        ConfigError: it lacks a right.
    """
    try:
        yield
    except ProgrammingError as error:
        # the latter: no schema in which it may make something
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege | psycopg.errors.InvalidSchemaName):
            raise
        raise ConfigError(
            f"the role of LONGSHIFT_DATABASE_URL lacks a right: {reason(error)}; grant it, or use the role that owns the "
            "tables"
        ) from None


class UniqueConflict(Exception):
    """A unique key was taken meanwhile; the caller knows what that means."""


class Database:
    """One process's connections to Postgres."""

    def __init__(
        self,
        url: str,
        *,
        size: int = 8,
        connect_timeout: timedelta = timedelta(seconds=3),
        timeout: timedelta = timedelta(seconds=10),
        name: str = "longshift",
    ) -> None:
        """``timeout``: for a free connection, and for each answer of the server. ``name``: of the process, in
        ``pg_stat_activity``, where the newest revision that it knows is added.
        """
        self._limit = timeout.total_seconds()
        self.engine = create_async_engine(
            driver_url(url),
            pool_size=size,
            max_overflow=0,
            pool_timeout=self._limit,
            pool_use_lifo=True,
            # for the life of a connection: switching it at each checkout is a place where a cancelled task loses one
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,  # inputs, results and the like do not belong into a log
            connect_args={
                "connect_timeout": max(2, round(connect_timeout.total_seconds())),
                "application_name": signed(name),
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 15_000,
                # a statement that is merely slow is ended by the server, which keeps the connection
                "options": "-c idle_in_transaction_session_timeout=5s -c lock_timeout=2s -c timezone=UTC"
                f" -c statement_timeout={round(self._limit * 1000)}",
            },
        )
        self.breaks = 0
        """How often a connection was lost, or led to another server than before: what was read earlier may be gone."""
        self.on_break: Callable[[str], None] = lambda _: None
        self._server_started: datetime | None = None
        self._transactions = self.engine.execution_options(isolation_level="READ COMMITTED")
        self._listen(self.engine.sync_engine, self._transactions.sync_engine)

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """A connection on which each statement commits by itself."""
        with Translated():
            async with self.engine.connect() as connection:
                self._check_unbroken()
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        with Translated():
            async with self._transactions.begin() as connection:
                self._check_unbroken()
                yield connection

    async def fetch(self, statement: TextClause, params: Params | None = None) -> Sequence[Row[Any]]:
        """All rows of one autocommit statement."""
        async with self.connect() as connection:
            return (await connection.execute(statement, params)).all()

    async def execute(self, statement: TextClause, params: Params | None = None) -> int:
        """The number of rows that one autocommit statement wrote."""
        async with self.connect() as connection:
            return (await connection.execute(statement, params)).rowcount

    @contextmanager
    def since(self, breaks: int) -> Iterator[None]:
        """What is sent in this block rests on what was read when ``breaks`` was that: if it no longer is, ``Unavailable``.

        The check comes after the checkout. A write that waited for a free connection may get one to a server that has
        lost the end of the log it continues.
        """
        token = _since.set(breaks)
        try:
            yield
        finally:
            _since.reset(token)

    def _check_unbroken(self) -> None:
        needed = _since.get()
        if needed is not None and needed != self.breaks:
            raise Unavailable("a connection to Postgres was lost meanwhile")

    # -- what happens to connections

    def _listen(self, engine: Engine, transactions: Engine) -> None:
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "checkout", _begin)
        event.listen(engine, "checkin", _end)
        event.listen(engine, "handle_error", self._failed)
        # an autocommit statement is alone: its checkout has begun its time
        event.listen(transactions, "before_cursor_execute", _begin_statement)
        event.listen(transactions, "commit", _begin_ending)
        event.listen(transactions, "rollback", _begin_ending)

    def _connected(self, connection: Any, record: ConnectionPoolEntry) -> None:
        driver = connection.driver_connection
        # Group commits send columns as arrays. As text, psycopg escapes each element by a regular expression: 8 ms for
        # 500 events of 400 bytes, against 0.6 ms in binary.
        driver.adapters.register_dumper(list, ListBinaryDumper)
        patience = record.info[_PATIENCE] = Patience(driver, limit=self._limit + 1)
        patience.begin()
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT pg_postmaster_start_time()")
            (started,) = cursor.fetchone()
        finally:
            cursor.close()
        connection.rollback()
        if self._server_started not in (None, started):
            self._break("another server answers, or the same after a restart")
        self._server_started = started

    def _failed(self, context: ExceptionContext) -> None:
        if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
            context.is_disconnect = True  # it was the primary: only a new connection finds the one that is it now
        if not isinstance(context.original_exception, Exception):
            return  # a cancelled caller: its connection is given up, which says nothing of the server
        if context.is_disconnect and context.connection is not None:
            self._break(reason(context.original_exception))

    def _break(self, why: str) -> None:
        self.breaks += 1
        self.on_break(why)


def _begin(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
    record.info[_PATIENCE].begin()


def _end(_connection: object, record: ConnectionPoolEntry) -> None:
    if _PATIENCE in record.info:  # not if the connection was lost
        record.info[_PATIENCE].end()


def _begin_statement(connection: Connection, *_: object) -> None:
    connection.info[_PATIENCE].begin()


def _begin_ending(connection: Connection) -> None:
    if not connection.invalidated:
        connection.info[_PATIENCE].begin()


class Translated:
    """Turn the driver's errors into ours; a plain context manager, so that it wraps async bodies too."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UnicodeEncodeError):  # a lone surrogate: the driver raises it before it sends anything
            raise InvalidInput(f"Postgres refuses this value: {error}") from error
        if error is None or not isinstance(error, DBAPIError | PoolExhausted | InvalidRequestError | OSError):
            return
        if isinstance(error, PoolExhausted):
            raise Unavailable(
                "all connections to Postgres are in use: try again, or raise LONGSHIFT_POOL_SIZE"
            ) from error
        if isinstance(error, InvalidRequestError):
            if "invalidated" in str(error) or "closed" in str(error):
                raise Unavailable("the connection to Postgres was lost") from error
            return
        if isinstance(error, OSError):
            raise Unavailable(f"Postgres does not answer: {reason(error)}") from error
        cause = error.orig
        if isinstance(cause, psycopg.errors.UniqueViolation):
            raise UniqueConflict(cause.diag.constraint_name or "") from error
        if isinstance(cause, _REFUSED):
            raise InvalidInput(f"Postgres refuses this value: {reason(error)}") from error
        if (
            error.connection_invalidated
            or isinstance(error, OperationalError | InterfaceError)
            or isinstance(cause, _RETRY)
            or (isinstance(cause, psycopg.Error) and cause.diag.source_file in _STORAGE)
        ):
            raise Unavailable(f"Postgres does not answer: {reason(error)}") from error


def chunks(items: Iterable[T], *, size: int = CHUNK) -> Iterator[list[T]]:
    """``items`` in lists of ``size``: so many rows go into one statement."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
