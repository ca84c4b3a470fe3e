"""A worker and its supervisor: whichever of the two dies, no turn waits for a silence to be noticed.

The time-to-live here is an hour: under it nobody is ever declared dead for being silent.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from longshift.model import Json
from longshift.testing.fleet import SUPERVISED, Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once
from tests.support.fleet import Fleet


@pytest.fixture
def supervised(fleet: Fleet) -> Iterator[Process]:
    process = fleet.start_worker(f"supervised-{len(fleet.processes)}", supervised=True, lease_ttl=3600, lock_grace=1800)
    yield process
    fleet.stop(process)


def _at_the_gate(fleet: Fleet, turn: Json, *, attempt: int) -> int:
    """The process in which the turn is at its gate."""

    def found() -> int | None:
        at = [e.pid for e in fleet.effects(turn, what="begun") if e.step == "at the gate" and e.attempt == attempt]
        return at[0] if at else None

    pid = wait_until_sync(found, description=f"attempt {attempt} is at the gate")
    assert pid is not None
    return pid


def test_the_turns_of_a_killed_worker_go_on_in_the_one_that_its_supervisor_starts(
    fleet: Fleet, supervised: Process
) -> None:
    turn = fleet.client.submit("gated", "killed child")
    victim = _at_the_gate(fleet, turn, attempt=1)
    assert victim != supervised.pid
    os.kill(victim, signal.SIGKILL)
    assert _at_the_gate(fleet, turn, attempt=2) != victim
    fleet.open_gate("killed child")

    assert fleet.client.wait(turn)["status"] == "succeeded"
    events = fleet.client.events(turn)
    assert_gap_free(events)
    assert_recorded_once(events)
    assert supervised.alive


def test_a_worker_whose_supervisor_is_killed_drains(fleet: Fleet, supervised: Process) -> None:
    turn = fleet.client.submit("gated", "killed parent")
    orphan = _at_the_gate(fleet, turn, attempt=1)
    supervised.kill()
    wait_until_sync(lambda: '"draining"' in supervised.log(), description="the worker drains")
    fleet.open_gate("killed parent")
    successor = fleet.start_worker(f"successor-{len(fleet.processes)}", lease_ttl=3600, lock_grace=1800)

    assert fleet.client.wait(turn)["status"] == "succeeded"
    wait_until_sync(lambda: not _exists(orphan), description="the worker has ended")
    runs = [e.pid for e in fleet.effects(turn, what="begun") if e.step == "at the gate"]
    assert runs == [orphan], "its running step was not cut short"
    fleet.stop(successor)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_whose_supervisor_was_gone_before_it_served_ends(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshift.testing.fleet.WORKER", (*SUPERVISED, "--supervised"))
    orphan = fleet.start_worker("orphan", ready=False)  # its standard input is at its end from the first moment on

    assert orphan.exit_code(limit=60) == 0, orphan.log()
