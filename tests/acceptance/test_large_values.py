"""Values that are too large for a row, through real processes: small in the log, whole for agents and clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256

import psycopg
import pytest
import redis

from longshift.model import Json
from longshift.testing.fleet import Client, Process
from longshift.testing.waiting import wait_until_sync
from tests.acceptance.checks import assert_gap_free, assert_recorded_once
from tests.support.fleet import Fleet
from tests.support.noise import MB5, noise

KB = 1024
AGENTS = "tests.acceptance.large_agents"
ROWS = """
SELECT (SELECT pg_column_size(t.*) FROM turns t WHERE t.id = %(turn)s),
       (SELECT pg_column_size(c.*) FROM tool_calls c WHERE c.turn_id = %(turn)s),
       (SELECT max(octet_length(CAST(e.payload AS text))) FROM events e WHERE e.turn_id = %(turn)s),
       (SELECT max(pg_column_size(e.*)) FROM events e WHERE e.turn_id = %(turn)s)"""


@pytest.fixture(scope="module")
def measured(fleet: Fleet) -> Json:
    """A turn whose worker was killed right after the result of 5 MB was recorded."""
    victim = fleet.start_worker("victim", agents=AGENTS, queues="victim-1", crash_at="after step.completed measure")
    turn = fleet.client.submit("measurer", noise(1, 100 * KB))
    wait_until_sync(lambda: not victim.alive, description="the worker is dead")
    return turn


@pytest.fixture(scope="module")
def worker(fleet: Fleet, measured: Json) -> Iterator[Process]:
    worker = fleet.start_worker("other", agents=AGENTS, queues="default,victim-1")
    yield worker
    fleet.stop(worker)


def test_a_result_of_5_mb_adds_less_than_1_kb_and_comes_back_identical_on_another_worker(
    fleet: Fleet, client: Client, measured: Json, worker: Process
) -> None:
    turn = client.wait(measured)

    assert (turn["status"], turn["output"], turn["attempts"]) == ("succeeded", None, 2)
    output = client.request("GET", turn["output_artifact"]["links"]["content"]).json()
    assert output["hashes"] == [sha256(noise(*given).encode()).hexdigest() for given in ((1, 100 * KB), (7, MB5))]
    assert (output["told"], output["pid"]) == (noise(7), worker.pid)
    assert turn["input"] == noise(1, 100 * KB)
    assert len(fleet.effects(turn, what="done")) == 1
    events = client.events(turn)
    assert_gap_free(events)
    assert_recorded_once(events)
    with psycopg.connect(fleet.database_url) as connection:
        sizes = connection.execute(ROWS, {"turn": turn["id"].removeprefix("turn_")}).fetchone()
    assert sizes is not None
    assert all(size < KB for size in sizes), sizes

    following = client.wait(client.submit("historian", "short", session=turn["session_id"]))
    [given, told, last] = following["output"]
    assert [given] == output["history"]
    assert all(len(json.dumps(message)) < KB for message in (given, told, last))
    assert told["content"]["$artifact"] == turn["output_artifact"]["id"]
    assert told["content"]["preview"] == json.dumps(output, separators=(",", ":"))[:200]


def test_a_turn_whose_input_is_out_of_reach_waits_without_a_worker(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    first = client.submit("historian", "short", metadata={"gate": "input"})
    second = client.submit("historian", noise(2, 50 * KB), session=first["session_id"])
    third = client.submit("historian", noise(3, 50 * KB), session=first["session_id"])
    folder, away = fleet.folder / "artifacts", fleet.folder / "away"
    folder.rename(away)
    fleet.open_gate("input")
    said = "a turn waits for the artifact store"
    wait_until_sync(lambda: said in worker.log(), description="the turn waits")

    assert client.wait(client.submit("historian", "another session"))["status"] == "succeeded"
    assert client.turn(second)["status"] == "queued"
    assert client.cancel(second)["status"] == "cancelled"  # at once: it has not started
    away.rename(folder)
    path = f"/v1/sessions/{first['session_id']}/signals"
    client.request("POST", path, json={"name": "back"})  # it would look by itself, a little later
    turn = client.wait(third)
    assert (turn["status"], turn["attempts"]) == ("succeeded", 1)
    assert [message["content"] for message in turn["output"]][2]["size"] == 50 * KB + 2


def test_a_turn_whose_archived_context_is_out_of_reach_waits_without_a_worker(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    first = client.wait(client.submit("historian", "short"))
    session = first["session_id"]
    client.request("POST", f"/v1/sessions/{session}/archive")
    with redis.Redis.from_url(fleet.redis_url) as hot:
        hot.flushall()
    folder, away = fleet.folder / "artifacts", fleet.folder / "away"
    folder.rename(away)
    turn = client.submit("historian", "after", session=session)
    wait_until_sync(lambda: turn["id"].removeprefix("turn_") in worker.log(), description="the turn waits")

    with psycopg.connect(fleet.database_url) as connection:
        held = "SELECT count(*) FROM sessions WHERE id = CAST(%s AS uuid) AND lease_worker IS NOT NULL"
        wait_until_sync(
            lambda: connection.execute(held, (session.removeprefix("ses_"),)).fetchone() == (0,),
            description="the session is given back",
        )
    assert (client.turn(turn)["status"], client.turn(turn)["attempts"]) == ("queued", 0)
    away.rename(folder)
    ended = client.wait(turn)
    assert (ended["status"], ended["attempts"]) == ("succeeded", 1)
    assert ended["output"][0]["content"] == "short"


def test_a_turn_whose_input_is_lost_fails_and_its_session_goes_on(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    first = client.submit("historian", "short", metadata={"gate": "lost"})
    second = client.submit("historian", noise(4, 50 * KB), session=first["session_id"])
    third = client.submit("historian", "after", session=first["session_id"])
    [stored] = (fleet.folder / "artifacts").rglob(f"{second['input_artifact']['sha256']}/*")
    stored.write_bytes(b"other bytes")
    fleet.open_gate("lost")

    turn = client.wait(second)
    assert (turn["status"], turn["error"]["code"], turn["input"]) == ("failed", "value_lost", None)
    assert turn["error"]["artifact"] == second["input_artifact"]["id"]
    assert client.wait(third)["status"] == "succeeded"


def test_large_values_pass_between_a_turn_and_its_child_by_pointer(
    fleet: Fleet, client: Client, worker: Process
) -> None:
    turn = client.wait(client.submit("asking", noise(5, 50 * KB)))

    assert turn["output"] is True
    [ended] = [event["payload"] for event in client.events(turn) if event["kind"] == "wait.ended"]
    assert (ended["output"], ended["artifact"]["size"]) == (None, 50 * KB + 2)
    with psycopg.connect(fleet.database_url) as connection:
        refs = "SELECT session_id FROM artifact_refs WHERE artifact_id = CAST(%s AS uuid)"
        keep = {row[0].hex for row in connection.execute(refs, (ended["artifact"]["id"],))}
    assert turn["session_id"].removeprefix("ses_") in keep
    assert len(keep) == 2  # the child's may be deleted first
