"""Schema migrations (Alembic), shipped inside the package: ``upgrade(url)`` brings a database to the newest version.

**Pairs.** Old and new software work on one schema while a fleet is deployed piece by piece. So each script has a ``phase``:

    expand      adds: software of the release before goes on working, and may be started again
    contract    takes away what only older software still used: only when none of that lives any more

and ``oldest``: the oldest software, by the newest revision that it knows, that understands the schema from then on. It is
kept in the table ``compatibility``, where software looks that does not know the revision of the database. ``upgrade`` stops
in front of a contracting migration unless it is told to go on, and then refuses while older software lives. An empty database
has nobody to consider: everything is applied at once. Of the scripts of one release the contracting ones are the last, or
whoever comes from an older release would have to contract before the new software can start.

No migration waits for a lock for longer than two seconds, for whoever comes after it would wait behind it: it is given up and
begun again. An expanding script must not hold a lock for long either: nothing that rewrites or scans a large table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from longshift.db import compatibility
from longshift.db.database import driver_url, reason, rights
from longshift.db.revision import Software, signed
from longshift.errors import ConfigError, InUse, Unavailable

HERE = Path(__file__).parent
PAUSES = (0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0)
"""Seconds before a migration is begun again that could not have its locks."""
_MORTAL = (
    "-c idle_in_transaction_session_timeout=10s -c idle_session_timeout=60s"
    " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
)
"""A process that migrates may be stopped, or vanish with its machine, while it holds locks for which the whole fleet waits: the
server then ends its session, which rolls back. Itself it is never idle for longer than the longest of ``PAUSES``."""
_BUSY = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


class Phase(StrEnum):
    """What a migration does to software of the release before."""

    EXPAND = "expand"
    CONTRACT = "contract"


@dataclass(frozen=True, slots=True)
class Migration:
    """One script; ``oldest`` as above."""

    revision: str
    phase: Phase
    oldest: str


@dataclass(frozen=True, slots=True)
class Migrated:
    """Where ``upgrade`` has brought a database to.

    Attributes:
        revision: of the database.
        stopped_before: the contracting migration that comes next, and was not asked for.
        sufficient: whether this software may start on it.
    """

    revision: str
    stopped_before: str | None = None
    sufficient: bool = True


class Scripts:
    """The migrations that a version of the software knows, oldest first."""

    def __init__(self, folders: Sequence[Path] = (HERE / "versions",)) -> None:
        self._folders = folders
        walked = ScriptDirectory.from_config(self.config()).walk_revisions()
        self.chain = [Migration(each.revision, Phase(each.module.phase), each.module.oldest) for each in walked][::-1]

    @property
    def software(self) -> Software:
        needed = [each.revision for each in self.chain if each.phase is Phase.EXPAND][-1]
        return Software(needed=needed, newest=self.chain[-1].revision)

    def after(self, revision: str | None, *, to: str | None = None) -> list[Migration]:
        """What is still to be applied to a database at ``revision`` (None: an empty one)."""
        return [
            each
            for each in self.chain
            if (revision is None or each.revision > revision) and (to is None or each.revision <= to)
        ]

    def config(self, connection: Connection | None = None) -> AlembicConfig:
        config = AlembicConfig()
        config.set_main_option("script_location", _escaped(HERE))
        config.set_main_option("path_separator", "os")
        config.set_main_option("version_locations", os.pathsep.join(map(_escaped, self._folders)))
        config.attributes["connection"] = connection
        return config


def upgrade(
    url: str,
    *,
    to: str | None = None,
    contract: bool = False,
    scripts: Scripts | None = None,
    connect_timeout: timedelta = timedelta(seconds=3),
) -> Migrated:
    """Migrate the database at ``url``, up to the revision ``to`` (None: the newest), stopping in front of a contracting
    migration unless ``contract``; safe to call from many processes.

    Raises:
        Unavailable: Postgres does not answer, or others hold locks for so long that a migration could not have its own.
        InUse: processes run that would not understand the new schema; nothing of that migration has changed.
        ConfigError: the database is of a newer version, which this software does not understand; or this role lacks a right.
    """
    scripts = scripts or Scripts()
    engine = create_engine(
        driver_url(url),
        poolclass=NullPool,
        connect_args={
            "application_name": signed("longshift-migrate"),
            "connect_timeout": max(2, round(connect_timeout.total_seconds())),
            "options": _MORTAL,
        },
    )
    try:
        with rights(), engine.connect() as connection:
            compatibility.lock(connection)  # replicas that start together migrate one after the other
            return _upgrade(connection, scripts, to=to, contract=contract)
    except DBAPIError as error:
        if not isinstance(error, OperationalError) and not error.connection_invalidated:
            raise
        if isinstance(error.orig, _BUSY):
            raise Unavailable(
                "others hold locks on the tables for too long, and nothing was migrated: `longshift doctor` names long "
                "transactions; run `longshift migrate` again when they have ended"
            ) from None
        raise Unavailable(f"Postgres does not answer at LONGSHIFT_DATABASE_URL: {reason(error)}") from None
    finally:
        engine.dispose()


def head() -> str:
    """The newest revision that this version of the code knows."""
    return Scripts().software.newest


def _upgrade(connection: Connection, scripts: Scripts, *, to: str | None, contract: bool) -> Migrated:
    now = compatibility.revision(connection)
    software = scripts.software
    if now is not None and now > software.newest:  # a roll back, or an old image that migrates once more
        if not software.understands(now, oldest=compatibility.oldest(connection)):
            raise ConfigError(compatibility.too_new(now, software))
        return Migrated(now)
    if now is not None:
        _forget_announcement(connection, scripts, now)
    coming = scripts.after(now, to=to)
    while coming:
        first = coming[0]
        run = coming if now is None else _expanding(coming)
        if run:
            _apply(connection, scripts, run[-1])
        elif contract:
            _contract(connection, scripts, first)
            run = [first]
        else:
            assert now is not None
            return Migrated(now, stopped_before=first.revision, sufficient=software.needed <= now)
        now, coming = run[-1].revision, coming[len(run) :]
    return Migrated(now or software.newest)


def _expanding(coming: list[Migration]) -> list[Migration]:
    """Those that come before the first contracting one."""
    ends = next((i for i, each in enumerate(coming) if each.phase is Phase.CONTRACT), len(coming))
    return coming[:ends]


def _contract(connection: Connection, scripts: Scripts, migration: Migration) -> None:
    """Apply ``migration`` if nobody lives who would not understand it afterwards.

    It is announced before the last look: a process that has started meanwhile is seen by it (its connection was open when
    it read ``compatibility``), and one that starts later sees the announcement. Not before the first look: a process that is
    started again while others of its kind still run must not be refused for an operator's being too early.
    """
    _refuse_under_older(connection, migration)
    before = compatibility.announce(connection, migration.oldest)
    try:
        _refuse_under_older(connection, migration)
        _apply(connection, scripts, migration)
    except BaseException:
        connection.rollback()
        compatibility.withdraw(connection, before)
        raise


def _forget_announcement(connection: Connection, scripts: Scripts, now: str) -> None:
    """Of a contracting migration whose process was killed before it was applied: software that the schema still fits could not
    start. Whoever announces holds the lock that we hold, so that nobody is about to apply it."""
    true = max(each.oldest for each in scripts.chain if each.revision <= now)
    announced = compatibility.oldest(connection)
    if announced is not None and announced > true:
        compatibility.withdraw(connection, true)


def _refuse_under_older(connection: Connection, migration: Migration) -> None:
    living = compatibility.older(connection, than=migration.oldest)
    if living:
        raise InUse(
            f"{len(living)} of the version before are running ({', '.join(sorted(set(living)))}), and the contracting "
            f"migration {migration.revision} was not applied: replace or stop them (`longshift fleet` lists the workers), "
            "then run `longshift migrate --contract` again"
        )


def _apply(connection: Connection, scripts: Scripts, last: Migration) -> None:
    """All that is missing up to ``last``, in one transaction, begun again while others hold the locks that it needs."""
    for pause in (*PAUSES, None):
        try:
            with connection.begin():
                compatibility.be_brief(connection)
                command.upgrade(scripts.config(connection), last.revision)
                compatibility.note(connection, last.oldest)
        except OperationalError as error:
            if pause is None or not isinstance(error.orig, _BUSY):
                raise
            time.sleep(pause)
        else:
            return


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")
