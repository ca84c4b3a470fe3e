"""Schema migrations (Alembic), shipped inside the package: ``upgrade(url)`` brings a database to the newest version."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from longshift.db.database import driver_url, reason
from longshift.errors import Unavailable

_LOCK = 0x10A6_5817  # any fixed number: replicas that start together migrate one after the other


def upgrade(url: str, *, to: str | None = None) -> str:
    """Migrate the database at ``url`` to the revision ``to`` (None: the newest) and return its name; safe to call from many
    processes.

    Raises:
        Unavailable: Postgres does not answer.
        InUse: processes run that would not understand the new schema; nothing has changed.
    """
    engine = create_engine(driver_url(url))
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, to or "head")
            return to or head()
    except OperationalError as error:
        raise Unavailable(f"Postgres does not answer at LONGSHIFT_DATABASE_URL: {reason(error)}") from None
    finally:
        engine.dispose()


def head() -> str:
    """The revision that this version of the code needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def _config() -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
