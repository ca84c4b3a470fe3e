"""A worker dies by SIGKILL right after an event became durable, for every event of a turn; another one finishes it.

Others die at a point by its name, most of them right before a record: what it was to record has happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from longshift.model import Json
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_no_finished_step_ran_again, assert_recorded_once, runs_of
from tests.support.fleet import Fleet

EVENTS = 13
"""Of an undisturbed turn of the agent ``five``."""
INPUT = 7
NAMED = {
    EVENTS + 1: "before turn.started",
    EVENTS + 2: "before step.completed first",
    EVENTS + 3: "before step.completed 0.1/side-1",
    EVENTS + 4: "before turn.waiting",
    EVENTS + 5: "before turn.succeeded",
    EVENTS + 6: "after step.completed first",
}


@dataclass
class Crashes:
    """All turns of this module, finished: one undisturbed, and for each n one whose worker died there."""

    fleet: Fleet
    undisturbed: Json
    turns: dict[int, Json]
    victims: dict[int, int]  # pids


@pytest.fixture(scope="module")
def crashes(fleet: Fleet) -> Iterator[Crashes]:
    """All victims side by side, each alone with its queue; the rescuer serves their queues only when all are dead."""
    fleet.settings = {"lease_ttl": 3}
    points: dict[int, Any] = {n: {"crash_after": n} for n in range(1, EVENTS + 1)}
    points |= {n: {"crash_at": point} for n, point in NAMED.items()}
    victims = {
        n: fleet.start_worker(f"victim-{n}", queues=f"victim-{n}", ready=False, **point) for n, point in points.items()
    }
    for victim in victims.values():
        fleet.wait_ready(victim)
    turns = {n: fleet.client.submit(f"five-{n}", INPUT) for n in victims}
    wait_until_sync(lambda: not any(v.alive for v in victims.values()), description="all victims are dead", limit=60)
    rescuer = fleet.start_worker("rescuer", queues=",".join(["default", *(f"victim-{n}" for n in victims)]))
    undisturbed = fleet.client.wait(fleet.client.submit("five", INPUT))
    finished = {n: fleet.client.wait(turn, limit=60) for n, turn in turns.items()}
    yield Crashes(fleet, undisturbed, finished, {n: victim.pid for n, victim in victims.items()})
    fleet.stop(rescuer)


def test_an_undisturbed_turn_has_as_many_events_as_we_crash_after(crashes: Crashes) -> None:
    events = crashes.fleet.client.events(crashes.undisturbed)

    assert crashes.undisturbed["status"] == "succeeded"
    assert len(events) == EVENTS, [event["kind"] for event in events]


@pytest.mark.parametrize("n", range(1, EVENTS + 1))
def test_a_turn_whose_worker_died_after_its_nth_event_ends_like_an_undisturbed_one(crashes: Crashes, n: int) -> None:
    turn, fleet = crashes.turns[n], crashes.fleet
    events = fleet.client.events(turn)
    effects = fleet.effects(turn)

    assert (turn["status"], turn["output"]) == ("succeeded", crashes.undisturbed["output"])
    assert_gap_free(events)
    assert_recorded_once(events)
    names = [event["payload"]["name"] for event in events if event["kind"] == "step.completed"]
    expected = fleet.client.events(crashes.undisturbed)
    assert sorted(names) == sorted(e["payload"]["name"] for e in expected if e["kind"] == "step.completed")
    assert_no_finished_step_ran_again(events, effects)
    _assert_only_steps_in_flight_ran_twice(crashes, n, events)
    values = {(e.more["uuid"], e.more["random"], e.more["now"]) for e in effects if e.what == "values"}
    assert len(values) == 1


@pytest.mark.parametrize("n", NAMED, ids=NAMED.values())
def test_a_turn_whose_worker_died_at_a_point_by_its_name_ends_like_an_undisturbed_one(crashes: Crashes, n: int) -> None:
    turn, fleet = crashes.turns[n], crashes.fleet
    events, effects = fleet.client.events(turn), fleet.effects(turn)

    assert (turn["status"], turn["output"]) == ("succeeded", crashes.undisturbed["output"])
    assert_gap_free(events)
    assert_recorded_once(events)
    assert_no_finished_step_ran_again(events, effects)
    twice = {step for (_, step), count in runs_of(effects).items() if count > 1}
    lost = {step for step in ("first", "side-1") if NAMED[n].startswith("before") and NAMED[n].endswith(step)}
    assert lost <= twice
    assert twice <= (lost | {"side-2"} if "side-1" in lost else lost)  # its sibling was in flight, too


def _assert_only_steps_in_flight_ran_twice(crashes: Crashes, n: int, events: list[Json]) -> None:
    turn, victim = crashes.turns[n], crashes.victims[n]
    effects = crashes.fleet.effects(turn)
    assert {e.pid for e in effects} - {victim} or n == EVENTS, "the rescuer did nothing"
    recorded = {event["payload"].get("name") for event in events[:n]}
    in_flight = {e.step for e in effects if e.what == "begun" and e.pid == victim} - recorded
    runs = runs_of(effects)
    assert {step for (_, step), count in runs.items() if count > 1} <= in_flight
    assert max(runs.values()) <= 2
