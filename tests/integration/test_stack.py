"""The local stack: what it starts it stops, whatever happens to it, and its data stay."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from longshift.embedded import Guardian
from longshift.testing.waiting import wait_until_sync
from tests.support.local_stack import COMMAND, LocalStack, call, environment, gone, running

MORE = """
from longshift import Turn, agent

@agent("more")
async def more(turn: Turn, n: int) -> int:
    return n + 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the stacks that come and go, so that only the first makes a database."""
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, guardian: Guardian) -> Iterator[LocalStack]:
    """A stack that stays while the tests of this module look at it, and hurt parts of it."""
    with running(tmp_path_factory.mktemp("shared"), "--workers", "1", guardian=guardian) as stack:
        assert stack.ready
        yield stack


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(gone(process) for process in processes)


def test_ctrl_c_stops_everything_and_a_restart_keeps_data_and_key(folder: Path, guardian: Guardian) -> None:
    with running(folder, "--workers", "2", guardian=guardian) as first:
        assert set(first.ready["pids"]) == {"postgres", "redis", "api", "worker-1", "worker-2", "guardian"}
        turn_id = first.call("submit", "double", "21").out.strip()
        assert first.call("result", turn_id, "--wait").json == 42
        everything = first.everything()
        assert first.stop(signal.SIGINT) == 0
        assert all_gone(everything)
        assert [line["part"] for line in first.lines if line.get("state") == "stopped"] == [
            "api",
            "worker-1",
            "worker-2",
            "redis",
            "postgres",
        ]
        key = (folder / ".longshift" / "api-key").read_text()
    with running(folder, guardian=guardian) as second:
        assert second.ready
        assert second.call("result", turn_id).json == 42
        assert (folder / ".longshift" / "api-key").read_text() == key


def test_files_with_secrets_are_for_their_owner_only(stack: LocalStack) -> None:
    for name in ("stack.json", "api-key"):
        assert (stack.folder / ".longshift" / name).stat().st_mode & 0o077 == 0
    key = (stack.folder / ".longshift" / "api-key").read_text().strip()
    for log in (stack.folder / ".longshift" / "logs").iterdir():
        assert key not in log.read_text()


def test_a_killed_stack_leaves_nothing_running_and_starts_again(folder: Path, guardian: Guardian) -> None:
    with running(folder, "--workers", "1", guardian=guardian) as killed:
        assert killed.ready
        everything = killed.everything()
        assert len(everything) > 5
        killed.stop(signal.SIGKILL)
        wait_until_sync(lambda: all_gone(everything), description="nothing is left running", limit=20)
    with running(folder, "--workers", "1", guardian=guardian) as again:
        assert again.ready
        assert again.call("submit", "double", "3", "--wait").json == 6


def test_a_second_stack_on_the_same_folder_is_refused(stack: LocalStack) -> None:
    said = call("up", "--port", "0", folder=stack.folder)
    assert said.code == 2
    assert f"in use by process {stack.process.pid}" in said.err


def test_a_worker_may_join_the_stack_from_another_terminal(stack: LocalStack, guardian: Guardian) -> None:
    (stack.folder / "more.py").write_text(MORE)
    extra = extra_worker(stack, guardian)
    wait_until_sync(lambda: stack.call("submit", "more", "1").code == 0, description="its agent is registered")
    assert stack.call("submit", "more", "1", "--wait").json == 2
    extra.send_signal(signal.SIGTERM)
    assert extra.wait(30) == 0


def extra_worker(stack: LocalStack, guardian: Guardian) -> psutil.Popen:
    with (stack.folder / "extra.log").open("wb") as log:
        worker = psutil.Popen(
            [*COMMAND, "worker", "--agents", "more"],
            cwd=stack.folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    guardian.watch(worker.pid)
    return worker


def test_what_dies_is_started_again(stack: LocalStack) -> None:
    pids = stack.ready["pids"]
    for part in ("worker-1", "api", "redis", "postgres"):
        os.kill(pids[part], signal.SIGKILL)
        assert "starting again in" in death_of(stack, part)["detail"]
        assert stack.wait_for(part, "restarted")["pid"] != pids[part]
    wait_until_sync(
        lambda: stack.call("submit", "double", "4", "--wait").out == "8\n", description="it works again", limit=40
    )


def test_a_worker_that_dies_while_the_stack_starts_is_started_again(folder: Path, guardian: Guardian) -> None:
    (folder / "frail.py").write_text(
        "import os, signal\nfrom pathlib import Path\n"
        "if not Path('died').exists():\n"
        "    Path('died').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n" + MORE
    )
    with running(folder, "--workers", "1", "--agents", "frail,tiny", guardian=guardian) as stack:
        assert stack.ready
        assert "SIGKILL" in death_of(stack, "worker-1")["detail"]


def death_of(stack: LocalStack, part: str) -> dict[str, str]:
    def line() -> dict[str, str] | None:
        return next((line for line in stack.lines if line.get("part") == part and line["state"] == "died"), None)

    found = wait_until_sync(line, description=f"{part} is missed")
    assert found is not None
    return found


def test_a_key_of_the_environment_is_the_key(folder: Path, guardian: Guardian) -> None:
    key = "lsk_chosen_by_an_operator_0123456789"
    with running(folder, "--workers", "0", guardian=guardian, api_key=key) as stack:
        url = stack.ready["url"]
        assert call("agents", folder=folder.parent, url=url, api_key=key).code == 0
        assert call("agents", folder=folder.parent, url=url).code == 5


def test_a_port_that_is_taken_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = call("up", "--port", str(port), folder=tmp_path)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert "--port" in said.err
    assert [path.name for path in (tmp_path / ".longshift").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("source", "error"),
    [("import no_such_module\n", "ModuleNotFoundError"), ("raise SystemExit(3)\n", "SystemExit: 3")],
)
def test_agents_that_cannot_be_imported_end_the_start(folder: Path, source: str, error: str) -> None:
    (folder / "bad.py").write_text(source)
    said = call("up", "--port", "0", "--agents", "bad", "--json", folder=folder)
    assert said.code == 2
    assert f"LONGSHIFT_AGENTS: cannot import 'bad': {error}" in said.err
    assert said.lines[-1] == {"part": "postgres", "state": "stopped"}


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        ({"database_url": "postgresql://nobody@127.0.0.1:1/none"}, 4, "LONGSHIFT_DATABASE_URL"),
        ({"database_url": "mysql://host/name"}, 2, "LONGSHIFT_DATABASE_URL must begin with postgresql://"),
        ({"workers": "many"}, 2, "LONGSHIFT_WORKERS"),
        ({"api_key": "short"}, 2, "LONGSHIFT_API_KEY must be at least 16"),
        ({"redis_url": "redis://:hush@127.0.0.1:1/0"}, 4, "LONGSHIFT_REDIS_URL"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(folder: Path, settings: dict[str, str], code: int, expected: str) -> None:
    said = call("up", "--port", "0", folder=folder, **settings)
    assert said.code == code
    assert expected in said.err
    assert "hush" not in said.err + said.out
