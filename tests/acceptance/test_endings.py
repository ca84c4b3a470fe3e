"""How turns end when it is not the agent that ends them, and that they do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from longshift.model import Json
from longshift.testing.fleet import Client, Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once, runs_of
from tests.support.fleet import Fleet


@pytest.fixture(scope="module")
def worker(fleet: Fleet) -> Iterator[Process]:
    fleet.settings = {"lease_ttl": 15}
    worker = fleet.start_worker("worker")
    yield worker
    fleet.stop(worker)


def _at_the_gate(fleet: Fleet, name: str, **more: Json) -> Json:
    """A turn that is running, and will for as long as the test likes."""
    turn = fleet.client.submit("gated", name, **more)
    wait_until_sync(lambda: runs_of(fleet.effects(turn))[turn["id"], "at the gate"], description="it is at the gate")
    return turn


def _soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def _assert_log_ends_with(client: Client, turn: Json, kind: str) -> None:
    events = client.events(turn)
    assert_gap_free(events)
    assert_recorded_once(events)
    assert [event["kind"] for event in events if event["turn_id"] == turn["id"]][-1] == kind


def test_a_queued_turn_is_cancelled_at_once_and_never_runs(fleet: Fleet, client: Client, worker: Process) -> None:
    first = _at_the_gate(fleet, "behind")
    second = client.submit("noop", 2, session=first["session_id"])
    third = client.submit("noop", 3, session=first["session_id"])

    assert client.cancel(second)["status"] == "cancelled"
    fleet.open_gate("behind")
    assert client.wait(first)["status"] == "succeeded"
    assert client.wait(third)["status"] == "succeeded"
    assert fleet.effects(second) == []
    assert [event for event in client.events(first) if event["turn_id"] == second["id"]] == []


def test_a_running_turn_is_cancelled_in_the_middle_of_a_step_and_the_next_one_runs(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    turn = _at_the_gate(fleet, "never")
    following = client.submit("noop", 1, session=turn["session_id"])
    client.cancel(turn)

    ended = client.wait(turn)
    assert (ended["status"], ended["error"]["code"]) == ("cancelled", "cancelled")
    assert client.wait(following)["status"] == "succeeded"
    _assert_log_ends_with(client, turn, "turn.cancelled")
    assert fleet.effects(turn)[-1].what == "begun", "the step was not cut short"


def test_a_waiting_turn_is_cancelled_and_does_not_go_on(fleet: Fleet, client: Client, worker: Process) -> None:
    turn = client.submit("sleeper", 3600)
    client.wait(turn, status="waiting")
    client.cancel(turn)

    assert client.wait(turn)["status"] == "cancelled"
    assert {e.step for e in fleet.effects(turn)} == {"before"}
    _assert_log_ends_with(client, turn, "turn.cancelled")


def test_a_queued_turn_past_its_deadline_expires_without_running(fleet: Fleet, client: Client, worker: Process) -> None:
    first = _at_the_gate(fleet, "too long")
    second = client.submit("noop", 2, session=first["session_id"], deadline=_soon(0.5))

    assert client.wait(second)["status"] == "expired"
    assert client.turn(first)["status"] == "running"
    fleet.open_gate("too long")
    assert client.wait(first)["status"] == "succeeded"
    assert fleet.effects(second) == []


def test_a_running_turn_past_its_deadline_expires(fleet: Fleet, client: Client, worker: Process) -> None:
    turn = _at_the_gate(fleet, "never", deadline=_soon(1.5))

    ended = client.wait(turn)
    assert (ended["status"], ended["error"]["code"]) == ("expired", "expired")
    _assert_log_ends_with(client, turn, "turn.expired")


def test_a_waiting_turn_past_its_deadline_expires_and_lets_the_next_one_run(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    turn = client.submit("sleeper", 3600, deadline=_soon(1.5))
    following = client.submit("noop", 1, session=turn["session_id"])

    assert client.wait(turn)["status"] == "expired"
    assert client.wait(following)["status"] == "succeeded"
    assert {e.step for e in fleet.effects(turn)} == {"before"}
    _assert_log_ends_with(client, turn, "turn.expired")


def test_a_scheduled_turn_runs_when_its_time_has_come_and_others_overtake_it(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    due = datetime.now(UTC) + timedelta(seconds=1)
    later = client.submit("noop", 1, run_after=due.isoformat())
    sooner = client.submit("noop", 2, session=later["session_id"])

    assert later["status"] == "scheduled"
    assert client.wait(sooner)["status"] == "succeeded"
    ended = client.wait(later)
    assert ended["status"] == "succeeded"
    assert datetime.fromisoformat(ended["started_at"]) >= due
    assert sooner["position"] < ended["position"]


def test_a_scheduled_turn_that_is_cancelled_never_runs(fleet: Fleet, client: Client, worker: Process) -> None:
    turn = client.submit("noop", 1, run_after=_soon(0.5))

    assert client.cancel(turn)["status"] == "cancelled"
    after = client.submit("noop", 2, run_after=_soon(0.7))
    assert client.wait(after)["status"] == "succeeded"
    assert fleet.effects(turn) == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("raises BaseException", "internal"),
        ("exits", "agent_error"),
        ("exits in a step", "step_failed"),
        ("exits in an async step", "step_failed"),
        ("is cancelled by itself", "agent_error"),
        ("cancels its own task", "internal"),
        ("returns what is no JSON", "usage"),
        ("recurses", "agent_error"),
        ("raises BaseException in a step", "internal"),
    ],
)
def test_an_agent_that_misbehaves_fails_its_turn_and_neither_its_worker_nor_the_next_turn(
    client: Client, worker: Process, kind: str, code: str
) -> None:
    turn = client.submit("poison", kind)
    following = client.submit("noop", 1, session=turn["session_id"])

    ended = client.wait(turn, limit=15)
    assert (ended["status"], ended["error"]["code"], ended["attempts"]) == ("failed", code, 1)
    assert client.wait(following)["status"] == "succeeded"
    assert worker.alive


def test_a_failed_turn_is_retried_from_its_last_step(fleet: Fleet, client: Client, worker: Process) -> None:
    failed = client.wait(client.submit("breakable", "mended"), status="failed")
    assert failed["error"]["step"] == "middle"
    steps = client.get(f"/v1/turns/{failed['id']}/steps")["data"]
    assert [(step["name"], step["status"], step["result"]) for step in steps] == [
        ("before", "completed", 2),
        ("middle", "failed", None),
    ]

    fleet.open_gate("mended")
    retry = client.request("POST", f"/v1/turns/{failed['id']}/retry").json()
    done = client.wait(retry)

    assert (done["output"], done["retry_of"]) == (6, failed["id"])
    ran = [(effect.step, effect.turn) for effect in fleet.effects(failed, retry, what="begun")]
    assert ran == [("before", failed["id"]), ("middle", failed["id"]), ("middle", done["id"]), ("after", done["id"])]


def test_a_sleeping_turn_survives_the_death_of_all_workers(fleet: Fleet, client: Client, worker: Process) -> None:
    turn = client.submit("sleeper", 2)
    client.wait(turn, status="waiting")
    worker.kill()
    successor = fleet.start_worker("successor")

    ended = client.wait(turn)
    assert (ended["status"], ended["output"]) == ("succeeded", 4)
    assert [(e.step, e.what, e.pid) for e in fleet.effects(turn)] == [
        ("before", "begun", worker.pid),
        ("before", "done", worker.pid),
        ("after", "begun", successor.pid),
        ("after", "done", successor.pid),
    ]
    _assert_log_ends_with(client, turn, "turn.succeeded")
    fleet.stop(successor)
