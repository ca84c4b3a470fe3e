"""SIGTERM: running steps end, turns go on elsewhere, nothing is done twice."""

from __future__ import annotations

from statistics import median

from longshift.model import Json
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once, runs_of
from tests.support.fleet import Fleet

TURNS = 40


def test_a_drained_worker_ends_with_code_0_and_its_turns_go_on_elsewhere(fleet: Fleet) -> None:
    fleet.settings = {"lease_ttl": 15}
    drained, other = (fleet.start_worker(name) for name in ("drained", "other"))
    other.pause()  # so that all turns run on the first
    batch = fleet.client.submit_batch([{"agent": "loaded", "input": n} for n in range(TURNS)])
    wait_until_sync(lambda: len({e.turn for e in fleet.effects()}) == TURNS, description="all turns run")
    other.resume()
    drained.drain()

    assert drained.exit_code() == 0
    assert "did not stop in time" not in drained.log()
    turns = fleet.client.wait_batch(batch)
    assert {turn["status"] for turn in turns} == {"succeeded"}
    assert other.alive
    assert set(runs_of(fleet.effects()).values()) == {1}
    for turn in turns:
        events = fleet.client.events(turn)
        assert_gap_free(events)
        assert_recorded_once(events)
        kinds = [event["payload"].get("reason") for event in events if event["kind"] == "turn.rescheduled"]
        assert kinds in ([], ["drain"])
    fleet.stop(other)
    moved = [seconds for turn in turns if (seconds := _handover(fleet, turn, drained.pid)) is not None]
    assert len(moved) > TURNS // 2
    print(f"hand-over of {len(moved)} turns: median {median(moved):.3f} s, longest {max(moved):.3f} s")


def _handover(fleet: Fleet, turn: Json, pid: int) -> float | None:
    """Seconds from the end of the turn's last step on the drained worker to its next step elsewhere."""
    here = [e.at for e in fleet.effects(turn) if e.pid == pid]
    there = [e.at for e in fleet.effects(turn) if e.pid != pid]
    return min(there) - max(here) if here and there else None


def test_a_step_longer_than_the_grace_is_cut_short_and_runs_again_elsewhere(fleet: Fleet) -> None:
    drained = fleet.start_worker("hasty", drain_grace=1)
    turn = fleet.client.submit("gated", "grace")
    wait_until_sync(lambda: runs_of(fleet.effects(turn))[turn["id"], "at the gate"] == 1, description="at the gate")
    patient = fleet.start_worker("patient")
    drained.drain()

    assert drained.exit_code() == 0
    assert "did not stop in time" not in drained.log()
    fleet.open_gate("grace")
    ended = fleet.client.wait(turn)
    assert ended["status"] == "succeeded"
    assert runs_of(fleet.effects(turn)) == {
        (turn["id"], "before"): 1,
        (turn["id"], "at the gate"): 2,
        (turn["id"], "after"): 1,
    }
    fleet.stop(patient)


def test_a_plain_step_that_never_ends_does_not_keep_a_drained_worker(fleet: Fleet) -> None:
    drained = fleet.start_worker("kept", drain_grace=1)
    turn = fleet.client.submit("deaf", 1)
    wait_until_sync(lambda: runs_of(fleet.effects(turn, what="begun")), description="the step has begun")
    drained.drain()

    assert drained.exit_code() == 0
    fleet.client.cancel(turn)
