"""A turn that ends its whole process is found out, fails alone, and costs nobody else a turn."""

from __future__ import annotations

import pytest

from tests.acceptance.checks import assert_gap_free, assert_no_finished_step_ran_again, assert_recorded_once
from tests.support.fleet import Fleet
from tests.support.waiting import wait_until_sync

INNOCENTS = 20
LONG = pytest.mark.full


@pytest.mark.parametrize(
    "kind", ["segmentation fault", pytest.param("exit", marks=LONG), pytest.param("blocks the loop", marks=LONG)]
)
def test_of_many_turns_in_a_process_the_one_that_crashes_it_fails_and_all_others_succeed(
    fleet: Fleet, kind: str
) -> None:
    worker = fleet.start_worker(f"with {kind}", supervised=True, loop_limit=2, drain_grace=1)
    name, deadly_gate = f"innocent {kind}", f"deadly {kind}"
    innocents = fleet.client.submit_batch([{"agent": "gated", "input": name} for _ in range(INNOCENTS)])
    deadly = fleet.client.submit("deadly", kind, metadata={"gate": deadly_gate})
    following = fleet.client.submit("noop", 1, session=deadly["session_id"])
    _wait_for_begun(fleet, "at the gate", INNOCENTS)
    fleet.open_gate(deadly_gate)

    ended = fleet.client.wait(deadly, limit=90)
    fleet.open_gate(name)
    turns = fleet.client.wait_batch(innocents, limit=90)

    assert (ended["status"], ended["error"]["code"]) == ("failed", "crash_loop"), ended
    assert {turn["status"] for turn in turns} == {"succeeded"}
    assert fleet.client.wait(following)["status"] == "succeeded", "the session goes on with its next turn"
    assert worker.alive
    for turn in (deadly, *turns):
        events = fleet.client.events(turn)
        assert_gap_free(events)
        assert_recorded_once(events)
        assert_no_finished_step_ran_again(events, fleet.effects(turn))
    fleet.stop(worker)


def _wait_for_begun(fleet: Fleet, step: str, count: int) -> None:
    def enough() -> bool:
        return sum(e.what == "begun" and e.step == step for e in fleet.effects()) >= count

    wait_until_sync(enough, description=f"{count} steps {step!r} have begun", limit=60)
