"""An irreversible tool in real processes: whatever happens to its worker, its effect is one line in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from longshift.model import Json
from longshift.testing.fleet import Client, Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once
from tests.support.fleet import Fleet

POINTS = ["after tool.started post", "before ledger.end post"]
QUEUES = [f"victim-{n}" for n in range(1, len(POINTS) + 1)]


@dataclass
class Staged:
    """The turns of two workers that were killed, one of them before its call and one after; and the two that are left."""

    turns: list[Json]
    first: Process  # has seen the others die: of who is only silent nobody knows whether it is dead
    second: Process  # has run their turns again


@pytest.fixture(scope="module")
def staged(fleet: Fleet) -> Iterator[Staged]:
    fleet.agents = "tests.acceptance.tool_agents"
    fleet.open_gate("killed")
    first = fleet.start_worker("first")
    victims = [
        fleet.start_worker(queue, queues=queue, crash_at=point, ready=False)
        for queue, point in zip(QUEUES, POINTS, strict=True)
    ]
    for victim in victims:
        fleet.wait_ready(victim)
    turns = [fleet.client.submit(f"mailer-{n}", "killed") for n in range(1, len(POINTS) + 1)]
    wait_until_sync(lambda: not any(victim.alive for victim in victims), description="all victims are dead")
    second = fleet.start_worker("second", queues=",".join(["default", *QUEUES]), drain_grace=0.2)
    yield Staged(turns, first, second)
    fleet.stop(first, second)


def calls(fleet: Fleet, turn: Json) -> list[str]:
    """How the calls of a turn stand in the ledger."""
    with psycopg.connect(fleet.database_url) as connection:
        query = "SELECT status FROM tool_calls WHERE turn_id = CAST(%s AS uuid)"
        return [row[0] for row in connection.execute(query, (turn["id"].removeprefix("turn_"),))]


@pytest.mark.parametrize("place", range(len(POINTS)), ids=POINTS)
def test_a_call_whose_worker_was_killed_is_made_once(fleet: Fleet, client: Client, staged: Staged, place: int) -> None:
    turn = client.wait(staged.turns[place])

    assert turn["output"] == "posted"
    assert len(fleet.effects(turn, what="posted")) == 1
    assert calls(fleet, turn) == ["done"]
    assert_gap_free(client.events(turn))
    assert_recorded_once(client.events(turn))


def test_a_call_that_a_stopped_worker_may_still_make_is_not_made_by_another(
    fleet: Fleet, client: Client, staged: Staged
) -> None:
    staged.second.pause()
    turn = client.submit("mailer", "stopped")
    wait_until_sync(lambda: fleet.effects(turn, what="begun"), description="the call is under way")
    staged.second.resume()
    staged.first.pause()
    wait_until_sync(
        lambda: fleet.effects(turn, what="absent"), description="another worker has asked what became of it"
    )
    staged.first.resume()
    wait_until_sync(lambda: "under a new id" in staged.first.log(), description="it knows that it was declared dead")
    fleet.open_gate("stopped")

    assert client.wait(turn)["output"] == "posted"
    assert [effect.pid for effect in fleet.effects(turn, what="posted")] == [staged.first.pid]
    assert calls(fleet, turn) == ["done"]


def test_a_drain_waits_for_a_call_beyond_the_grace_of_steps(fleet: Fleet, client: Client, staged: Staged) -> None:
    fleet.stop(staged.first)
    turn = client.submit("leaving", "drained")
    wait_until_sync(lambda: fleet.effects(turn, what="begun"), description="the call is under way")
    staged.second.drain()
    wait_until_sync(lambda: "waiting for irreversible tools" in staged.second.log(), description="the grace is over")
    assert staged.second.alive

    fleet.open_gate("drained")

    assert staged.second.exit_code() == 0
    assert (len(fleet.effects(turn, what="posted")), calls(fleet, turn)) == (1, ["done"])
    assert client.turn(turn)["status"] == "queued"
    recorded = [event["payload"]["name"] for event in client.events(turn) if event["kind"] == "step.completed"]
    assert recorded == ["post"]  # it kept its lease until then
