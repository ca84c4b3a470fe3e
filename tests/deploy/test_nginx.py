"""nginx as we ship it, in front of three real replicas: what it spreads, what it passes on, and what it never sends twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from longshift.config import Config
from longshift.embedded import Guardian, LocalRedis
from longshift.hot import turn_channel
from longshift.model import Prefix, parse_id
from longshift.testing.fleet import Client
from longshift.testing.waiting import wait_until_sync
from tests.deploy.proxies import FILES, Policy, Proxy, blocks, proxy
from tests.support.databases import Databases
from tests.support.fleet import AGENTS, KEY, Fleet

Ask = Callable[..., "Future[httpx.Response]"]
Start = Callable[[Policy], Proxy]


@pytest.fixture(scope="module")
def fleet(
    databases: Databases, redis_server: LocalRedis, guardian: Guardian, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Three replicas, and two workers, one with three times the slots of the other."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    folder: Path = tmp_path_factory.mktemp("fleet")
    with (
        databases.fresh() as database_url,
        Fleet(folder, database_url=database_url, redis_url=redis_server.url, guardian=guardian) as fleet,
        ThreadPoolExecutor() as pool,
    ):
        fleet.agents = f"{AGENTS},tests.deploy.deploy_agents"
        starting = [pool.submit(fleet.start_api, f"api-{n}") for n in (1, 2, 3)]
        starting += [pool.submit(fleet.start_worker, f"worker-{n}", capacity=n) for n in (2, 6)]
        for start in starting:
            start.result()
        yield fleet


@pytest.fixture(scope="module")
def replicas(fleet: Fleet) -> list[str]:
    return [address(client) for client in fleet.clients]


@pytest.fixture
def nginx_with(replicas: list[str], guardian: Guardian) -> Iterator[Start]:
    """Starts nginx with one of the policies."""
    with ExitStack() as stack:
        yield lambda policy: stack.enter_context(proxy(policy, replicas, guardian=guardian))


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


@pytest.fixture
def ask(http: httpx.Client) -> Iterator[Ask]:
    """Sends requests in threads of their own."""
    with ThreadPoolExecutor(16) as pool:
        yield lambda method, url, **more: pool.submit(http.request, method, url, **more)


def address(client: Client) -> str:
    return client.url.removeprefix("http://")


def submitted(http: httpx.Client, url: str, agent: str, value: object) -> Any:
    answer = http.post(url, json={"agent": agent, "input": value})
    assert answer.status_code == 202, answer.text
    return answer.json()


def at_the_gate(fleet: Fleet, *turns: Any) -> Counter[int]:
    """How many of ``turns`` have come to their gate, in each process."""
    return Counter(e.pid for e in fleet.effects(*turns, what="begun") if e.step == "at the gate")


# ------------------------------------------------------------------------------------------------- how it spreads them


def test_the_file_has_one_policy_in_force_and_that_is_least_connections() -> None:
    lines = [line for line in (FILES / "upstream.conf").read_text().splitlines() if not line.startswith("#")]
    assert "\n".join(lines).strip() + "\n" == blocks()["least_conn"]


def test_round_robin_gives_every_replica_the_same(nginx_with: Start, replicas: list[str], http: httpx.Client) -> None:
    nginx = nginx_with("round_robin")
    for _ in range(30):
        assert http.get(f"{nginx.url}/livez").status_code == 200
    assert nginx.shares(30) == dict.fromkeys(replicas, 10)


def test_weights_are_kept_exactly(nginx_with: Start, replicas: list[str], http: httpx.Client) -> None:
    nginx = nginx_with("weighted")
    for _ in range(60):
        assert http.get(f"{nginx.url}/livez").status_code == 200
    assert nginx.shares(60) == dict(zip(replicas, (30, 20, 10), strict=True))


def test_least_connections_spares_a_replica_that_holds_a_long_poll(
    nginx_with: Start, fleet: Fleet, http: httpx.Client, ask: Ask
) -> None:
    nginx = nginx_with("least_conn")
    turn = submitted(http, f"{nginx.url}/v1/turns", "gated", "spares")
    wait_until_sync(lambda: at_the_gate(fleet, turn), description="the turn is at its gate")
    now = http.get(f"{nginx.url}/v1/turns/{turn['id']}")
    poll = ask("GET", f"{nginx.url}/v1/turns/{turn['id']}?wait=60", headers={"If-None-Match": now.headers["ETag"]})
    wait_until_sync(lambda: listens(fleet, turn), description="the long poll is held")
    answers = [http.get(f"{nginx.url}/livez") for _ in range(12)]
    _, _, *quick = nginx.requests(14)
    fleet.open_gate("spares")
    assert poll.result(30).json()["status"] == "succeeded"
    [slow] = nginx.requests(1)
    busy = Counter(request.asked[0][0] for request in quick)
    assert {answer.status_code for answer in answers} == {200}
    assert busy[slow.asked[0][0]] == 0
    assert sorted(busy.values()) == [6, 6]


def listens(fleet: Fleet, turn: Any) -> bool:
    """Whether somebody waits for a change of the turn."""
    with redis.Redis.from_url(fleet.redis_url) as client:
        channel = turn_channel(parse_id(Prefix.TURN, turn["id"]))
        return any(count for _, count in client.pubsub_numsub(channel))


# ------------------------------------------------------------------------------------------------- what passes through


def test_a_conversation_goes_over_every_replica_and_forgets_nothing(
    nginx_with: Start, replicas: list[str], http: httpx.Client
) -> None:
    nginx = nginx_with("round_robin")
    words, place, count = ["to", "be", "or", "not", "to", "be"], "/v1/turns", 0
    for i, word in enumerate(words):
        turn = submitted(http, f"{nginx.url}{place}", "chat", word)
        place, count = f"/v1/sessions/{turn['session_id']}/turns", count + 1
        while turn["status"] not in ("succeeded", "failed"):
            turn = http.get(f"{nginx.url}/v1/turns/{turn['id']}?wait=30").json()
            count += 1
        assert turn["output"] == words[: i + 1]
    assert set(nginx.shares(count)) == set(replicas)


def test_an_event_stream_comes_at_once_and_can_be_resumed_at_another_replica(
    nginx_with: Start, fleet: Fleet, http: httpx.Client
) -> None:
    nginx = nginx_with("round_robin")
    turn = submitted(http, f"{nginx.url}/v1/turns", "gated", "stream")
    url = f"{nginx.url}/v1/turns/{turn['id']}/events"
    first = []
    with http.stream("GET", url, headers=STREAM) as stream:
        for frame in frames(stream):
            first.append(frame)
            if frame["event"] == "step.completed":  # the turn is at its gate now: nobody holds frames back
                break
    fleet.open_gate("stream")
    with http.stream("GET", url, headers=STREAM | {"Last-Event-ID": first[-1]["id"]}) as stream:
        rest = list(frames(stream))
    _, one, other = nginx.requests(3)
    ids = [int(frame["id"]) for frame in first[1:] + rest[1:-1]]
    assert ids == list(range(1, len(ids) + 1))
    assert (first[0]["event"], rest[0]["event"], rest[-1]["event"]) == ("open", "open", "done")
    assert one.asked != other.asked


STREAM = {"Accept": "text/event-stream"}


def frames(stream: httpx.Response) -> Iterator[dict[str, str]]:
    frame: dict[str, str] = {}
    for line in stream.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            frame[name] = value
        elif "event" in frame:
            yield frame
            frame = {}


def test_bodies_may_be_as_large_as_the_api_allows_and_no_larger(nginx_with: Start, http: httpx.Client) -> None:
    fields = Config.model_fields
    allowed = re.findall(r"client_max_body_size +(\d+)([mg]);", (FILES / "nginx.conf").read_text())
    sizes = [int(size) * {"m": 1024**2, "g": 1024**3}[unit] for size, unit in allowed]
    assert sizes == [fields[name].default for name in ("max_body", "max_batch_body", "max_artifact")]
    nginx, large = nginx_with("round_robin"), b"x" * (sizes[0] + 1)
    refused = http.post(f"{nginx.url}/v1/turns", content=large)
    kept = http.post(f"{nginx.url}/v1/artifacts?name=large", content=large)
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
    assert (kept.status_code, kept.json()["size"]) == (201, len(large))


def test_figures_of_the_fleet_are_not_for_everybody(nginx_with: Start, http: httpx.Client) -> None:
    nginx = nginx_with("round_robin")
    answer = http.get(f"{nginx.url}/metrics")
    [request] = nginx.requests(1)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert request.asked == ()


def test_workers_take_work_in_proportion_to_their_slots(nginx_with: Start, fleet: Fleet, http: httpx.Client) -> None:
    nginx = nginx_with("least_conn")
    lines = "\n".join(json.dumps({"agent": "gated", "input": "slots"}) for _ in range(16))
    batch = http.post(f"{nginx.url}/v1/batches", content=lines, headers={"Content-Type": "application/jsonl"}).json()
    turns = http.get(f"{nginx.url}/v1/turns", params={"batch_id": batch["id"], "limit": 100}).json()["data"]
    wait_until_sync(lambda: at_the_gate(fleet, *turns).total() >= 8, description="every slot is taken")
    taken = at_the_gate(fleet, *turns)
    fleet.open_gate("slots")
    ended = fleet.client.wait_batch(batch)
    pids = {process.name: process.pid for process in fleet.processes}
    assert taken == {pids["worker-2"]: 2, pids["worker-6"]: 6}
    assert {turn["status"] for turn in ended} == {"succeeded"}


# ------------------------------------------------------------------------------------------------ when a replica dies


def test_when_a_replica_dies_what_may_be_repeated_is_and_nothing_else_is_sent_twice(
    nginx_with: Start, fleet: Fleet, replicas: list[str], http: httpx.Client, ask: Ask
) -> None:
    """The last one here: it leaves two replicas."""
    nginx, dying = nginx_with("round_robin"), replicas[2]
    victim = next(process for process in fleet.processes if f'"port": {dying.split(":")[1]}' in process.log())
    victim.pause()  # it takes what it is sent, and does nothing with it
    url = f"{nginx.url}/v1/turns"
    reads = [ask("GET", url) for _ in replicas]
    wait_until_sync(lambda: sum(read.done() for read in reads) == 2, description="two replicas have answered")
    posts = {key: post(ask, url, key) for key in ("a", "b", "c")}
    wait_until_sync(lambda: sum(sent.done() for sent in posts.values()) == 2, description="two replicas have answered")
    victim.kill()
    assert [read.result(30).status_code for read in reads] == [200] * 3
    [lost] = [key for key, sent in posts.items() if sent.result(30).status_code != 202]
    told = posts[lost].result()
    assert (told.status_code, told.json()["status"], told.json()["retryable"]) == (502, 502, True)
    assert [request.asked[0][0] for request in nginx.requests(6) if len(request.asked) > 1] == [dying]  # of the reads
    afresh = nginx_with("round_robin")  # which has not heard of the death
    again = {key: post(ask, f"{afresh.url}/v1/turns", key) for key in (lost, "d", "e")}
    assert [sent.result(30).status_code for sent in again.values()] == [202] * 3
    [passed_on] = [request for request in afresh.requests(3) if len(request.asked) > 1]
    assert passed_on.asked[0] == (dying, 0)
    assert len(http.get(f"http://{replicas[0]}/v1/turns?agent=noop&limit=100").json()["data"]) == 5


def post(ask: Ask, url: str, key: str) -> Future[httpx.Response]:
    body = {"agent": "noop", "input": 1}
    return ask("POST", url, json=body, headers={"Idempotency-Key": key})
