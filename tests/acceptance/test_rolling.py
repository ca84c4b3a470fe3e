"""Workers and API processes come and go: what was accepted waits for whoever can do it."""

from __future__ import annotations

import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from socket import gethostname

import httpx
import pytest

from longshift.model import Json
from longshift.testing.fleet import Client
from longshift.testing.waiting import wait_until_sync
from tests.support.databases import execute
from tests.support.fleet import KEY, Fleet
from tests.support.local_stack import call_inline
from tests.test_docs import blocks, check_output, commands

LATE = "tests.acceptance.late_agents"
ONE, TWO = "tests.acceptance.versions_one", "tests.acceptance.versions_two"
SERVING = """
INSERT INTO workers (id, host, pid, queues, capacity, serves)
VALUES (gen_random_uuid(), 'elsewhere', 1, '{{default}}', 1, '[["late", "1"]]')"""


def test_a_turn_waits_until_a_worker_appears_that_has_its_agent(fleet: Fleet, client: Client) -> None:
    fleet.stop(fleet.start_worker("registers it", agents=LATE))
    without = fleet.start_worker("without")
    turn = client.submit("late", 1)
    wait_until_sync(lambda: "turn deferred" in without.log(), description="the worker that has not the agent says so")
    behind = client.submit("late", 2, session=turn["session_id"])
    other = client.submit("noop", 3)

    assert client.wait(other)["status"] == "succeeded"
    assert client.turn(turn)["status"] == "queued"
    assert fleet.effects(turn) == []
    assert '"served": true' not in without.log()
    execute(fleet.database_url, SERVING)
    misdirected = client.submit("late", 4)
    wait_until_sync(lambda: '"served": true' in without.log(), description="it knows that another one has the agent")
    execute(fleet.database_url, "DELETE FROM workers WHERE host = 'elsewhere'")
    having = fleet.start_worker("having", agents=LATE)
    assert [client.wait(each)["output"] for each in (turn, behind, misdirected)] == [1, 2, 4]
    assert {e.pid for e in fleet.effects(turn, behind, misdirected)} == {having.pid}
    fleet.stop(without, having)


@pytest.mark.parametrize("status", ["cancelled", "expired"])
def test_a_waiting_turn_ends_when_told_to_though_nobody_has_its_agent_any_more(
    fleet: Fleet, client: Client, status: str
) -> None:
    having = fleet.start_worker(f"had it {status}", agents=LATE)
    deadline = (datetime.now(UTC) + timedelta(seconds=3 if status == "expired" else 60)).isoformat()
    turn = client.submit("late sleeper", 3600, deadline=deadline)
    client.wait(turn, status="waiting")
    fleet.stop(having)
    without = fleet.start_worker(f"never had it {status}")
    if status == "cancelled":
        client.cancel(turn)

    assert client.wait(turn)["status"] == status
    fleet.stop(without)


def test_a_turn_submitted_before_any_worker_serves_its_queue_runs_when_one_comes(fleet: Fleet, client: Client) -> None:
    fleet.stop(fleet.start_worker("elsewhere", queues="victim-1"))
    turn = client.submit("five-1", 1)
    worker = fleet.start_worker("here", queues="victim-1")

    assert client.wait(turn)["status"] == "succeeded"
    fleet.stop(worker)


def test_clients_go_on_polling_and_submitting_when_one_of_two_api_processes_is_killed(fleet: Fleet) -> None:
    worker = fleet.start_worker("worker")
    doomed = fleet.start_api("doomed")
    there, here = fleet.clients[-1], fleet.client
    turn = there.submit("gated", "api")
    here.wait(turn, status="running")  # nothing changes any more: the poll is held, or has not even connected
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(there.http.get, f"/v1/turns/{turn['id']}", headers={"Prefer": "wait=30"})
        doomed.kill()
        assert isinstance(polling.exception(timeout=10), httpx.TransportError)

    assert here.turn(turn)["status"] == "running"
    fleet.open_gate("api")
    assert here.wait(turn)["status"] == "succeeded"
    fleet.stop(worker)


def test_a_submission_repeated_at_another_api_process_makes_one_turn(fleet: Fleet) -> None:
    worker = fleet.start_worker("one turn")
    doomed = fleet.start_api("also doomed")
    here, there = fleet.client, fleet.clients[-1]
    headers = {"Authorization": f"Bearer {KEY}", "Idempotency-Key": "once-1"}
    body = {"agent": "noop", "input": 42}
    with ThreadPoolExecutor(8) as pool:
        urls = [f"{client.url}/v1/turns" for client in (here, there) * 8]
        answers = list(pool.map(lambda url: httpx.post(url, json=body, headers=headers, timeout=30), urls))
    doomed.kill()
    answers.append(here.request("POST", "/v1/turns", json=body, headers=headers))

    assert {answer.status_code for answer in answers} == {202}
    turns = {answer.json()["id"] for answer in answers}
    assert len(turns) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    here.wait(answers[0].json())
    assert [e.turn for e in fleet.effects() if e.more.get("place") == 42] == list(turns)
    fleet.stop(worker)


def test_turns_end_in_the_version_in_which_they_began_and_its_workers_drain_when_none_needs_them(
    fleet: Fleet, client: Client
) -> None:
    def say_go(*turns: Json) -> None:
        for turn in turns:
            client.request("POST", f"/v1/sessions/{turn['session_id']}/signals", json={"name": "go"})

    def needed(version: str) -> int:
        said = call_inline("fleet", "versions", "--json", folder=fleet.folder, database_url=fleet.database_url)
        return sum(each["turns"] for each in said.lines if each["version"] == version)

    one = fleet.start_worker("one", agents=ONE)
    old = [client.submit(agent, gate) for agent in ("shared", "moved") for gate in ("old", "old", "held")]
    for turn in old:
        client.wait(turn, status="waiting")
    say_go(*old[2::3])  # these run, and hold their worker, while the second version comes
    two = fleet.start_worker("two", agents=TWO, queues="default,second")
    fleet.open_gate("new")
    # the first one names its version: an API process remembers for two seconds which there are, and looks again for this
    new = [client.submit("moved", "new", agent_version="2"), *(client.submit("moved", "new") for _ in range(3))]
    say_go(*new)
    assert [client.wait(turn)["output"] for turn in new] == ["2"] * len(
        new
    )  # though workers of version 1 are still there
    assert needed("1") == len(old)

    fleet.open_gate("old")
    fleet.open_gate("held")
    say_go(*old)
    assert [client.wait(turn)["output"] for turn in old] == ["1"] * len(old)
    assert needed("1") == 0
    said = call_inline(
        "fleet", "drain", f"{gethostname()}:{one.pid}", "--wait", folder=fleet.folder, database_url=fleet.database_url
    )
    assert (said.code, one.exit_code()) == (0, 0)
    last = client.submit("shared", "new")
    say_go(last)
    assert client.wait(last)["output"] == "2"
    done = Counter((effect.turn, effect.step) for effect in fleet.effects(*old, *new, last, what="done"))
    assert set(done.values()) == {1}
    assert len(done) == 3 * len([*old, *new, last])
    fleet.stop(two)


def test_the_guides_to_operating_and_deploying_run(fleet: Fleet) -> None:
    """Their commands, on a fleet at work; see ``tests/test_docs.py``."""
    fleet.stop(*(each for each in fleet.processes if not each.name.endswith(("api", "doomed"))))
    workers = [fleet.start_worker(f"guide {n}", agents=ONE) for n in (1, 2)]
    where = {
        "database_url": fleet.database_url,
        "redis_url": fleet.redis_url,
        "artifacts_url": (fleet.folder / "artifacts").as_uri(),
    }
    wait_until_sync(
        lambda: call_inline("doctor", folder=fleet.folder, **where).code == 0, description="the doctor is content"
    )
    seen = set()
    for block in [*blocks("how-to/operate.md"), *blocks("how-to/deploy.md")]:
        assert block.language == "console"
        for command, output in commands(block):
            program, *words = shlex.split(command)
            said = call_inline(*words, folder=fleet.folder, **where)
            assert (program, said.code) == ("longshift", 0), f"{command}\n{said.err}"
            check_output(command, said.out + said.err, output)
            seen.add(words[0])
    assert seen == {"doctor", "fleet", "migrate"}
    assert [worker.exit_code() for worker in workers] == [0, 0]
