"""The migrations, run for real, make exactly the schema that the code is written against."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from longshift.db.database import driver_url
from longshift.db.migrations import head, upgrade
from longshift.db.schema import metadata
from longshift.errors import InUse
from tests.support.databases import Databases, execute

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
    assert upgrade(database_url).revision == upgrade(database_url).revision == head()


@pytest.fixture
def before_tiers(databases: Databases) -> Iterator[str]:
    """A database of the version before the tiers, in which a worker has just given a sign of life."""
    with databases.fresh() as url:
        execute(url, "DROP SCHEMA public CASCADE")
        execute(url, "CREATE SCHEMA public")
        assert upgrade(url, to="0003").revision == "0003"
        execute(
            url, "INSERT INTO workers (id, host, pid, queues, capacity) VALUES (gen_random_uuid(), 'h', 1, '{{}}', 1)"
        )
        yield url


def test_the_tiers_are_not_migrated_under_workers_of_the_version_before(before_tiers: str) -> None:
    with pytest.raises(InUse, match="stop all workers and API processes"):
        upgrade(before_tiers)

    with psycopg.connect(before_tiers) as connection:
        found = connection.execute("SELECT version_num, to_regclass('blobs') FROM alembic_version").fetchone()
    assert found == ("0003", None)


@pytest.mark.parametrize(
    "change", ["dead_at = clock_timestamp()", "heartbeat_at = heartbeat_at - interval '16 seconds'"]
)
def test_the_tiers_are_migrated_once_those_have_stopped(before_tiers: str, change: str) -> None:
    execute(before_tiers, f"UPDATE workers SET {change}")

    assert upgrade(before_tiers).revision == head()


def _details(connection: Connection) -> list[tuple[object, ...]]:
    return [tuple(row) for statement in (INDEXES, OPTIONS) for row in connection.execute(statement)]
