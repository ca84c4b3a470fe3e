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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    open(os.path.join(os.environ["FOLDER"], "obeys"), "w").close()
    time.sleep(60)
elif what == "until the parent is gone":
    sys.stdin.read()
elif what.startswith("signal "):
    os.kill(os.getpid(), int(what.split()[1]))
else:
    sys.exit(int(what))
"""


def supervise(
    folder: Path, *lives: str, known: Callable[[], bool | None] = lambda: True
) -> tuple[int, list[tuple[UUID, int]]]:
    """Run a supervisor whose children live like this: its exit code and what it reported."""
    reports: list[tuple[UUID, int]] = []

    def report(process: UUID, code: int) -> bool | None:
        reports.append((process, code))
        return known()

    def environment(process: UUID) -> dict[str, str]:
        return {**os.environ, "FOLDER": str(folder), "LONGSHIFT_PROCESS": str(process)}

    return Supervisor([sys.executable, "-c", CHILD, *lives], environment, report).run(), reports


def identities(folder: Path) -> list[UUID]:
    return [UUID(line) for line in (folder / "lives").read_text().split()]


def test_a_child_that_ends_in_order_ends_its_supervisor_and_is_not_reported(tmp_path: Path) -> None:
    assert supervise(tmp_path, "0") == (0, [])


@pytest.mark.parametrize("death", ["signal 11", "signal 9", "3"])
def test_a_child_that_dies_is_reported_and_replaced_by_one_with_another_identity(tmp_path: Path, death: str) -> None:
    code, reports = supervise(tmp_path, death, death, "0")

    assert code == 0
    first, second, last = identities(tmp_path)
    assert len({first, second, last}) == 3
    expected = -int(death.split()[1]) if "signal" in death else 3
    assert reports == [(first, expected), (second, expected)]


def test_a_child_that_could_not_start_is_not_started_again(tmp_path: Path) -> None:
    code, reports = supervise(tmp_path, "1", "0", known=lambda: False)

    assert (code, len(reports), len(identities(tmp_path))) == (1, 1, 1)


@pytest.mark.parametrize(("code", "lives"), [(2, 1), (4, 1), (3, 2)])
def test_where_nobody_can_say_whether_it_had_started_its_exit_code_does(tmp_path: Path, code: int, lives: int) -> None:
    ended, _ = supervise(tmp_path, str(code), "0", known=lambda: None)

    assert (ended, len(identities(tmp_path))) == (code if lives == 1 else 0, lives)


def test_a_signal_is_passed_on_and_the_child_is_waited_for(tmp_path: Path) -> None:
    def ask() -> None:
        wait_until_sync((tmp_path / "obeys").exists, description="the child obeys")
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code, reports = supervise(tmp_path, "obey", "3")
    asking.join()

    assert (code, reports, len(identities(tmp_path))) == (0, [], 1)


def test_a_child_that_ends_by_the_signal_itself_ends_in_order(tmp_path: Path) -> None:
    """It had no chance to listen: the signal came while it started."""

    def ask() -> None:
        wait_until_sync((tmp_path / "lives").exists, description="the child lives")
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code, _ = supervise(tmp_path, "until the parent is gone", "3")
    asking.join()

    assert (code, len(identities(tmp_path))) == (0, 1)


def test_where_one_child_could_start_a_later_one_that_cannot_is_tried_again(tmp_path: Path) -> None:
    """Postgres may be away just now."""
    served = iter([True, False, False])
    code, reports = supervise(tmp_path, "signal 9", "4", "2", "0", known=lambda: next(served))

    assert (code, [exit_code for _, exit_code in reports]) == (0, [-9, 4, 2])


def test_only_what_a_process_did_to_itself_is_a_crash() -> None:
    assert [code for code in (0, -9, -15, -2, -3, -1) if crashed(code)] == []
    assert all(crashed(code) for code in (-11, -6, -7, -4, -8, 1, 3, 70))
