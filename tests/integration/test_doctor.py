"""`longshift doctor`: what each check finds on a ground where that is so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection

from longshift.clock import SYSTEM, Clock
from longshift.config import Config
from longshift.db import doctor as facts
from longshift.db.database import Database
from longshift.db.liveness import LEADER
from longshift.db.revision import newest
from longshift.doctor import CHECKS, Check, Grade, examine
from longshift.doctor.findings import Seen
from longshift.doctor.ground import Ground, opened
from longshift.hot.facts import Facts
from tests.support.databases import Databases
from tests.support.local_stack import call_inline

NOW, ID = "clock_timestamp()", "gen_random_uuid()"
LATER = f"{NOW} + interval '1 day'"
WORKER = f"""
INSERT INTO workers (id, host, pid, queues, capacity, process, revision, version, serves, condition, lock_key) VALUES
({ID}, 'h', 1, '{{default}}', 10, {ID}, '{newest()}', '1', '[["echo", "1"]]', 'ok', 4711);"""
ELSEWHERE = WORKER.replace("'h'", "'elsewhere'")
SESSION = f"INSERT INTO sessions (id, tenant_id, queue) VALUES ({ID}, {ID}, 'default');"
TURN = f"""
INSERT INTO turns (id, session_id, tenant_id, status, agent, queue, input, root_turn_id, deadline)
VALUES ({ID}, {ID}, {ID}, 'queued', 'echo', 'default', 'null', {ID}, {LATER});"""
CALL = f"""
INSERT INTO tool_calls (id, tenant_id, session_id, turn_id, tool, effect, dedupe, place, input, status, worker_id, epoch, timeout)
VALUES ({ID}, {ID}, {ID}, {ID}, 'pay', 'irreversible', 'turn', 'p', 'null', 'unknown', {ID}, 1, '1 s');"""
APPROVAL = f"""
INSERT INTO approvals (id, tenant_id, session_id, turn_id, name, created_at)
VALUES ({ID}, {ID}, {ID}, {ID}, 'publish', {NOW} - interval '2 days');"""
GARBAGE = f"""
INSERT INTO garbage (tenant_id, sha256, generation, size, since) VALUES ({ID}, 'x', 1, 1, {NOW} - interval '2 days');"""
HELD_BY_DEAD = f"""
UPDATE workers SET dead_at = {NOW} - interval '1 minute'; UPDATE sessions SET lease_worker = (SELECT id FROM workers);"""
DELETED = f"UPDATE sessions SET purge_at = {NOW}, deleted_at = {NOW} - interval '2 days'"
CLEAN = f"""
DELETE FROM workers; DELETE FROM sessions; DELETE FROM turns; DELETE FROM tool_calls; DELETE FROM approvals; DELETE FROM garbage;
UPDATE alembic_version SET version_num = '{newest()}'; UPDATE compatibility SET oldest = '0004'"""


@pytest.fixture(scope="module")
def ours(databases: Databases) -> Iterator[str]:
    with databases.fresh() as url:
        yield url


@pytest.fixture
def database_url(ours: str) -> Iterator[str]:
    """One database for all of them, emptied after each."""
    yield ours
    do(ours, CLEAN)


def do(url: str, script: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(script.encode())


@pytest.fixture
def config(database_url: str, redis_url: str, tmp_path: Path) -> Config:
    return Config(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        artifacts_url=(tmp_path / "artifacts").as_uri(),
    )


async def look(config: Config, name: str, *, clock: Clock = SYSTEM) -> tuple[Grade, str]:
    """What the check ``name`` finds, whatever the others would."""
    checks = [replace(check, needs=()) for check in CHECKS if check.name == name]
    (finding,) = [each async for each in examine(config, clock=clock, checks=checks)]
    assert (finding.advice is None) == (finding.grade is Grade.OK)
    return finding.grade, finding.found


@asynccontextmanager
async def ground(config: Config) -> AsyncIterator[Ground]:
    async with opened(config, clock=SYSTEM) as ground:
        yield ground


def test_the_names_of_checks_are_each_there_once() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    assert {need for check in CHECKS for need in check.needs} <= set(names)


def test_a_role_without_rights_is_told_so_by_doctor_and_by_fleet(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    servers = {"redis_url": redis_url, "artifacts_url": (tmp_path / "artifacts").as_uri()}
    do(database_url, "DROP ROLE IF EXISTS without_rights; CREATE ROLE without_rights LOGIN")
    try:
        url = database_url.replace("longshift@", "without_rights@")
        looked = call_inline("doctor", "--json", folder=tmp_path, database_url=url, **servers)
        listed = call_inline("fleet", folder=tmp_path, database_url=url)
    finally:
        do(database_url, "DROP ROLE without_rights")

    said = "the role of LONGSHIFT_DATABASE_URL lacks a right: permission denied for table alembic_version"
    (problem,) = [each for each in looked.lines if each["grade"] == "problem"]
    assert (looked.code, problem["check"], problem["found"].startswith(said)) == (1, "schema", True)
    assert (listed.code, said in listed.err) == (2, True)


async def test_a_check_that_breaks_hides_none_of_the_others(config: Config) -> None:
    async def broken(_: Ground) -> Seen:
        raise RuntimeError("no such answer")

    checks = [Check("broken", broken, "look"), *(check for check in CHECKS if check.name == "redis")]
    first, second = [each async for each in examine(config, checks=checks)]
    assert (first.grade, first.found, second.grade) == (Grade.PROBLEM, "RuntimeError: no such answer", Grade.OK)


def test_a_healthy_fleet_has_no_problem(database_url: str, redis_url: str, tmp_path: Path) -> None:
    where = {"database_url": database_url, "redis_url": redis_url, "artifacts_url": (tmp_path / "artifacts").as_uri()}
    do(database_url, WORKER)
    with psycopg.connect(database_url, autocommit=True) as beat:
        beat.execute("SELECT pg_advisory_lock(%s), pg_advisory_lock(4711)", (LEADER,))
        said = call_inline("doctor", "--json", folder=tmp_path, **where)
        shown = call_inline("doctor", folder=tmp_path, **where)

    assert [each for each in said.lines if each["grade"] not in ("ok",)] == [
        {
            "check": "keys",
            "grade": "warning",
            "found": "none is valid: the API refuses everybody",
            "advice": "`longshift keys create NAME` makes one.",
        }
    ]
    assert (said.code, shown.code) == (0, 0)
    assert [each["check"] for each in said.lines] == [check.name for check in CHECKS]
    assert "`longshift keys create NAME` makes one." in shown.out
    assert not any((tmp_path / "artifacts" / "doctor").glob("*"))


def test_what_does_not_answer_is_a_problem_and_what_stands_on_it_is_not_looked_at(tmp_path: Path) -> None:
    said = call_inline(
        "doctor",
        "--json",
        folder=tmp_path,
        database_url="postgresql://me:hush@127.0.0.1:1/none",
        redis_url="redis://:hush@127.0.0.1:1/0",
        artifacts_url="ftp://somewhere",
    )
    grades = {each["check"]: each["grade"] for each in said.lines}

    assert said.code == 1
    assert {name for name, grade in grades.items() if grade == "problem"} == {"postgres", "redis", "artifacts"}
    assert {name for name, grade in grades.items() if grade == "ok"} == {"settings"}
    assert "hush" not in said.out + said.err


@pytest.mark.parametrize(
    ("settings", "code", "found"),
    [
        ({"capcity": "10"}, 1, "these are no settings, and are ignored: LONGSHIFT_CAPCITY"),
        ({"heartbeat": "often"}, 1, "LONGSHIFT_HEARTBEAT"),
        ({}, 1, "LONGSHIFT_DATABASE_URL is not set"),
        ({"api_service_host": "10.0.0.1", "api_port_80_tcp": "tcp://10.0.0.1:80"}, 1, "LONGSHIFT_... is a setting"),
    ],
)
def test_settings_that_do_not_fit_or_do_not_exist_are_named(
    tmp_path: Path, settings: dict[str, str], code: int, found: str
) -> None:
    said = call_inline("doctor", folder=tmp_path, **settings)
    assert (said.code, found in said.out) == (code, True), said.out


@pytest.mark.parametrize(
    ("check", "statement", "grade", "found"),
    [
        ("schema", "UPDATE alembic_version SET version_num = '0004'", "problem", "run `longshift migrate`"),
        ("schema", "UPDATE compatibility SET oldest = '9999'", "problem", "start a newer version"),
        ("workers", "", "warning", "none is alive"),
        ("workers", TURN, "problem", "none is alive, and 1 turns are open"),
        (
            "conditions",
            f"{WORKER} UPDATE workers SET condition = 'stuck', complaint = 'why'",
            "problem",
            "h:1 is stuck: why",
        ),
        ("silence", f"{WORKER} UPDATE workers SET heartbeat_at = {NOW} - interval '16 s'", "warning", "h:1"),
        ("leader", WORKER, "problem", "no worker leads"),
        ("versions", f"{WORKER} UPDATE workers SET revision = '0004'", "warning", "h:1"),
        ("versions", f"{WORKER} UPDATE workers SET revision = NULL", "warning", "h:1"),
        ("drains", f"{WORKER} UPDATE workers SET drain_asked_at = {NOW} - interval '1 h'", "warning", "h:1"),
        (
            "queues",
            f"{SESSION} UPDATE sessions SET ready_at = {NOW}",
            "problem",
            "nobody serves 'default', where 1 wait",
        ),
        (
            "queues",
            f"{SESSION} {WORKER} UPDATE sessions SET ready_at = {NOW} - interval '10 minutes'",
            "warning",
            "the oldest for 10 minutes, with 0 of 10 slots in use",
        ),
        (
            "agents",
            f"{TURN} {WORKER} UPDATE turns SET agent_version = '2'",
            "problem",
            "1 turns need 'echo' in version 2",
        ),
        ("agents", f"{TURN} {WORKER}", "ok", "every open turn"),
        ("leases", f"{SESSION} UPDATE sessions SET lease_worker = {ID}", "problem", "1 sessions"),
        ("leases", f"{SESSION} {WORKER} {HELD_BY_DEAD}", "problem", "1 sessions"),
        ("deadlines", f"{TURN} UPDATE turns SET deadline = {NOW} - interval '1 h'", "problem", "1 turns"),
        ("suspects", f"{SESSION} UPDATE sessions SET suspect = 1", "warning", "1 turns"),
        ("garbage", f"{SESSION} {DELETED}", "warning", "1 deleted sessions"),
        ("garbage", GARBAGE, "warning", "1 objects that nothing refers to"),
        ("tool calls", CALL, "warning", "of 1 tool calls nobody knows"),
        ("approvals", APPROVAL, "warning", "1 have waited"),
        ("shared store", f"{WORKER} {ELSEWHERE}", "warning", "workers are on 2 machines"),
    ],
)
async def test_what_is_wrong_in_the_database_is_found(
    config: Config, database_url: str, check: str, statement: str, grade: str, found: str
) -> None:
    do(database_url, statement)

    said = await look(config, check)
    assert (said[0], found in said[1]) == (grade, True), said


async def test_a_role_that_may_not_write_is_a_problem(config: Config, database_url: str) -> None:
    do(database_url, "DROP ROLE IF EXISTS doctor_reader")
    do(database_url, "CREATE ROLE doctor_reader LOGIN")
    do(database_url, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO doctor_reader")
    assert (await look(config, "privileges"))[0] == "ok"
    reader = database_url.replace("//longshift@", "//doctor_reader@")

    grade, found = await look(config.model_copy(update={"database_url": SecretStr(reader)}), "privileges")
    do(database_url, "DROP OWNED BY doctor_reader")
    do(database_url, "DROP ROLE doctor_reader")
    assert (grade, "table sessions" in found, "sequence epochs" in found) == ("problem", True, True)


async def test_a_long_transaction_is_named(config: Config, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longshift.doctor.servers.LONG", timedelta(0))
    with psycopg.connect(database_url, application_name="reporting") as long:
        long.execute("SELECT 1")

        grade, found = await look(config, "transactions")
    assert (grade, "reporting (pid " in found) == ("warning", True)


class Pooled(Database):
    """As behind a pooler in transaction mode: who connects next gets the connection of whoever asks nothing just now."""

    _shared: AsyncConnection | None = None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        if self._shared is not None:
            yield self._shared
            return
        async with super().connect() as connection:
            self._shared = connection
            yield connection


async def test_a_pooler_in_transaction_mode_is_recognised(config: Config, database_url: str) -> None:
    plain, pooled = Database(database_url, size=3), Pooled(database_url, size=3)

    assert not await facts.pooled(plain)
    assert await facts.pooled(pooled)
    await plain.close()
    await pooled.close()


@pytest.mark.parametrize(
    ("check", "change", "grade"),
    [
        ("postgres", {"version": 140_000}, "problem"),
        ("postgres", {"read_only": True}, "problem"),
        ("pooler", {"lock_timeout": "0"}, "problem"),
        ("durability", {"fsync": False}, "problem"),
        ("durability", {"synchronous_commit": "off"}, "problem"),
        ("durability", {"synchronous_commit": "remote_apply"}, "ok"),
        ("connections", {"room": 10, "connections": 9}, "warning"),
        ("vacuum", {"autovacuum": False}, "problem"),
    ],
)
async def test_a_postgres_that_is_not_set_up_for_this_is_found(
    config: Config, check: str, change: dict[str, object], grade: str
) -> None:
    (wanted,) = [each for each in CHECKS if each.name == check]
    async with ground(config) as here:
        assert (await wanted.look(here)).grade == "ok"
        here._server = replace(await here.server(), **change)  # type: ignore[arg-type]
        assert (await wanted.look(here)).grade == grade


@pytest.mark.parametrize(
    ("check", "change", "grade"),
    [
        ("redis", {"writes": False}, "problem"),
        ("redis", {"cluster": True}, "problem"),
        ("redis", {"version": "5.0.7"}, "warning"),
        ("eviction", {"policy": "allkeys-lru"}, "problem"),
        ("eviction", {"policy": "volatile-lru", "limit": 100, "used": 90}, "warning"),
    ],
)
async def test_a_redis_that_is_not_set_up_for_this_is_found(
    config: Config, check: str, change: dict[str, object], grade: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wanted,) = [each for each in CHECKS if each.name == check]
    async with ground(config) as here:
        assert (await wanted.look(here)).grade == "ok"
        changed = replace(await here.hot.facts(), **change)  # type: ignore[arg-type]

        async def told() -> Facts:
            return changed

        monkeypatch.setattr(here.hot, "facts", told)
        assert (await wanted.look(here)).grade == grade


@pytest.mark.parametrize(("off", "grade"), [(0, "ok"), (5, "warning"), (-5, "warning"), (60, "problem")])
async def test_a_clock_that_is_wrong_is_found(config: Config, off: int, grade: str) -> None:
    clock = Clock(now=lambda: datetime.now(UTC) + timedelta(seconds=off))

    assert (await look(config, "clock", clock=clock))[0] == grade


async def test_a_store_that_cannot_be_written_to_is_found(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = config.model_copy(update={"artifacts_url": (tmp_path / "file" / "below").as_uri()})

    assert (await look(blocked, "artifacts"))[0] == "problem"


async def test_an_embedder_without_pgvector_is_found(config: Config, database_url: str) -> None:
    with_embedder = config.model_copy(update={"embedder": "a.module:function"})
    assert (await look(with_embedder, "vectors"))[0] == "warning"
    do(database_url, "CREATE EXTENSION vector")
    assert (await look(with_embedder, "vectors"))[0] == "ok"
