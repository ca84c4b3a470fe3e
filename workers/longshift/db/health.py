"""Is Postgres there, and is it the database that this version of the code needs?"""

from __future__ import annotations

from sqlalchemy import text

from longshift.db.database import Database
from longshift.errors import ConfigError

PING = text("SELECT 1")
HAS_TABLE = text("SELECT to_regclass('alembic_version') IS NOT NULL AS made")
REVISION = text("SELECT version_num FROM alembic_version")


async def check(db: Database) -> None:
    """Raises ``Unavailable`` if Postgres does not answer."""
    await db.fetch(PING)


async def check_schema(db: Database) -> None:
    """For the start of a process.

    Raises:
        Unavailable: Postgres does not answer.
        ConfigError: the database has not been migrated to the schema of this version.
    """
    from longshift.db import migrations  # late: Alembic is not needed afterwards

    made = (await db.fetch(HAS_TABLE))[0].made
    found = [row.version_num for row in await db.fetch(REVISION)] if made else []
    if found != [migrations.head()]:
        state = f"at revision {found[0]}, not {migrations.head()}" if found else "empty"
        raise ConfigError(f"the database at LONGSHIFT_DATABASE_URL is {state}: run `longshift migrate`")
