"""A worker is stopped by SIGSTOP past its time-to-live, another one takes over, and then the first one comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longshift.testing.fleet import Client, Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once, completed_in
from tests.support.fleet import Fleet


@pytest.fixture
def workers(fleet: Fleet) -> Iterator[list[Process]]:
    """Two, of which the first leads: it swept alone before the second came."""
    number = len(fleet.processes)
    started = [fleet.start_worker(f"worker-{number}-{name}") for name in "ab"]
    yield started
    fleet.stop(*started)


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_a_paused_worker_is_replaced_and_what_it_writes_late_is_refused(
    fleet: Fleet, client: Client, workers: list[Process], role: str
) -> None:
    paused, other = workers if role == "leader" else workers[::-1]
    other.pause()
    turn = client.submit("gated", role)
    _wait_for_begin(fleet, turn, at="at the gate", pid=paused.pid)
    other.resume()
    paused.pause()
    _wait_for_begin(fleet, turn, at="at the gate", pid=other.pid)
    fleet.open_gate(role)
    ended = client.wait(turn)
    paused.resume()
    wait_until_sync(lambda: "lease lost" in paused.log(), description="the stale worker is refused")

    events, effects = client.events(turn), fleet.effects(turn)
    assert (ended["status"], ended["output"]) == ("succeeded", 2 + other.pid)
    assert_gap_free(events)
    assert_recorded_once(events)
    assert completed_in(events) == {(turn["id"], "before"): 1, (turn["id"], "at the gate"): 2, (turn["id"], "after"): 2}
    assert [e.pid for e in effects if e.step == "after"] == [other.pid, other.pid]

    wait_until_sync(lambda: "going on under a new id" in paused.log(), description="it knows that it was declared dead")
    fleet.stop(other)
    following = client.wait(client.submit("noop", 1))
    assert following["status"] == "succeeded"
    assert [e.pid for e in fleet.effects(following)] == [paused.pid]


def _wait_for_begin(fleet: Fleet, turn: dict[str, object], *, at: str, pid: int) -> None:
    def begun() -> bool:
        return any(e.step == at and e.what == "begun" and e.pid == pid for e in fleet.effects(turn))

    wait_until_sync(begun, description=f"process {pid} is {at}")
