"""What KEDA asks Postgres: the queries of the manifests, as the role of the manifests, on a migrated database."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
import yaml
from psycopg import sql
from psycopg.errors import InsufficientPrivilege, ReadOnlySqlTransaction

from longshift.model import new_id
from tests.deploy.manifests import K8S

KEDA = K8S / "components" / "keda"
SESSION = """
INSERT INTO sessions (id, tenant_id, queue, ready_at, lease_worker)
SELECT gen_random_uuid(), gen_random_uuid(), %s, now() - make_interval(secs => %s), %s FROM generate_series(1, %s)"""
WORKER = "INSERT INTO workers (id, host, pid, queues, capacity, draining_since) VALUES (%s, 'h', 1, %s, %s, %s)"

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def owner(database_url: str) -> Iterator[Connection]:
    """Who owns the schema, after it has made the role, twice."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for _ in range(2):
            connection.execute((KEDA / "role.sql").read_bytes())
        yield connection
        connection.execute("DROP OWNED BY keda")
        connection.execute("DROP ROLE keda")


@pytest.fixture
def keda(owner: Connection, database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, user="keda", autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def triggers() -> dict[str, dict[str, str]]:
    spec = yaml.safe_load((KEDA / "scaledobject.yaml").read_text())["spec"]
    return {trigger["name"]: trigger["metadata"] | {"metric": trigger["metricType"]} for trigger in spec["triggers"]}


@pytest.fixture
def asked(keda: Connection, triggers: dict[str, dict[str, str]]) -> Any:
    def ask(name: str) -> float:
        rows = keda.execute(sql.SQL(triggers[name]["query"])).fetchall()
        assert len(rows) == len(rows[0]) == 1, "KEDA reads one value"
        assert isinstance(rows[0][0], float), "KEDA reads it as a float"
        return rows[0][0]

    return ask


def sessions(
    owner: Connection, number: int, *, queue: str = "default", age: float = 0, held_by: UUID | None = None
) -> None:
    owner.execute(SESSION, (queue, age, held_by, number))


def worker(owner: Connection, *, queue: str = "default", slots: int = 100) -> UUID:
    worker_id = new_id()
    owner.execute(WORKER, (worker_id, [queue], slots, None))
    return worker_id


def test_an_idle_fleet_is_asked_for_nothing(owner: Connection, asked: Any) -> None:
    assert (asked("work"), asked("age")) == (0, 0)
    worker(owner)
    assert (asked("work"), asked("age")) == (0, 0)


def test_work_is_what_is_ready_and_what_runs_of_this_queue(
    owner: Connection, asked: Any, triggers: dict[str, dict[str, str]]
) -> None:
    sessions(owner, 150)
    sessions(owner, 100, held_by=worker(owner))
    sessions(owner, 30, age=-60)  # scheduled, or waiting for a time: they need nobody yet
    sessions(owner, 40, queue="gpu")
    assert asked("work") == 250
    assert triggers["work"]["metric"] == "AverageValue"
    assert math.ceil(asked("work") / float(triggers["work"]["targetQueryValue"])) == 4


def test_the_age_counts_up_to_a_doubling(owner: Connection, asked: Any, triggers: dict[str, dict[str, str]]) -> None:
    worker(owner)
    sessions(owner, 5, age=45)
    assert asked("age") == pytest.approx(45, abs=5)
    sessions(owner, 1, age=86400)
    assert asked("age") == 60 == 2 * float(triggers["age"]["targetQueryValue"])
    assert triggers["age"]["metric"] == "Value", "a multiple of the replicas that are ready"


def test_the_age_asks_for_no_more_workers_than_there_are_sessions(owner: Connection, asked: Any) -> None:
    for _ in range(3):
        worker(owner)
    sessions(owner, 3, age=600)
    assert asked("age") == 0
    sessions(owner, 1)
    assert asked("age") == 60


def test_work_without_any_worker_is_seen(owner: Connection, asked: Any) -> None:
    """Or a fleet that has gone to 0 would stay there."""
    sessions(owner, 1, age=20)
    assert asked("work") == 1
    assert asked("age") > 0


def test_the_role_reads_the_view_and_nothing_else(owner: Connection, keda: Connection) -> None:
    tables = [row[0] for row in owner.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    assert "turns" in tables
    for table in tables:
        with pytest.raises(InsufficientPrivilege):
            keda.execute(sql.SQL("SELECT 1 FROM {}").format(sql.Identifier(table)))
    with pytest.raises((InsufficientPrivilege, ReadOnlySqlTransaction)):
        keda.execute("CREATE TABLE mine ()")
    assert keda.execute("SHOW statement_timeout").fetchone() == ("5s",)
