"""The migrations, run for real, make exactly the schema that the code is written against."""

from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from longshift.db.database import driver_url
from longshift.db.migrations import head, upgrade
from longshift.db.schema import metadata

INDEXES = text("""
SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version' ORDER BY 1""")
OPTIONS = text("SELECT relname, reloptions FROM pg_class WHERE reloptions IS NOT NULL AND relkind = 'r' ORDER BY 1")


def test_migrating_a_fresh_database_gives_the_schema_of_the_code(database_url: str) -> None:
    engine = create_engine(driver_url(database_url))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)
    engine.dispose()

    assert differences == []


def test_partial_indexes_and_fill_factors_are_those_of_the_code(database_url: str) -> None:
    """What Alembic does not compare: predicates and storage options."""
    engine = create_engine(driver_url(database_url))
    with engine.begin() as connection:
        migrated = _details(connection)
        for statement in ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
            connection.execute(text(statement))
        metadata.create_all(connection)
        written = _details(connection)
    engine.dispose()

    assert migrated == written


def test_migrating_twice_changes_nothing_and_names_the_newest_revision(database_url: str) -> None:
    assert upgrade(database_url) == upgrade(database_url) == head()


def _details(connection: Connection) -> list[tuple[object, ...]]:
    return [tuple(row) for statement in (INDEXES, OPTIONS) for row in connection.execute(statement)]
