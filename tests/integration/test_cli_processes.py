"""The commands that run one process each: what they need and do not find is one sentence that names the setting."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync
from tests.support.databases import Databases, execute, with_database
from tests.support.local_stack import AGENTS, COMMAND, call, environment


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tiny.py").write_text(AGENTS)
    artifacts = (tmp_path / "artifacts").as_uri()
    return {"database_url": database_url, "redis_url": redis_url, "artifacts_url": artifacts, "agents": "tiny"}


@pytest.mark.parametrize(
    ("wrong", "code", "expected"),
    [
        ({"database_url": ""}, 2, "LONGSHIFT_DATABASE_URL is not set"),
        (
            {"database_url": "postgresql://me:hush@127.0.0.1:1/none"},
            4,
            "LONGSHIFT_DATABASE_URL: Postgres does not answer",
        ),
        ({"redis_url": "redis://:hush@127.0.0.1:1/0"}, 4, "Redis does not answer at LONGSHIFT_REDIS_URL"),
        ({"redis_url": "http://127.0.0.1"}, 2, "LONGSHIFT_REDIS_URL must begin with redis://"),
        ({"artifacts_url": "ftp://somewhere"}, 2, "LONGSHIFT_ARTIFACTS_URL is s3://"),
        ({"agents": "no_such_module"}, 2, "LONGSHIFT_AGENTS: cannot import 'no_such_module'"),
        ({"agents": "json"}, 2, "LONGSHIFT_AGENTS: module 'json' defines no agent"),
        ({"heartbeat": "often"}, 2, "LONGSHIFT_HEARTBEAT"),
    ],
)
def test_a_worker_says_what_it_does_not_find(
    settings: dict[str, str], tmp_path: Path, wrong: dict[str, str], code: int, expected: str
) -> None:
    said = call("worker", folder=tmp_path, **(settings | wrong))
    assert (said.code, said.out) == (code, "")
    assert expected in said.err
    assert "hush" not in said.err


def test_an_empty_database_wants_to_be_migrated_first(
    databases: Databases, settings: dict[str, str], tmp_path: Path
) -> None:
    execute(databases.server_url, "CREATE DATABASE {name}", name="cli_empty")
    settings["database_url"] = with_database(databases.server_url, "cli_empty")
    for command in ("worker", "api"):
        said = call(command, folder=tmp_path, **settings)
        assert said.code == 2
        assert "run `longshift migrate`" in said.err
    assert call("migrate", folder=tmp_path, **settings).code == 0
    assert call("migrate", "--json", folder=tmp_path, **settings).json["revision"]
    with psycopg.connect(settings["database_url"]) as connection:
        assert connection.execute("SELECT to_regclass('passage_vectors')").fetchone() != (None,)
    assert call("keys", "create", "me", folder=tmp_path, **settings).out.startswith("lsk_")


@pytest.mark.parametrize("command", ["worker", "api"])
def test_a_process_runs_until_sigterm_and_logs_json_lines(
    command: str, settings: dict[str, str], tmp_path: Path, guardian: Guardian
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, command], cwd=tmp_path, env=environment(port="0", **settings), stdout=output, stderr=output
        )
    guardian.watch(process.pid, grace=timedelta(seconds=5))
    ready = {"worker": "worker ready", "api": "the api listens"}[command]
    wait_until_sync(lambda: f'"message": "{ready}"' in log.read_text(), description=ready)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert all(line.startswith('{"time": ') for line in log.read_text().splitlines())


def test_the_library_and_the_command_line_import_no_module_of_the_api() -> None:
    code = (
        "import sys, longshift.cli.app, longshift.cli.stack\n"
        "assert not [m for m in sys.modules if m.startswith('longshift_api')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
