"""Turns that wait for others, in a fleet of real processes: nothing is lost, and nothing is taken twice."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from longshift.embedded import Guardian, LocalPostgres, LocalRedis
from longshift.model import Json
from longshift.testing.fleet import Client, Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_no_finished_step_ran_again, assert_recorded_once
from tests.support.databases import Databases
from tests.support.fleet import AGENTS, Fleet

WAITING = f"{AGENTS},tests.acceptance.waiting_agents"


@pytest.fixture(scope="module")
def workers(fleet: Fleet) -> list[Process]:
    return [fleet.start_worker(name, agents=WAITING) for name in "ab"]


def signal(client: Client, turn: Json, name: str, payload: Json = None) -> None:
    client.request("POST", f"/v1/sessions/{turn['session_id']}/signals", json={"name": name, "payload": payload})


def approvals(client: Client, turn: Json) -> list[Json]:
    found = client.get("/v1/approvals", status="open")["data"]
    return [approval for approval in found if approval["turn_id"] == turn["id"]]


def waiting(client: Client, turn: Json, kind: str) -> None:
    """Until the turn has begun to wait for that, and has left its worker."""

    def begun() -> bool:
        events = client.events(turn)
        return (
            bool(events) and events[-1]["kind"] == "turn.waiting" and any(kind in event["payload"] for event in events)
        )

    wait_until_sync(begun, description=f"{turn['id']} waits for a {kind}")


@pytest.fixture
def servers(guardian: Guardian, tmp_path: Path) -> Iterator[tuple[LocalPostgres, LocalRedis]]:
    """Of the test's own, to be restarted."""
    postgres, server = LocalPostgres(tmp_path / "pg", guardian=guardian), LocalRedis(tmp_path / "rd", guardian=guardian)
    postgres.start()
    server.start()
    yield postgres, server
    server.stop()
    postgres.stop()


def test_turns_that_wait_survive_the_restart_of_everything(
    servers: tuple[LocalPostgres, LocalRedis], guardian: Guardian, tmp_path: Path
) -> None:
    postgres, server = servers
    databases = Databases(postgres.url)
    databases.make_template()
    with (
        databases.fresh() as url,
        Fleet(tmp_path, database_url=url, redis_url=server.url, guardian=guardian, settings={"lease_ttl": 3}) as fleet,
    ):
        processes = [fleet.start_api(), fleet.start_worker("before", agents=WAITING)]
        listens = fleet.client.submit("waits for everything", 5)
        asked, parent = fleet.client.submit("asks", 60), fleet.client.submit("has a family", "waits")
        for turn, kind in ((listens, "signal"), (asked, "approval"), (parent, "child")):
            waiting(fleet.client, turn, kind)
        kin = _family(fleet.client, parent, 5)
        for process in processes:
            process.kill()
        with redis.Redis.from_url(server.url) as wiped:
            wiped.flushall()
        postgres.restart(immediate=True)
        fleet.start_api("api-again")
        fleet.start_worker("after", agents=WAITING)
        client = fleet.clients[-1]
        for each in kin:
            signal(client, each, "go")
        signal(client, asked, "publish", {"granted": True})
        for n, name in enumerate(("first", "second")):
            signal(client, listens, name, n)
        wait_until_sync(lambda: approvals(client, listens), description="it asks")
        signal(client, listens, "publish", False)

        expected = {"got": [0, 1], "race": 1, "granted": False, "children": [20, 22, 24], "last": 10 * 2}
        assert client.wait(listens)["output"] == expected
        assert (client.wait(asked)["output"], client.wait(parent)["output"]) == (True, "all ended")
        events, effects = client.events(listens), fleet.effects(listens)
    assert_gap_free(events)
    assert_recorded_once(events)
    assert_no_finished_step_ran_again(events, effects)


def test_twenty_children_are_gathered(fleet: Fleet, client: Client, workers: list[Process]) -> None:
    turn = client.submit("gathers", 20)

    ended = client.wait(turn)

    assert ended["output"] == [*(2 * n for n in range(20)), 0]
    assert len({effect.turn for effect in fleet.effects(what="done")} - {turn["id"]}) >= 20
    assert_recorded_once(client.events(turn))


@pytest.mark.parametrize("how", ["cancelled", "fails"])
def test_the_end_of_a_parent_ends_its_children_and_theirs(
    fleet: Fleet, client: Client, workers: list[Process], how: str
) -> None:
    turn = client.submit("has a family", "fails" if how == "fails" else "waits")
    kin = _family(client, turn, 5)
    wait_until_sync(lambda: len(fleet.effects(*kin, what="waits")) == 4, description="all children wait")

    if how == "fails":
        signal(client, turn, "fail")
    else:
        client.cancel(turn)

    assert client.wait(turn)["status"] == ("failed" if how == "fails" else "cancelled")
    for each in kin:
        assert client.wait(each)["status"] == "cancelled"


def _family(client: Client, turn: Json, size: int) -> list[Json]:
    """The children of a turn and theirs."""

    def found() -> list[Json] | None:
        kin, todo = [], [turn]
        while todo:
            events = client.events(todo.pop())
            new = [e["payload"] for e in events if e["kind"] == "value.recorded" and "session" in e["payload"]]
            todo += [{"id": each["turn"], "session_id": each["session"]} for each in new]
            kin += [client.turn({"id": each["turn"]}) for each in new]
        return kin if len(kin) == size else None

    return wait_until_sync(found, description=f"{size} turns are started") or []


def test_a_turn_that_cannot_leave_hears_its_signal(fleet: Fleet, client: Client, workers: list[Process]) -> None:
    turn = client.submit("works and waits", "listening")
    wait_until_sync(
        lambda: [e for e in client.events(turn) if e["kind"] == "wait.begun"], description="it waits for the signal"
    )

    signal(client, turn, "go", "now")
    wait_until_sync(lambda: fleet.effects(turn, what="heard"), description="it has heard, while the step still runs")
    fleet.open_gate("listening")

    assert client.wait(turn)["output"] == "now"
    assert client.turn(turn)["attempts"] == 1


def test_of_two_answers_at_once_one_is_taken(client: Client, workers: list[Process]) -> None:
    turn = client.submit("asks", 60)
    waiting(client, turn, "approval")
    [approval] = approvals(client, turn)

    def say(granted: bool) -> tuple[bool, int]:
        answer = client.http.post(f"/v1/approvals/{approval['id']}", json={"granted": granted})
        return granted, answer.status_code

    with ThreadPoolExecutor(2) as threads:
        said = dict(threads.map(say, [True, False]))

    assert sorted(said.values()) == [200, 409]
    assert client.wait(turn)["output"] is (said[True] == 200)


def test_a_turn_whose_deadline_is_stopped_outlives_it(client: Client, workers: list[Process]) -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=2)
    turn = client.submit("asks", 60, deadline=deadline.isoformat())
    waiting(client, turn, "approval")

    wait_until_sync(
        lambda: datetime.now(UTC) > deadline + timedelta(seconds=0.5), description="its deadline has passed"
    )
    assert client.turn(turn)["status"] == "waiting"
    assert datetime.fromisoformat(client.turn(turn)["deadline"]) > deadline
    signal(client, turn, "publish", True)

    assert client.wait(turn)["output"] is True
