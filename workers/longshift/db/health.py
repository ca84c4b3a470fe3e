"""Is Postgres there, and is it a database that this software understands?"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text

from longshift.db.compatibility import too_new
from longshift.db.database import Database, rights
from longshift.db.revision import Software, ours
from longshift.errors import ConfigError

PING = text("SELECT 1")
HAS_TABLES = text("""
SELECT to_regclass('alembic_version') IS NOT NULL AS made, to_regclass('compatibility') IS NOT NULL AS paired""")
REVISION = text("SELECT version_num AS revision FROM alembic_version")
OLDEST = text("SELECT oldest FROM compatibility")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a database stands to a version of the software.

    Attributes:
        revision: of the database; None: it is empty.
        oldest: the oldest software that understands it, by the newest revision that this knows; None: it does not say.
    """

    software: Software
    revision: str | None
    oldest: str | None

    @property
    def behind(self) -> bool:
        """Whether `longshift migrate` is what helps."""
        return self.revision is None or self.revision < self.software.needed

    @property
    def complaint(self) -> str | None:
        """Why the software may not start on it; None: it may."""
        if self.behind:
            state = f"at revision {self.revision}, not {self.software.needed}" if self.revision else "empty"
            return f"the database at LONGSHIFT_DATABASE_URL is {state}: run `longshift migrate`"
        assert self.revision is not None
        if not self.software.understands(self.revision, oldest=self.oldest):
            return too_new(self.revision, self.software)
        return None


async def check(db: Database) -> None:
    """Raises ``Unavailable`` if Postgres does not answer."""
    await db.fetch(PING)


async def standing(db: Database, *, software: Software | None = None) -> Standing:
    """
    Raises:
        Unavailable: Postgres does not answer.
        ConfigError: this role may not even look.
    """
    with rights():
        has = (await db.fetch(HAS_TABLES))[0]
        revisions = [row.revision for row in await db.fetch(REVISION)] if has.made else []
        oldest = [row.oldest for row in await db.fetch(OLDEST)] if has.paired else []
    return Standing(software or ours(), revisions[0] if revisions else None, oldest[0] if oldest else None)


async def check_schema(db: Database, *, software: Software | None = None) -> None:
    """For the start of a process, on connections that it keeps: a contracting migration that begins meanwhile sees them.

    Raises:
        Unavailable: Postgres does not answer.
        ConfigError: the database has not been migrated to what this version needs, or needs a newer one.
    """
    complaint = (await standing(db, software=software)).complaint
    if complaint is not None:
        raise ConfigError(complaint)
