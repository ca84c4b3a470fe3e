"""The guardian: stops what it watches, in order, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from longshift.embedded import FolderLock, Guardian
from longshift.embedded.guardian import born, command_line
from longshift.embedded.processes import last_line, stop_leftover
from longshift.errors import ConfigError
from longshift.testing.waiting import wait_until_sync

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
SAYS_WHEN = """
import pathlib, signal, sys, time
def end(number, frame):
    with open(sys.argv[2], "a") as file:
        file.write(sys.argv[1] + signal.Signals(number).name + "\\n")
    sys.exit()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
print("up", flush=True)
time.sleep(600)
"""


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdout.close()
    return process


def test_closing_stops_servers_after_everybody_else_each_with_its_own_signal(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Guardian() as guardian:
        server = started(SAYS_WHEN, "server ", str(diary))
        worker = started(SAYS_WHEN, "worker ", str(diary))
        guardian.watch(server.pid, stop_signal=signal.SIGINT, last=True)
        guardian.watch(worker.pid)

    assert (worker.wait(5), server.wait(5)) == (0, 0)
    assert diary.read_text().splitlines() == ["worker SIGTERM", "server SIGINT"]


def test_a_child_that_ignores_its_signal_is_killed_after_its_grace() -> None:
    with Guardian() as guardian:
        child = started(STUBBORN)
        guardian.watch(child.pid, grace=timedelta(milliseconds=100))

    assert child.wait(5) == -signal.SIGKILL


def test_a_forgotten_child_lives_on() -> None:
    child = started(STUBBORN)
    with Guardian() as guardian:
        guardian.watch(child.pid)
        guardian.forget(child.pid)

    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_killed_guardian_is_replaced_and_remembers() -> None:
    with Guardian() as guardian:
        first, second = started(STUBBORN), started(STUBBORN)
        guardian.watch(first.pid, grace=timedelta(0))
        os.kill(guardian.pid, signal.SIGKILL)
        wait_until_sync(lambda: born(guardian.pid) is None, description="the guardian is gone")
        guardian.watch(second.pid, grace=timedelta(0))

    assert [first.wait(5), second.wait(5)] == [-signal.SIGKILL, -signal.SIGKILL]


def test_the_guardian_ignores_the_signals_of_a_terminal() -> None:
    with Guardian() as guardian:
        child = started(STUBBORN)
        guardian.watch(child.pid, grace=timedelta(0))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guardian.pid, number)
        guardian.forget(child.pid)
        assert born(guardian.pid) is not None
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_process_that_ended_has_no_birth_and_no_command_line() -> None:
    child = started(STUBBORN)
    assert "SIG_IGN" in command_line(child.pid)

    child.kill()

    wait_until_sync(lambda: born(child.pid) is None, description="not yet reaped counts as ended")
    child.wait()
    assert command_line(child.pid) == ""


def test_a_leftover_that_ignores_signals_is_killed() -> None:
    child = started(STUBBORN)

    stop_leftover(child.pid, signals=[signal.SIGTERM], grace=timedelta(milliseconds=100))

    assert child.wait(5) == -signal.SIGKILL


def test_a_folder_is_locked_once_and_can_be_locked_again_after_release(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    first.acquire()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}: .* LONGSHIFT_DATA"):
        second.acquire()

    first.release()
    second.acquire()
    second.release()


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"cannot write to the folder '.*/file/below': .* LONGSHIFT_DATA"):
        FolderLock(tmp_path / "file" / "below").acquire()


def test_the_last_line_of_a_log_is_the_one_that_says_what_went_wrong(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == "(no log)"
    log.write_text("starting\nFATAL: no room\nbye\n\n")
    assert last_line(log) == "FATAL: no room"
