"""Which software understands the schema, and which lives: what a contracting migration has to know (see ``migrations``)."""

from __future__ import annotations

from sqlalchemy import Connection, text

from longshift.db.revision import Software

LOCK = text("SELECT pg_advisory_lock(:key)")
KEY = 0x10A6_5817  # any fixed number
HAS = text("SELECT to_regclass(:name) IS NOT NULL")
REVISION = text("SELECT version_num FROM alembic_version")
OLDEST = text("SELECT oldest FROM compatibility")
SET = text("UPDATE compatibility SET oldest = :oldest")
NOTE = text("UPDATE compatibility SET oldest = greatest(oldest, :oldest)")
BRIEF = text("SET LOCAL lock_timeout = '2s'")

# Workers by their rows, which they have also behind a pooler; everybody by the names of the connections. Of the two only the
# row tells a worker that cannot reach Postgres at the moment, and only the connection one that has been silent for longer.
OLDER = text("""
SELECT 'longshift-worker on ' || host AS name FROM workers
 WHERE dead_at IS NULL AND heartbeat_at > clock_timestamp() - interval '15 seconds'
   AND coalesce(revision, '') < :than
UNION ALL
SELECT application_name FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name ~ '^longshift(-|/|$)'
   AND application_name !~ '^longshift-migrate' -- whoever waits to migrate looks anew when it is its turn
   AND split_part(application_name, '/', 2) < :than""")


def too_new(revision: str, software: Software) -> str:
    return (
        f"the database at LONGSHIFT_DATABASE_URL is at revision {revision}, and this software, which knows revisions up to "
        f"{software.newest}, is too old for it: start a newer version"
    )


def lock(connection: Connection) -> None:
    """Wait until nobody else migrates this database; until the connection is closed."""
    connection.execute(LOCK, {"key": KEY})
    connection.commit()


def be_brief(connection: Connection) -> None:
    """Let no statement of this transaction wait for a lock for long: others would wait behind it."""
    connection.execute(BRIEF)


def revision(connection: Connection) -> str | None:
    """Of the database; None: it is empty."""
    with connection.begin():
        if not _has(connection, "alembic_version"):
            return None
        return connection.execute(REVISION).scalar()


def oldest(connection: Connection) -> str | None:
    """The oldest software that understands the schema; None: the database is too old to know."""
    with connection.begin():
        return connection.execute(OLDEST).scalar() if _has(connection, "compatibility") else None


def note(connection: Connection, oldest: str) -> None:
    """In the caller's transaction: from now on the schema needs this software, or a newer one."""
    if _has(connection, "compatibility"):
        connection.execute(NOTE, {"oldest": oldest})


def announce(connection: Connection, oldest: str) -> str:
    """The same, committed before the schema changes: older software does not start any more. Returns what was there."""
    with connection.begin():
        before = str(connection.execute(OLDEST).scalar_one())
        connection.execute(NOTE, {"oldest": oldest})
    return before


def withdraw(connection: Connection, oldest: str) -> None:
    with connection.begin():
        connection.execute(SET, {"oldest": oldest})


def older(connection: Connection, *, than: str) -> list[str]:
    """Names of the processes that live and know no revision as new as ``than``."""
    with connection.begin():
        return [row.name for row in connection.execute(OLDER, {"than": than})]


def _has(connection: Connection, table: str) -> bool:
    return bool(connection.execute(HAS, {"name": table}).scalar())
