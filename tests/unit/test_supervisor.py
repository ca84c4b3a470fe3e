"""The parent of a worker: passes signals on, starts what died again, and reports how it died."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from longshift.deaths import crashed
from longshift.supervisor import Supervisor
from longshift.testing.waiting import wait_until_sync

# The n-th life of the child does the n-th thing; it is told what to do as its arguments.
CHILD = """
import os, signal, sys, time
lives = os.path.join(os.environ["FOLDER"], "lives")
with open(lives, "a") as file:
    file.write(os.environ["LONGSHIFT_PROCESS"] + "\\n")
life = sum(1 for _ in open(lives))
what = sys.argv[1:][min(life, len(sys.argv) - 1) - 1]
if what == "obey":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, _: sys.exit(number))
    open(os.path.join(os.environ["FOLDER"], "obeys"), "w").close()
    sys.stdin.read()
elif what == "obey but slowly":
    signal.signal(signal.SIGQUIT, lambda *_: sys.exit(1))
    open(os.path.join(os.environ["FOLDER"], "obeys"), "w").close()
    sys.stdin.read()
    open(os.path.join(os.environ["FOLDER"], "drains"), "w").close()
    time.sleep(60)
elif what.startswith("signal "):
    os.kill(os.getpid(), int(what.split()[1]))
else:
    sys.exit(int(what))
"""


def supervise(
    folder: Path, *lives: str, known: bool | None = True, unsigned: bool = False
) -> tuple[int, list[tuple[UUID, int]]]:
    """Run a supervisor whose children live like this: its exit code and what it reported."""
    reports: list[tuple[UUID, int]] = []

    def report(process: UUID, code: int) -> bool | None:
        reports.append((process, code))
        return known if code else unsigned

    return Supervisor([sys.executable, "-c", CHILD, *lives], environment_in(folder), report).run(), reports


def environment_in(folder: Path) -> Callable[[UUID], dict[str, str]]:
    return lambda process: {**os.environ, "FOLDER": str(folder), "LONGSHIFT_PROCESS": str(process)}


def identities(folder: Path) -> list[UUID]:
    return [UUID(line) for line in (folder / "lives").read_text().split()]


def test_a_child_that_ends_in_order_ends_its_supervisor(tmp_path: Path) -> None:
    code, reports = supervise(tmp_path, "0", "3")

    assert (code, [reported for _, reported in reports], len(identities(tmp_path))) == (0, [0], 1)


def test_a_child_that_ends_with_code_0_and_has_not_signed_off_is_replaced(tmp_path: Path) -> None:
    code, reports = supervise(tmp_path, "0", "2", known=False, unsigned=True)

    assert (code, [reported for _, reported in reports]) == (2, [0, 2])


@pytest.mark.parametrize("death", ["signal 11", "signal 9", "3"])
def test_a_child_that_dies_is_reported_and_replaced_by_one_with_another_identity(tmp_path: Path, death: str) -> None:
    code, reports = supervise(tmp_path, death, death, "0")

    assert code == 0
    assert reports.pop()[1] == 0
    first, second, last = identities(tmp_path)
    assert len({first, second, last}) == 3
    expected = -int(death.split()[1]) if "signal" in death else 3
    assert reports == [(first, expected), (second, expected)]


def test_a_child_that_could_not_start_is_not_started_again(tmp_path: Path) -> None:
    code, reports = supervise(tmp_path, "1", "0", known=False)

    assert (code, len(reports), len(identities(tmp_path))) == (1, 1, 1)


@pytest.mark.parametrize(("code", "lives"), [(2, 1), (4, 1), (3, 2)])
def test_where_nobody_can_say_whether_it_had_started_its_exit_code_does(tmp_path: Path, code: int, lives: int) -> None:
    ended, _ = supervise(tmp_path, str(code), "0", known=None)

    assert (ended, len(identities(tmp_path))) == (code if lives == 1 else 0, lives)


def test_what_does_not_answer_is_waited_for_once_a_child_has_served(tmp_path: Path) -> None:
    answers: list[bool | None] = [True, None, False]
    lives = ["signal 9", "4", "4", "0"]
    codes: list[int] = []

    def report(_process: UUID, code: int) -> bool | None:
        codes.append(code)
        return answers.pop(0) if answers else False

    supervisor = Supervisor([sys.executable, "-c", CHILD, *lives], environment_in(tmp_path), report)

    assert (supervisor.run(), codes) == (0, [-9, 4, 4, 0])


def asking(folder: Path, *requests: tuple[str, int]) -> threading.Thread:
    """Sends this process signals, each as soon as the child has made a file of this name."""

    def ask() -> None:
        for name, number in requests:
            wait_until_sync((folder / name).exists, description=f"the child {name}")
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_ends_the_childs_input_and_is_not_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    """Else a child that had the same one from systemd would have it twice, and cut short what it runs."""
    thread = asking(tmp_path, ("obeys", number))
    code, reports = supervise(tmp_path, "obey", "3")
    thread.join()

    assert (code, reports, len(identities(tmp_path))) == (0, [], 1)


def test_a_child_that_was_told_to_end_at_once_has_not_crashed(tmp_path: Path) -> None:
    thread = asking(tmp_path, ("obeys", signal.SIGTERM), ("drains", signal.SIGTERM))
    code, reports = supervise(tmp_path, "obey but slowly", "3")
    thread.join()

    assert (code, [reported for _, reported in reports]) == (1, [-signal.SIGTERM])
    assert not crashed(reports[0][1])


def test_only_what_a_process_did_to_itself_is_a_crash() -> None:
    assert [code for code in (-9, -15, -2, -3, -1) if crashed(code)] == []
    assert all(crashed(code) for code in (-11, -6, -7, -4, -8, 0, 1, 3, 70))
