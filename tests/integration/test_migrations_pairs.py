"""Migrations in pairs: what may be applied under which software, and which software may start on what.

``old`` is today's software. ``new`` knows a pair as well, ``later`` what comes after that: real scripts, in folders beside this
file, which continue after the newest one of ours.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import Connection, text

from longshift.db import compatibility, health, migrations
from longshift.db.database import Database
from longshift.db.migrations import HERE, Migrated, Phase, Scripts, upgrade
from longshift.db.revision import Software, newest, ours
from longshift.errors import ConfigError, InUse, Unavailable
from longshift.testing.waiting import wait_until_sync
from tests.support.databases import Databases, execute
from tests.support.local_stack import call_inline

OURS, PAIR, LATE = (
    HERE / "versions",
    Path(__file__).parent / "migrations_pair",
    Path(__file__).parent / "migrations_late",
)
OLD, NEW, LATER = Scripts(), Scripts((OURS, PAIR)), Scripts((OURS, PAIR, LATE))
WORKER = "INSERT INTO workers (id, host, pid, queues, capacity, revision) VALUES (gen_random_uuid(), 'h', 1, '{{{{}}}}', 1, {})"


@pytest.fixture
def expanded(database_url: str) -> str:
    assert upgrade(database_url, scripts=NEW) == Migrated("9001", stopped_before="9002")
    return database_url


def ask(url: str, query: str) -> TupleRow | None:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchone()


def state(url: str) -> tuple[object, ...]:
    """Revision, oldest software, and whether the old home of the pair is there."""
    column = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'workers' AND column_name = 'host'"
    found = ask(url, f"SELECT version_num, oldest, ({column}) FROM alembic_version, compatibility")
    assert found is not None
    return found


async def starts(url: str, software: Software) -> bool:
    db = Database(url)
    try:
        await health.check_schema(db, software=software)
    except ConfigError:
        return False
    finally:
        await db.close()
    return True


def test_our_scripts_keep_the_rules() -> None:
    assert OLD.software == ours()
    for before, script in zip(OLD.chain, OLD.chain[1:], strict=False):
        assert before.revision < script.revision
        assert before.oldest <= script.oldest <= script.revision
        if script.revision >= "0005" and script.phase is Phase.EXPAND:
            assert script.oldest <= before.revision


async def test_old_software_starts_after_an_expanding_migration_and_not_after_a_contracting_one(expanded: str) -> None:
    assert await starts(expanded, OLD.software)
    assert await starts(expanded, NEW.software)

    assert upgrade(expanded, contract=True, scripts=NEW) == Migrated("9002")
    assert state(expanded) == ("9002", "9001", 0)
    assert not await starts(expanded, OLD.software)
    assert await starts(expanded, NEW.software)
    assert not await starts(expanded, LATER.software)


async def test_new_software_does_not_start_before_the_migration(database_url: str) -> None:
    assert not await starts(database_url, NEW.software)


def test_an_empty_database_has_nobody_to_consider(databases: Databases) -> None:
    with databases.fresh() as url:
        execute(url, "DROP SCHEMA public CASCADE")
        execute(url, "CREATE SCHEMA public")

        assert upgrade(url, scripts=LATER) == Migrated("9003")
        assert state(url) == ("9003", "9001", 0)


@pytest.mark.parametrize("name", ["longshift-api", "longshift-api/0004", f"longshift-worker/{newest()}", "longshift"])
def test_nothing_is_contracted_under_a_process_of_the_version_before(expanded: str, name: str) -> None:
    before = state(expanded)
    with (
        psycopg.connect(expanded, application_name=name),
        pytest.raises(InUse, match=f"1 of the version before are running \\({name}\\)"),
    ):
        upgrade(expanded, contract=True, scripts=NEW)

    assert state(expanded) == before


@pytest.mark.parametrize("revision", ["NULL", f"'{newest()}'"])
def test_nothing_is_contracted_under_a_worker_of_the_version_before(expanded: str, revision: str) -> None:
    execute(expanded, WORKER.format(revision))

    with pytest.raises(InUse, match="longshift-worker on h"):
        upgrade(expanded, contract=True, scripts=NEW)
    execute(expanded, "UPDATE workers SET dead_at = clock_timestamp()")
    assert upgrade(expanded, contract=True, scripts=NEW).revision == "9002"


def test_others_are_in_nobodys_way(expanded: str) -> None:
    execute(expanded, WORKER.format("'9001'"))
    names = ("psql", "longshifty", "longshift-api/9001", "longshift-api/9002")
    connections = [psycopg.connect(expanded, application_name=name) for name in names]

    assert upgrade(expanded, contract=True, scripts=NEW).revision == "9002"
    for connection in connections:
        connection.close()


def test_what_starts_while_a_contraction_begins_either_stops_it_or_does_not_start(
    expanded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first look at who lives, before the announcement: it has read that it may start."""
    before, late = state(expanded), []
    announce = compatibility.announce

    def preceded(connection: Connection, oldest: str) -> str:
        late.append(psycopg.connect(expanded, application_name=f"longshift-api/{newest()}"))
        return announce(connection, oldest)

    monkeypatch.setattr(compatibility, "announce", preceded)
    with pytest.raises(InUse, match="longshift-api"):
        upgrade(expanded, contract=True, scripts=NEW)

    assert state(expanded) == before
    late[0].close()


def test_a_contraction_that_comes_too_early_keeps_no_old_process_from_being_started_again(
    expanded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[str] = []
    monkeypatch.setattr(compatibility, "announce", lambda _, oldest: announced.append(oldest))
    with psycopg.connect(expanded, application_name="longshift-api/0004"), pytest.raises(InUse):
        upgrade(expanded, contract=True, scripts=NEW)

    assert announced == []


async def test_old_software_does_not_start_once_a_contraction_is_announced(expanded: str) -> None:
    execute(expanded, "UPDATE compatibility SET oldest = '9001'")

    assert not await starts(expanded, OLD.software)
    assert await starts(expanded, NEW.software)


def test_an_announcement_whose_process_was_killed_does_not_outlive_the_next_migration(expanded: str) -> None:
    before = state(expanded)
    execute(expanded, "UPDATE compatibility SET oldest = '9001'")  # all that a kill leaves
    with psycopg.connect(expanded, application_name=f"longshift-api/{newest()}"), pytest.raises(InUse):
        upgrade(expanded, contract=True, scripts=NEW)

    assert state(expanded) == before


def test_old_software_that_migrates_a_newer_database_changes_nothing_or_says_that_it_is_too_old(expanded: str) -> None:
    assert upgrade(expanded, scripts=OLD) == Migrated("9001")
    upgrade(expanded, contract=True, scripts=NEW)

    with pytest.raises(ConfigError, match=r"at revision 9002, and this software, .* is too old for it"):
        upgrade(expanded, scripts=OLD)


def test_a_process_that_migrates_and_hangs_is_ended_by_the_server(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold locks for which the whole fleet waits."""
    limits: dict[str, str] = {}
    brief = compatibility.be_brief

    def look(connection: Connection) -> None:
        for name in ("idle_in_transaction_session_timeout", "idle_session_timeout"):
            limits[name] = str(connection.exec_driver_sql(f"SHOW {name}").scalar())
        brief(connection)
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = '1ms'")
        with psycopg.connect(database_url, autocommit=True) as other:
            wait_until_sync(lambda: not migrating(other), description="the server ends the session that hangs")

    def migrating(other: psycopg.Connection) -> bool:
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name ~ 'migrate'"
        return other.execute(query).fetchone() is not None

    monkeypatch.setattr(compatibility, "be_brief", look)
    with pytest.raises(Unavailable, match="idle-in-transaction timeout"):
        upgrade(database_url, scripts=NEW)

    assert limits == {"idle_in_transaction_session_timeout": "10s", "idle_session_timeout": "1min"}


def test_migrate_says_that_a_server_does_not_answer_instead_of_waiting_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(Unavailable, match="Postgres does not answer"):
            upgrade(f"postgresql://longshift@127.0.0.1:{port}/longshift", connect_timeout=timedelta(0))


def test_a_role_that_may_not_migrate_is_told_so(databases: Databases) -> None:
    with databases.fresh() as url:
        execute(url, "DROP SCHEMA public CASCADE")
        execute(url, "DROP ROLE IF EXISTS nobody_of_ours")
        execute(url, "CREATE ROLE nobody_of_ours LOGIN")
        try:
            with pytest.raises(ConfigError, match="the role of LONGSHIFT_DATABASE_URL lacks a right"):
                upgrade(url.replace("longshift@", "nobody_of_ours@"))
        finally:
            execute(url, "DROP ROLE nobody_of_ours")


def test_whoever_skips_a_release_must_contract_before_the_new_software_can_start(database_url: str) -> None:
    assert upgrade(database_url, scripts=LATER) == Migrated("9001", stopped_before="9002", sufficient=False)
    assert upgrade(database_url, contract=True, scripts=LATER) == Migrated("9003")
    assert state(database_url)[:2] == ("9003", "9001")


def test_migrate_check_says_whether_this_software_may_start_and_waits_for_whoever_migrates(
    databases: Databases, tmp_path: Path
) -> None:
    with databases.fresh() as url, ThreadPoolExecutor(1) as pool:
        assert call_inline("migrate", "--check", folder=tmp_path, database_url=url).code == 0
        execute(url, "DROP SCHEMA public CASCADE")
        execute(url, "CREATE SCHEMA public")
        said = call_inline("migrate", "--check", folder=tmp_path, database_url=url)
        assert (said.code, "is empty: run `longshift migrate`" in said.err) == (2, True)

        pool.submit(upgrade, url)
        said = call_inline("migrate", "--check", "--wait", "60", "--json", folder=tmp_path, database_url=url)
        assert (said.code, said.json) == (0, {"revision": newest()})

        upgrade(url, contract=True, scripts=NEW)
        said = call_inline("migrate", "--check", "--wait", "60", folder=tmp_path, database_url=url)
        assert (said.code, "start a newer version" in said.err) == (2, True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "BRIEF", text("SET LOCAL lock_timeout = '50ms'"))
    monkeypatch.setattr(migrations, "PAUSES", (0.05,) * 100)


@pytest.mark.usefixtures("impatient")
def test_a_migration_that_cannot_have_its_lock_lets_others_pass_and_is_begun_again(database_url: str) -> None:
    with psycopg.connect(database_url) as long, ThreadPoolExecutor(1) as pool:
        long.execute("SELECT count(*) FROM workers")  # its transaction goes on
        migrating = pool.submit(upgrade, database_url, scripts=NEW)

        def waits() -> bool:
            waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'workers'::regclass"
            return ask(database_url, waiting) is not None

        wait_until_sync(waits, description="the migration waits for its lock")
        execute(database_url, WORKER.format("NULL"))  # behind it
        assert not migrating.done()
        long.rollback()

        assert migrating.result(30).revision == "9001"


@pytest.mark.usefixtures("impatient")
def test_a_migration_that_never_gets_its_lock_says_so_and_has_changed_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "PAUSES", ())
    with psycopg.connect(database_url) as long:
        long.execute("SELECT count(*) FROM workers")
        with pytest.raises(Unavailable, match="others hold locks"):
            upgrade(database_url, scripts=NEW)

    assert state(database_url)[0] == newest()
